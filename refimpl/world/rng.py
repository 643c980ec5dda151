"""The one source of chance in the world: `random.Random(seed).random()` and nothing else.

Python promises that `random()` gives the same stream for the same integer seed on every version and platform;
it promises nothing for `choice`, `shuffle` or `sample`. The world must be the same text on the training
machine and on a reader's laptop, so every draw below is a function of `random()` alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import MutableSequence, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


class Rng:
    """A seeded stream of draws; `Rng("a", 3)` and `Rng("a", 4)` are independent.

    Parameters
    ----------
    *key : str or int
        Names the stream. Equal keys give equal streams.

    Examples
    --------
    >>> Rng("doc", 1).below(10) == Rng("doc", 1).below(10)
    True
    >>> sorted(Rng("doc", 1).sample("abc", 3))
    ['a', 'b', 'c']
    """

    __slots__ = ("random",)

    def __init__(self, *key: str | int) -> None:
        if not key:
            raise ValueError("key: an Rng needs at least one string or int to name its stream")
        digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
        self.random = Random(int.from_bytes(digest[:8], "big")).random  # a float in [0, 1)

    def below(self, n: int) -> int:
        """An integer in [0, n), all equally likely."""
        return int(self.random() * n)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return self.random() < p

    def choice(self, seq: Sequence[T]) -> T:
        """One element of `seq`, all equally likely."""
        return seq[int(self.random() * len(seq))]

    def shuffle(self, items: MutableSequence) -> None:
        """Put `items` in random order, in place (Fisher-Yates)."""
        for i in range(len(items) - 1, 0, -1):
            j = int(self.random() * (i + 1))
            items[i], items[j] = items[j], items[i]

    def sample(self, seq: Sequence[T], k: int) -> list[T]:
        """k different elements of `seq`, in random order."""
        n = len(seq)
        if k > n:
            raise ValueError(f"k: cannot draw {k} different elements from {n}")
        if 4 * k < n:  # few from many: draw again on a repeat
            seen: dict[int, None] = {}
            while len(seen) < k:
                seen[int(self.random() * n)] = None
            return [seq[i] for i in seen]
        pool = list(seq)
        for i in range(k):
            j = i + int(self.random() * (n - i))
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]

    def weighted(self, cumulative: Sequence[float]) -> int:
        """An index i with probability proportional to `cumulative[i] - cumulative[i-1]`."""
        x = self.random() * cumulative[-1]
        low, high = 0, len(cumulative) - 1
        while low < high:
            mid = (low + high) // 2
            if x < cumulative[mid]:
                high = mid
            else:
                low = mid + 1
        return low
