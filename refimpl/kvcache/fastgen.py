"""FastGen: each head gets the cheapest of five fixed rules that loses little of its attention.

Equation 1 of the paper bounds |A - softmax(Q K_C)| by 1 - T and names no norm; here it is half of the sum
of absolute differences, averaged over rows, which is the mass missed, as the paper's section 4.1 counts it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.policies import KVPolicy
from refimpl.kvcache.snapkv import first
from refimpl.kvcache.view import View

__all__ = ["RULES", "FastGen"]

RULES = ("special", "+ punctuation", "+ frequent", "+ local", "full")
SPECIAL, PUNCTUATION = 2, 1


class FastGen(KVPolicy):
    """Choose a rule for each KV head from its attention in the prompt, then evict by it (2310.01801).

    A is a head's causal attention [n, n], averaged over the R queries that share it. The rules keep more and
    more: special tokens; punctuation too; the frequent tokens too (the r_f · n with the largest column sums
    of A); the local ones too (the last r_l · n); everything. A rule recovers the mass of A on what it keeps,

        recovery(C) = 1/n sum over i, s of A[i, s] [s in C_i],   the local part of C_i moving with i,

    and the first with recovery >= `recovery` is taken. While decoding, special tokens and punctuation of the
    heads that keep them stay for good, the local part slides, and the frequent tokens are those of largest
    mass so far, r_f of the tokens so far. Heads hold different numbers of slots, and only these.

    The authors released no code; the reproduction that they point to (cold-compress) adds the first four
    tokens to every rule, ranks by the mean over queries, and takes the frequent ones from the other tokens.

    Parameters
    - special, punctuation: token ids of the two classes; not both empty.
    - recovery: T > 0, in the paper 0.91 to 0.98; above 1 every head keeps everything.
    - frequent, local: r_f, a share of the tokens so far, and r_l, one of the prompt, in [0, 1]; 0.3 in the
      paper, which uses one KV head per query head.
    Raises ValueError for others, and a forward without `input_ids` does.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model = tiny("llama")
    >>> cache = KVCache(model, FastGen(special=[0], punctuation=[5, 6], recovery=0.8))
    >>> out = model(random_ids(1, 24), past_key_values=cache)
    >>> [RULES[i] for i in cache.layers[0].notes["rule"].flatten()]
    ['+ local', '+ local']
    """

    slots = {"kind": torch.uint8, "mass": torch.float32}
    needs = frozenset({"attn", "ids"})

    def __init__(
        self, special: Iterable[int], punctuation: Iterable[int], recovery: float = 0.95,
        frequent: float = 0.3, local: float = 0.3,
    ) -> None:  # fmt: skip
        self.special, self.punctuation = _ids("special", special), _ids("punctuation", punctuation)
        if not len(self.special) + len(self.punctuation):
            raise ValueError("special, punctuation: both empty; allowed: token ids in one of them at least")
        if not recovery > 0:
            raise ValueError(f"recovery: {recovery}; allowed: above 0 (above 1: everything stays)")
        for name, share in (("frequent", frequent), ("local", local)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: {share}; allowed: 0 to 1, a share of the tokens")
        self.recovery, self.frequent, self.local = recovery, frequent, local
        last = int(torch.cat((self.special, self.punctuation)).max())
        self.kinds = torch.zeros(last + 2, dtype=torch.uint8)  # by id; larger ones are as the last: no member
        self.kinds[self.punctuation] = PUNCTUATION
        self.kinds[self.special] = SPECIAL
        self.least = torch.tensor([SPECIAL, PUNCTUATION, PUNCTUATION, PUNCTUATION, 0])  # by rule

    def observe(self, v: View) -> None:
        self.kinds = self.kinds.to(v.device)
        v.slot["kind"][..., -v.T :] = self.kinds[v.ids.clamp(max=len(self.kinds) - 1)][:, None]
        if not v.prefill:
            v.slot["mass"] += v.attn_sum().mean(2)
            return
        n = torch.as_tensor(v.count, device=v.device).expand(*v.shape[:2], 1)
        v.notes["padding"] = v.seen - n
        v.notes["local"] = (self.local * n).round().long()
        column, near = column_sums(v, v.notes["local"])
        v.slot["mass"].copy_(column)
        sets = self._sets(v)
        kept = [(column * s).sum(-1) for s in sets] + [torch.where(sets[-1], column, near).sum(-1)]
        missed = torch.stack(kept) / n[..., 0] < self.recovery
        v.notes["rule"] = missed.long().cumprod(0).sum(0)[..., None]

    def keep(self, v: View) -> Tensor:
        rule = v.notes["rule"]
        by_kind = v.slot["kind"] >= self.least.to(v.device)[rule]
        local = v.pos >= v.seen - v.notes["local"] * (rule >= 3)
        return by_kind | self._frequent(v, rule >= 2) | local

    def _sets(self, v: View) -> tuple[Tensor, Tensor, Tensor]:
        """What the first three rules keep, each [B, G, S]."""
        special, punctuation = v.slot["kind"] == SPECIAL, v.slot["kind"] > 0
        return special, punctuation, punctuation | self._frequent(v, 1)

    def _frequent(self, v: View, heads: Tensor | int) -> Tensor:
        """The frequent tokens [B, G, S] of the heads that are True in [B, G, 1]; none of the others."""
        number = (self.frequent * (v.seen - v.notes["padding"])).round() * heads
        most = min(v.S, int(self.frequent * v.seen) + 1)
        return first(v.slot["mass"].masked_fill(~v.ok, -1), number, most)


def column_sums(v: View, local: LongTensor) -> tuple[Tensor, Tensor]:
    """Column sums [B, G, S] of a head's attention, and those of its band of `local` [B, G, 1] diagonals.

    Computed in blocks of queries, so that a long prompt's map [n, n] never exists as a whole.
    """
    column = torch.zeros(v.shape, device=v.device)
    near = torch.zeros_like(column)
    for part in v.attention.blocks():
        weights = v.attn_rows(part).mean(2, dtype=torch.float32)
        distance = v.attention.at[..., part, None] - v.attention.pos[..., None, :]
        column += weights.sum(2)
        near += weights.masked_fill(distance >= local[..., None], 0).sum(2)
    return column, near


def _ids(name: str, ids: Iterable[int]) -> LongTensor:
    ids = [ids] if isinstance(ids, int) else list(ids)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"{name}: {ids}; allowed: token ids, integers from 0")
    return torch.tensor(ids, dtype=torch.long)
