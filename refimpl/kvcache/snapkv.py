"""SnapKV: the end of the prompt votes once for what stays of the rest; and its split over heads, AdaKV."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from refimpl.kvcache.policies import KVPolicy, _size
from refimpl.kvcache.slots import best
from refimpl.kvcache.view import View

__all__ = ["AdaSnapKV", "SnapKV", "votes"]

POOLING = ("avg", "max")


class SnapKV(KVPolicy):
    """Compress the prompt once, at its end; what is generated afterwards all stays (2404.14469).

    The last w tokens (the observation window) vote for key s < n - w with the attention they pay to it,
    pooled over neighbours so that whole phrases stay:

        vote(s) = mean over the R queries that share a KV head of pool_k( sum over i >= n - w of A[i, s] ).

    Each KV head keeps the window and its capacity - w best. The paper keeps one cache per query head; with
    grouped queries that would store each key R times, so here the votes of a group are averaged.

    Parameters
    - capacity: tokens that stay of the prompt, the window included; > window. A shorter prompt stays whole.
      Released code: 2048; the papers compare 64-4096.
    - window: w, 8-64 (released code 32).
    - kernel: k, odd, 5 or 7; 1 switches pooling off.
    - pooling: "avg" (neighbours beyond the ends count as zeros) or "max".
    Raises ValueError for others.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model = tiny("llama")
    >>> cache = KVCache(model, SnapKV(10, window=4, kernel=3))
    >>> out = model(random_ids(1, 24), past_key_values=cache)
    >>> cache.held(0).tolist(), cache.layers[0].pos[0, 1, -4:].tolist()
    ([[10, 10]], [20, 21, 22, 23])
    """

    needs, once = frozenset({"attn_lastw"}), True

    def __init__(self, capacity: int, window: int = 32, kernel: int = 5, pooling: str = "avg") -> None:
        self.window, self.kernel = _size("window", window, 1), _size("kernel", kernel, 1)
        self.capacity = _size("capacity", capacity, window + 1)
        if kernel % 2 == 0:
            raise ValueError(f"kernel: {kernel}; allowed: odd numbers, so that a pool has a middle")
        if pooling not in POOLING:
            raise ValueError(f"pooling: {pooling!r}; allowed: {', '.join(POOLING)}")
        self.pooling = pooling

    def capacity_of(self, v: View) -> int | LongTensor:
        """Slots that each head of this layer keeps; a tensor [B, G, 1] if it depends on a row's length."""
        return self.capacity

    def score(self, v: View) -> Tensor:
        """Votes [B, G, S]; infinite in the window, -1 at padding."""
        return votes(v, self.window, self.kernel, self.pooling)

    def keep(self, v: View) -> Tensor | LongTensor | None:
        n = self.capacity_of(v)
        if isinstance(n, Tensor):
            return first(self.score(v), n)
        return None if v.S <= n else best(self.score(v), n)


class AdaSnapKV(SnapKV):
    """SnapKV with the G heads of a layer sharing capacity · G slots (AdaKV, 2407.11550).

    The best slots of all heads together stay, so that a head with scattered attention gets more of them than
    one that looks at a few tokens; the memory of a head that keeps less is really free. Each head keeps at
    least its best `floor` · capacity, and its window.

    Parameters: as `SnapKV`, and floor in [0, 1], 0.2 in the paper; 1 is SnapKV. Raises ValueError.

    >>> AdaSnapKV(64, floor=1.5)
    Traceback (most recent call last):
    ValueError: floor: 1.5; allowed: 0 to 1
    """

    def __init__(
        self, capacity: int, window: int = 32, kernel: int = 5, pooling: str = "avg", floor: float = 0.2
    ) -> None:
        super().__init__(capacity, window, kernel, pooling)
        if not 0 <= floor <= 1:
            raise ValueError(f"floor: {floor}; allowed: 0 to 1")
        self.floor = floor

    def keep(self, v: View) -> Tensor | None:
        if v.S <= self.capacity:
            return None
        score = self.score(v)
        least = int(self.floor * self.capacity)
        if least > 0:
            score = score.scatter(-1, score.topk(least).indices, torch.inf).masked_fill(~v.ok, -1)
        B, G, _ = v.shape
        n = self.capacity * G if v.full else (v.count.clamp(max=self.capacity)).sum((1, 2))[:, None]
        return first(score.flatten(1), n).view(v.shape)


def votes(v: View, window: int, kernel: int, pooling: str) -> Tensor:
    """Pooled attention [B, G, S] that the last `window` queries pay; infinite inside it, -1 at padding.

    >>> from refimpl.kvcache.attention import Attention
    >>> at = torch.arange(6)
    >>> q, k = torch.zeros(1, 1, 1, 6, 4), torch.zeros(1, 1, 6, 4)
    >>> v = View(Attention(q, k, k, 0.5, at, at), read=lambda: (k, k), pos=at, shape=(1, 1, 6), layer=0,
    ...     n_layers=1, prefill=True, seen=6)
    >>> votes(v, 1, 3, "avg")[0, 0].tolist()  # each of 6 keys gets 1/6; the ends are pooled with a zero
    [0.111..., 0.166..., 0.166..., 0.166..., 0.111..., inf]
    """
    past = v.attn_lastw(window)[..., : v.S - window].sum(3, dtype=torch.float32).flatten(1, 2)
    if pooling == "avg":
        past = F.avg_pool1d(past, kernel, 1, kernel // 2)
    else:
        past = F.max_pool1d(past, kernel, 1, kernel // 2)
    score = F.pad(past.unflatten(1, v.q.shape[1:3]).mean(2), (0, window), value=math.inf)
    return score if v.full else score.masked_fill(~v.ok, -1)


def first(score: Tensor, n: int | Tensor, most: int | None = None) -> Tensor:
    """Mask of the n largest scores [..., S]; n may differ by row: a tensor [..., 1], nowhere above `most`.

    >>> first(torch.tensor([[3.0, 9.0, 1.0], [3.0, 9.0, 1.0]]), torch.tensor([[1], [2]])).tolist()
    [[False, True, False], [True, True, False]]
    """
    if most is None:
        order = score.argsort(dim=-1, descending=True, stable=True)
    else:  # a part of the order is faster
        order = score.topk(most).indices
    place = torch.arange(order.shape[-1], device=score.device).expand_as(order)
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, place < n)
