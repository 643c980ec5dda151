"""The check of AQLM (quantization spec, section 11; arXiv 2401.06118)."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"aqlm": "refimpl.quantization.aqlm:AQLM"}
ROWS, COLUMNS, G, M, BITS = 40, 16, 4, 2, 2
K = 2**BITS


@check
def check_aqlm(AQLM: Callable) -> None:
    """`AQLM(codebooks, bits, group, beam, epochs=, steps=, tolerance=)` with `solve(W, H)` ->
    ((codes, codebooks, scale), errors after k-means and after every phase)."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, COLUMNS, generator=generator)
    mix = torch.randn(5, COLUMNS, generator=generator)
    X = torch.randn(300, 5, generator=generator) @ mix
    X += 0.3 * torch.randn(300, COLUMNS, generator=generator)
    X *= torch.linspace(0.4, 1.6, COLUMNS)
    H = (2 / len(X) * X.T @ X).double()
    before = W.clone(), H.clone()
    _kmeans_alone(AQLM, W, H)
    _brute_force(AQLM, W[:, :G].contiguous(), H[:G, :G].contiguous())
    # Beam search alone, until no single code can be changed for the better.
    found, losses = AQLM(M, BITS, G, 1, epochs=15, steps=0, tolerance=0.0).solve(W, H)
    codes, books, scale = _parts(found, COLUMNS)
    own = _row_losses(W, H, codes, books, scale)
    last, error = losses[-1], float(own.mean())
    require(abs(last - error) < 1e-4 * error, f"reported error {last:.6g}, found {error:.6g}")
    for j, m, k in product(range(COLUMNS // G), range(M), range(K)):
        other = codes.clone()
        other[:, j, m] = k
        better = own - _row_losses(W, H, other, books, scale) > 1e-4 * own
        where = f"code {k} of codebook {m} in group {j}, all other codes as they are"
        count = int(better.sum())
        require(count == 0, f"beam search: {where}, lowers the error of the outputs in {count} rows")
    # Adam on codebooks and scales.
    _, losses = AQLM(M, BITS, G, 1, epochs=2, steps=50, tolerance=0.0).solve(W, H)
    rises = [b > a * (1 + 1e-6) for a, b in zip(losses, losses[1:], strict=False)]
    require(len(losses) == 5 and not any(rises), f"errors after k-means and four phases: {losses}")
    require(losses[1] < 0.999 * losses[0], f"50 steps of Adam: error {losses[0]:.5g} -> {losses[1]:.5g}")
    require(torch.equal(W, before[0]) and torch.equal(H, before[1]), "W or H was changed")


def _kmeans_alone(AQLM: Callable, W: Tensor, H: Tensor) -> None:
    """Without epochs and with one codebook: k-means of rows of norm 1, at a fixed point."""
    found, _ = AQLM(1, 3, G, 1, epochs=0, iterations=200).solve(W, H)
    codes, books, scale = _parts(found, COLUMNS, 1, 8)
    require_close(scale, W.double().norm(dim=1), 1e-5, "scales: norms of the rows")
    points = (W.double() / scale[:, None]).view(-1, G)
    distance = torch.cdist(points, books[0])
    chosen = distance.gather(1, codes.view(-1, 1))[:, 0]
    require_close(chosen, distance.amin(1), 1e-5, "k-means: distance of a group to its centroid, the nearest")
    for k in codes.unique().tolist():
        require_close(
            books[0, k], points[codes.flatten() == k].mean(0), 1e-5, f"k-means: centroid {k}, a mean"
        )


def _brute_force(AQLM: Callable, W: Tensor, H: Tensor) -> None:
    """With one group and a beam of all codes, the search finds the best of all pairs of codes."""
    found, _ = AQLM(M, BITS, G, K, epochs=1, steps=0).solve(W, H)
    codes, books, scale = _parts(found, G)
    everything = []
    for a, b in product(range(K), repeat=2):
        pair = torch.tensor([a, b]).expand(len(W), 1, M)
        everything.append(_row_losses(W, H, pair, books, scale))
    best, own = torch.stack(everything).amin(0), _row_losses(W, H, codes, books, scale)
    worse = int((own > best * (1 + 1e-4)).sum())
    require(
        worse == 0, f"one group, beam {K}: {worse} of {len(W)} rows miss the best of {K}^2 pairs of codes"
    )


def _row_losses(W: Tensor, H: Tensor, codes: Tensor, books: Tensor, scale: Tensor) -> Tensor:
    restored = sum(books[m][codes[..., m]] for m in range(len(books))).flatten(1) * scale[:, None]
    difference = W.double() - restored
    return ((difference @ H) * difference).sum(1)


def _parts(found: tuple, d_in: int, M: int = M, K: int = K) -> tuple[Tensor, Tensor, Tensor]:
    codes, books, scale = found
    require(tuple(codes.shape) == (ROWS, d_in // G, M), f"codes have shape {list(codes.shape)}")
    require(tuple(books.shape) == (M, K, G), f"codebooks have shape {list(books.shape)}")
    require(tuple(scale.shape) == (ROWS,), f"scale has shape {list(scale.shape)}")
    return codes.long(), books.double(), scale.double()
