"""The byte ledger: what a model, cache, memory or index holds, by kind, each storage counted once.

Implements the account behind the survey's Eq. 1 (total memory is a sum over kinds) and Eq. 15 (compression
ratio). Every chapter reports its bytes through it. Two views of one thing:

- *payload*: the bytes that its data need, as a file holds them;
- *resident*: the bytes of the storages that are alive because of it.

A slice that keeps a large buffer alive has a small payload and is resident as a whole; weights dequantised to
float32 for computing have a small payload (their codes) and are resident as float32 (`simulated=True`).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Item", "Kind", "Ledger", "View", "of_file", "of_model", "of_tensors"]

Kind = Literal["weight", "meta", "buffer", "grad", "optim", "activation", "kv", "index", "temp"]
View = Literal["payload", "resident"]


@dataclass(frozen=True)
class Item:
    """One tensor's line in a ledger.

    Parameters
    ----------
    name : where the tensor is found.
    kind : what it is for, one of `Kind`.
    numel : elements that no earlier item has counted.
    payload, resident : bytes in the two views; 0 where an earlier item has counted them.
    storage : serial number of the storage in this process, None for bytes in a file.
    simulated : True where a small payload is represented by larger tensors.
    """

    name: str
    kind: Kind
    numel: int
    payload: int
    resident: int
    storage: int | None
    simulated: bool = False

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, get_args(Kind))


@dataclass(frozen=True)
class Ledger:
    """Items and their sums.

    Examples
    --------
    >>> weights = of_tensors([("w", torch.zeros(256, 256)), ("b", torch.zeros(256))], "weight")
    >>> cache = of_tensors([("keys", torch.zeros(64, 32, dtype=torch.bfloat16))], "kv")
    >>> print(weights + cache)
    kind    tensors  elements  payload B  resident B
    weight        2    65,792    263,168     263,168
    kv            1     2,048      4,096       4,096
    total         3    67,840    267,264     267,264
    >>> (weights + cache).by_kind()
    {'weight': 263168, 'kv': 4096}
    """

    items: tuple[Item, ...] = ()

    def total(self, kind: Kind | None = None, view: View = "payload") -> int:
        """Return the bytes of one kind, or of all."""
        _check_choice("view", view, get_args(View))
        if kind is not None:
            _check_choice("kind", kind, get_args(Kind))
        return sum(getattr(item, view) for item in self.items if kind in (None, item.kind))

    def by_kind(self, view: View = "payload") -> dict[Kind, int]:
        """Return the bytes of every kind that occurs, in the order of `Kind`."""
        present = {item.kind for item in self.items}
        return {kind: self.total(kind, view) for kind in get_args(Kind) if kind in present}

    def __add__(self, other: Ledger) -> Ledger:
        """Join two ledgers; ValueError where both hold one storage, which would then count twice."""
        mine = {item.storage: item.name for item in self.items if item.storage is not None}
        for item in other.items:
            if item.storage in mine:
                raise ValueError(
                    f"{item.name!r} and {mine[item.storage]!r} share a storage: "
                    "count them in one call of of_tensors"
                )
        return Ledger(self.items + other.items)

    def __sub__(self, other: Ledger) -> Ledger:
        """Return what changed, by (kind, name): this one's numbers minus the other's, equal items left out.

        Totals subtract likewise: (a - b).total(kind, view) == a.total(kind, view) - b.total(kind, view).

        Examples
        --------
        >>> small, large = (of_tensors([("k", torch.zeros(n, dtype=torch.int8))], "kv") for n in (10, 30))
        >>> (large - small).total()
        20
        """
        before, after = other._by_name(), self._by_name()
        changes = []
        for key in dict.fromkeys([*after, *before]):
            old, new = before.get(key), after.get(key)
            if new is None:
                change = replace(old, numel=-old.numel, payload=-old.payload, resident=-old.resident)
            elif old is None:
                change = new
            else:
                change = replace(
                    new,
                    numel=new.numel - old.numel,
                    payload=new.payload - old.payload,
                    resident=new.resident - old.resident,
                )
            if change.numel or change.payload or change.resident:
                changes.append(change)
        return Ledger(tuple(changes))

    def _by_name(self) -> dict[tuple[str, str], Item]:
        items: dict[tuple[str, str], Item] = {}
        for item in self.items:
            if (item.kind, item.name) in items:
                raise ValueError(f"two items of kind {item.kind!r} are named {item.name!r}")
            items[item.kind, item.name] = item
        return items

    def cr(self, base: Ledger, view: View = "payload") -> float:
        """Return the compression ratio against `base`, bytes(base) / bytes(this) (survey Eq. 15).

        4.0 means a quarter of the bytes is left. A base in float32 doubles every ratio: count it with
        `of_model(model, stored_as=torch.bfloat16)`. Raises ValueError where this ledger holds no bytes.

        Examples
        --------
        >>> base = of_tensors([("w", torch.zeros(8, 8, dtype=torch.bfloat16))], "weight")
        >>> codes = of_tensors([("w", torch.zeros(8, 8, dtype=torch.int8))], "weight")
        >>> codes.cr(base)
        2.0
        """
        size = self.total(view=view)
        if size <= 0:
            raise ValueError(f"a ledger of {size} {view} bytes has no compression ratio")
        return base.total(view=view) / size

    def __str__(self) -> str:
        head = ("kind", "tensors", "elements", "payload B", "resident B")
        rows = [head]
        for kind in [*self.by_kind(), None]:
            items = [item for item in self.items if kind in (None, item.kind)]
            sums = len(items), sum(i.numel for i in items), self.total(kind), self.total(kind, "resident")
            rows.append((kind or "total", *(f"{s:,}" for s in sums)))
        widths = [max(len(row[c]) for row in rows) for c in range(len(head))]
        lines = []
        for row in rows:
            numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
        return "\n".join(lines)


def of_tensors(
    named: Iterable[tuple[str, Tensor]],
    kind: Kind,
    *,
    stored_as: torch.dtype | None = None,
    simulated: bool = False,
) -> Ledger:
    """Count named tensors, every storage and every byte of it once.

    The first tensor that touches a storage carries its whole resident size; each tensor's payload is what it
    adds to the bytes already counted, so tied weights cost nothing the second time and overlapping views only
    their new part. Tensor subclasses (quantised weights and the like) are taken apart into their inner
    tensors, sparse ones into indices and values. Meta and fake tensors count like real ones.

    Parameters
    ----------
    named : pairs (name, tensor).
    kind : one of `Kind`.
    stored_as : dtype in which a file would hold the floating-point tensors; changes the payload only.
    simulated : marks the items as stand-ins for a smaller payload counted elsewhere.

    Raises ValueError for an unknown kind, TypeError for something that is not a tensor.

    Examples
    --------
    >>> big = torch.zeros(1000, dtype=torch.int8)
    >>> ledger = of_tensors([("part", big[:10]), ("again", big[:10])], "kv")
    >>> ledger.total(view="payload"), ledger.total(view="resident")
    (10, 1000)
    """
    _check_choice("kind", kind, get_args(Kind))
    return _count(((name, tensor, kind, True) for name, tensor in named), stored_as, simulated)


def of_model(model: nn.Module, *, stored_as: torch.dtype | None = None) -> Ledger:
    """Count a module as it serves: parameters ("weight") and buffers ("buffer"), ties once.

    Buffers that a saved file leaves out (rotary frequencies, say) have payload 0. Gradients, optimizer states
    and activations are other ledgers (`of_tensors` with their kind).

    Parameters
    ----------
    model : any module, on any device, meta included.
    stored_as : dtype in which a file would hold the floating-point tensors; changes the payload only.

    Examples
    --------
    >>> with torch.device("meta"):
    ...     layer = nn.Linear(8192, 8192, bias=False)
    >>> of_model(layer, stored_as=torch.bfloat16).total(), of_model(layer).total(view="resident")
    (134217728, 268435456)
    """
    saved = model.state_dict().keys()
    weights = [(name, p, "weight", True) for name, p in model.named_parameters(remove_duplicate=False)]
    buffers = [(name, b, "buffer", name in saved) for name, b in model.named_buffers(remove_duplicate=False)]
    return _count(weights + buffers, stored_as, simulated=False)


def of_file(path: str | os.PathLike[str], kind: Kind = "weight") -> Ledger:
    """Count the tensors of a safetensors file by reading its header alone.

    Their payload is the file's size less the header; nothing is resident. Raises ValueError where header and
    size disagree, as for a truncated file.
    """
    _check_choice("kind", kind, get_args(Kind))
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        # The format: header length as 8 bytes little endian, the header as JSON, then the tensors' bytes.
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path} is not a complete safetensors file: {size} bytes hold no header")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    items = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        items.append(Item(name, kind, math.prod(entry["shape"]), end - begin, 0, None))
    ledger, held = Ledger(tuple(items)), size - 8 - length
    if ledger.total() != held:
        raise ValueError(f"{path} holds {held} bytes of tensors, its header says {ledger.total()}")
    return ledger


def _count(
    entries: Iterable[tuple[str, Tensor, Kind, bool]], stored_as: torch.dtype | None, simulated: bool
) -> Ledger:
    """Count entries (name, tensor, kind, whether a file holds it)."""
    plain = ((*part, kind, held) for name, tensor, kind, held in entries for part in _plain(name, tensor))
    counted: dict[int, _Counted] = {}
    items = []
    for name, tensor, kind, held in plain:
        storage = tensor.untyped_storage()
        serial = _serial(storage)
        resident = 0 if serial in counted else storage.nbytes()
        payload = counted.setdefault(serial, _Counted(storage.nbytes())).add(tensor)
        numel = payload // tensor.itemsize
        if stored_as is not None and tensor.is_floating_point():
            payload = numel * stored_as.itemsize
        items.append(Item(name, kind, numel, payload if held else 0, resident, serial, simulated))
    return Ledger(tuple(items))


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors with a storage of their own that make up a tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name!r} must be a tensor, got {type(tensor).__name__}")
    if is_traceable_wrapper_subclass(tensor):
        inner, _ = tensor.__tensor_flatten__()
        # A DTensor names its mesh of ranks beside its local tensor.
        parts = [(part, getattr(tensor, part)) for part in inner if isinstance(getattr(tensor, part), Tensor)]
    elif tensor.layout is torch.strided:
        yield name, tensor
        return
    elif tensor.layout is torch.sparse_coo:
        parts = [("indices", tensor._indices()), ("values", tensor._values())]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [(p, getattr(tensor, p)()) for p in ("crow_indices", "col_indices", "values")]
    else:
        raise ValueError(f"{name!r} has layout {tensor.layout}; strided, COO, CSR and BSR are counted")
    for part, value in parts:
        yield from _plain(f"{name}.{part}", value)


class _Counted:
    """The bytes of one storage that have been counted."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.views: list[_Geometry] = []
        self.mask: np.ndarray | None = None

    def add(self, tensor: Tensor) -> int:
        """Count a view and return how many bytes it adds."""
        view = _Geometry.of(tensor)
        if view in self.views:
            return 0
        self.views.append(view)
        if len(self.views) == 1 and not view.overlaps_itself():
            return view.numel() * view.width
        # Overlap is possible: only now is a map of the storage's bytes worth its memory.
        if self.mask is None:
            self.mask = np.zeros(self.nbytes, dtype=bool)
            for earlier in self.views[:-1]:
                earlier.mark(self.mask)
        before = int(self.mask.sum())
        view.mark(self.mask)
        return int(self.mask.sum()) - before


