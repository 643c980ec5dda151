"""Checks for the exercises of the notebook on rounding with data."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close


def _inputs(seed: int, n: int, d: int) -> Tensor:
    """Correlated inputs [n, d], float64."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=draw, dtype=torch.float64)
    return torch.randn(n, d, generator=draw, dtype=torch.float64) @ mix


@check
def check_compensated(compensated: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """`compensated(w, H, q1)`: the second of two weights that makes up best for the first's rounding."""
    for seed in range(4):
        x = _inputs(seed, 9, 2)
        H = 2 / 9 * x.T @ x
        w = torch.tensor([0.3 + seed, -0.7], dtype=torch.float64)
        q1 = w[0].round()
        got = torch.as_tensor(compensated(w.clone(), H, q1), dtype=torch.float64)
        # The error (w1 - q1, w2 - got) has no slope in its second entry: H[1] @ error = 0.
        error = torch.stack([w[0] - q1, w[1] - got.reshape(())])
        slope = float(H[1] @ error)
        where = f"w {w.tolist()}, first weight rounded to {float(q1):g}"
        require(
            abs(slope) < 1e-8 * float(H.abs().max()),
            f"{where}: {float(got):.4f} is not the best second weight, the output error falls beside it",
        )


@check
def check_damped_h(damped_h: Callable[[Tensor, float], Tensor]) -> None:
    """`damped_h(X, damp)`: 2/N sum x x', unused inputs at 1, damp times the mean diagonal added; float64."""
    for seed, (n, d, damp) in enumerate(((20, 5, 0.01), (3, 6, 0.1), (50, 2, 0.0))):
        X = _inputs(seed, n, d).float()
        if d > 2:
            X[:, 1] = 0
        got = damped_h(X.clone(), damp)
        where = f"{n} tokens, {d} inputs, damping {damp}"
        require(
            isinstance(got, Tensor) and got.dtype == torch.float64, f"{where}: the result must be float64"
        )
        expected = torch.zeros(d, d, dtype=torch.float64)
        for x in X.double():
            expected += 2 / n * torch.outer(x, x)
        for j in range(d):
            if expected[j, j] == 0:
                expected[j, j] = 1
        mean = sum(float(expected[j, j]) for j in range(d)) / d
        for j in range(d):
            expected[j, j] += damp * mean
        require_close(got, expected, 1e-9 * float(expected.abs().max()), f"{where}: H'")


@check
def check_shared_smooth(shared_smooth: Callable[[Tensor, Sequence[Tensor], float], Tensor]) -> None:
    """`shared_smooth(X, weights, alpha)`: SmoothQuant's factor of inputs [N, d_in] read by all weights."""
    for seed, (alpha, sizes) in enumerate(((0.5, (4, 2, 2)), (0.75, (3,)), (0.0, (2, 5)), (1.0, (2, 2)))):
        X = _inputs(seed, 12, 6)
        weights = [_inputs(10 * seed + i + 1, n, 6) for i, n in enumerate(sizes)]
        got = shared_smooth(X.clone(), [W.clone() for W in weights], alpha)
        expected = []
        for j in range(6):
            x = max(abs(float(v)) for v in X[:, j])
            w = max(abs(float(v)) for W in weights for v in W[:, j])
            expected.append(x**alpha / w ** (1 - alpha))
        where = f"alpha {alpha}, {len(sizes)} weights"
        require_close(got, torch.tensor(expected, dtype=torch.float64), 1e-9, f"{where}: the factor")


@check
def check_whitened_repair(whitened_repair: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """`whitened_repair(E, H, r)`: the P of rank r of least tr((E - P) H (E - P)')."""
    for seed, (d_out, d_in, r) in enumerate(((6, 4, 2), (5, 8, 3), (4, 4, 4), (7, 3, 1))):
        x = _inputs(seed, 5 * d_in, d_in)
        H, E = 2 / len(x) * x.T @ x, _inputs(seed + 50, d_out, d_in)
        got = whitened_repair(E.clone(), H.clone(), r)
        where = f"{d_out} x {d_in}, rank {r}"
        require(
            isinstance(got, Tensor) and got.shape == E.shape, f"{where}: a matrix of the shape of E is wanted"
        )
        require(int(torch.linalg.matrix_rank(got)) <= r, f"{where}: the rank of the repair is above {r}")
        # The squares of the singular values of E S are the eigenvalues of E H E'.
        least = float(torch.linalg.eigvalsh(E @ H @ E.T).flip(0)[r:].clamp(min=0).sum())
        left = float((((E - got) @ H) * (E - got)).sum())
        require(
            left <= least + 1e-8 * float((E @ H * E).sum()),
            f"{where}: output error {left:.4f} remains, {least:.4f} is possible",
        )
