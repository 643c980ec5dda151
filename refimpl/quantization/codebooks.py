"""Vector codebooks: k-means, codebooks in few bytes, and a layer of codes and codebooks.

A row of W is cut into vectors of v neighbouring weights. Each is stored as M codes of b bits, one for each
codebook of K = 2^b vectors, and restored as the sum of the M vectors that they name (M = 1: a plain vector
quantizer). Codebooks are stored with the layer: on a small matrix they can take more bytes than the codes.
"""

from typing import NamedTuple

import torch
from torch import LongTensor, Tensor

from refimpl.quantization.linear import CompressedLinear
from refimpl.quantization.packing import pack_codes, unpack_codes

__all__ = ["CodebookLinear", "Codebooks", "decode", "flat_index", "kmeans", "nearest", "random_points"]

STORES = ("int8", "float16")
_ENTRIES = 1 << 22  # scores of points and centroids at a time


class Codebooks(NamedTuple):
    """Codebooks as they are stored.

    - values [R, C, M, K, v], int8 or float16: R groups of rows and C groups of columns have M codebooks each.
    - step [R, C, M], float16, what an int8 value is worth; None for float16 values.
    """

    values: Tensor
    step: Tensor | None

    @classmethod
    def store(cls, dense: Tensor, dtype: str = "int8") -> "Codebooks":
        """Round codebooks [R, C, M, K, v].

        `dtype` "int8": in steps of max |c| / 127 of each codebook (GPTVQ); "float16" (AQLM). Raises
        ValueError for another dtype, another number of dimensions, and values float16 cannot hold.

        >>> Codebooks.store(torch.tensor([[[[[1.27], [-0.5]]]]])).values.flatten().tolist()
        [127, -50]
        """
        if dtype not in STORES:
            raise ValueError(f"dtype must be one of {', '.join(STORES)}, got {dtype!r}")
        if dense.ndim != 5:
            raise ValueError(f"dense must be [R, C, M, K, v], got {list(dense.shape)}")
        step = None
        if dtype == "int8":
            step = (dense.abs().amax((-2, -1)) / 127).half()
            step = step.where(step > 0, 1.0)  # a codebook of zeros, or below the smallest float16
            values = (dense / step[..., None, None].to(dense.dtype)).round().clamp(-127, 127).to(torch.int8)
        else:
            values = dense.half()
        if not bool((values if step is None else step).isfinite().all()):
            raise ValueError("dense has values that are not finite in float16")
        return cls(values, step)

    def dense(self) -> Tensor:
        """The codebooks [R, C, M, K, v] in float32."""
        values = self.values.float()
        return values if self.step is None else values * self.step.float()[..., None, None]


