"""Readers: which of the stored entries a query of a decoding step reads."""

from __future__ import annotations

from copy import copy

from torch import LongTensor, Tensor

__all__ = ["ReadAll", "Reader"]


class Reader:
    """Which entries one layer's queries read; the cache gives every layer a reader of its own by `fresh`."""

    def fresh(self) -> Reader:
        """A reader with the same settings and no index."""
        return copy(self)

    def build(self, k: Tensor, v: Tensor) -> None:
        """Prepare an index of the entries [B, G, S, D]; called once at the end of prefill, after eviction."""

    def select(self, q: Tensor) -> LongTensor | None:
        """Return the slots [B, G, m] that q [B, G, H/G, 1, D] reads in this step; None: all."""
        raise NotImplementedError


class ReadAll(Reader):
    """Every query reads every stored entry: plain attention.

    >>> import torch
    >>> ReadAll().select(torch.zeros(1, 2, 4, 1, 8)) is None
    True
    """

    def select(self, q: Tensor) -> None:
        return None
