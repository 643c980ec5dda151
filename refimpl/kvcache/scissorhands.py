"""Scissorhands: drop, in bulk, the tokens whose attention was below average most often of late.

The paper's second algorithm prints weight > 1/t where its comment has low scores marked, and clears all but
the recent window where its comment keeps that: the comments are followed here, and 1 over the tokens held
takes the place of 1/t, t the step. Not here: larger budgets for later layers. The released code is another
rule, for measuring perplexity, without a budget: it masks what is in the largest tenth of none of the last
100 rows, but for the 10 latest tokens.
"""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.policies import KVPolicy, _size
from refimpl.kvcache.slots import best
from refimpl.kvcache.view import View

__all__ = ["Scissorhands", "persistence"]

BITS = 64  # rows of history in one int64 state


class Scissorhands(KVPolicy):
    """Keep at most `budget` tokens, those least often unimportant in the last `history` rows (2305.17118).

    A token is unimportant to a query if its weight, averaged over the heads of the group, lies below 1 over
    the number of tokens held at that step. Whenever more than `budget` are held, each KV head drops the
    `drop` tokens with the highest count of such rows; the `recent` last ones count as 0, and among equals the
    older goes. So evictions are rare and in bulk, and held counts move between budget - drop + 1 and budget.
    A prompt that is too long loses as many times `drop` as it takes.

    It is a count of thresholded rows, not a sum of weights: what mattered only more than `history` rows ago
    loses its protection. State: one bit for each slot and row, packed into 8 bytes for 64 rows.

    Parameters, in tokens
    - budget: >= 2.
    - recent: 0 to budget - drop; the paper: 10.
    - history: rows w, >= 1; the paper: 400.
    - drop: m, 1 to budget; default half of the budget, the paper's.

    Raises ValueError for other values.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model = tiny("llama")
    >>> cache = KVCache(model, Scissorhands(8, recent=2, history=16, drop=3))
    >>> held = []
    >>> for token in random_ids(1, 12).T:
    ...     out = model(token[None], past_key_values=cache)
    ...     held.append(int(cache.held(0)[0, 0]))
    >>> held
    [1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 6]
    """

    needs = frozenset({"attn_lastw"})

    def __init__(
        self, budget: int, *, recent: int = 10, history: int = 400, drop: int | None = None
    ) -> None:  # fmt: skip
        self.budget, self.history = _size("budget", budget, 2), _size("history", history, 1)
        self.drop = _size("drop", budget // 2 if drop is None else drop, 1)
        self.recent = _size("recent", recent, 0)
        if self.drop > self.budget:
            raise ValueError(f"drop: {drop}; allowed: 1 to {budget}, the budget")
        if self.recent > self.budget - self.drop:
            raise ValueError(f"recent: {recent}; allowed: 0 to {self.budget - self.drop} (budget - drop)")
        self.slots = {"low": (torch.int64, -(-self.history // BITS))}

    def observe(self, v: View) -> None:
        """Write the rows of the last `history` queries over the oldest ones: row t is bit t mod history."""
        first = v.seen - v.T
        t = max(first, v.seen - self.history)
        while t < v.seen:  # rows of one word at a time
            word, bit = divmod(t % self.history, BITS)
            stop = min(t - bit + BITS, t + self.history - t % self.history, v.seen)
            low = self._below_average(v, slice(t - first, stop - first))
            self._write(v.slot["low"][..., word], low, bit)
            t = stop

    def _below_average(self, v: View, part: slice) -> Tensor:
        """Whether slots that a query could have kept [B, G, t, S] got less than the average weight."""
        weights = v.attn_rows(part).mean(2, dtype=torch.float32)
        if v.T == 1 and v.full:
            return weights < 1 / v.S
        # Tokens to come are not there yet; those outside a model's own window are, with weight 0.
        there = v.attention.pos[..., None, :] <= v.attention.at[..., part, None]
        there = there.expand(weights.shape) & v.ok[:, :, None]
        return there & (weights < 1 / there.sum(-1, keepdim=True).clamp(min=1))

    @staticmethod
    def _write(state: Tensor, low: Tensor, bit: int) -> None:
        n = low.shape[2]
        old = sum(1 << b for b in range(bit, bit + n))
        old -= (old >> (BITS - 1)) << BITS  # as a signed number
        at = torch.arange(bit, bit + n, device=low.device)[:, None]
        state.bitwise_and_(~old).bitwise_or_((low.long() << at).sum(2))

    def counts(self, v: View) -> LongTensor:
        """In how many of the last rows each slot was unimportant, [B, G, S]; 0 for the recent ones."""
        counts = _ones(v.slot["low"]).sum(-1)
        return counts.masked_fill(v.rank >= v.count - self.recent, 0)

    def keep(self, v: View) -> Tensor | None:
        if v.S <= self.budget:
            return None
        # One integer orders by count first, then by age.
        key = self.counts(v) * v.S + (v.S - 1 - v.rank)
        if v.full:
            return best(-key, v.S - self.drop * -(-(v.S - self.budget) // self.drop))
        times = ((v.count - self.budget).clamp(min=0) + self.drop - 1) // self.drop
        place = key.masked_fill(~v.ok, torch.iinfo(key.dtype).max).argsort(-1).argsort(-1)
        return place < v.count - self.drop * times


def persistence(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Measure the persistence of importance on one text: do tokens that matter later matter already before?

    A token is pivotal for query t if its weight exceeds the average 1 / (t + 1). With P the tokens of the
    first half that are pivotal for some query of the first half, and Q those that are for some query of the
    second half, the paper's persistence ratio is |P ∩ Q| / |Q|. A random set as large as P would reach the
    share |P| / (T // 2), which must be reported beside it.

    Parameters: weights, causal softmax weights [..., T, T] of a whole text, T >= 2.
    Returns ratio and share, each [...]; the ratio is NaN where Q is empty. Raises ValueError for another
    shape or dtype.

    >>> weights = torch.tensor([[1., 0, 0, 0], [.9, .1, 0, 0], [.8, .1, .1, 0], [.7, .1, .1, .1]])
    >>> persistence(weights)  # token 0 matters to tokens 1, 2 and 3
    (tensor(1.), tensor(0.5000))
    """
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise ValueError(f"weights: {getattr(weights, 'dtype', type(weights).__name__)}; allowed: floats")
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2] or weights.shape[-1] < 2:
        raise ValueError(f"weights: shape {list(weights.shape)}; allowed: [..., T, T], T >= 2")
    T = weights.shape[-1]
    half = T // 2
    average = 1 / torch.arange(1, T + 1, device=weights.device)
    pivotal = weights[..., :half] > average[:, None]
    before, after = pivotal[..., :half, :].any(-2), pivotal[..., half:, :].any(-2)
    return (before & after).sum(-1) / after.sum(-1), before.float().mean(-1)


def _ones(words: Tensor) -> LongTensor:
    """Number of ones in each int64, by adding neighbouring bits, pairs, nibbles, bytes."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (words * 0x0101010101010101) >> 56
