"""Codecs of two tiers: a part of the entries lies on the device, the rest in the memory of the host.

With a model on a GPU the host's part really is CPU memory (pinned); with a model on the CPU both lie in the
same memory, and the tier is a name only. Either way what crosses is a tensor of its own, and its bytes are
counted. `KVCache.nbytes` shows the host's part under "host".
"""

from __future__ import annotations

from copy import copy

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.codecs import CONTIGUOUS, Codec
from refimpl.kvcache.readers import union
from refimpl.kvcache.slots import Selection

__all__ = ["HostRows", "HostValues", "Offloaded"]

HOST = torch.device("cpu")


class HostRows:
    """Rows [B, G, n, D] in the memory of the host.

    Room is made ahead, half as much again as is needed: pinned memory is slow to get, so it must not be
    asked for at every step. Raises ValueError for other than four dimensions.

    >>> rows = HostRows(torch.arange(4.).view(1, 2, 2, 1))
    >>> values, moved = rows.fetch(torch.tensor([[[1, 1], [0, 1]]]))
    >>> values.flatten().tolist(), moved  # three distinct rows of 4 bytes cross
    ([1.0, 1.0, 2.0, 3.0], 12)
    """

    def __init__(self, rows: Tensor) -> None:
        if rows.ndim != 4:
            raise ValueError(f"rows: shape {list(rows.shape)}; allowed: [B, G, n, D]")
        self.device, self.n = rows.device, rows.shape[2]
        self.room = self._pinned(*rows.shape, dtype=rows.dtype)
        self.room.copy_(rows)

    def _pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=HOST, pin_memory=self.device.type == "cuda")

    @property
    def rows(self) -> Tensor:
        """The rows [B, G, n, D], where they lie."""
        return self.room[:, :, : self.n]

    def append(self, rows: Tensor) -> None:
        """Add rows [B, G, T, D] behind."""
        n, self.n = self.n, self.n + rows.shape[2]
        if self.n > self.room.shape[2]:
            B, G, _, D = self.room.shape
            bigger = self._pinned(B, G, self.n + self.n // 2, D, dtype=self.room.dtype)
            bigger[:, :, :n] = self.room[:, :, :n]
            self.room = bigger
        self.room[:, :, n : self.n] = rows

    def all(self) -> Tensor:
        """All rows on the device."""
        return self.rows.to(self.device)

    def fetch(self, index: LongTensor, ok: Tensor | None = None) -> tuple[Tensor, int]:
        """Return the rows at index [B, G, ..., m] on the device, [B, G, ..., m, D], and the bytes moved.

        A row that several query heads of one KV head want crosses once; one that is not `ok` [B, G, n] never
        crosses, and what stands in its place means nothing.
        """
        wanted = union(index, self.n)
        if ok is not None:
            wanted &= ok
        b, g, slot = wanted.to(HOST).nonzero(as_tuple=True)
        crossing = self.room[b, g, slot].to(self.device)
        place = (wanted.flatten().cumsum(0) - 1).view_as(wanted).gather(-1, index.flatten(2))
        fetched = crossing.index_select(0, place.flatten().clamp(min=0))
        return fetched.view(*index.shape, fetched.shape[-1]), crossing.nbytes

    def keep(self, selection: Selection) -> None:
        """Drop what is not selected."""
        here = copy(selection)
        if selection.slices is None:
            here.rows = selection.rows.to(HOST)
        kept = here.apply(self.rows)
        self.n = kept.shape[2]
        self.room = self._pinned(*kept.shape, dtype=kept.dtype)
        self.room.copy_(kept)

    def take_rows(self, rows: LongTensor) -> None:
        """Reorder or repeat the rows of the batch."""
        taken = self.rows.index_select(0, rows.to(HOST))
        self.room = self._pinned(*taken.shape, dtype=taken.dtype)
        self.room.copy_(taken)


class HostValues(Codec):
    """Keys on the device, values on the host: half the bytes of `Dense` each (KCache, 2404.18057).

    Reading all moves all values. Raises ValueError where heads keep different numbers of slots.

    >>> codec = HostValues()
    >>> codec.append(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)); codec.nbytes()
    {'payload': 96, 'meta': 0, 'host': 96}
    """

    k: Tensor | None = None
    v: HostRows | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.k is None:
            self.k, self.v = k.clone(memory_format=CONTIGUOUS), HostRows(v)
        else:
            self.k = torch.cat((self.k, k), 2)
            self.v.append(v)

    def read(self, index: LongTensor | None = None) -> tuple[Tensor, Tensor]:
        if index is None:
            return self.k, self.v.all()
        return self.k.take_along_dim(index[..., None], 2), self.v.fetch(index)[0]

    def keep(self, selection: Selection) -> None:
        if selection.ragged:
            raise ValueError(
                "codec: HostValues; allowed: policies that keep the same number of slots in every head"
            )
        self.k = selection.apply(self.k)
        self.v.keep(selection)

    def rewrite(self, k: Tensor, v: Tensor) -> None:
        if k.shape != self.k.shape or v.shape != self.k.shape:
            got = f"{list(k.shape)} and {list(v.shape)}"
            raise ValueError(f"k, v: expected two tensors {list(self.k.shape)}, got {got}")
        self.k, self.v = k.contiguous(), HostRows(v)

    def take_rows(self, rows: LongTensor) -> None:
        self.k = self.k.index_select(0, rows)
        self.v.take_rows(rows)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        if self.k is None:
            return {"payload": {}, "meta": {}, "host": {}}
        return {"payload": {"k": self.k}, "meta": {}, "host": {"v": self.v.rows}}


class Offloaded(Codec):
    """The first and last tokens of the prompt, and all later ones, on the device; the rest on the host.

    Until the end of the prefill everything is on the device. Then the `far` entries, slots first to
    n - last - 1, move to the host; what stays, the near ones, is `k` and `v`, and grows. Nothing is evicted.

    Parameters: first >= 0 and last >= 1, in tokens (TailorKV: 8 and 56; RetrievalAttention: 128 and 512).
    Raises ValueError for others, and where a policy evicts.

    >>> codec = Offloaded(first=1, last=2)
    >>> codec.append(torch.arange(5.).view(1, 1, 5, 1), torch.zeros(1, 1, 5, 1)); codec.commit(None)
    >>> codec.k.flatten().tolist(), codec.far[0].rows.flatten().tolist(), codec.nbytes()
    ([0.0, 3.0, 4.0], [1.0, 2.0], {'payload': 24, 'meta': 0, 'host': 16})
    """

    k: Tensor | None = None
    v: Tensor | None = None
    far: tuple[HostRows, HostRows] | None = None

    def __init__(self, first: int = 8, last: int = 56) -> None:
        for name, value, least in (("first", first, 0), ("last", last, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: {value!r}; allowed: integers from {least}")
        self.first, self.last = first, last

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k = k.clone(memory_format=CONTIGUOUS) if self.k is None else torch.cat((self.k, k), 2)
        self.v = v.clone(memory_format=CONTIGUOUS) if self.v is None else torch.cat((self.v, v), 2)

    def commit(self, ok: Tensor | None) -> None:
        if self.far is not None:
            return
        start = min(self.first, self.k.shape[2])
        stop = max(start, self.k.shape[2] - self.last)
        self.far = tuple(HostRows(t[:, :, start:stop]) for t in (self.k, self.v))
        self.k, self.v = (torch.cat((t[:, :, :start], t[:, :, stop:]), 2) for t in (self.k, self.v))

    def read(self, index: LongTensor | None = None) -> tuple[Tensor, Tensor]:
        if self.far is not None:
            start = min(self.first, self.k.shape[2])
            parts = zip((self.k, self.v), self.far, strict=True)
            k, v = (torch.cat((t[:, :, :start], f.all(), t[:, :, start:]), 2) for t, f in parts)
        else:
            k, v = self.k, self.v
        return (k, v) if index is None else tuple(t.take_along_dim(index[..., None], 2) for t in (k, v))

    def fetch(self, index: LongTensor) -> tuple[Tensor, Tensor, int]:
        """Return keys and values [B, G, m, D] of the far entries at index [B, G, m], and the bytes moved."""
        (k, one), (v, other) = (f.fetch(index) for f in self.far)
        return k, v, one + other

    def channels(self, index: LongTensor) -> Tensor:
        """Return the channels at index [B, G, C] of all far keys, on the device: [B, G, far, C]."""
        keys = self.far[0].rows
        return keys.take_along_dim(index.to(HOST)[:, :, None], -1).to(self.k.device)

    def keep(self, selection: Selection) -> None:
        raise ValueError("codec: Offloaded; allowed beside it: policies that evict nothing, such as Full()")

    def rewrite(self, k: Tensor, v: Tensor) -> None:
        raise ValueError("codec: Offloaded; allowed beside it: policies that merge nothing, such as Full()")

    def take_rows(self, rows: LongTensor) -> None:
        self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)
        for f in self.far or ():
            f.take_rows(rows)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        near = {} if self.k is None else {"k": self.k, "v": self.v}
        far = {} if self.far is None else {"k": self.far[0].rows, "v": self.far[1].rows}
        return {"payload": near, "meta": {}, "host": far}
