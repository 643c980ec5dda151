"""Plausible but wrong Quest that its check must reject."""

from refimpl.kvcache.quest import Quest


class ReadsAllPages(Quest):
    """The method switched off."""

    def __init__(self, budget, page=16, shared=False):
        super().__init__(budget, page, shared)
        if budget > 1:
            self.budget = 10**6


class StaleLastPage(Quest):
    """New keys open pages, but do not widen the one that was there."""

    def append(self, k):
        old = self.lo.clone(), self.hi.clone()
        super().append(k)
        n = old[0].shape[2]
        if n:
            self.lo[:, :, :n], self.hi[:, :, :n] = old


class BoundOfTheMean(Quest):
    """The middle of a page stands for its keys."""

    @staticmethod
    def bound(q, lo, hi):
        return ((lo + hi) / 2 @ q[..., None])[..., 0]


class OneSelectionPerGroup(Quest):
    def select(self, q):
        return super().select(q)[:, :, :1].expand(-1, -1, q.shape[2], -1)


MUTANTS = [
    ("quest", "every page is read", ReadsAllPages),
    ("quest", "the bounds of the last page are stale when it grows", StaleLastPage),
    ("quest", "pages are scored by their middle, which bounds nothing", BoundOfTheMean),
    ("quest", "all query heads of a group read what the first chooses", OneSelectionPerGroup),
]
