"""TOVA: keep the tokens to which the newest token attends most."""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.importance import norm_slot, note_norms
from refimpl.kvcache.policies import KVPolicy, _size
from refimpl.kvcache.slots import best
from refimpl.kvcache.view import View

__all__ = ["TOVA"]


class TOVA(KVPolicy):
    """Keep the `budget` slots with the largest weight of the last query, averaged over heads (2401.06104).

    All heads of a layer keep the same slots, and nothing is remembered from step to step. No token is
    protected: a token that does not attend to itself goes at once.

    With `p` the score is survey Eq. 11 as it is printed: alpha_i · ||v_i||_p, summed over all heads of the
    layer, for the last query. The norm is taken once, on arrival: 4 bytes of state for each slot and KV head.

    Parameters
    - budget: tokens, >= 1.
    - p: None (TOVA), or the norm of the values, 1 or 2, see `token_importance`.
    - newest: whether the newest token stays in any case, as in kvpress' version; default False, the paper's.

    Raises ValueError for other values.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model = tiny("llama")
    >>> cache = KVCache(model, TOVA(4))
    >>> out = model(random_ids(1, 10), past_key_values=cache)
    >>> cache.layers[0].pos.shape  # one list of positions for all heads
    torch.Size([4])
    """

    needs = frozenset({"attn_lastw"})

    def __init__(self, budget: int, *, p: int | None = None, newest: bool = False) -> None:
        self.budget = self.steady = _size("budget", budget, 1)
        self.slots = norm_slot(p)
        if not isinstance(newest, bool):
            raise ValueError(f"newest: {newest!r}; allowed: True, False")
        self.p, self.newest = p, newest

    def observe(self, v: View) -> None:
        if self.p is not None:
            note_norms(v, self.p)

    def score(self, v: View) -> Tensor:
        """Score of every slot for the whole layer, [B, S], >= 0."""
        weights = v.attn_lastw(1).sum((2, 3), dtype=torch.float32)
        return (weights if self.p is None else weights * v.slot["norm"]).sum(1)

    def replace(self, v: View) -> LongTensor:
        score = self.score(v)
        if self.newest:
            score = score.masked_fill(v.pos[:, 0] == v.seen - 1, torch.inf)
        dropped = score.argmin(-1)[:, None]
        return dropped if len(dropped) == 1 else dropped.expand(-1, v.shape[1])

    def keep(self, v: View) -> LongTensor | None:
        if v.S <= self.budget:
            return None
        score = self.score(v)
        if self.newest:
            score[:, -1] = torch.inf
        if not v.full:
            score = score.masked_fill(~v.ok.any(1), -1)
        kept = best(score, self.budget)
        # One row needs no copy for each head: its positions are stored once.
        return kept[0] if len(kept) == 1 else kept[:, None].expand(-1, v.shape[1], -1)
