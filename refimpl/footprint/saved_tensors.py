"""What autograd keeps between forward and backward, measured op by op.

The activation term of the survey's Eq. 1. Autograd packs every tensor that a backward formula needs; a hook
on that packing sees them all. It sees views, and the same tensor several times, so bytes are counted on
storages, each once; parameters and buffers are saved as well and cost nothing more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from refimpl.ledger import Item, Ledger, of_tensors

__all__ = ["SavedTensor", "as_ledger", "record", "saved_tensors"]


@dataclass(frozen=True)
class SavedTensor:
    """One line of the account: which module and op saved which tensor.

    Parameters
    ----------
    module : its name in the model, "(model)" for the model itself.
    op : the torch function that saved it, as called in Python ("linear", "softmax", "mul", ...).
    tensor : its shape if measured, its role if predicted.
    dtype : "float32", "bfloat16", "float16", "int64" or "bool".
    numel : elements that no earlier line has counted.
    payload, resident : bytes of those elements, and of the storage if no earlier line keeps it alive.
    storage : serial number of the storage if measured, else None.
    """

    module: str
    op: str
    tensor: str
    dtype: str
    numel: int
    payload: int
    resident: int
    storage: int | None = None


def saved_tensors(forward: Callable[[], Any], model: nn.Module, counted: Iterable[Tensor] = ()) -> Ledger:
    """Run a forward pass and return what its graph keeps, as a ledger of kind "activation".

    The resident view is the memory; the payload leaves out parts of storages that backward does not read.
    Items are named "module op dtype", and "#2", "#3" ... where an op saves several of a dtype.

    Parameters
    ----------
    forward : runs the forward pass and returns what holds the graph, the loss say.
    model : the module that it runs; its parameters and buffers are not counted.
    counted : tensors that another ledger counts, such as the batch.

    Raises ValueError where nothing that `forward` returned needs a gradient. Tensors that it returned without
    autograd keeping them (logits beside the loss) are not activations and not counted.

    Examples
    --------
    >>> import torch
    >>> layer, x = nn.Linear(8, 4), torch.zeros(2, 8)
    >>> ledger = saved_tensors(lambda: layer(x).relu().sum(), layer)  # saves x and the output
    >>> [(item.name, item.payload) for item in ledger.items]
    [('(model) linear float32', 64), ('(model) relu float32', 32)]
    """
    return as_ledger(record(forward, model, counted))


def record(
    forward: Callable[[], Any], model: nn.Module, counted: Iterable[Tensor] = ()
) -> tuple[SavedTensor, ...]:
    """Return the lines behind `saved_tensors` with the shapes, in the order in which they were saved.

    >>> import torch
    >>> layer, x = nn.Linear(8, 4), torch.zeros(2, 8)
    >>> line = record(lambda: layer(x).relu().sum(), layer)[0]
    >>> line.module, line.op, line.tensor
    ('(model)', 'linear', '[2, 8]')
    """
    skip = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *counted)}
    packed: list[tuple[str, str, weakref.ref[_Packed]]] = []
    modules, ops = ["(model)"], _Op()

    def pack(tensor: Tensor) -> _Packed:
        box = _Packed(tensor.detach())  # shares the storage, without the graph: no cycle through an output
        packed.append((modules[-1], ops.name, weakref.ref(box)))
        return box

    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = lambda *_, name=name: modules.append(name or "(model)")
            leave = lambda *_: modules.pop() and None
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(saved_tensors_hooks(pack, lambda box: box.tensor))
        stack.enter_context(ops)
        held = forward()
    # Only autograd owns the boxes, so those of branches that nothing holds any more are gone by now.
    alive = [(module, op, box.tensor) for module, op, ref in packed if (box := ref()) is not None]
    if not alive:
        raise ValueError(f"forward returned {type(held).__name__}, for which autograd keeps no tensor")
    mine = [line for line in alive if line[2].untyped_storage()._cdata not in skip]
    ledger = of_tensors(((op, tensor) for _, op, tensor in mine), "activation")
    lines = []
    for (module, op, tensor), item in zip(mine, ledger.items, strict=True):
        if item.payload or item.resident:
            dtype, shape = str(tensor.dtype).removeprefix("torch."), str(list(tensor.shape))
            counts = (item.numel, item.payload, item.resident, item.storage)
            lines.append(SavedTensor(module, op, shape, dtype, *counts))
    return tuple(lines)


def as_ledger(lines: Iterable[SavedTensor]) -> Ledger:
    """Return saved tensors, measured or predicted, as a ledger of kind "activation"."""
    seen: dict[str, int] = {}
    items = []
    for line in lines:
        name = f"{line.module} {line.op} {line.dtype}"
        seen[name] = seen.get(name, 0) + 1
        name += f" #{seen[name]}" if seen[name] > 1 else ""
        items.append(Item(name, "activation", line.numel, line.payload, line.resident, line.storage))
    return Ledger(tuple(items))


class _Packed:
    """What autograd holds in place of a saved tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Op(TorchFunctionMode):
    """Knows the name of the torch function that is running."""

    name = "(custom function)"

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, self.name = self.name, func.__name__
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.name = before
