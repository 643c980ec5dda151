"""The live tracker: which bytes are alive after every operation, and how many at most.

Implements the measurement of the survey's Eq. 1, total = model + optimizer + gradients + activations, at each
instant of a step instead of term by term. Convention: a storage lives from the operation that returns it
until nothing refers to it, with the bytes that PyTorch asks for. What a kernel allocates and frees inside
itself, and what an allocator rounds up, is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from refimpl.ledger import Kind

__all__ = ["LiveTracker"]


class LiveTracker(TorchDispatchMode):
    """Counts live bytes by storage, and their high-water mark, on real and on fake tensors.

    What exists before the `with` block is counted if it is registered: `register`, or `watch` for a model and
    its optimizer. Storages subtract themselves when they die, also after the block.

    Attributes
    ----------
    live, peak : bytes alive now, and at most since the start or the last `reset_peak()`.
    by_kind, at_peak : the same two split by kind; every kind of `refimpl.ledger.Kind` is a key.
    timeline : (operation, bytes alive after it) for every operation since then.
    new : the kind that new storages are given, default "temp"; set "activation" before a forward pass.

    Examples
    --------
    >>> x = torch.ones(1000)                      # 4000 bytes
    >>> with LiveTracker() as tracker:
    ...     tracker.register([x], "weight")
    ...     y = (x * 2).exp()                     # x, x * 2 and its exponential; then x * 2 dies
    >>> tracker.peak, tracker.live
    (12000, 8000)
    >>> tracker.timeline
    [('mul.Tensor', 8000), ('exp.default', 12000)]
    >>> del y
    >>> tracker.live
    4000
    """

    def __init__(self) -> None:
        super().__init__()
        self.new: Kind = "temp"
        self.by_kind: dict[Kind, int] = dict.fromkeys(get_args(Kind), 0)
        self.live = 0
        # A storage's address names it while it lives; the weak reference takes the entry out when it dies.
        self._held: dict[int, tuple[int, Kind, weakref.ref]] = {}
        self._hooks: list[Any] = []
        self.reset_peak()

    def reset_peak(self) -> None:
        """Forget the peak and the timeline so far; call it where the step to be measured begins."""
        self.peak, self.at_peak = self.live, dict(self.by_kind)
        self.timeline: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A wrapper subclass (quantised, sharded) computes with inner tensors: let it unwrap, and see those.
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented
        out = func(*args, **kwargs or {})
        if func.namespace == "prim":  # a fake tensor is asked for its device, no operation
            return out
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage(), self.new, relabel=False)
        self.timeline.append((func.__name__, self.live))
        return out

    def register(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Count tensors that exist already, or give those that are counted another kind.

        Raises ValueError for an unknown kind and TypeError for something that is not a tensor, before it
        counts anything.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        plain = [part for tensor in tensors for part in _plain(tensor)]
        for tensor in plain:
            self._see(tensor.untyped_storage(), kind, relabel=True)

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Register a model and its optimizer's states, and until the block ends what they come to hold.

        Gradients count as "grad" from the moment they are accumulated, optimizer states as "optim" from the
        end of the first `optimizer.step()`.
        """
        parameters = list(model.parameters())
        self.register(parameters, "weight")
        self.register(model.buffers(), "buffer")
        self.register([p.grad for p in parameters if p.grad is not None], "grad")
        for parameter in parameters:
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(lambda p: self.register([p.grad], "grad"))
                self._hooks.append(hook)
        if optimizer is not None:
            self.register(_states(optimizer), "optim")
            hook = optimizer.register_step_post_hook(lambda o, *_: self.register(_states(o), "optim"))
            self._hooks.append(hook)

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().__exit__(*error)

    def _see(self, storage: torch.UntypedStorage, kind: Kind, relabel: bool) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        held = self._held.get(key)
        if held is None:
            reference = weakref.ref(storage, lambda _: self._free(key))
        elif held[0] == nbytes and (held[1] == kind or not relabel):
            return
        else:  # resized in place, or known under another kind
            kind, reference = kind if relabel else held[1], held[2]
            self._free(key)
        self._held[key] = (nbytes, kind, reference)
        self.live += nbytes
        self.by_kind[kind] += nbytes
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, dict(self.by_kind)

    def _free(self, key: int) -> None:
        nbytes, kind, _ = self._held.pop(key)
        self.live -= nbytes
        self.by_kind[kind] -= nbytes


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors with a storage of their own that make up a tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensors must hold tensors, got {type(tensor).__name__}")
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(tensor, name))]


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
