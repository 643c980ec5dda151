"""DynamicKV: budgets of layers from where the largest votes of the whole model fall."""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.policies import _size
from refimpl.kvcache.snapkv import SnapKV, first
from refimpl.kvcache.view import View

__all__ = ["DynamicKV", "layer_budgets"]


class DynamicKV(SnapKV):
    """Give each layer slots by its share of the model's largest SnapKV votes (2412.14838; survey [120]).

    With b = capacity - window: each layer is first cut to its best most · b votes and the window. After every
    m-th layer the votes of all layers so far are compared as they are; of the G · b · l largest of l layers,
    layer i holds a share p_i, and is cut to p_i · b · L. After the last layer these budgets are rounded by
    largest remainders and sum to b · L. All heads of a layer keep the same number, each its own best.

    Parameters: as `SnapKV` (the paper: window 8-64, kernel 7), and
    - most: a layer's largest budget over b, >= 1; 10 in the released code.
    - every: m, >= 1; 4 in the released code.
    Raises ValueError. The released code rounds otherwise (it hands what is left to the last layer), and works
    on votes and caches of single query heads.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model = tiny("llama")
    >>> cache = KVCache(model, DynamicKV(10, window=4, kernel=3, every=2))
    >>> out = model(random_ids(1, 30), past_key_values=cache)
    >>> sum(int(cache.held(l)[0, 0]) for l in range(3))  # 3 layers of 10 on average
    30
    """

    slots = {"vote": torch.float32}

    def __init__(
        self, capacity: int, window: int = 32, kernel: int = 7, pooling: str = "avg", most: float = 10.0,
        every: int = 4,
    ) -> None:  # fmt: skip
        super().__init__(capacity, window, kernel, pooling)
        if not most >= 1:
            raise ValueError(f"most: {most}; allowed: 1 and more")
        self.most, self.plan_every = most, _size("every", every, 1)

    def observe(self, v: View) -> None:
        if v.S > self.capacity:
            v.slot["vote"].copy_(self.score(v))

    def keep(self, v: View) -> Tensor | None:
        most = self.window + int(self.most * (self.capacity - self.window))
        return first(v.slot["vote"], most) if v.S > most else None

    def plan(self, views: list[View]) -> list[Tensor | None]:
        if views[0].seen <= self.capacity:
            return [None] * len(views)
        votes, L = [v.slot["vote"].masked_fill(~v.ok, -1) for v in views], views[0].n_layers
        budgets = layer_budgets(votes, self.capacity - self.window, grow=L / len(views))
        return [
            first(vote, budget[:, None, None] + self.window)
            for vote, budget in zip(votes, budgets, strict=True)
        ]


def layer_budgets(votes: list[Tensor], base: int, grow: float = 1.0) -> LongTensor:
    """Split l · base slots among l layers by their numbers of votes among the G · l · base largest.

    Parameters
    - votes: [B, G, S] of each layer, S may differ; infinite ones (the window) and negative ones (padding) do
      not count.
    - base: average slots of a layer, >= 1.
    - grow: every budget times this, rounded up, while layers are still to come; 1 rounds to the exact sum.

    Returns the budgets [l, B]. Raises ValueError for no layers and base < 1.

    >>> a = torch.tensor([[[4.0, 3.0, 2.0, 1.0]]])
    >>> layer_budgets([a, a], 2).flatten().tolist(), layer_budgets([10 * a, a], 2).flatten().tolist()
    ([2, 2], [4, 0])
    """
    if not votes:
        raise ValueError("votes: no layers; allowed: a list of one tensor or more")
    B, G, _ = votes[0].shape
    n = _size("base", base, 1) * G * len(votes)
    pool = torch.cat([vote.masked_fill(vote.isinf(), -1).flatten(1) for vote in votes], 1)
    best = pool.topk(min(n, pool.shape[1]))
    ends = torch.tensor([G * vote.shape[2] for vote in votes], device=pool.device).cumsum(0)
    layer = torch.bucketize(best.indices, ends, right=True)
    counts = layer.new_zeros(B, len(votes)).scatter_add_(1, layer, (best.values >= 0).long())
    if grow > 1:
        return (counts * (grow / G)).ceil().long().T
    whole, rest = counts // G, counts % G
    missing = counts.sum(1, keepdim=True) // G - whole.sum(1, keepdim=True)
    return (whole + first(rest, missing)).T
