"""GPTVQ: GPTQ that rounds v neighbouring weights together, to the nearest vector of a codebook.

Implements arXiv 2402.15319 (Algorithm 1): codebooks by k-means in the metric of the layer's inputs, started
at points of equally spaced Mahalanobis distance; error feedback block by block; codebooks stored in int8;
and, once the codes are chosen, codebooks moved to lower the layer's error. Its options of scales for blocks
of weights and of an SVD of the codebooks are left out.

Where this differs from its authors' code (`exact=False` is that code):
- A block of v columns with upper triangular U_BB (see `refimpl.quantization.feedback`) costs exactly
  ||(w - q) U_BB^-1||^2, which decides here about centroids, codes and the error that is fed back. The code
  takes U_BB as if it were its diagonal: error (w - q) / diag U_BB, codes by weights 1 / U_jj. Its k-means
  weighs coordinate j by U_jj, which is the wrong way round: U_jj is small where inputs matter (v = 1: plain
  k-means).
- The codebook update takes conjugate gradients to the minimum of tr((W - Q) H (W - Q)') for fixed codes. The
  code takes 25 steps of Adam towards the same minimum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.codebooks import (
    STORES,
    CodebookLinear,
    Codebooks,
    decode,
    flat_index,
    kmeans,
    nearest,
)
from refimpl.quantization.feedback import Step, feedback_quantize, inverse_factor

__all__ = ["GPTVQ", "VectorQuantized", "least_squares", "mahalanobis_points"]


class VectorQuantized(NamedTuple):
    """Codes, uint8 [d_out, d_in / v, 1], and their codebooks; W^ = `decode(codes, books.dense())`."""

    codes: Tensor
    books: Codebooks


@dataclass(frozen=True)
class GPTVQ:
    """Error feedback with vector codebooks.

    Parameters
    ----------
    bits : b, code bits per weight, 1 to 8; bits * vdim at most 8. A codebook has 2^(b v) vectors.
    vdim : v, the paper's d: 1, 2 or 4; a divisor of d_in.
    rows, columns : how many rows and columns share a codebook, divisors of d_out and d_in; None: all. The
        paper: 256 columns, and as many rows as make codebooks cost 0.125 or 0.25 bits per weight.
    store : dtype of the codebooks, "int8" or "float16".
    exact : block-exact distances and feedback; False: the diagonal rule of the authors' code.
    iterations : of k-means, at most; 10 is the code's default, its scripts take 100.
    update : move the codebooks once the codes are chosen.
    damp : share of the mean of diag H that is added to it (0.01).

    An object is a recipe of `compress_model`. Raises ValueError for values that are not allowed.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> W, X = torch.randn(64, 16, generator=generator), torch.randn(64, 16, generator=generator)
    >>> layer = GPTVQ(bits=2, vdim=2).layer(W, X.T @ X)
    >>> layer.codes.shape, layer.codebooks.shape                  # 64 x 8 codes of 4 bits, 16 centroids
    (torch.Size([256]), torch.Size([1, 1, 1, 16, 2]))
    """

    bits: int = 2
    vdim: int = 2
    rows: int | None = None
    columns: int | None = None
    store: str = "int8"
    exact: bool = True
    iterations: int = 10
    update: bool = True
    damp: float = 0.01

    def __post_init__(self) -> None:
        for name, low in (("bits", 1), ("vdim", 1), ("iterations", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        if self.vdim not in (1, 2, 4):
            raise ValueError(f"vdim must be 1, 2 or 4, got {self.vdim}")
        if self.bits * self.vdim > 8:
            raise ValueError(f"bits * vdim must be at most 8, got {self.bits} * {self.vdim}")
        for name in ("rows", "columns"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be None or an integer >= 1, got {value!r}")
        if self.columns is not None and self.columns % self.vdim:
            raise ValueError(f"columns must be a multiple of vdim = {self.vdim}, got {self.columns}")
        if self.store not in STORES:
            raise ValueError(f"store must be one of {', '.join(STORES)}, got {self.store!r}")
        if not self.damp >= 0:
            raise ValueError(f"damp must be a number >= 0, got {self.damp!r}")

    def solve(self, W: Tensor, H: Tensor) -> VectorQuantized:
        """Codes and codebooks of W [d_out, d_in] for inputs with H = 2/N sum x x' [d_in, d_in].

        Raises ValueError where rows, columns or vdim do not divide, where a codebook has more vectors than
        there are to store, and as `feedback_quantize`.
        """
        d_out, d_in = W.shape if W.ndim == 2 else (0, 0)
        rows, columns = self.rows or d_out, self.columns or d_in
        K, v = 1 << self.bits * self.vdim, self.vdim
        if not d_out or not d_in or d_out % rows or d_in % columns or columns % v:
            raise ValueError(
                f"W must be [d_out, d_in], multiples of rows = {self.rows}, columns = {self.columns} and "
                f"vdim = {v}, got {list(W.shape)}"
            )
        if rows * columns // v < K:
            raise ValueError(f"bits: {K} centroids for {rows * columns // v} vectors of {rows} x {columns}")
        R, groups = d_out // rows, []
        live = W.masked_fill(H.diagonal() == 0, 0) if H.ndim == 2 and len(H) == d_in else W

        def fit(W: Tensor, U: Tensor, start: int) -> Tensor:
            """The codebooks of the columns from `start`, after storage, [R, K, v]."""
            points = W[:, start : start + columns].reshape(R, -1, v).float()
            corners = (U[s : s + v, s : s + v] for s in range(start, start + columns, v))
            metric = torch.stack([self._metric(corner, clustering=True) for corner in corners]).float()
            found, _ = kmeans(
                points, mahalanobis_points(points, K), metric=metric, iterations=self.iterations
            )
            groups.append(Codebooks.store(found[:, None, None], self.store))
            return groups[-1].dense().double()[:, 0, 0]

        def encode(step: Step) -> tuple[Tensor, Tensor]:
            start = step.start
            if start % columns == 0:
                books[:] = [fit(step.W, step.U, start)]
            metric = self._metric(step.U[start : start + v, start : start + v])
            code = nearest(step.w.reshape(R, rows, v), books[0], metric[None])
            return _gather(books[0], code).view(d_out, v), code.view(d_out, 1)

        books: list[Tensor] = []
        if self.exact:
            # Whole groups, so that a group's columns are up to date when its codebook is fitted.
            lazy = columns * max(1, 128 // columns)
            codes = feedback_quantize(live, H, encode, vdim=v, damp=self.damp, lazy=lazy).codes
        else:
            codes = _diagonal_feedback(live, H, encode, v, self.damp)
        codes = codes.to(torch.uint8)[..., None]
        stored = Codebooks(
            *(None if part[0] is None else torch.cat(part, 1) for part in zip(*groups, strict=True))
        )
        if self.update:
            moved = least_squares(live, H, codes, stored.dense())
            moved = Codebooks.store(moved, self.store)
            if _loss(live, H, codes, moved) < _loss(live, H, codes, stored):
                stored = moved
        return VectorQuantized(codes, stored)

    def layer(self, W: Tensor, H: Tensor) -> CodebookLinear:
        """The compressed layer; parameters and errors as `solve`."""
        return CodebookLinear.pack(*self.solve(W, H), bits=self.bits * self.vdim)

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> CodebookLinear:
        return self.layer(weight, stats.H)

    def _metric(self, corner: Tensor, clustering: bool = False) -> Tensor:
        """A [v, v] of the distance (w - q) A (w - q)' in a block with U_BB = `corner`."""
        if not self.exact:
            weight = corner.diagonal() if clustering else 1 / corner.diagonal()
            return weight.diag() if self.vdim > 1 else torch.ones_like(corner)
        inverse = torch.linalg.solve_triangular(corner, torch.eye(self.vdim).to(corner), upper=True)
        return inverse @ inverse.T


