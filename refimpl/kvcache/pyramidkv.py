"""PyramidKV: SnapKV with budgets that shrink from the first layer to the last (a baseline)."""

from __future__ import annotations

import torch
from torch import LongTensor

from refimpl.kvcache.snapkv import SnapKV
from refimpl.kvcache.view import View

__all__ = ["PyramidKV", "pyramid"]


class PyramidKV(SnapKV):
    """Give early layers more slots than late ones, `capacity` on average (2406.02069).

    Attention is spread wide in the first layers and narrow in the last, so the budgets besides the window
    fall in equal steps: of L layers, with an average of c = capacity - window,

        last = c / beta,   first = 2 c - last,   budget(l) = first - l (first - last) / (L - 1).

    Where `first` exceeds a prompt's n - window tokens, it is cut to them and `last` raised likewise. The
    window comes on top, as in the authors' code.

    Parameters: as `SnapKV`, and beta >= 1: 20 in the paper; 1 is SnapKV. Raises ValueError.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model = tiny("llama")
    >>> cache = KVCache(model, PyramidKV(12, window=4, kernel=3, beta=4))
    >>> out = model(random_ids(1, 30), past_key_values=cache)
    >>> [int(cache.held(l)[0, 0]) for l in range(3)]
    [18, 12, 6]
    """

    def __init__(
        self, capacity: int, window: int = 32, kernel: int = 5, pooling: str = "avg", beta: float = 20.0
    ) -> None:
        super().__init__(capacity, window, kernel, pooling)
        if not beta >= 1:
            raise ValueError(f"beta: {beta}; allowed: 1 and more")
        self.beta = beta

    def capacity_of(self, v: View) -> int | LongTensor:
        if v.full:
            n = v.S
            if n <= self.capacity:
                return n
            return self.window + pyramid(n - self.window, self.capacity - self.window, self.beta, v)
        past = (v.count - self.window).clamp(min=0)
        budget = pyramid(past, self.capacity - self.window, self.beta, v)
        return torch.where(v.count > self.capacity, self.window + budget, v.count)


def pyramid(past: int | LongTensor, average: int, beta: float, v: View) -> int | LongTensor:
    """Slots for layer v.layer of v.n_layers, for `past` tokens before the window (> average), rounded."""
    last = average / beta
    first = 2 * average - last
    first = min(past, first) if isinstance(past, int) else past.clamp(max=first)
    last = 2 * average - first
    step = (first - last) / max(v.n_layers - 1, 1)
    budget = first - v.layer * step + 0.5
    return int(budget) if isinstance(past, int) else budget.long()
