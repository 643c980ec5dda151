"""The check of HWPQ as reconstructed here (quantization spec, section 17; arXiv 2501.16376)."""

from collections.abc import Callable
from math import floor, log2
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"hwpq": "refimpl.quantization.hwpq:HWPQ"}
ROWS, COLUMNS = 12, 64


@check
def check_hwpq(HWPQ: Callable) -> None:
    """`HWPQ(sparsity, fp8=, beta=)(name, W, stats)` -> layer with `weight`, `nbytes()`; of the statistics
    only `sqnorm` [d_in] is there."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    W *= torch.linspace(0.2, 3, ROWS)[:, None]
    # A few inputs hold most of the power, so that 1 - x^2 / S is far from 1.
    sqnorm = torch.rand(COLUMNS, generator=generator, dtype=torch.float64)
    sqnorm[[3, 20, 41]] *= 30
    stats = SimpleNamespace(sqnorm=sqnorm)
    L = 0.5 * W**2 * (1 - sqnorm / sqnorm.sum())
    for sparsity in (0.5, 0.7):
        for beta in (0.9, 0.99):
            what = f"sparsity {sparsity}, beta {beta}"
            found = HWPQ(sparsity, fp8=False, beta=beta)("fc", W, stats).weight
            _compare(found, _ewma(L, sparsity, beta), W, f"{what}: mu + kappa sigma of the moving averages")
    pairs = torch.zeros_like(W, dtype=torch.bool)
    for row, four in torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLUMNS // 4)).tolist():
        best = L[row, 4 * four : 4 * four + 4].argsort()[2:]
        pairs[row, 4 * four + best] = True
    _compare(HWPQ("2:4", fp8=False)("fc", W, stats).weight, pairs, W, "2:4: the two largest L of four")
    layer = HWPQ("2:4", fp8=True)("fc", W, stats)
    expected = _fp8(W * pairs)
    require_close(layer.weight.double(), expected, 1e-5, "2:4 in FP8, e4m3, absmax of the row at 448: W^")
    size = layer.nbytes() * 8 / W.numel()
    require(size <= 5 + 32 / COLUMNS, f"2:4 in FP8 takes 1 + 8 / 2 bits and a scale per row, not {size:.3f}")
    require_close(
        HWPQ(0, fp8=True)("fc", W, stats).weight.double(), _fp8(W), 1e-5, "no sparsity: FP8 of all weights"
    )
    wide = torch.randn(2, 1024, generator=generator)
    with _Largest() as largest:
        HWPQ(0.5, fp8=True)("fc", wide, SimpleNamespace(sqnorm=torch.rand(1024, generator=generator)))
    require(
        largest.numel <= 16 * wide.numel(),
        f"a tensor of {largest.numel} numbers was made for W [2, 1024]: memory must not grow with d_in^2",
    )


def _compare(weight: Tensor, keep: Tensor, W: Tensor, what: str) -> None:
    require(weight.shape == W.shape, f"{what}: W^ must have the shape of W")
    wrong = int(((weight != 0) != keep).sum())
    require(wrong == 0, f"{what}: {wrong} of {W.numel()} weights are kept or left out that should not be")
    require_close(weight.double(), (W * keep).half().double(), 1e-6, f"{what}: what is kept, as float16")


def _ewma(L: Tensor, sparsity: float, beta: float) -> Tensor:
    score = torch.zeros_like(L)
    for i, row in enumerate(L.tolist()):
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        for j, value in enumerate(row):
            mean = beta * mean + (1 - beta) * value
            variance = beta * variance + (1 - beta) * (value - mean) ** 2
            score[i, j] = (value - mean) / variance**0.5
    kappa = score.flatten().sort().values[floor(L.numel() * sparsity)]
    return score >= kappa


def _fp8(W: Tensor) -> Tensor:
    """Round to e4m3: 4 bits of significand, down to 2^-6 with a step of 2^-9 below."""
    scale = (W.abs().amax(1, keepdim=True).float() / 448).double()
    values = (W / scale).float().double()
    exponents = values.abs().clamp_min(2.0**-6).apply_(lambda v: floor(log2(v)))
    step = 2.0 ** (exponents - 3)
    return ((values / step).round() * step).clamp(-448, 448) * scale


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return result
