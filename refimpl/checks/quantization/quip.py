"""The check of QuIP (quantization spec, section 10; arXiv 2307.13304)."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"quip": "refimpl.quantization.quip:QuIP"}
ROWS, COLUMNS = 24, 36
DAMP, REACH = 0.01, 2.4


@check
def check_quip(QuIP: Callable) -> None:
    """`QuIP(bits, rescale=)(name, weight, stats)` -> layer, from stats.H; `layer.transforms()` -> (L, R)."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, COLUMNS, generator=generator)
    W[:, 3] *= 8
    mix = torch.randn(6, COLUMNS, generator=generator)
    X = torch.randn(300, 6, generator=generator) @ mix + 0.2 * torch.randn(300, COLUMNS, generator=generator)
    H = 2 / len(X) * X.double().T @ X.double()
    for bits, rescale in ((2, False), (3, False), (3, True)):
        what = f"{bits} bits, rescale={rescale}"
        layer = QuIP(bits, rescale=rescale)("fc", W, SimpleNamespace(H=H))
        L, R = (_matrix(t, n, what) for t, n in zip(layer.transforms(), (ROWS, COLUMNS), strict=True))
        s = _rescaling(W, H) if rescale else torch.ones(COLUMNS).double()
        rotated = L @ (W.double() * s) @ R.T
        spread = float(rotated.abs().max() / rotated.square().mean().sqrt())
        before = float(W.abs().max() / W.square().mean().sqrt())
        require(
            spread < 0.75 * before, f"{what}: mu is {before:.2f} before and {spread:.2f} after the transforms"
        )
        expected = L.T @ _ldlq(rotated, R @ (H / torch.outer(s, s)) @ R.T, bits) @ R / s
        found = layer.weight.double()
        errors = [float((((W - Q) @ H) * (W - Q)).sum()) for Q in (found, expected)]
        require_close(
            found, expected, 1e-3, f"{what}: loss {errors[0]:.4g} where QuIP has {errors[1]:.4g}; W^"
        )
        require_close(layer(X[:5]), X[:5] @ layer.weight.T, 1e-3, f"{what}: outputs and x W^'")
        extra = 16 / ROWS * rescale + 200 / (ROWS * COLUMNS)  # and a seed, a range, a half-filled unit
        limit = bits + extra
        require(layer.bits_per_weight <= limit, f"{what}: {layer.bits_per_weight:.3f} bits, over {limit:.3f}")


def _matrix(transform: Callable, n: int, what: str) -> Tensor:
    """The matrix of a transform of rows, which must be orthogonal and no permutation."""
    M = transform(torch.eye(n, dtype=torch.float64)).T
    require_close(M @ M.T, torch.eye(n).double(), 1e-5, f"{what}: transform times its transpose")
    require(float(M.abs().max()) < 0.999, f"{what}: a transform of {n} numbers leaves one of them alone")
    return M


def _rescaling(W: Tensor, H: Tensor) -> Tensor:
    """(H_jj / |W_j|^2)^(1/4), geometric mean 1, in 16 bits."""
    s = (H.diagonal() / W.double().square().sum(0)).pow(0.25)
    return (s / s.log().mean().exp()).half().double()


def _ldlq(W: Tensor, H: Tensor, bits: int) -> Tensor:
    """From the last column to the first, the factor of H by elimination."""
    H = H + DAMP * H.diagonal().mean() * torch.eye(COLUMNS)
    r = REACH * W.square().mean().sqrt()
    W, Q, step = W.clamp(-r, r), torch.zeros_like(W), 2 * r / (2**bits - 1)
    for k in reversed(range(COLUMNS)):
        # M_jk = (C_jk / C_kk) of the Schur complement C of the columns before k.
        C = H.clone()
        if k:
            C -= H[:, :k] @ torch.linalg.solve(H[:k, :k], H[:k])
        target = W[:, k] + (W[:, k + 1 :] - Q[:, k + 1 :]) @ (C[k + 1 :, k] / C[k, k])
        Q[:, k] = ((target + r) / step).round().clamp(0, 2**bits - 1) * step - r
    return Q
