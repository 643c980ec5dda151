"""Plausible but wrong SnapKV, AdaKV and PyramidKV that their checks must reject."""

import torch

from refimpl.kvcache.pyramidkv import PyramidKV
from refimpl.kvcache.slots import best
from refimpl.kvcache.snapkv import AdaSnapKV, SnapKV


class WithoutPooling(SnapKV):
    def __init__(self, capacity, window=32, kernel=5, pooling="avg"):
        super().__init__(capacity, window, kernel, pooling)
        self.kernel = 1


class RecentOnly(SnapKV):
    """Switched off: the last tokens stay, whatever the votes."""

    def score(self, v):
        return torch.arange(v.S, dtype=torch.float32).expand(v.shape)


class FirstQueryOfTheGroup(SnapKV):
    """With grouped queries only one head's votes are counted."""

    def score(self, v):
        one = v.attn_lastw(self.window)[:, :, :1]
        view = type("View", (), {**vars(v), "q": v.q[:, :, :1], "attn_lastw": lambda self, w: one})()
        return super().score(view)


class WindowMayGo(SnapKV):
    def score(self, v):
        score = super().score(v)
        return score.masked_fill(score.isinf(), 0)


class AllQueriesVote(SnapKV):
    """Accumulated attention in place of the observation window's."""

    def score(self, v):
        score = v.attn_sum().mean(2)
        score[..., -self.window :] = torch.inf
        return score


class EvenHeads(AdaSnapKV):
    def keep(self, v):
        return SnapKV.keep(self, v)


class NoFloor(AdaSnapKV):
    def __init__(self, capacity, window=32, kernel=5, pooling="avg", floor=0.2):
        super().__init__(capacity, window, kernel, pooling, 0.0)


class EvenLayers(PyramidKV):
    def capacity_of(self, v):
        return self.capacity


class UpsideDown(PyramidKV):
    def capacity_of(self, v):
        v.layer = v.n_layers - 1 - v.layer
        return super().capacity_of(v)


class WindowInside(PyramidKV):
    """kvpress' convention: the window is part of each layer's budget."""

    def keep(self, v):
        n = self.capacity_of(v) - self.window
        return best(self.score(v), max(n, 1))


class CutNotMovedOn(PyramidKV):
    """A first layer that cannot use its budget gives nothing to the last."""

    def capacity_of(self, v):
        average = self.capacity - self.window
        last = average / self.beta
        first = min(2 * average - last, v.S - self.window)
        return self.window + round(first - v.layer * (first - last) / max(v.n_layers - 1, 1))


MUTANTS = [
    ("snapkv", "no votes at all: a window", RecentOnly),
    ("snapkv", "no pooling", WithoutPooling),
    ("snapkv", "only the first query head of a group votes", FirstQueryOfTheGroup),
    ("snapkv", "the window itself may be evicted", WindowMayGo),
    ("snapkv", "all queries vote, not the window's", AllQueriesVote),
    ("adakv", "every head keeps the same number", EvenHeads),
    ("adakv", "no floor", NoFloor),
    ("pyramidkv", "every layer keeps the same number", EvenLayers),
    ("pyramidkv", "the pyramid stands on its top", UpsideDown),
    ("pyramidkv", "the window is counted inside", WindowInside),
    ("pyramidkv", "what the first layer cannot use is lost", CutNotMovedOn),
]
