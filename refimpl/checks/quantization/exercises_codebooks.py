"""Checks for the exercises of the notebook on two bits and codebooks."""

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close


@check
def check_codebook_bits(codebook_bits: Callable[[int, int, int, int, int], float]) -> None:
    """`codebook_bits(bits, v, rows, columns, entry_bits)`: stored bits per weight, codebook included."""
    for bits, v, rows, columns, entry in ((2, 2, 64, 128, 8), (2, 4, 256, 768, 16), (3, 1, 16, 16, 16)):
        got, where = codebook_bits(bits, v, rows, columns, entry), f"{bits} bits, v = {v}, {rows} x {columns}"
        vectors = rows * columns // v
        total = vectors * (bits * v) + 2 ** (bits * v) * v * entry
        require(not math.isclose(got, bits), f"{where}: {got:.4f}, the codebook itself is missing")
        one_number = bits + 2 ** (bits * v) * entry / (rows * columns)
        require(
            v == 1 or not math.isclose(got, one_number), f"{where}: an entry of the codebook has {v} numbers"
        )
        require(math.isclose(got, total / (rows * columns)), f"{where}: {got:.4f} bits per weight")


@check
def check_walsh_hadamard(walsh_hadamard: Callable[[Tensor], Tensor]) -> None:
    """`walsh_hadamard(x)`: the orthogonal transform of x [n], n a power of two, in Sylvester's order."""
    for n in (1, 2, 4, 8, 32):
        matrix = [[(-1) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
        for seed in range(2):
            x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
            before = x.clone()
            got = walsh_hadamard(x)
            require(torch.equal(x, before), f"n = {n}: x was changed")
            require(tuple(got.shape) == (n,), f"n = {n}: the result has shape {list(got.shape)}")
            length = float(got.norm() / x.norm())
            require(abs(length - 1) < 1e-4, f"n = {n}: the length of x was multiplied by {length:.3f}")
            expected = torch.tensor(matrix, dtype=x.dtype) @ x / n**0.5
            require_close(got, expected, 1e-5, f"n = {n}: the transform")


@check
def check_best_pair(best_pair: Callable[[Tensor, Tensor, Tensor], tuple[int, int]]) -> None:
    """`best_pair(x, A, B)`: indices (i, j) with the least |x - A_i - B_j|^2; x [v], A and B [K, v]."""
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        x, A, B = (torch.randn(*shape, generator=draw) for shape in ((4,), (8, 4), (8, 4)))
        i, j = best_pair(x, A, B)
        errors = [[float((x - a - b).square().sum()) for b in B] for a in A]
        least = min(min(row) for row in errors)
        found = errors[int(i)][int(j)]
        require(
            found <= least + 1e-6, f"pair ({int(i)}, {int(j)}) has error {found:.3f}, the best {least:.3f}"
        )


@check
def check_incoherence_mu(incoherence_mu: Callable[[Tensor], float]) -> None:
    """`incoherence_mu(W)`: max |W_ij| sqrt(m n) / ||W||_F for W [m, n]."""
    for m, n in ((4, 8), (16, 16), (3, 5)):
        W = torch.randn(m, n, generator=torch.Generator().manual_seed(m))
        W[1, 2] = -9.0
        total = sum(float(w) ** 2 for w in W.flatten())
        expected = 9.0 * math.sqrt(m * n) / math.sqrt(total)
        got = float(incoherence_mu(W))
        require(math.isclose(got, expected, rel_tol=1e-4), f"{m} x {n}: {got:.4f} instead of {expected:.4f}")


@check
def check_best_signs(best_signs: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`best_signs(y, s)`: the point with sizes s [8], in halves, and an even sum that is nearest to y [8]."""
    every = torch.tensor(list(product((1.0, -1.0), repeat=8)))
    for seed in range(24):
        draw = torch.Generator().manual_seed(seed)
        y, s = 2 * torch.randn(8, generator=draw), torch.randint(0, 3, (8,), generator=draw) + 0.5
        kept = y.clone(), s.clone()
        got, points = best_signs(y, s), every * s
        require(torch.equal(y, kept[0]) and torch.equal(s, kept[1]), "y or s was changed")
        require(tuple(got.shape) == (8,), f"the result has shape {list(got.shape)}")
        require(torch.equal(got.abs(), s), f"the sizes are {got.abs().tolist()} instead of {s.tolist()}")
        require(float(got.sum()) % 2 == 0, f"the sum is {float(got.sum())}, which is not even")
        least = float((y - points[points.sum(1) % 2 == 0]).square().sum(1).min())
        found = float((y - got).square().sum())
        require(found <= least + 1e-4, f"squared distance {found:.3f}, the nearest point has {least:.3f}")
