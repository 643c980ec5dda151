"""Plausible but wrong SparseGPT that its check must reject."""

import torch

from refimpl.quantization.feedback import inverse_factor
from refimpl.quantization.pruning.sparsegpt import Pruned, SparseGPT
from refimpl.quantization.pruning.unstructured import highest
from refimpl.quantization.sparse import n_m_mask


class NoUpdate(SparseGPT):
    """The mask of SparseGPT, the weights as they were."""

    def solve(self, W, H):
        result = super().solve(W, H)
        return result._replace(Q=W.double() * result.keep)


class WholeRowOfBlocks(SparseGPT):
    """One mask for all columns at once, from the original weights."""

    def solve(self, W, H):
        U = inverse_factor(H, self.damp)
        return _by_hand(self, W, H, self._select((W.double() / U.diagonal()).square()))


class ByMagnitude(SparseGPT):
    """The mask of the largest weights, the update of SparseGPT."""

    def _select(self, score):
        return super()._select(score * self._price[: score.shape[1]])

    def solve(self, W, H):
        object.__setattr__(self, "_price", inverse_factor(H, self.damp).diagonal().square())
        return super().solve(W, H)


class RowByRow(SparseGPT):
    """The share holds in each row of the block."""

    def _select(self, score):
        return n_m_mask(score, *self.pattern) if self.pattern else highest(score, self.sparsity)


class PatternFromTheStart(SparseGPT):
    """n:m of the original weights."""

    def solve(self, W, H):
        if not self.pattern:
            return super().solve(W, H)
        U = inverse_factor(H, self.damp)
        return _by_hand(self, W, H, n_m_mask((W.double() / U.diagonal()).square(), *self.pattern))


class OneMore(SparseGPT):
    """Everything up to and with the threshold of the block goes."""

    def _select(self, score):
        if self.pattern:
            return super()._select(score)
        return score > score.flatten().sort().values[int(score.numel() * self.sparsity)]


class NoDamping(SparseGPT):
    def solve(self, W, H):
        return SparseGPT(self.sparsity, self.dtype, damp=1e-6).solve(W, H)


def _by_hand(self, W, H, keep):
    U, W = inverse_factor(H, self.damp), W.double().clone()
    Q = torch.zeros_like(W)
    for j in range(W.shape[1]):
        Q[:, j] = W[:, j] * keep[:, j]
        W[:, j:] -= ((W[:, j] - Q[:, j]) / U[j, j])[:, None] * U[j, j:]
    return Pruned(Q, keep, None, 0.0)


MUTANTS = [
    ("sparsegpt", "no update of the weights", NoUpdate),
    ("sparsegpt", "one mask for all blocks", WholeRowOfBlocks),
    ("sparsegpt", "the mask of the largest weights", ByMagnitude),
    ("sparsegpt", "the share holds in each row", RowByRow),
    ("sparsegpt", "n:m of the weights before their update", PatternFromTheStart),
    ("sparsegpt", "the threshold itself goes as well", OneMore),
    ("sparsegpt", "no damping", NoDamping),
]
