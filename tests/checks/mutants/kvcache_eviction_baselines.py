"""Plausible but wrong baselines that their checks must reject."""

import torch

from refimpl.kvcache import Full, KVCache, Random, Window, best


class _Redrawn(Random):
    """A new lottery at every step: old tokens die out geometrically."""

    def observe(self, v):
        v.slot["priority"].copy_(torch.rand(*v.shape, generator=self.generator))


class _NewestMayGo(Random):
    def keep(self, v):
        return None if v.S <= self.budget else best(v.slot["priority"], self.budget)


class _NewestMayBeReplaced(Random):
    """While it generates, the newest token draws with the others."""

    def replace(self, v):
        return v.slot["priority"].argmin(-1)


class _WindowSticks(Window):
    """While it generates, the newest token is replaced again and again."""

    def replace(self, v):
        return (v.pos == v.seen - 1).long().argmax(-1)


class _Shared(Random):
    """One lottery for all heads and rows."""

    def keep(self, v):
        if v.S <= self.budget:
            return None
        priority = v.slot["priority"][0, 0].clone()
        priority[-1] = 2
        return best(priority, self.budget)


def _off_by_one(model, recent):
    Window(recent)
    return KVCache(model, Window(recent + 1))


def _off(model, recent):
    Window(recent)
    return KVCache(model, Full())


MUTANTS = [
    ("window", "nothing is evicted", _off),
    ("window", "the window does not slide in decoding", lambda m, n: KVCache(m, _WindowSticks(n))),
    ("window", "one token too many stays", _off_by_one),
    ("random_eviction", "the window in place of a sample", lambda m, n, g: KVCache(m, Window(n))),
    ("random_eviction", "priorities drawn anew at every step", lambda m, n, g: KVCache(m, _Redrawn(n, g))),
    ("random_eviction", "the newest token may go", lambda m, n, g: KVCache(m, _NewestMayGo(n, g))),
    ("random_eviction", "the newest token may go in decoding",
     lambda m, n, g: KVCache(m, _NewestMayBeReplaced(n, g))),
    ("random_eviction", "all heads keep the same", lambda m, n, g: KVCache(m, _Shared(n, g))),
]
