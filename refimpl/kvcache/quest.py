"""Quest (2406.10774): bounds of whole pages choose which pages a query reads; nothing is evicted."""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.codecs import Codec
from refimpl.kvcache.policies import _size
from refimpl.kvcache.readers import Reader

__all__ = ["Quest"]


class Quest(Reader):
    """Read the pages with the largest upper bound of q · k (2406.10774, section 3.3).

    A page is `page` tokens in a row. Of its keys the least and the largest value of each channel are stored,
    lo and hi [B, G, P, D], and sum_c max(q_c lo_c, q_c hi_c) is at least every q · k of the page. Each query
    head reads its best max(3, budget / page) pages, the growing last one if it is among them. The paper
    reads everything in the first two layers: `reader=[ReadAll()] * 2 + [Quest(256)] * (L - 2)`. Storage grows
    by the bounds; what shrinks is reading.

    Parameters: budget >= 1, tokens that a query head reads (the paper: 256 to 4096); page >= 1 tokens (16);
    shared: the R query heads of a KV head read the same pages, those with the largest bound of any of them
    (the paper has no such heads). Raises ValueError for others.

    >>> quest = Quest(budget=2, page=1)
    >>> quest.bound(torch.tensor([1., -2.]), torch.tensor([[-1., 0.]]), torch.tensor([[3., 5.]])).tolist()
    [3.0]
    """

    def __init__(self, budget: int, page: int = 16, shared: bool = False) -> None:
        self.budget, self.page, self.shared = _size("budget", budget, 1), _size("page", page, 1), shared

    @staticmethod
    def bound(q: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """sum_c max(q_c lo_c, q_c hi_c) of q [..., D] for pages lo, hi [..., P, D] -> [..., P]."""
        q = q[..., None, :]
        return (q.clamp(min=0) @ hi.mT + q.clamp(max=0) @ lo.mT)[..., 0, :]

    def build(self, codec: Codec, q: Tensor, ok: Tensor | None) -> None:
        k = codec.read()[0]
        # Pages are counted from a row's first token: padding changes nothing.
        self.start = None if ok is None else ok.int().argmax(-1, keepdim=True)
        self.S, self.lo = 0, k.new_empty(*k.shape[:2], 0, k.shape[3])
        self.hi = self.lo
        self.append(k)

    def append(self, k: Tensor) -> None:
        slot = torch.arange(self.S, self.S + k.shape[2], device=k.device)
        self.S += k.shape[2]
        low = high = k
        if self.start is not None:
            slot = slot - self.start
            low, high = (k.masked_fill((slot < 0)[..., None], end) for end in (torch.inf, -torch.inf))
        new = -(-self.S // self.page) - self.lo.shape[2]
        if new:
            empty = k.new_full((*k.shape[:2], new, k.shape[3]), torch.inf)
            self.lo, self.hi = torch.cat((self.lo, empty), 2), torch.cat((self.hi, -empty), 2)
        at = (slot.clamp(min=0) // self.page)[..., None].expand(k.shape)
        self.lo.scatter_reduce_(2, at, low, "amin")
        self.hi.scatter_reduce_(2, at, high, "amax")

    def select(self, q: Tensor) -> LongTensor:
        bound = self.bound(q[:, :, :, 0], self.lo[:, :, None], self.hi[:, :, None])  # [B, G, R, P]
        first = torch.arange(0, self.lo.shape[2] * self.page, self.page, device=q.device)
        if self.start is not None:  # a padded row has fewer pages
            bound = bound.masked_fill((first + self.start >= self.S)[:, :, None], -torch.inf)
        if self.shared:
            bound = bound.amax(2)
        best = bound.topk(min(max(3, self.budget // self.page), bound.shape[-1]), sorted=False).indices
        slots = (first[best][..., None] + torch.arange(self.page, device=q.device)).flatten(-2)
        if self.start is not None:
            slots = slots + (self.start if self.shared else self.start[:, :, None])
        return slots.masked_fill(slots >= self.S, -1)  # the last page may not be full

    def read_bytes(self) -> dict[str, int]:
        return super().read_bytes() | {"meta": self.lo.nbytes + self.hi.nbytes}

    def take_rows(self, rows: LongTensor) -> None:
        self.lo, self.hi = self.lo.index_select(0, rows), self.hi.index_select(0, rows)
        if self.start is not None:
            self.start = self.start.index_select(0, rows)

    def tensors(self) -> dict[str, Tensor]:
        return {"lo": self.lo, "hi": self.hi} if hasattr(self, "lo") else {}
