"""Codecs: how the entries that stay are stored."""

from __future__ import annotations

from copy import copy

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.slots import Padding, Selection

__all__ = ["Codec", "Dense"]

CONTIGUOUS = torch.contiguous_format


class Codec:
    """How one layer stores keys and values; the cache gives every layer a codec of its own by `fresh`.

    Between two forwards the entries are [B, G, S, D] or, ragged, flat [N, D]. `pad` lays flat entries out for
    the attention, `keep` follows it in the same forward and makes them flat again.
    """

    def fresh(self) -> Codec:
        """An empty codec with the same settings."""
        return copy(self)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add new entries [B, G, T, D] behind the stored ones."""
        raise NotImplementedError

    def read(self, index: LongTensor | None = None) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, G, S, D], or only those at `index` [B, G, m]."""
        raise NotImplementedError

    def keep(self, selection: Selection) -> None:
        """Drop what is not selected; the memory of what is dropped is free afterwards."""
        raise NotImplementedError

    def pad(self, padding: Padding) -> None:
        """Lay flat entries [N, D] out as [B, G, S, D]."""
        raise NotImplementedError

    def rewrite(self, k: Tensor, v: Tensor) -> None:
        """Replace all entries by k, v [B, G, S, D]: what merging does to the survivors."""
        raise NotImplementedError

    def take_rows(self, rows: LongTensor) -> None:
        """Reorder or repeat the rows of the batch: what beam search needs."""
        raise NotImplementedError

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything stored, by tier ("payload": the entries, "meta": scales, indices) and name."""
        raise NotImplementedError

    def nbytes(self) -> dict[str, int]:
        """Return the bytes stored, by tier."""
        return {tier: sum(t.nbytes for t in named.values()) for tier, named in self.tensors().items()}


class Dense(Codec):
    """Keys and values as they come, in the model's dtype: 2 · G · D numbers for each token of a layer.


    >>> codec = Dense()
    >>> codec.append(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    >>> codec.keep(Selection(torch.tensor([True, False, True]), (1, 2, 3)))
    >>> codec.read()[0].shape, codec.nbytes()
    (torch.Size([1, 2, 2, 4]), {'payload': 128, 'meta': 0})
    """

    k: Tensor | None = None
    v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        # The first entries are copied: what the model hands over may be a view of a larger tensor.
        self.k = k.clone(memory_format=CONTIGUOUS) if self.k is None else torch.cat((self.k, k), 2)
        self.v = v.clone(memory_format=CONTIGUOUS) if self.v is None else torch.cat((self.v, v), 2)

    def read(self, index: LongTensor | None = None) -> tuple[Tensor, Tensor]:
        if index is None:
            return self.k, self.v
        return tuple(t.take_along_dim(index[..., None], 2) for t in (self.k, self.v))

    def keep(self, selection: Selection) -> None:
        self.k, self.v = selection.apply(self.k), selection.apply(self.v)

    def pad(self, padding: Padding) -> None:
        self.k, self.v = padding.apply(self.k), padding.apply(self.v)

    def rewrite(self, k: Tensor, v: Tensor) -> None:
        if k.shape != self.k.shape or v.shape != self.v.shape:
            got = f"{list(k.shape)} and {list(v.shape)}"
            raise ValueError(f"k, v: expected two tensors {list(self.k.shape)}, got {got}")
        self.k, self.v = k.contiguous(), v.contiguous()

    def take_rows(self, rows: LongTensor) -> None:
        self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"payload": {} if self.k is None else {"k": self.k, "v": self.v}, "meta": {}}