def mahalanobis_points(points: Tensor, k: int) -> Tensor:
    """Of each set of points [G, N, v], k at equally spaced ranks of Mahalanobis distance: [G, k, v].

    >>> mahalanobis_points(torch.tensor([[[5.0], [1.0], [3.0], [2.0]]]), 2).flatten().tolist()
    [3.0, 5.0]
    """
    centred = points - points.mean(1, keepdim=True)
    inverse = torch.linalg.pinv(centred.transpose(1, 2) @ centred, hermitian=True)
    distance = torch.einsum("gni,gij,gnj->gn", centred, inverse, centred)
    ranks = torch.linspace(0, points.shape[1] - 1, k, device=points.device).round().long()
    return _gather(points, distance.argsort(stable=True)[:, ranks])


def least_squares(W: Tensor, H: Tensor, codes: Tensor, start: Tensor, steps: int = 50) -> Tensor:
    """Codebooks that minimise tr((W - Q) H (W - Q)') for fixed codes, by conjugate gradients.

    Q is linear in the codebooks, so the objective is a quadratic; no step can raise it. Parameters: `W`
    [d_out, d_in], `H` [d_in, d_in], `codes` [d_out, d_in / v, M], `start` [R, C, M, K, v]; `steps`, at most
    (as many as there are numbers in the codebooks reach the minimum exactly, if rounding allows). Returns
    codebooks in float64; those that no code names stay.

    >>> W, codes = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[[0], [0], [1]]])
    >>> least_squares(W, torch.eye(3), codes, torch.zeros(1, 1, 1, 3, 1)).flatten().tolist()
    [1.5, 6.0, 0.0]
    """
    W, H, books = W.double(), H.double(), start.double().clone()
    v = start.shape[-1]
    place = flat_index(codes, books).flatten()

    def gather(G: Tensor) -> Tensor:
        """The adjoint of `decode`: sums over all places where a codebook vector is used."""
        parts = G.view(codes.shape[0], codes.shape[1], 1, v).expand(-1, -1, codes.shape[2], -1)
        return torch.zeros_like(books.view(-1, v)).index_add_(0, place, parts.reshape(-1, v)).view_as(books)

    weight = gather(H.diagonal().expand(len(W), -1))
    weight = weight.where(weight > 0, 1.0)
    residual = gather((W - decode(codes, books)) @ H)
    direction = z = residual / weight
    size = first = (residual * z).sum()
    for _ in range(steps):
        if size <= 1e-12 * first:
            break
        image = gather(decode(codes, direction) @ H)
        step = size / (direction * image).sum()
        books += step * direction
        residual = residual - step * image
        z = residual / weight
        size, old = (residual * z).sum(), size
        direction = z + size / old * direction
    return books


def _diagonal_feedback(W: Tensor, H: Tensor, encode: Callable, v: int, damp: float) -> Tensor:
    """Codes [d_out, d_in / v] by the rule of the authors' code: U_BB counts as its diagonal."""
    U, W = inverse_factor(H, damp), W.double().clone()
    codes = []
    for start in range(0, W.shape[1], v):
        block = slice(start, start + v)
        values, code = encode(Step(start, W[:, block], W, U))
        error = (W[:, block] - values) / U.diagonal()[block]
        W[:, start + v :] -= error @ U[block, start + v :]
        codes.append(code)
    return torch.cat(codes, 1)


def _gather(sets: Tensor, index: Tensor) -> Tensor:
    """sets [G, n, v] at index [G, m]: [G, m, v]."""
    return sets.gather(1, index[..., None].expand(-1, -1, sets.shape[-1]))


def _loss(W: Tensor, H: Tensor, codes: Tensor, books: Codebooks) -> float:
    difference = W.double() - decode(codes, books.dense()).double()
    return float(((difference @ H.double()) * difference).sum())
