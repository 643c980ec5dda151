"""The check of GPTQ (quantization spec, section 6; arXiv 2210.17323)."""

from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"gptq": "refimpl.quantization.gptq:GPTQ"}
ROWS, COLUMNS, GROUP = 12, 32, 8
DAMP = 0.01


@check
def check_gptq(GPTQ: Callable) -> None:
    """`GPTQ(bits, scheme, group=, act_order=)` with `solve(W, H)` -> (codes, scale, zero); damping 0.01."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    mix = torch.randn(6, COLUMNS, generator=generator, dtype=torch.float64)
    X = torch.randn(300, 6, generator=generator, dtype=torch.float64) @ mix
    X += 0.2 * torch.randn(300, COLUMNS, generator=generator, dtype=torch.float64)
    X *= torch.linspace(0.3, 1.5, COLUMNS, dtype=torch.float64)  # so that act-order is not the given order
    H = 2 / len(X) * X.T @ X
    before = W.clone(), H.clone()
    for bits in (2, 3, 4):
        for group in (COLUMNS, GROUP):
            for act_order in (False, True):
                what = f"{bits} bits, group {group}, act_order={act_order}"
                solver = GPTQ(bits, "asymmetric", group=group, act_order=act_order)
                Q = _restored(*solver.solve(W, H), what)
                untouched = torch.equal(W, before[0]) and torch.equal(H, before[1])
                require(untouched, f"{what}: W or H was changed")
                expected = _reference(W, H, bits, group, act_order)
                error, reference = (float((((W - q) @ H) * (W - q)).sum()) for q in (Q, expected))
                found = f"output error {error:.4g} where GPTQ has {reference:.4g}"
                require_close(Q, expected, 1e-6, f"{what}: {found}; the matrix")
    # Inputs that do not correlate leave nothing to make up for.
    plain = _restored(*GPTQ(3, "asymmetric", group=GROUP).solve(W, torch.eye(COLUMNS) * 2), "diagonal H")
    require_close(plain, _rounded(W, *_grid(W, 3)), 1e-6, "diagonal H: rounding to nearest")
    dead = H.clone()
    dead[5], dead[:, 5] = 0, 0
    column = _restored(*GPTQ(3, "asymmetric", group=COLUMNS).solve(W, dead), "a dead input")[:, 5]
    require_close(column, torch.zeros(ROWS).double(), 0, "an input that never occurred: its weights")


def _reference(W: Tensor, H: Tensor, bits: int, group: int, act_order: bool) -> Tensor:
    """GPTQ without a Cholesky factor: the inverse of what is left of H, at every column."""
    H = H + DAMP * H.diagonal().mean() * torch.eye(COLUMNS)
    order = H.diagonal().argsort(descending=True) if act_order else torch.arange(COLUMNS)
    W, Q = W.clone(), torch.zeros_like(W)
    scale, zero = _grid(W, bits, group)
    for i, j in enumerate(order.tolist()):
        if not act_order and group < COLUMNS and j % group == 0:
            s, z = _grid(W[:, j : j + group], bits, group)
            scale[:, j : j + group], zero[:, j : j + group] = s, z
        left = order[i:]
        inverse = torch.linalg.inv(H[left][:, left])
        Q[:, j] = _rounded(W[:, [j]], scale[:, [j]], zero[:, [j]], bits)[:, 0]
        W[:, left] -= ((W[:, j] - Q[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return Q


def _grid(W: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Asymmetric scale and zero point of every weight, groups along the rows; scales of 16 bits."""
    groups = W.view(len(W), -1, group)
    lo, hi = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((hi - lo) / (2**bits - 1)).half().double()
    zero = (-lo / scale).round()
    return scale.repeat_interleave(group, 1), zero.repeat_interleave(group, 1)


def _rounded(W: Tensor, scale: Tensor, zero: Tensor, bits: int = 3) -> Tensor:
    return (((W / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


def _restored(codes: Tensor, scale: Tensor, zero: Tensor, what: str) -> Tensor:
    require(tuple(codes.shape) == (ROWS, COLUMNS), f"{what}: codes have shape {list(codes.shape)}")
    groups = codes.view(ROWS, scale.shape[1], -1).double()
    return ((groups - zero[..., None].double()) * scale[..., None].double()).view(ROWS, COLUMNS)
