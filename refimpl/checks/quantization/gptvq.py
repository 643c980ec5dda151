"""The check of GPTVQ (quantization spec, section 12; arXiv 2402.15319)."""

from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"gptvq": "refimpl.quantization.gptvq:GPTVQ"}
ROWS, COLUMNS, V, DAMP, ITERATIONS = 48, 16, 2, 0.01, 5
K = 16


@check
def check_gptvq(GPTVQ: Callable) -> None:
    """`GPTVQ(bits, vdim, store=, iterations=, update=)` with `solve(W, H)` -> (codes, (values, step))."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    mix = torch.randn(5, COLUMNS, generator=generator, dtype=torch.float64)
    X = torch.randn(300, 5, generator=generator, dtype=torch.float64) @ mix
    X += 0.3 * torch.randn(300, COLUMNS, generator=generator, dtype=torch.float64)
    X *= torch.linspace(0.4, 1.6, COLUMNS, dtype=torch.float64)
    H = 2 / len(X) * X.T @ X
    before = W.clone(), H.clone()
    solve = lambda update, store: GPTVQ(2, V, store=store, iterations=ITERATIONS, update=update).solve(W, H)
    codes, book = _parts(*solve(False, "float16"))
    require(torch.equal(W, before[0]) and torch.equal(H, before[1]), "W or H was changed")
    require_close(book, _kmeans(W, H), 2e-3, "codebook of k-means in the metric of the inputs")
    _feedback(W, H, codes, book)
    # The codebook may move afterwards, to the minimum for these codes; the codes stay.
    moved_codes, moved = _parts(*solve(True, "float16"))
    require(torch.equal(moved_codes, codes), "the codebook update changed the codes")
    found, best = _error(W, H, codes, moved), _error(W, H, codes, _least_squares(W, H, codes))
    first = _error(W, H, codes, book)
    require(
        found <= 1.001 * best, f"updated codebook: error {found:.5g}, least {best:.5g}, before {first:.5g}"
    )
    values, step = solve(True, "int8")[1]
    require(values.dtype is torch.int8 and step is not None, f"int8 codebooks are stored as {values.dtype}")


def _feedback(W: Tensor, H: Tensor, codes: Tensor, book: Tensor) -> None:
    """Follow the codes with the inverse of what is left of H; each must be the best at its turn."""
    H, W = H + DAMP * H.diagonal().mean() * torch.eye(COLUMNS), W.clone()
    for block in range(COLUMNS // V):
        left = torch.arange(block * V, COLUMNS)
        inverse = torch.linalg.inv(H[left][:, left])
        A = torch.linalg.inv(inverse[:V, :V])
        difference = W[:, None, left[:V]] - book
        distance = torch.einsum("rki,ij,rkj->rk", difference, A, difference)
        chosen = distance.gather(1, codes[:, [block]])[:, 0]
        wrong = int((chosen > 1.0001 * distance.amin(1)).sum())
        require(
            wrong == 0,
            f"block {block}: {wrong} of {ROWS} codes are not the nearest once the errors before are fed back",
        )
        error = W[:, left[:V]] - book[codes[:, block]]
        W[:, left] -= error @ A @ inverse[:V]


def _kmeans(W: Tensor, H: Tensor) -> Tensor:
    """EM from equally spaced Mahalanobis ranks; vector p of a row in the metric of its block."""
    U = torch.linalg.cholesky(
        torch.linalg.inv(H + DAMP * H.diagonal().mean() * torch.eye(COLUMNS)), upper=True
    )
    corners = [U[s : s + V, s : s + V] for s in range(0, COLUMNS, V)]
    metric = torch.stack([torch.linalg.inv(corner.T @ corner) for corner in corners])
    metric = metric.repeat(ROWS, 1, 1)
    points = W.reshape(-1, V)
    centred = points - points.mean(0)
    distance = ((centred @ torch.linalg.inv(centred.T @ centred)) * centred).sum(1)
    book = points[distance.argsort()[torch.linspace(0, len(points) - 1, K).round().long()]]
    for _ in range(ITERATIONS):
        difference = points[:, None] - book
        code = torch.einsum("nki,nij,nkj->nk", difference, metric, difference).argmin(1)
        for k in code.unique().tolist():
            A, x = metric[code == k], points[code == k]
            book[k] = torch.linalg.solve(A.sum(0), torch.einsum("nij,nj->i", A, x))
    return book


def _least_squares(W: Tensor, H: Tensor, codes: Tensor) -> Tensor:
    """The best codebook for given codes, from a dense system of equations."""
    root = torch.linalg.cholesky(H + 1e-9 * torch.eye(COLUMNS))
    onehot = torch.nn.functional.one_hot(codes, K).double()
    # Output (r, c) of entry (k, i): sum over the blocks that use k of root[block i, c].
    design = torch.einsum("rpk,pic->rcki", onehot, root.view(-1, V, COLUMNS)).reshape(-1, K * V)
    return torch.linalg.lstsq(design, (W @ root).reshape(-1, 1), driver="gelsd").solution.view(K, V)


def _error(W: Tensor, H: Tensor, codes: Tensor, book: Tensor) -> float:
    difference = W - book[codes].flatten(1)
    return float(((difference @ H) * difference).sum())


def _parts(codes: Tensor, books: tuple) -> tuple[Tensor, Tensor]:
    require(tuple(codes.shape) == (ROWS, COLUMNS // V, 1), f"codes have shape {list(codes.shape)}")
    values = books[0]
    require(tuple(values.shape) == (1, 1, 1, K, V), f"codebooks have shape {list(values.shape)}")
    return codes[..., 0].long(), values[0, 0, 0].double()
