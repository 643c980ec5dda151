"""TailorKV (2505.19586): layers with spread attention at 1 bit, the others offloaded and partly fetched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import LongTensor, Tensor, nn

from refimpl.kvcache.attention import Attention
from refimpl.kvcache.cache import KVCache
from refimpl.kvcache.codecs import Codec
from refimpl.kvcache.kivi import KIVI
from refimpl.kvcache.policies import KVPolicy, _size
from refimpl.kvcache.readers import ReadAll, Reader
from refimpl.kvcache.tiers import Offloaded
from refimpl.kvcache.view import View

__all__ = ["TailorKV", "layer_density", "spread", "tailor"]


class TailorKV(Reader):
    """Fetch the far tokens that a few channels of the keys say are the best (2505.19586, section 4.3).

    For each KV head, with q the mean of the queries that share it, the `channels` channels c with the largest
    |q_c| · max_t |K_tc| are moved from the host for all far keys; q · k over these channels alone ranks them,
    and keys and values of the best `budget` are fetched. Attention then reads them beside all near tokens of
    the codec `Offloaded`. The paper chooses the channels by a prediction of q from the layer before, which
    hides the transfer behind that layer's work; here q itself chooses: the best that a prediction can be.

    Parameters: budget >= 1, far tokens fetched (the paper: 128); channels, 1 to D (the paper: 8 of 128).
    Raises ValueError for others.

    >>> TailorKV(budget=0)
    Traceback (most recent call last):
    ValueError: budget: 0; allowed: integers from 1
    """

    codec = Offloaded
    evicts = padded = False

    def __init__(self, budget: int = 128, channels: int = 8) -> None:
        self.budget, self.n_channels = _size("budget", budget, 1), _size("channels", channels, 1)

    def check(self, head_dim: int) -> None:
        if self.n_channels > head_dim:
            raise ValueError(f"channels: {self.n_channels}; allowed: 1..{head_dim}, the head dim")

    def build(self, codec: Codec, q: Tensor, ok: Tensor | None) -> None:
        self.largest = codec.k.abs().amax(2)  # [B, G, D]
        far = codec.far[0].rows
        if far.shape[2]:
            self.largest = torch.maximum(self.largest, far.abs().amax(2).to(codec.k.device))

    def choose(self, q: Tensor) -> LongTensor:
        """Return the channels [B, G, C] that matter most to q [B, G, D]."""
        return (q.abs() * self.largest).topk(self.n_channels, sorted=False).indices

    def rank(self, q: Tensor, codec: Offloaded) -> tuple[LongTensor, int]:
        """Return far tokens [B, G, m], the best by a few channels, for q [B, G, D], and the bytes moved."""
        channels = self.choose(q)
        part = codec.channels(channels)
        scores = (part @ q.gather(-1, channels)[..., None])[..., 0]
        return scores.topk(min(self.budget, scores.shape[-1]), sorted=False).indices, part.nbytes

    def read(self, q: Tensor, codec: Codec, scale: float, ok: Tensor | None) -> Tensor:
        index, looked = self.rank(q[:, :, :, 0].mean(2), codec)
        k, v, fetched = codec.fetch(index)
        near = codec.k.nbytes + codec.v.nbytes
        self._bytes = {"payload": near, "meta": looked, "host": fetched, "moved": looked + fetched}
        k, v = torch.cat((codec.k, k), 2), torch.cat((codec.v, v), 2)
        return Attention(q, k, v, scale, None, None).output()

    def read_bytes(self) -> dict[str, int]:
        return self._bytes

    def take_rows(self, rows: LongTensor) -> None:
        self.largest = self.largest.index_select(0, rows)

    def tensors(self) -> dict[str, Tensor]:
        return {"largest": self.largest} if hasattr(self, "largest") else {}


def spread(weights: Tensor, seen: LongTensor, share: float = 0.05) -> Tensor:
    """1 - the mean mass of the largest `share` of the weights that a query can see (the paper's P).

    Parameters: weights [..., T, S], rows that sum to 1 over what query t sees, 0 elsewhere; seen [T], the
    slots that each sees; share in (0, 1]. Near 0 if attention picks single tokens, 1 - share if it is
    uniform. Raises ValueError for another share.

    >>> spread(torch.full((1, 100), 0.01), torch.tensor([100])).item()
    0.949...
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: {share}; allowed: more than 0, at most 1")
    mass = weights.float().sort(-1, descending=True).values.cumsum(-1)
    top = (seen * share).ceil().long().clamp(min=1) - 1
    return 1 - mass.gather(-1, top[:, None].expand(*mass.shape[:-1], 1)).mean()


@torch.no_grad()
def layer_density(model: nn.Module, ids: LongTensor, last: int = 32, share: float = 0.05) -> Tensor:
    """Return P of each layer, [L]: `spread` of the last queries of a text, under the causal mask.

    The released search leaves the mask out inside these last rows; there, weights on later tokens count.

    Parameters: model; ids [B, T], T > 1, without padding; last >= 1 queries; share in (0, 1]. Raises
    ValueError for others.
    """
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ValueError(f"ids: shape {list(ids.shape)}; allowed: [B, T], T from 2")
    probe = _Probe(_size("last", last, 1), share)
    model(ids, past_key_values=KVCache(model, probe))
    return torch.stack(probe.found)


def tailor(
    density: Sequence[float] | Tensor, threshold: float = 0.2, *, budget: int = 128, channels: int = 8,
    first: int = 8, last: int = 56, group: int = 64, residual: int = 128, value_group: int | None = None,
) -> tuple[list[Codec], list[Reader]]:  # fmt: skip
    """Assign a codec and a reader to each layer: KIVI at 1 bit where P > threshold, else offloading.

    Parameters: density, P of each layer (`layer_density`); threshold (the paper: 0.2; small models need one
    of their own); the others as in `TailorKV`, `Offloaded`, `KIVI` (the paper's defaults). Raises ValueError
    for an empty density, for one outside [0, 1] or NaN, and as those do.

    >>> codecs, readers = tailor([0.6, 0.1])
    >>> [type(c).__name__ for c in codecs], [type(r).__name__ for r in readers]
    (['KIVI', 'Offloaded'], ['ReadAll', 'TailorKV'])
    """
    density = [float(p) for p in density]
    if not density or not all(0 <= p <= 1 for p in density):
        raise ValueError(f"density: {density}; allowed: one number in [0, 1] for each layer")
    codecs: list[Codec] = []
    readers: list[Reader] = []
    for p in density:
        if p > threshold:
            codecs.append(KIVI(1, group=group, residual=residual, value_group=value_group))
            readers.append(ReadAll())
        else:
            codecs.append(Offloaded(first, last))
            readers.append(TailorKV(budget, channels))
    return codecs, readers


class _Probe(KVPolicy):
    needs = frozenset({"attn_lastw"})

    def __init__(self, last: int, share: float) -> None:
        self.last, self.share, self.found = last, share, []

    def observe(self, v: View) -> None:
        weights = v.attn_lastw(self.last)
        seen = torch.arange(v.S - weights.shape[3] + 1, v.S + 1, device=v.device)
        self.found.append(spread(weights, seen, self.share))
