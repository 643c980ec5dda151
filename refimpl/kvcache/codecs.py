"""Codecs: how the entries that stay are stored."""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from refimpl.kvcache.places import Places
from refimpl.kvcache.slots import Padding, Selection

__all__ = ["Codec", "Dense", "DenseTail"]

CONTIGUOUS = torch.contiguous_format


class Codec:
    """How one layer stores keys and values; the cache gives every layer a codec of its own by `fresh`.

    Between two forwards the entries are [B, G, S, D] or, ragged, flat [N, D]. `pad` lays flat entries out for
    the attention, `keep` follows it in the same forward and makes them flat again.

    Attributes
    - layer: index of the layer that it serves, set by the cache after `fresh`.
    - rotated: whether keys arrive and are read with their rotation; if not, the cache turns them back before
      `append` and rotates what it reads (rotary models only).
    """

    layer: int = 0
    rotated: bool = True

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

    def commit(self, ok: Tensor | None) -> None:
        """Compress what may be compressed: the forward is over, its attention computed, its policy obeyed.

        Called once at the end of a prefill and after every later forward; ok [B, G, S] is False at padding
        (None: there is none).
        """

    def join(self, codecs: list[Codec]) -> None:
        """Meet the codecs of all layers before the first forward; for codecs that share storage."""

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

    While nothing is evicted, new entries wait `beside` flat ones, [B, G, t, D], until the next `pad`.

    >>> codec = Dense()
    >>> codec.append(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    >>> codec.keep(Selection(torch.tensor([True, False, True]), (1, 2, 3)))
    >>> codec.read()[0].shape, codec.nbytes()
    (torch.Size([1, 2, 2, 4]), {'payload': 128, 'meta': 0})
    """

    k: Tensor | None = None
    v: Tensor | None = None
    beside: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        # The first entries are copied: what the model hands over may be a view of a larger tensor.
        self.k = k.clone(memory_format=CONTIGUOUS) if self.k is None else torch.cat((self.k, k), 2)
        self.v = v.clone(memory_format=CONTIGUOUS) if self.v is None else torch.cat((self.v, v), 2)

    def read(self, index: LongTensor | None = None) -> tuple[Tensor, Tensor]:
        if index is None:
            return self.k, self.v
        return tuple(t.take_along_dim(index[..., None], 2) for t in (self.k, self.v))

    def widen(self) -> None:
        """Make room for one more entry in each head."""
        self.k, self.v = F.pad(self.k, (0, 0, 0, 1)), F.pad(self.v, (0, 0, 0, 1))

    def put(self, places: Places, k: Tensor, v: Tensor) -> None:
        """Write new entries [B, G, 1, D] where a slot is free."""
        places.put(self.k, k)
        places.put(self.v, v)

    def append_beside(self, k: Tensor, v: Tensor) -> None:
        """Add new entries [B, G, T, D] to flat ones, which stay where they are."""
        pair = self.beside or (None, None)
        self.beside = tuple(_behind(old, new, own=True) for old, new in zip(pair, (k, v), strict=True))

    def keep(self, selection: Selection) -> None:
        self.k, self.v = selection.apply(self.k), selection.apply(self.v)

    def pad(self, padding: Padding) -> None:
        self.k, self.v = self.laid_out(padding)
        self.beside = None

    def laid_out(self, padding: Padding) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, S, D], of flat entries and those beside them, for which there is room."""
        k, v = self.beside or (None, None)
        return padding.apply(self.k, k), padding.apply(self.v, v)

    def rewrite(self, k: Tensor, v: Tensor) -> None:
        if k.shape != self.k.shape or v.shape != self.v.shape:
            got = f"{list(k.shape)} and {list(v.shape)}"
            raise ValueError(f"k, v: expected two tensors {list(self.k.shape)}, got {got}")
        self.k, self.v = k.contiguous(), v.contiguous()

    def take_rows(self, rows: LongTensor) -> None:
        self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        named = {} if self.k is None else {"k": self.k, "v": self.v}
        if self.beside is not None:
            named |= dict(zip(("k beside", "v beside"), self.beside, strict=True))
        return {"payload": named, "meta": {}}

    def nbytes(self) -> dict[str, int]:
        held = 0 if self.k is None else self.k.nbytes + self.v.nbytes
        return {"payload": held + sum(t.nbytes for t in self.beside or ()), "meta": 0}


class DenseTail(Codec):
    """Newest entries dense, older ones in a compressed form: the base of codecs that compress at `commit`.

    What the cache appends waits in the dense tail k, v [B, G, T, D]; a subclass moves entries from its front
    into the compressed form. Until the first are moved, that is until the end of a prefill, any eviction that
    leaves all heads equally many slots and any merging is possible; afterwards none.

    A subclass gives `older` (the compressed entries, as they are read), `compressed` (its tensors by tier)
    and `commit`.
    """

    k: Tensor | None = None
    v: Tensor | None = None

    def older(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values [B, G, n, D] read from the compressed form; None where there are none."""
        raise NotImplementedError

    def compressed(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the compressed form by tier and name, rows of the batch first."""
        raise NotImplementedError

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = _behind(self.k, k, own=True), _behind(self.v, v, own=True)

    def read(self, index: LongTensor | None = None) -> tuple[Tensor, Tensor]:
        pairs = zip(self.older(), (self.k, self.v), strict=True)
        both = tuple(_behind(older, tail) for older, tail in pairs)
        return both if index is None else tuple(t.take_along_dim(index[..., None], 2) for t in both)

    def keep(self, selection: Selection) -> None:
        name = type(self).__name__
        self._refuse_compressed("evicted")
        if selection.ragged:
            raise ValueError(
                f"keep: rows or heads keep different numbers of slots; allowed for {name}: equally many"
            )
        self.k, self.v = selection.apply(self.k), selection.apply(self.v)

    def rewrite(self, k: Tensor, v: Tensor) -> None:
        self._refuse_compressed("merged")
        self.k, self.v = k.contiguous(), v.contiguous()

    def pad(self, padding: Padding) -> None:
        raise ValueError(f"pad: {type(self).__name__} never holds flat entries")

    def take_rows(self, rows: LongTensor) -> None:
        for name, t in (("k", self.k), ("v", self.v)):
            setattr(self, name, None if t is None else t.index_select(0, rows))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        tail = {name: t for name, t in (("k", self.k), ("v", self.v)) if t is not None}
        named = self.compressed()
        return named | {"payload": named["payload"] | tail}

    def _refuse_compressed(self, what: str) -> None:
        if self.compressed()["payload"]:
            raise ValueError(
                f"{type(self).__name__}: compressed entries cannot be {what}; allowed: policies that decide "
                "at the end of the prefill and keep everything afterwards"
            )


def _behind(older: Tensor | None, newer: Tensor | None, own: bool = False) -> Tensor:
    """Older and newer entries [B, G, ., D] in one tensor; one of `own` memory if nothing is older."""
    if older is None:
        return newer.clone(memory_format=CONTIGUOUS) if own else newer
    return older if newer is None else torch.cat((older, newer), 2)


def first_real(t: Tensor, ok: Tensor | None) -> Tensor:
    """t [B, G, S, D] with its padding replaced by the head's first real entry, which widens no group."""
    if ok is None:
        return t
    first = t.take_along_dim(ok.int().argmax(-1)[..., None, None], 2)
    return torch.where(ok[..., None], t, first)
