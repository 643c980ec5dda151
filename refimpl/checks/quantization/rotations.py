"""What the checks of QuIP and QuIP# share: a problem, the matrix of a transform, what a layer must keep."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import require, require_close

__all__ = ["problem", "require_layer", "schur", "transform_matrix"]
DAMP = 0.01


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """W [rows, columns] with a large column, correlated inputs X [300, columns], and their H."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, generator=generator)
    W[:, 3] *= 8
    mix = torch.randn(6, columns, generator=generator)
    X = torch.randn(300, 6, generator=generator) @ mix + 0.2 * torch.randn(300, columns, generator=generator)
    return W, X, 2 / len(X) * X.double().T @ X.double()


def transform_matrix(transform: Callable, n: int, what: str) -> Tensor:
    """The matrix of a transform of rows of n numbers, which must be orthogonal."""
    M = transform(torch.eye(n, dtype=torch.float64)).T
    require_close(M @ M.T, torch.eye(n).double(), 1e-5, f"{what}: transform times its transpose")
    return M


def schur(H: Tensor, k: int) -> Tensor:
    """H without its first k columns: the Schur complement, in the shape of H; the damping is added here."""
    H = H + DAMP * H.diagonal().mean() * torch.eye(len(H))
    return H - H[:, :k] @ torch.linalg.solve(H[:k, :k], H[:k]) if k else H


def require_layer(
    layer: nn.Module, W: Tensor, expected: Tensor, X: Tensor, H: Tensor, limit: float, name: str, what: str
) -> None:
    """The layer's weight is `expected`, its outputs are those of that weight, its bits at most `limit`."""
    found = layer.weight.double()
    errors = [float((((W - Q) @ H) * (W - Q)).sum()) for Q in (found, expected)]
    losses = f"{what}: loss {errors[0]:.4g} where {name} has {errors[1]:.4g}; W^"
    require_close(found, expected, 1e-3, losses)
    require_close(layer(X[:5]), X[:5] @ layer.weight.T, 1e-3, f"{what}: outputs and x W^'")
    require(layer.bits_per_weight <= limit, f"{what}: {layer.bits_per_weight:.3f} bits, over {limit:.3f}")
