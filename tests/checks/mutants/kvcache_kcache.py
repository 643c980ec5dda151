"""Plausible but wrong KCache that its check must reject."""

from refimpl.kvcache.kcache import KCache


class ReadsAllValues(KCache):
    """The method switched off."""

    def __init__(self, n, renormalise=False):
        super().__init__(n, renormalise)
        self.n = 10**6


class RenormalisesSilently(KCache):
    def __init__(self, n, renormalise=False):
        super().__init__(n, True)


class CountsEachHeadsRows(KCache):
    """The traffic of a group is not its union."""

    def read(self, q, codec, scale, ok):
        out = super().read(q, codec, scale, ok)
        rows = q.shape[:3].numel() * min(self.n, codec.k.shape[2])
        self._bytes |= dict.fromkeys(("host", "moved"), rows * q.shape[-1] * 4)
        return out


MUTANTS = [
    ("kcache", "all values are read", ReadsAllValues),
    ("kcache", "the best weights are renormalised without being asked", RenormalisesSilently),
    ("kcache", "rows that heads share are counted for each", CountsEachHeadsRows),
]
