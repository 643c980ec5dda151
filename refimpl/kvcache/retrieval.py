"""RetrievalAttention (2409.10516): a window on the device, the best far keys by an index, merged exactly."""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.codecs import Codec
from refimpl.kvcache.indexes import Flat, Index
from refimpl.kvcache.policies import _size
from refimpl.kvcache.readers import Reader, union
from refimpl.kvcache.tiers import HOST, Offloaded

__all__ = ["RetrievalAttention", "mahalanobis", "merge", "partial"]


def partial(q: Tensor, k: Tensor, v: Tensor, scale: float, ok: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention to a part of the keys, and the log of the sum of its exponentials.

    q [..., n, D], k and v [..., m, D] -> o [..., n, D], l [..., n] in float32; ok [..., n, m] is False at
    keys that do not count.

    >>> one = torch.ones(1, 4)
    >>> partial(one, torch.zeros(3, 4), torch.eye(4)[:3], 1.0)[0]
    tensor([[0.3333, 0.3333, 0.3333, 0.0000]])
    """
    scores = (q @ k.mT).float() * scale
    if ok is not None:
        scores = scores.masked_fill(~ok, -torch.inf)
    l = scores.logsumexp(-1)
    return (scores - l[..., None]).exp().to(v.dtype) @ v, l


def merge(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> Tensor:
    """Attention to two disjoint sets of keys from that to each: s o1 + (1 - s) o2, s = sigmoid(l1 - l2).

    o1, o2 [..., D] and l1, l2 [...] from `partial`. Exact for every split.

    >>> o, l = torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([3., 1.]).log()
    >>> merge(o[0], l[0], o[1], l[1])
    tensor([0.7500, 0.2500])
    """
    s = torch.sigmoid(l1 - l2)[..., None].to(o1.dtype)
    return s * o1 + (1 - s) * o2


class RetrievalAttention(Reader):
    """Attend to a window on the device and to k keys that an index finds on the host (2409.10516, section 3).

    The window, the near tokens of the codec `Offloaded`, are the first and last tokens of the prompt and all
    later ones; its attention is exact. For each query head the index of its KV head finds k of the far keys;
    they are attended to where they lie, and only the query, the output and its log-sum-exp cross. The two
    parts are merged by their log-sum-exps, so no token counts twice and a found set of all far keys gives
    plain attention.

    Parameters: k >= 1, keys of each query head (the paper: 100); index, an empty `Index`: `Flat()` (exact,
    the default), `IVF(...)`, or `Graph()`, the paper's choice. Raises ValueError, TypeError for others.

    >>> RetrievalAttention(32, index="flat")
    Traceback (most recent call last):
    TypeError: index: expected an Index, got 'flat'
    """

    codec = Offloaded
    evicts = padded = False
    queries = True

    def __init__(self, k: int = 100, index: Index | None = None) -> None:
        index = Flat() if index is None else index
        if not isinstance(index, Index):
            raise TypeError(f"index: expected an Index, got {index!r}")
        self.k, self.index = _size("k", k, 1), index

    def build(self, codec: Codec, q: Tensor, ok: Tensor | None) -> None:
        keys = codec.far[0].rows
        # Where all far keys are wanted there is nothing to choose.
        self.index = self.index.fresh() if self.k < keys.shape[2] else Flat()
        if keys.shape[2]:
            self.index.build(keys, q.flatten(2, 3).to(HOST))

    def read(self, q: Tensor, codec: Codec, scale: float, ok: Tensor | None) -> Tensor:
        B, G, R, _, D = q.shape
        q = q[:, :, :, 0]
        out, l = partial(q, codec.k, codec.v, scale)
        near = codec.k.nbytes + codec.v.nbytes
        self._bytes = {"payload": near, "meta": 0, "host": 0, "moved": 0}
        keys, values = (f.rows for f in codec.far)
        if keys.shape[2]:
            here = q.to(HOST)
            found, scanned = self.index.search(here, self.k)
            at = found.clamp(min=0).flatten(2)[..., None]
            k, v = (t.take_along_dim(at, 2).view(B, G, R, -1, D) for t in (keys, values))
            far = partial(here[..., None, :], k, v, scale, (found >= 0)[..., None, :])
            far_out, far_l = (t[:, :, :, 0].to(q.device) for t in far)
            out = merge(out, l, far_out, far_l)
            row = D * (keys.element_size() + values.element_size())
            self._bytes |= {
                "meta": int(scanned.sum()) * D * keys.element_size(),
                "host": int(union(found, keys.shape[2]).sum()) * row,
                "moved": far_out.nbytes + far_l.nbytes,
            }
        return out[:, :, :, None]

    def read_bytes(self) -> dict[str, int]:
        return self._bytes

    def take_rows(self, rows: LongTensor) -> None:
        self.index.take_rows(rows.to(HOST))

    def tensors(self) -> dict[str, Tensor]:
        return {}  # of the index nothing lies on the device


def mahalanobis(x: Tensor, sample: Tensor) -> Tensor:
    """Distance of x [n, D] from the distribution of a sample [m, D], m > D: sqrt((x - mu)' C^-1 (x - mu)).

    About sqrt(D) for what is drawn like the sample. The paper's queries are over ten times farther from the
    keys than keys are. Raises ValueError for a sample that does not span its space.

    >>> sample = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    >>> bool(mahalanobis(sample, sample).square().mean().isclose(torch.tensor(4 * 499 / 500)))
    True
    """
    sample = sample.double()
    centre, covariance = sample.mean(0), sample.T.cov()
    if len(sample) <= sample.shape[1] or torch.linalg.matrix_rank(covariance) < sample.shape[1]:
        raise ValueError(f"sample: shape {list(sample.shape)}; allowed: more rows than columns, of full rank")
    away = x.double() - centre
    return (away @ torch.linalg.inv(covariance) * away).sum(-1).sqrt().to(x.dtype)
