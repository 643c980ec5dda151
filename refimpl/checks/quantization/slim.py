"""The check of SLiM (quantization spec, section 18; arXiv 2410.09615)."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require

IMPLEMENTATION = {"slim": "refimpl.quantization.slim:SLiM"}
ROWS, COLUMNS, TOKENS, RANK = 64, 128, 200, 16


@check
def check_slim(SLiM: Callable) -> None:
    """`SLiM(bits, sparsity=, rank=, adapters=, recompute=, adapter_bits=, tile=)`, called (name, W, stats) ->
    a layer with `weight` and `nbytes()`; `stats.sqnorm` are sums of squared inputs."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(2, ROWS, COLUMNS, generator=generator).prod(0) * 0.1  # heavy tails: clipping pays
    X = torch.randn(TOKENS, COLUMNS, generator=generator) * torch.linspace(0.4, 3, COLUMNS)
    X[:, 9] = 0  # an input that never occurred
    x = X.double()
    stats = SimpleNamespace(
        H=2 / TOKENS * x.T @ x, absmax=x.abs().amax(0), absmean=x.abs().mean(0), sqnorm=x.square().sum(0),
        tokens=TOKENS, X=None,
    )  # fmt: skip
    n = stats.sqnorm + stats.sqnorm[stats.sqnorm > 0].min()
    size = n.sqrt()
    plain = {"rank": 0, "adapter_bits": None}
    # The histogram's error model counts 2^(b-1) steps up to the clipping point, the grid has one less.
    for bits, slack in ((3, 1.25), (4, 1.1)):
        found = SLiM(bits, sparsity="none", **plain)("fc", W, stats).weight
        best, largest = _least_error(W, bits)
        lost = float((found - W).square().mean())
        require(len(found.unique()) <= 2**bits, f"{bits} bits: {len(found.unique())} different weights")
        found_how = f"{bits} bits: mean squared error {lost:.3g}; the best clipping point has {best:.3g}"
        require(lost <= slack * best, f"{found_how}, no clipping {largest:.3g}")
    for sparsity in ("2:4", "half"):
        base = SLiM(4, sparsity=sparsity, **plain)("fc", W, stats).weight
        keep = _keep(W, size, sparsity)
        require(not bool(base[~keep].any()), f"{sparsity}: weights that Wanda drops are not 0")
        E = (W - base).double()
        for adapters, metric in (("slim", size), ("naive", torch.ones(COLUMNS).double())):
            what = f"{sparsity}, {adapters} adapters"
            settings = {"sparsity": sparsity, "rank": RANK / ROWS, "adapters": adapters, "adapter_bits": None}
            U, sigma, Vt = torch.linalg.svd(E * metric, full_matrices=False)
            LR = (U[:, :RANK] * sigma[:RANK]) @ (Vt[:RANK] / metric)
            layer = SLiM(4, recompute=False, **settings)("fc", W, stats)
            _near(layer.weight - base, LR, 2e-3, f"{what}, before step 4: L R")
            left = float(((W - layer.weight).double() * metric).norm())
            bound = float(sigma[RANK:].square().sum().sqrt())
            require(
                abs(left / bound - 1) < 1e-3,
                f"{what}, before step 4: the weighted error is {left:.4g}, not {bound:.4g}",
            )
            again = SLiM(4, recompute=True, **settings)("fc", W, stats)
            rest = again.weight.double() - LR
            dropped = float(rest[~keep].norm() / LR.norm())
            require(dropped < 2e-3, f"{what}: after step 4 the mask is another one")
            moved = float((rest - base)[keep].norm() / base.norm())
            require(moved > 0.02, f"{what}: step 4 changes the compressed weight by {moved:.1%} only")
            # Beyond rank 0 the weight is no smooth density any more: the histogram's choice gets worse.
            error, best = float((rest - (W - LR))[keep].square().mean()), _least_error((W - LR)[keep], 4)[0]
            require(
                error < 1.5 * best, f"{what}: step 4 rounds W - L R with error {error:.3g}, not {best:.3g}"
            )
    layer = SLiM(4, rank=RANK / ROWS, adapter_bits=8, tile=16)("fc", W, stats)
    full = SLiM(4, rank=RANK / ROWS, adapter_bits=None)("fc", W, stats)
    _near(layer.weight, full.weight, 0.02, "adapters in 8 bits: the weight")
    adapters = RANK * (ROWS + COLUMNS)
    wanted = W.numel() * 3 // 8 + 2 + adapters + adapters // 16 * 2
    require(
        wanted <= layer.nbytes() <= wanted + 8,
        f"{layer.nbytes()} bytes stored; 2:4 positions, 4-bit codes and 8-bit adapters take {wanted}",
    )


def _least_error(W: Tensor, bits: int) -> tuple[float, float]:
    """The mean squared error of rounding with the best clipping point, of 400, and with none."""
    top, found = 2 ** (bits - 1) - 1, []
    for i in range(1, 401):
        step = W.abs().max() * i / 400 / top
        found.append(float(((W / step).round().clamp(-top - 1, top) * step - W).square().mean()))
    return min(found), found[-1]


def _keep(W: Tensor, size: Tensor, sparsity: str) -> Tensor:
    groups = (W.abs() * size).view(ROWS, -1, 4 if sparsity == "2:4" else COLUMNS)
    return (groups > groups.median(-1, keepdim=True).values).view(W.shape)


def _near(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    require(found.shape == expected.shape, f"{what}: shape {list(found.shape)}, not {list(expected.shape)}")
    off = float((found.double() - expected).norm() / expected.norm())
    require(off < tolerance, f"{what} is {off:.2%} off, where {tolerance:.1%} is allowed")
