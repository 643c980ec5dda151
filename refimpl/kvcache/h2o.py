"""H2O: keep the tokens that received most attention so far, and the most recent ones."""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.importance import norm_slot, note_norms
from refimpl.kvcache.policies import KVPolicy, _size
from refimpl.kvcache.slots import best
from refimpl.kvcache.view import View

__all__ = ["H2O"]


class H2O(KVPolicy):
    """Keep `heavy` heavy hitters and the last `recent` tokens, for each KV head its own (2306.14048, [113]).

    A heavy hitter is a token with much accumulated attention, from the first prompt query on:

        acc_i = sum over all queries t since i arrived, and over the R heads of the group, of alpha[t, i].

    After every forward the slots that are neither recent nor among the `heavy` largest acc lose key, value
    and acc; survivors keep theirs. The official code knows one head per key only; its mean over a group would
    rank as our sum does. Sums favour old tokens: that is H2O. State: 4 bytes (float32) per slot.

    With `p` the score is acc_i · ||v_i||_p, which is VATP (2406.12335; its authors take p = 1 and sink = 20).
    The norm is taken once, on arrival, and is another 4 bytes of state.

    Parameters
    - heavy, recent: tokens, >= 0, together at least 1. The paper takes a tenth of the prompt's length each.
    - p: None (H2O), or the norm of the values, 1 or 2, see `token_importance`.
    - sink: first tokens that always stay, beside `heavy` and `recent`; >= 0. Their values are short, so that
      a score with `p` would drop them.

    Attributes: budget, sink + heavy + recent. Raises ValueError for other values.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model = tiny("llama")
    >>> cache = KVCache(model, H2O(heavy=3, recent=2))
    >>> out = model(random_ids(1, 10), past_key_values=cache)
    >>> cache.held(0).tolist(), cache.layers[0].pos[0, 0, -2:].tolist()
    ([[5, 5]], [8, 9])
    """

    slots = {"acc": torch.float32}
    needs = frozenset({"attn"})

    def __init__(self, heavy: int, recent: int, *, p: int | None = None, sink: int = 0) -> None:
        self.heavy, self.recent = _size("heavy", heavy, 0), _size("recent", recent, 0)
        self.sink = _size("sink", sink, 0)
        self.slots = H2O.slots | norm_slot(p)
        self.p, self.budget = p, self.sink + self.heavy + self.recent
        self.steady = self.budget
        if not self.heavy + self.recent:
            raise ValueError("heavy, recent: 0 and 0; allowed: together at least 1, or nothing new can stay")

    def observe(self, v: View) -> None:
        v.slot["acc"] += v.attn_sum().sum(2)
        if self.p is not None:
            note_norms(v, self.p)

    def score(self, v: View) -> Tensor:
        """Score of every slot, [B, G, S], >= 0."""
        acc = v.slot["acc"]
        return acc if self.p is None else acc * v.slot["norm"]

    def replace(self, v: View) -> LongTensor:
        pinned = v.pos >= v.seen - self.recent
        if self.sink:
            pinned = pinned | (v.pos < self.sink)
        return self.score(v).masked_fill(pinned, torch.inf).argmin(-1)

    def keep(self, v: View) -> LongTensor | None:
        if v.S <= self.budget:
            return None
        pinned = v.rank >= v.count - self.recent
        if self.sink:
            pinned = pinned | (v.rank < self.sink)
        score = self.score(v).masked_fill(pinned, torch.inf)
        return best(score if v.full else score.masked_fill(~v.ok, -1), self.budget)
