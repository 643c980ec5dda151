"""Plausible but wrong H2O, Scissorhands and TOVA that their checks must reject."""

import torch

from refimpl.kvcache.h2o import H2O
from refimpl.kvcache.scissorhands import Scissorhands
from refimpl.kvcache.slots import best
from refimpl.kvcache.tova import TOVA


class WindowOnly(H2O):
    """Switched off: nothing is a heavy hitter, the last tokens stay."""

    def observe(self, v):
        v.slot["acc"][:] = torch.arange(v.S)


class LastQueryOnly(H2O):
    def observe(self, v):
        v.slot["acc"][:] = v.attn_lastw(1).sum((2, 3))


class MeanOverItsLife(H2O):
    """The mean attention since a token's arrival, which does not favour old tokens."""

    def score(self, v):
        return super().score(v) / (v.seen - v.pos)


class Inherited(H2O):
    """The sums stay where they are while the slots move up: a dropped token's goes to its successor."""

    slots = {**H2O.slots, "at": torch.long}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept = None

    def observe(self, v):
        if self.kept is not None:
            v.slot["acc"][..., : self.kept.shape[-1]] = self.kept
        super().observe(v)

    def keep(self, v):
        keep = super().keep(v)
        self.kept = None if keep is None else v.slot["acc"][..., : keep.shape[-1]].clone()
        return keep


class NoRecent(H2O):
    def __init__(self, heavy, recent, **kwargs):
        super().__init__(heavy, recent, **kwargs)
        self.recent = 0


class PromptNotCounted(H2O):
    def observe(self, v):
        if not v.prefill:
            super().observe(v)


class FirstHeadOfTheGroup(H2O):
    def observe(self, v):
        v.slot["acc"] += v.attn_sum()[:, :, 0]
        if self.p is not None:
            v.slot["norm"][:] = v.v.norm(p=self.p, dim=-1)


class RecentMayGo(H2O):
    """While it generates, the recent tokens compete with the heavy hitters."""

    def replace(self, v):
        return self.score(v).argmin(-1)


class HeadsDropAlone(TOVA):
    """While it generates, each KV head drops the token to which it attends least."""

    def replace(self, v):
        return v.attn_lastw(1).sum((2, 3)).argmin(-1)


class HeadsChooseAlone(TOVA):
    def keep(self, v):
        if v.S <= self.budget:
            return None
        score = v.attn_lastw(1).mean((2, 3))
        if self.newest:
            score[..., -1] = torch.inf
        return best(score, self.budget)


class NewestAlwaysStays(TOVA):
    def __init__(self, budget, **kwargs):
        super().__init__(budget, **{**kwargs, "newest": True})


class Remembers(TOVA):
    slots = {"acc": torch.float32}

    def __init__(self, budget, **kwargs):
        super().__init__(budget, **kwargs)
        self.slots = Remembers.slots

    def keep(self, v):
        v.slot["acc"] += v.attn_sum().sum(2)
        if v.S <= self.budget:
            return None
        score = v.slot["acc"].sum(1)
        if self.newest:
            score[:, -1] = torch.inf
        return best(score, self.budget)[:, None].expand(-1, v.shape[1], -1)


class LastTokens(TOVA):
    def keep(self, v):
        return None if v.S <= self.budget else torch.arange(v.S - self.budget, v.S)


class SumsAttention(Scissorhands):
    """A sum of weights in place of a count of rows."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.slots = self.slots | {"acc": torch.float32}

    def observe(self, v):
        super().observe(v)
        v.slot["acc"] += v.attn_sum().mean(2)

    def counts(self, v):
        mass = v.slot["acc"]
        low = (1000 * (mass.amax(-1, keepdim=True) - mass)).long()
        return low.masked_fill(v.rank >= v.count - self.recent, 0)


class NeverForgets(Scissorhands):
    def __init__(self, budget, **kwargs):
        super().__init__(budget, **{**kwargs, "history": 1000})


class OneAtATime(Scissorhands):
    def __init__(self, budget, **kwargs):
        super().__init__(budget, **kwargs)
        self.drop = 1


class RecentCounted(Scissorhands):
    def __init__(self, budget, **kwargs):
        super().__init__(budget, **kwargs)
        self.recent = 0


class FutureCounted(Scissorhands):
    """Tokens that a query of the prompt could not see yet count as unimportant to it."""

    def _below_average(self, v, part):
        return v.attn_rows(part).mean(2) < 1 / v.S


class Window(Scissorhands):
    """Switched off: no token is ever unimportant, the oldest go."""

    def _below_average(self, v, part):
        return super()._below_average(v, part) & False


MUTANTS = [
    ("h2o", "no heavy hitters: a window", WindowOnly),
    ("h2o", "only the last query counts", LastQueryOnly),
    ("h2o", "mean over a token's life, not the sum", MeanOverItsLife),
    ("h2o", "a dropped token's sum is inherited by its successor", Inherited),
    ("h2o", "recent tokens are not protected", NoRecent),
    ("h2o", "attention of the prompt is not counted", PromptNotCounted),
    ("h2o", "one query head stands for its group", FirstHeadOfTheGroup),
    ("h2o", "recent tokens are not protected in decoding", RecentMayGo),
    ("tova", "each head chooses for itself", HeadsChooseAlone),
    ("tova", "each head chooses for itself in decoding", HeadsDropAlone),
    ("tova", "the newest token always stays", NewestAlwaysStays),
    ("tova", "attention is accumulated", Remembers),
    ("tova", "the last tokens stay", LastTokens),
    ("scissorhands", "attention is summed, not counted", SumsAttention),
    ("scissorhands", "the history has no end", NeverForgets),
    ("scissorhands", "one token is dropped at a time", OneAtATime),
    ("scissorhands", "recent tokens are counted like others", RecentCounted),
    ("scissorhands", "tokens to come count as unimportant", FutureCounted),
    ("scissorhands", "nothing counts: the oldest go", Window),
]
