"""The check of QuIP# (quantization spec, section 10; arXiv 2402.04396)."""

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close
from refimpl.checks.quantization.rotations import problem, require_layer, schur, transform_matrix

IMPLEMENTATION = {"quip_sharp": "refimpl.quantization.quip:QuIPSharp"}
ROWS, COLUMNS = 24, 32
RMS, RESIDUAL = 1.03, 3.45
NORM_12 = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045 067 057 047"
)
NORM_12 += " 056 046 014 237"


@check
def check_quip_sharp(QuIPSharp: Callable) -> None:
    """`QuIPSharp(bits)(name, weight, stats)` -> layer; `layer.transforms()` -> (L, R), `rotated()` -> W'."""
    W, X, H = problem(ROWS, COLUMNS)
    points = _points()
    for bits in (2, 4):
        what = f"{bits} bits"
        layer = QuIPSharp(bits)("fc", W, SimpleNamespace(H=H))
        L, R = (_matrix(t, n, what) for t, n in zip(layer.transforms(), (ROWS, COLUMNS), strict=True))
        rotated = L @ W.double() @ R.T
        scale = rotated.square().mean().sqrt() / RMS
        quantized = _ldlq(rotated / scale, R @ H @ R.T, points, bits) * scale
        expected = L.T @ quantized @ R
        limit = bits + (ROWS + COLUMNS + 48) / (ROWS * COLUMNS)  # signs, a scale, a half-filled unit
        require_layer(layer, W, expected, X, H, limit, "QuIP#", what)
        require_close(layer.rotated(), quantized, 1e-3, f"{what}: W'")


def _matrix(transform: Callable, n: int, what: str) -> Tensor:
    """The matrix of a randomized Hadamard transform of rows."""
    M = transform_matrix(transform, n, what)
    require_close(
        M.abs() * n**0.5, torch.ones(n, n).double(), 1e-5, f"{what}: magnitudes of the transform of {n}"
    )
    random = M[:, 0] * M[0, 0] < 0, M[0] * M[0, 0] < 0
    require(
        bool(random[0].any() or random[1].any()), f"{what}: the transform of {n} numbers has no random signs"
    )
    return M


def _points() -> Tensor:
    """All 65 536 points of E8P, from its definition."""
    table = [p for p in product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in p) <= 10]
    table += [tuple(0.5 if str(i) in halves else 1.5 for i in range(8)) for halves in NORM_12.split()]
    signs = torch.tensor(list(product((1.0, -1.0), repeat=8)), dtype=torch.float64)
    signed = (torch.tensor(table, dtype=torch.float64)[:, None] * signs).view(-1, 8)
    even = signed[signed.sum(1) % 2 == 0]
    return torch.cat((even + 0.25, even - 0.25))


def _ldlq(W: Tensor, H: Tensor, points: Tensor, bits: int) -> Tensor:
    """From the last block of eight columns to the first; every point is looked at."""
    Q, half = torch.zeros_like(W), points.square().sum(1) / 2
    nearest = lambda x: points[(x @ points.T - half).argmax(1)]
    for a in reversed(range(0, COLUMNS, 8)):
        b, C = a + 8, schur(H, a)
        target = W[:, a:b] + (W[:, b:] - Q[:, b:]) @ C[b:, a:b] @ torch.linalg.inv(C[a:b, a:b])
        Q[:, a:b] = nearest(target)
        if bits == 4:
            Q[:, a:b] += nearest((target - Q[:, a:b]) * RESIDUAL) / RESIDUAL
    return Q
