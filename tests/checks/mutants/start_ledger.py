"""Plausible but wrong byte counts that `check_ledger` must reject."""

from dataclasses import replace

import torch
from torch import Tensor

from refimpl.ledger import Item, Ledger, of_tensors


def _ledger(named, kind, identity, payload, resident):
    of_tensors([], kind)  # refuses an unknown kind
    seen, items = set(), []
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(name)
        new = identity(tensor) not in seen
        seen.add(identity(tensor))
        items.append(Item(name, kind, tensor.numel(), new * payload(tensor), new * resident(tensor), None))
    return Ledger(tuple(items))


def _inner(named):
    for name, tensor in named:
        if isinstance(tensor, Tensor) and type(tensor).__name__ == "_Codes":
            yield from [(f"{name}.codes", tensor.codes), (f"{name}.scales", tensor.scales)]
        else:
            yield name, tensor


def _nbytes(tensor):
    return tensor.numel() * tensor.itemsize


def _storage_bytes(tensor):
    return tensor.untyped_storage().nbytes()


def tied_counted_twice(named, kind):
    seen = list(_inner(named))
    return _ledger(seen, kind, lambda t: object(), _nbytes, _storage_bytes)


def tensors_told_apart_by_object(named, kind):
    seen = list(_inner(named))
    return _ledger(seen, kind, id, _nbytes, _storage_bytes)


def view_counted_as_its_slice(named, kind):
    exact = of_tensors(named, kind)
    return Ledger(tuple(replace(i, resident=i.payload) for i in exact.items))


def slice_counted_as_its_storage(named, kind):
    exact = of_tensors(named, kind)
    return Ledger(tuple(replace(i, payload=i.resident) for i in exact.items))


def storages_told_apart_by_address(named, kind):
    items, addresses = [], set()
    for (_, tensor), item in zip(_inner(named := list(named)), of_tensors(named, kind).items, strict=True):
        address = tensor.untyped_storage().data_ptr()
        again = tensor.is_meta and address in addresses  # a real storage keeps its address while it lives
        items.append(replace(item, payload=0, resident=0) if again else item)
        addresses.add(address)
    return Ledger(tuple(items))


def second_view_ignored(named, kind):
    exact = of_tensors(named, kind)
    kept, storages = [], set()
    for i in exact.items:
        if i.storage not in storages:
            kept.append(i)
        storages.add(i.storage)
    return Ledger(tuple(kept))


def subclass_counted_as_it_looks(named, kind):
    shown = []
    for name, tensor in named:
        looks = type(tensor).__name__ == "_Codes"
        shown.append((name, torch.empty(tensor.shape, dtype=tensor.dtype) if looks else tensor))
    return of_tensors(shown, kind)


MUTANTS = [
    ("ledger", "tied weights are counted twice", tied_counted_twice),
    ("ledger", "tensors are told apart by object, so views count again", tensors_told_apart_by_object),
    ("ledger", "a view is resident as its slice only", view_counted_as_its_slice),
    ("ledger", "a slice's payload is its whole storage", slice_counted_as_its_storage),
    ("ledger", "storages are told apart by address", storages_told_apart_by_address),
    ("ledger", "the second view of a storage is ignored", second_view_ignored),
    ("ledger", "a quantised subclass is counted by the dtype it shows", subclass_counted_as_it_looks),
]
