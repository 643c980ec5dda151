"""Decoding with one free slot in each head: a new token takes the place of one that has left."""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor

__all__ = ["Places"]


class Places:
    """Which slot of each head is free, while all hold equally many and one token leaves for each that comes.

    Slots are then in no order: their positions in the text tell how old they are.

    Parameters
    - shape: (B, G, S), S slots held by each head; the free one is at first behind them.
    - ranked: whether to follow `rank`, each slot's number in order of age, [1, 1, S + 1] or [B, G, S + 1] (a
      free slot is the newest); else it is None.

    >>> places = Places((1, 2, 3), ranked=True)
    >>> state = torch.tensor([[[7., 8., 9., 0.], [7., 8., 9., 0.]]])
    >>> places.put(state, torch.tensor([[[1.], [2.]]]))  # the fourth token of each head
    >>> places.free(torch.tensor([[0, 2]]))  # head 0 loses its first, head 1 its third
    >>> places.put(state, torch.tensor([[[3.], [4.]]])); state.tolist()
    [[[3.0, 8.0, 9.0, 1.0], [7.0, 8.0, 4.0, 2.0]]]
    >>> places.rank.tolist()
    [[[3, 0, 1, 2], [0, 1, 3, 2]]]
    """

    def __init__(
        self, shape: tuple[int, int, int], device: torch.device | None = None, *, ranked: bool = False
    ) -> None:
        B, G, S = shape
        self._last = S
        self._first = torch.arange(0, B * G * (S + 1), S + 1, device=device).view(B, G)
        self._rows = (self._first + S).flatten()  # the free slots, in a tensor flattened to [B · G · (S + 1)]
        self._size, self._alike = B * G * (S + 1), self._rows[:1]
        self.rank = torch.arange(S + 1, device=device).view(1, 1, -1) if ranked else None

    def free(self, dropped: LongTensor) -> None:
        """Free the slots `dropped` [B, G] or, the same for all, [1, 1]; those free before are filled."""
        self._rows, self._alike = (self._first + dropped).flatten(), dropped.flatten()
        if self.rank is not None:
            if len(self._alike) > self.rank.shape[:2].numel():  # heads differ from now on
                self.rank = self.rank.expand(*dropped.shape, -1).contiguous()
            younger = self.rank > self.take(self.rank)
            self.rank.add_(younger, alpha=-1)
            self.put(self.rank, self._last)

    def put(self, t: Tensor, new: Tensor | float) -> None:
        """Write the new tokens' [B, G, 1, ...], or one number, to the free slots of t [B, G, S + 1, ...].

        If the same slot is free everywhere, t may also be [1, 1, S + 1].
        """
        flat = t.flatten(0, 2)
        rows = self._rows if len(flat) == self._size else self._alike
        if isinstance(new, Tensor):
            flat.index_copy_(0, rows, new.reshape(len(rows), *flat.shape[1:]))
        else:
            flat.index_fill_(0, rows, new)

    def take(self, t: Tensor) -> Tensor:
        """Return what t [B, G, S + 1] (or [1, 1, S + 1]) holds at the free slots, [B, G, 1]."""
        flat = t.flatten()
        rows = self._rows if len(flat) == self._size else self._alike
        return flat.index_select(0, rows).view(*t.shape[:2], 1)
