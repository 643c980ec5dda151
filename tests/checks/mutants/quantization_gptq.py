"""Plausible but wrong GPTQ that its check must reject."""

import torch

from refimpl.quantization.feedback import inverse_factor
from refimpl.quantization.gptq import GPTQ
from refimpl.quantization.grids import Grid, Quantized, dequantize


class Off(GPTQ):
    """Rounding to nearest."""

    def solve(self, W, H):
        return self.quantize(W)


class NoDamping(GPTQ):
    def solve(self, W, H):
        return GPTQ(self.bits, self.scheme, self.group, act_order=self.act_order, damp=1e-6).solve(W, H)


class GroupsFromTheStart(GPTQ):
    """With groups all scales come from the original weight."""

    def solve(self, W, H):
        if self.act_order:
            return super().solve(W, H)
        return _by_hand(self, W, H, self.fit(W), torch.arange(W.shape[1]))


class GroupsInProcessingOrder(GPTQ):
    """Columns are permuted, groups are formed of them as they come, and nobody remembers which."""

    def solve(self, W, H):
        if not self.act_order:
            return super().solve(W, H)
        order = H.diagonal().argsort(descending=True)
        codes, scale, zero = GPTQ(self.bits, self.scheme, self.group).solve(W[:, order], H[order][:, order])
        return Quantized(codes[:, order.argsort()], scale, zero)


class ErrorNotDivided(GPTQ):
    """The error is spread by the row of U as it is, without the division by U_jj."""

    def solve(self, W, H):
        return _by_hand(self, W, H, self.fit(W), torch.arange(W.shape[1]), divide=False)


class DeadColumnsRounded(GPTQ):
    def solve(self, W, H):
        H = H.clone()
        H.diagonal()[H.diagonal() == 0] = 1e-9
        return super().solve(W, H)


def _by_hand(self, W, H, fitted, order, divide=True):
    U, W = inverse_factor(H, self.damp), W.double().clone()
    scale, zero = fitted
    grid, width = Grid(self.bits, self.scheme), W.shape[1] // scale.shape[1]
    codes = torch.zeros(W.shape, dtype=torch.uint8)
    for j in order.tolist():
        s, z = (t[:, [j // width]] for t in (scale, zero))
        codes[:, [j]] = grid.encode(W[:, [j]], s, z)
        error = W[:, [j]] - dequantize(Quantized(codes[:, [j]], s.double(), z))
        W[:, j + 1 :] -= error / (U[j, j] if divide else 1) * U[j, j + 1 :]
    return Quantized(codes, scale, zero)


MUTANTS = [
    ("gptq", "no feedback: rounding to nearest", Off),
    ("gptq", "no damping", NoDamping),
    ("gptq", "with groups all scales come from the original weight", GroupsFromTheStart),
    ("gptq", "groups of permuted columns without their index", GroupsInProcessingOrder),
    ("gptq", "the error is not divided by U_jj", ErrorNotDivided),
    ("gptq", "weights of dead inputs are rounded, not dropped", DeadColumnsRounded),
]