class CodebookLinear(CompressedLinear):
    """A weight of packed `codes`, `codebooks` (and their `step`), and, if given, a `scale` per row.

    >>> codes = torch.tensor([[[0], [1]], [[1], [1]]], dtype=torch.uint8)        # [d_out, d_in / v, M]
    >>> books = Codebooks.store(torch.tensor([[[[[0.5, -1.0], [2.0, 0.25]]]]]), "float16")
    >>> layer = CodebookLinear.pack(codes, books, bits=1)
    >>> layer.weight.tolist(), layer.nbytes()
    ([[0.5, -1.0, 2.0, 0.25], [2.0, 0.25, 2.0, 0.25]], 9)
    """

    @classmethod
    def pack(
        cls, codes: Tensor, books: Codebooks, bits: int, scale: Tensor | None = None
    ) -> "CodebookLinear":
        """Pack codes, uint8 [d_out, d_in / v, M], of b bits (1 to 8) with their codebooks and a scale
        [d_out]; raises ValueError for shapes that do not fit, or codes that need more bits."""
        d_out, vectors, M = codes.shape
        R, C, has, K, v = books.values.shape
        if has != M or 1 << bits != K or d_out % R or vectors % C:
            raise ValueError(
                f"codes {list(codes.shape)} of {bits} bits do not fit codebooks {[R, C, has, K, v]}"
            )
        if scale is not None and scale.shape != (d_out,):
            raise ValueError(f"scale must be [{d_out}], got {list(scale.shape)}")
        tensors = {"codes": pack_codes(codes, bits), "codebooks": books.values}
        tensors |= {} if books.step is None else {"step": books.step}
        tensors |= {} if scale is None else {"scale": scale}
        return cls((d_out, vectors * v), tensors, bits=bits)

    def unpacked(self) -> Tensor:
        """The codes, uint8 [d_out, d_in / v, M]."""
        M, _, v = self.codebooks.shape[2:]
        return unpack_codes(self.codes, self.settings["bits"], (self.out_features, self.in_features // v, M))

    def dequantize(self) -> Tensor:
        books = Codebooks(self.codebooks, self._buffers.get("step"))
        W = decode(self.unpacked(), books.dense())
        return W if "scale" not in self._buffers else W * self.scale.float()[:, None]


def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """W^ [d_out, d_in] of integer codes [d_out, d_in / v, M] and codebooks [R, C, M, K, v]; differentiable
    in the codebooks.

    >>> two_books = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[5.0, 5.0], [0.5, 0.25]]])
    >>> decode(torch.tensor([[[0, 1]]]), two_books[None, None])
    tensor([[1.5000, 2.2500]])
    """
    found = codebooks.flatten(0, 3)[flat_index(codes, codebooks)]
    return found.sum(2).flatten(1)


def flat_index(codes: Tensor, codebooks: Tensor) -> LongTensor:
    """Where the vectors named by codes [d_out, d_in / v, M] lie in `codebooks.flatten(0, 3)`."""
    (d_out, vectors, M), (R, C, _, K, _) = codes.shape, codebooks.shape
    row = torch.arange(d_out, device=codes.device) // (d_out // R)
    column = torch.arange(vectors, device=codes.device) // (vectors // C)
    book = (row[:, None, None] * C + column[:, None]) * M + torch.arange(M, device=codes.device)
    return book * K + codes.long()


def kmeans(
    points: Tensor, start: Tensor, *, metric: Tensor | None = None, iterations: int = 100
) -> tuple[Tensor, LongTensor]:
    """Cluster points by Lloyd's iterations, in a metric that may differ from point to point.

    The distance of point n to c is (x_n - c)' A_n (x_n - c); the best centre of a cluster S is then
    (sum_S A_n)^-1 sum_S A_n x_n. Neither of the two steps can raise the sum of distances.

    Parameters
    ----------
    points : [G, N, v], floating point: G sets, clustered separately.
    start : [G, k, v], the first centroids (`random_points`); an empty cluster keeps its centroid.
    metric : [P, v, v], symmetric positive definite: A_n is metric[n mod P], P a divisor of N; None: the
        identity.
    iterations : at most so many; they end when no point changes its cluster.

    Returns centroids [G, k, v] and codes [G, N], each point's nearest centroid. Raises ValueError for shapes
    that do not fit, points that are not finite, and iterations below 0.

    Examples
    --------
    >>> points = torch.tensor([[[0.0], [1.0], [9.0], [11.0]]])
    >>> centroids, codes = kmeans(points, points[:, 1:3])
    >>> centroids.flatten().tolist(), codes.tolist()
    ([0.5, 10.0], [[0, 0, 1, 1]])
    """
    if not points.is_floating_point() or points.ndim != 3 or points.numel() == 0:
        raise ValueError(f"points must be floating point [G, N, v], got {points.dtype} {list(points.shape)}")
    if not bool(points.isfinite().all()):
        raise ValueError("points must be finite")
    G, N, v = points.shape
    if start.ndim != 3 or start.shape[0] != G or start.shape[1] < 1 or start.shape[2] != v:
        raise ValueError(f"start must be [{G}, k, {v}], got {list(start.shape)}")
    if metric is None:
        metric = torch.eye(v, dtype=points.dtype, device=points.device)[None]
    if metric.ndim != 3 or metric.shape[1:] != (v, v) or N % len(metric):
        raise ValueError(f"metric must be [P, {v}, {v}] with P a divisor of {N}, got {list(metric.shape)}")
    if type(iterations) is not int or iterations < 0:
        raise ValueError(f"iterations must be an integer >= 0, got {iterations!r}")
    centroids = start.to(points.dtype)
    codes = nearest(points, centroids, metric)
    for _ in range(iterations):
        centroids = _centres(points, codes, metric, centroids)
        codes, old = nearest(points, centroids, metric), codes
        if torch.equal(codes, old):
            break
    return centroids, codes


def nearest(points: Tensor, centroids: Tensor, metric: Tensor) -> LongTensor:
    """The nearest of centroids [G, k, v] to each of points [G, N, v] in `metric` [P, v, v]: codes [G, N].

    >>> nearest(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.0, 3.0], [1.0, 1.0]]]), torch.eye(2)[None])
    tensor([[1]])
    """
    (G, N, v), P = points.shape, len(metric)
    # Half the squared distance without x'Ax, which no choice changes: c'Ac / 2 - x'Ac.
    half = torch.einsum("gki,pij,gkj->gkp", centroids, metric, centroids)[:, :, None] / 2
    found = []
    for part in points.view(G, N // P, P, v).split(max(1, _ENTRIES // (G * P * centroids.shape[1])), 1):
        mapped = torch.einsum("grpi,pij->gjrp", part, metric).flatten(2)
        score = half - (centroids @ mapped).view(G, -1, part.shape[1], P)
        found.append(score.min(1).indices.flatten(1))  # several times as fast as argmin on a CPU
    return torch.cat(found, 1)


def random_points(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k different ones of points [N, v], to start k-means from; ValueError where there are fewer."""
    if not 1 <= k <= len(points):
        raise ValueError(f"k must be 1 to {len(points)}, the number of points, got {k!r}")
    return points[torch.randperm(len(points), generator=generator)[:k].to(points.device)]


def _centres(points: Tensor, codes: LongTensor, metric: Tensor, old: Tensor) -> Tensor:
    (G, N, v), (_, k, _), P = points.shape, old.shape, len(metric)
    group = torch.arange(G, device=points.device)[:, None]
    place = ((group * k + codes) * P + torch.arange(N, device=points.device) % P).flatten()
    count = torch.bincount(place, minlength=G * k * P).view(G, k, P).to(points.dtype)
    total = points.new_zeros(G * k * P, v).index_add_(0, place, points.flatten(0, 1)).view(G, k, P, v)
    left = torch.einsum("gkp,pij->gkij", count, metric)
    right = torch.einsum("pij,gkpj->gki", metric, total)
    used = count.sum(-1) > 0
    centres = old.clone()
    centres[used] = torch.linalg.solve(left[used], right[used])
    return centres
