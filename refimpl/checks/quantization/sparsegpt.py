"""The check of SparseGPT (quantization spec, section 16; arXiv 2301.00774)."""

from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"sparsegpt": "refimpl.quantization.pruning.sparsegpt:SparseGPT"}
ROWS, COLUMNS, BLOCK = 8, 160, 128  # one block of 128 columns and a shorter one
DAMP = 0.01


@check
def check_sparsegpt(SparseGPT: Callable) -> None:
    """`SparseGPT(sparsity, dtype=)` with `solve(W, H)`, whose `Q` and `keep` are the weights and the mask."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, COLUMNS, generator=generator)
    mix = torch.randn(20, COLUMNS, generator=generator, dtype=torch.float64)
    X = torch.randn(400, 20, generator=generator, dtype=torch.float64) @ mix
    X += 0.5 * torch.randn(400, COLUMNS, generator=generator, dtype=torch.float64)
    X *= torch.linspace(0.3, 1.5, COLUMNS, dtype=torch.float64)
    H = 2 / len(X) * X.T @ X
    before, inverses = (W.clone(), H.clone()), _inverses(H)
    for sparsity in (0.0, 0.5, 0.7, "2:4", "4:8"):
        result = SparseGPT(sparsity, dtype=torch.float32).solve(W, H)
        untouched = torch.equal(W, before[0]) and torch.equal(H, before[1])
        require(untouched, f"sparsity {sparsity}: W or H was changed")
        expected, keep = _reference(W, inverses, sparsity)
        shapes = list(result.Q.shape), list(result.keep.shape)
        require(shapes == ([ROWS, COLUMNS],) * 2, f"sparsity {sparsity}: Q and keep have shapes {shapes}")
        require(
            not bool(result.Q[~result.keep].any()),
            f"sparsity {sparsity}: weights that are not kept are not 0",
        )
        found, wanted = int((~result.keep).sum()), int((~keep).sum())
        require(
            found == wanted, f"sparsity {sparsity}: {found} weights are left out where {wanted} should be"
        )
        other = int((result.keep != keep).sum())
        errors = [float((((W - q) @ H) * (W - q)).sum()) for q in (result.Q.double(), expected)]
        diagnosis = (
            f"sparsity {sparsity}: the mask differs in {other} places, the output error is {errors[0]:.4g} "
            f"where SparseGPT has {errors[1]:.4g}"
        )
        require(other == 0, diagnosis)
        require_close(result.Q.double(), expected, 1e-4, f"{diagnosis}; the weights")
    # A dead input costs nothing: its weights are the first to go.
    dead = H.clone()
    dead[5], dead[:, 5] = 0, 0
    result = SparseGPT(0.5, dtype=torch.float32).solve(W, dead)
    require(not bool(result.Q[:, 5].any()), "an input that never occurred: its weights are not 0")


def _inverses(H: Tensor) -> list[Tensor]:
    """For every column j, the first row of the inverse of what is left of H."""
    H = H + DAMP * H.diagonal().mean() * torch.eye(COLUMNS)
    return [torch.linalg.inv(H[j:, j:])[0] for j in range(COLUMNS)]


def _reference(W: Tensor, inverses: list[Tensor], sparsity: float | str) -> tuple[Tensor, Tensor]:
    """SparseGPT without a Cholesky factor: 1 / [inverse of what is left of H]_jj is the price of column j."""
    W, Q = W.double(), torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    price = torch.stack([row[0] for row in inverses])
    keep = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    n, m = (int(x) for x in sparsity.split(":")) if isinstance(sparsity, str) else (None, BLOCK)
    for j in range(COLUMNS):
        if j % m == 0:
            score = W[:, j : j + m].square() / price[j : j + m]
            if n is None:
                lowest = score.flatten().argsort()[: int(score.numel() * sparsity)]
                keep[lowest // score.shape[1], j + lowest % score.shape[1]] = False
            else:
                keep[:, j : j + m].scatter_(1, score.argsort(1)[:, : m - n], False)
        Q[:, j] = W[:, j] * keep[:, j]
        W[:, j:] -= ((W[:, j] - Q[:, j]) / inverses[j][0])[:, None] * inverses[j]
    return Q, keep
