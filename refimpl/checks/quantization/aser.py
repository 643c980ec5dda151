"""The check of ASER (quantization spec, section 13; arXiv 2411.07762)."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require

IMPLEMENTATION = {"aser": "refimpl.quantization.aser:ASER"}
ROWS, COLUMNS, TOKENS, OUTLIERS = 24, 48, 300, (7, 20, 41)


@check
def check_aser(ASER: Callable) -> None:
    """`ASER(rank=, outliers=, activation_bits=)`, called as `(name, W, stats)` -> a layer with `weight`,
    `nbytes()` and a forward pass; its base is rounding, 4 bits, symmetric, a scale per row."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, COLUMNS, generator=generator)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) / torch.linspace(1, 9, COLUMNS)[:, None]
    X = torch.randn(TOKENS, COLUMNS, generator=generator) @ mix
    X[:, OUTLIERS] *= torch.tensor([40.0, 15.0, 25.0])
    x = X.double()
    stats = SimpleNamespace(
        H=2 / TOKENS * x.T @ x, absmax=x.abs().amax(0), absmean=x.abs().mean(0), sqnorm=x.square().sum(0),
        tokens=TOKENS, X=None,
    )  # fmt: skip
    for rank, f, bits in ((8, 3, None), (8, 3, 8), (8, 3, 6), (0.5, 3, 8), (5, 0, 8), (0, 0, 6)):
        what = f"rank {rank}, {f} outlier channels, activations in {bits or 'all'} bits"
        layer = ASER(rank=rank, outliers=f, activation_bits=bits)("fc", W, stats)
        m, Q, LR, r = _reference(W, stats, rank, f)
        _near(layer.weight, (Q + LR) / m, f"{what}: the weight for inputs that are not smoothed")
        smooth = (X / m).float()
        if bits:
            steps = smooth.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            smooth = (smooth / steps).round() * steps
        y = smooth.double() @ (Q + LR).double().T
        _near(layer(X), y, f"{what}: the output, activations rounded after smoothing, for each token")
        wanted = W.numel() // 2 + 2 * ROWS + 2 * r * (ROWS + COLUMNS) + 4 * f
        require(
            wanted <= layer.nbytes() <= wanted + 4,
            f"{what}: {layer.nbytes()} bytes stored; codes, scales, factors of rank {r} in 16 bits and the "
            f"outliers' numbers and factors take {wanted}",
        )


def _reference(W: Tensor, stats: SimpleNamespace, rank: float, f: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """m, Q(W_s), L R and r by the paper's formulas: L = U_r Sigma_r, R = V_r' S^-1."""
    m = torch.ones(COLUMNS)
    chosen = (stats.absmean * W.abs().double().mean(0)).argsort(descending=True)[:f]
    if f:
        m[chosen] = (stats.absmean[chosen] / stats.absmean[chosen].min()).half().float()
    smoothed = W * m
    rest = smoothed.clone()
    rest[:, chosen] = 0
    scale = (rest.abs().amax(1, keepdim=True) / 7).half().float()
    Q = (rest / scale).round().clamp(-7, 7) * scale
    H = stats.H / torch.outer(m, m)
    S = torch.linalg.cholesky(H + 1e-6 * H.diagonal().mean() * torch.eye(COLUMNS))
    U, sigma, Vt = torch.linalg.svd((smoothed - Q).double() @ S, full_matrices=False)
    r = rank
    if 0 < rank < 1:
        share = sigma.cumsum(0) / sigma.sum()
        r = int((share < rank).sum()) + 1
    LR = (U[:, :r] * sigma[:r]) @ torch.linalg.solve(S.T, Vt[:r].T).T
    return m, Q, LR, r


def _near(found: Tensor, expected: Tensor, what: str) -> None:
    require(found.shape == expected.shape, f"{what}: shape {list(found.shape)}, not {list(expected.shape)}")
    off = float((found.double() - expected).norm() / expected.norm())
    require(off < 2e-3, f"{what}: it is {off:.2%} off the paper's, where 16-bit factors allow 0.2 %")
