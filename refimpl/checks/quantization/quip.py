"""The check of QuIP (quantization spec, section 10; arXiv 2307.13304)."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require
from refimpl.checks.quantization.rotations import problem, require_layer, schur, transform_matrix

IMPLEMENTATION = {"quip": "refimpl.quantization.quip:QuIP"}
ROWS, COLUMNS = 24, 36
REACH = 2.4


@check
def check_quip(QuIP: Callable) -> None:
    """`QuIP(bits, rescale=)(name, weight, stats)` -> layer, from stats.H; `layer.transforms()` -> (L, R)."""
    W, X, H = problem(ROWS, COLUMNS)
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
        limit = bits + 16 / ROWS * rescale + 200 / (ROWS * COLUMNS)  # s, a seed, a range, a half-filled unit
        require_layer(layer, W, expected, X, H, limit, "QuIP", what)


def _matrix(transform: Callable, n: int, what: str) -> Tensor:
    """The matrix of a transform of rows, which must be no permutation."""
    M = transform_matrix(transform, n, what)
    require(float(M.abs().max()) < 0.999, f"{what}: a transform of {n} numbers leaves one of them alone")
    return M


def _rescaling(W: Tensor, H: Tensor) -> Tensor:
    """(H_jj / |W_j|^2)^(1/4), geometric mean 1, in 16 bits."""
    s = (H.diagonal() / W.double().square().sum(0)).pow(0.25)
    return (s / s.log().mean().exp()).half().double()


def _ldlq(W: Tensor, H: Tensor, bits: int) -> Tensor:
    """From the last column to the first, the factor of H by elimination."""
    r = REACH * W.square().mean().sqrt()
    W, Q, step = W.clamp(-r, r), torch.zeros_like(W), 2 * r / (2**bits - 1)
    for k in reversed(range(COLUMNS)):
        C = schur(H, k)  # M_jk = C_jk / C_kk
        target = W[:, k] + (W[:, k + 1 :] - Q[:, k + 1 :]) @ (C[k + 1 :, k] / C[k, k])
        Q[:, k] = ((target + r) / step).round().clamp(0, 2**bits - 1) * step - r
    return Q