@dataclass(frozen=True)
class _Geometry:
    """The elements of its storage that a tensor reaches: offset, axes (stride, size) from fine to coarse, and
    bytes per element."""

    offset: int
    axes: tuple[tuple[int, int], ...]
    width: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Geometry:
        if tensor.numel() == 0:
            return cls(0, ((1, 0),), tensor.itemsize)
        # An axis of stride 0 (expand) repeats the same elements.
        axes = zip(tensor.stride(), tensor.shape, strict=True)
        reaching = sorted((stride, size) for stride, size in axes if size > 1 and stride > 0)
        return cls(tensor.storage_offset(), tuple(reaching), tensor.itemsize)

    def numel(self) -> int:
        return math.prod(size for _, size in self.axes)

    def overlaps_itself(self) -> bool:
        reach = 0
        for stride, size in self.axes:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
        return False

    def mark(self, mask: np.ndarray) -> None:
        if self.numel() == 0:
            return
        sizes = [size for _, size in self.axes] + [self.width]
        strides = [stride * self.width for stride, _ in self.axes] + [1]
        np.lib.stride_tricks.as_strided(mask[self.offset * self.width :], sizes, strides)[...] = True


_numbers = itertools.count(1)
_serials: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _serial(storage: torch.UntypedStorage) -> int:
    """Number a storage. Addresses would do while it lives, but are used again after it, and meta has none."""
    if storage not in _serials:
        _serials[storage] = next(_numbers)
    return _serials[storage]


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
