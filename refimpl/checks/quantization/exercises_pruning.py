"""Checks for the exercises of the notebook on pruning."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close


@check
def check_sparse_bits(sparse_bits: Callable[[float, int, str, int], float]) -> None:
    """`sparse_bits(kept, bits, storage, columns)`: stored bits per weight of a matrix of which a share `kept`
    is stored with `bits` bits each; storage "bitmap" or "csr" (16-bit columns, a 32-bit pointer per row)."""
    for kept, bits, columns in ((0.5, 16, 128), (0.3, 4, 256), (0.75, 8, 64)):
        where = f"{kept:.0%} kept at {bits} bits, {columns} columns"
        got = sparse_bits(kept, bits, "bitmap", columns)
        require(not math.isclose(got, kept * bits), f"{where}: bitmap {got:.3f}, the mask itself is missing")
        require(math.isclose(got, 1 + kept * bits), f"{where}: bitmap {got:.3f} bits per weight")
        got = sparse_bits(kept, bits, "csr", columns)
        no_rows = kept * (bits + 16)
        require(not math.isclose(got, no_rows), f"{where}: csr {got:.3f}, the rows' pointers are missing")
        require(math.isclose(got, no_rows + 32 / columns), f"{where}: csr {got:.3f} bits per weight")


@check
def check_input_aware_mask(input_aware_mask: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """`input_aware_mask(W, X, sparsity)`: bool [d_out, d_in], False for the floor(d_in s) lowest
    |W_ij| ||x_j|| of each row; X [tokens, d_in] are the layer's inputs."""
    for seed, (rows, columns, sparsity) in enumerate(((4, 12, 0.5), (3, 10, 0.25), (5, 8, 0.7))):
        draw = torch.Generator().manual_seed(seed)
        W, X = torch.randn(rows, columns, generator=draw), torch.randn(20, columns, generator=draw)
        X = X * torch.logspace(-1, 1, columns)
        W[0] *= 100  # a row that a threshold over the whole layer would keep
        where = f"{rows} x {columns}, sparsity {sparsity}"
        keep = input_aware_mask(W.clone(), X.clone(), sparsity)
        require(keep.dtype is torch.bool and keep.shape == W.shape, f"{where}: expected a bool mask like W")
        gone = math.floor(columns * sparsity + 1e-9)
        counts = (~keep).sum(1).tolist()
        require(counts == [gone] * rows, f"{where}: rows lose {counts} weights instead of {gone} each")
        for i in range(rows):
            scores = [float(W[i, j].abs()) * float(X[:, j].norm()) for j in range(columns)]
            lowest = set(sorted(range(columns), key=lambda j, s=scores: s[j])[:gone])
            wrong = sorted(lowest ^ set((~keep[i]).nonzero()[:, 0].tolist()))
            require(not wrong, f"{where}, row {i}: columns {wrong} are on the wrong side")


@check
def check_remove_one(remove_one: Callable[[Tensor, Tensor, int], tuple[Tensor, float]]) -> None:
    """`remove_one(w, H, j)`: the row w [n] with weight j exactly 0 and the others moved so that
    (w' - w)' H (w' - w) is least; and that cost, a number."""
    for seed, (n, j) in enumerate(((4, 0), (6, 3), (8, 7))):
        draw = torch.Generator().manual_seed(seed)
        X = torch.randn(50, n, generator=draw, dtype=torch.float64)
        X = X + X[:, :1]
        H, w = 2 / 50 * X.T @ X, torch.randn(n, generator=draw, dtype=torch.float64)
        before = w.clone()
        new, cost = remove_one(w, H, j)
        where = f"n = {n}, j = {j}"
        require(torch.equal(w, before), f"{where}: w was changed")
        require(abs(float(new[j])) < 1e-9, f"{where}: weight {j} is {float(new[j]):.3g}, not 0")
        others = [i for i in range(n) if i != j]
        best = torch.zeros(n, dtype=torch.float64)
        best[others] = torch.linalg.solve(H[others][:, others], H[others] @ w)
        least = float((best - w) @ H @ (best - w))
        real = float((new - w) @ H @ (new - w))
        require(real < least * (1 + 1e-6), f"{where}: your row costs {real:.4f}, the best one {least:.4f}")
        require(math.isclose(float(cost), least, rel_tol=1e-6), f"{where}: cost {float(cost):.4f}")


@check
def check_relaxed_top_k(relaxed_top_k: Callable[[Tensor, int, float], Tensor]) -> None:
    """`relaxed_top_k(scores, k, temperature)`: sum of k softmaxes of r / t; after each one log(1 - p) is
    added to r, which begins as the scores [n], float64."""
    scores = torch.tensor([0.3, 2.0, -1.0, 1.0, 0.9], dtype=torch.float64)
    for k in (1, 2, 4):
        for temperature in (1e-6, 0.3, 1.0, 10.0):
            got = relaxed_top_k(scores.clone(), k, temperature)
            where = f"k = {k}, temperature {temperature}"
            require(got.shape == scores.shape, f"{where}: the result has shape {list(got.shape)}")
            require(abs(float(got.sum()) - k) < 1e-6, f"{where}: the entries sum to {float(got.sum()):.4f}")
            r, expected = scores.tolist(), [0.0] * 5
            for _ in range(k):
                top = max(r)
                powers = [math.exp((x - top) / temperature) for x in r]
                p = [x / sum(powers) for x in powers]
                expected = [e + q for e, q in zip(expected, p, strict=True)]
                r = [x + math.log(max(1 - q, 1e-300)) for x, q in zip(r, p, strict=True)]
            require_close(got, torch.tensor(expected, dtype=torch.float64), 1e-6, f"{where}: the mask")
