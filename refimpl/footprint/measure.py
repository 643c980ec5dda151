"""Measure a training step: the ledger of what it holds, its peak, and the peak in closed form.

Implements the survey's Eq. 1 by measuring each of its terms on two real steps of plain training; under
`FakeTensorMode`, which computes shapes and no values, so that 70 billion parameters cost no memory. With
eager attention, real and fake agree to the byte. With sdpa they do not: transformers cannot look whether a
fake mask hides anything, so it builds the mask and repeats keys and values, and the fake step holds more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.checkpointing import checkpoint_layers
from refimpl.footprint.static import measure_static
from refimpl.footprint.tracker import LiveTracker
from refimpl.ledger import Item, Kind, Ledger, of_tensors

__all__ = ["Measurement", "measure", "measure_step", "peak", "peak_points"]

_OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class Measurement:
    """What a training step held.

    Parameters
    ----------
    ledger : the terms of Eq. 1, each at its largest: weights, buffers, gradients and optimizer states after a
        step, and the activations that one forward pass saves, token ids included.
    after_forward : bytes alive between the last forward and backward pass of the second step.
    peak : most bytes alive at one instant of the second step, when optimizer states exist; less than the
        ledger's total where gradients and activations do not meet.
    at_peak : the peak split by kind; what lives at the end of a forward pass and what dies in it are both
        "activation", what a backward pass makes is "temp" until it is a gradient.
    timeline : (operation, bytes alive after it) over the second step.
    """

    ledger: Ledger
    after_forward: int
    peak: int
    at_peak: dict[Kind, int]
    timeline: list[tuple[str, int]]


def measure(
    make_model: Callable[[], nn.Module], make_batch: Callable[[], Tensor], run: Run, fake: bool = True
) -> Ledger:
    """Return the bytes of a training step by kind; `measure_step` says what the arguments are.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> run = Run(batch=2, length=8, attention="eager")
    >>> ledger = measure(lambda: tiny("llama"), lambda: random_ids(2, 8), run, fake=False)
    >>> ledger.total("grad") == ledger.total("weight"), ledger.total("optim") - 2 * ledger.total("weight")
    (True, 116)
    """
    return measure_step(make_model, make_batch, run, fake).ledger


def measure_step(
    make_model: Callable[[], nn.Module], make_batch: Callable[[], Tensor], run: Run, fake: bool = True,
    tracker: type[LiveTracker] = LiveTracker,
) -> Measurement:  # fmt: skip
    """Run two training steps and account for them: the terms of Eq. 1 in the first, the peak in the second.

    Parameters
    ----------
    make_model : returns a causal language model of `transformers`, on CPU; it is called with `run.dtype` as
        default dtype, under FakeTensorMode if `fake`, so it must not load weights then.
    make_batch : returns the token ids [B, S], which are the labels as well.
    run : all fields but those of LoRA and ZeRO are obeyed.
    fake : compute shapes only.
    tracker : what counts; `refimpl.footprint.cuda.CudaTracker` counts as a GPU would.

    Raises ValueError for a run with LoRA, ZeRO or an 8-bit optimizer, for Adafactor under `fake` (it reads
    values), and for a model or batch that disagrees with `run`; TypeError for something that is not one.
    """
    _check_run(run)
    if fake and run.optimizer == "adafactor":
        raise ValueError("fake must be False for 'adafactor', whose step reads the values of the parameters")
    mode = FakeTensorMode() if fake else nullcontext()
    with torch.random.fork_rng(devices=[]), mode, ExitStack() as stack:  # constructors draw global numbers
        with _default_dtype(getattr(torch, run.dtype)):
            model = make_model()
        ids = make_batch()
        _check_made(model, ids, run)
        ids = mode.from_tensor(ids) if fake else ids
        model.train()
        if run.checkpoint_every is not None:
            stack.enter_context(checkpoint_layers(model, run.checkpoint_every))
        optimizer = _OPTIMIZERS[run.optimizer](model.parameters())

        activations: list[Item] = []
        with saved_tensors_hooks(_collector(activations, measure_static(model)), lambda tensor: tensor):
            _loss(model, ids, run)
        for _ in range(run.accumulate):
            _loss(model, ids, run).backward()
        optimizer.step()
        ledger = measure_static(model, optimizer) + Ledger(tuple(activations))
        optimizer.zero_grad()

        with tracker() as count:
            count.watch(model, optimizer)
            count.register([ids], "activation")
            count.reset_peak()
            for _ in range(run.accumulate):
                count.new = "activation"
                loss = _loss(model, ids, run)
                count.new, after_forward = "temp", count.live
                loss.backward()
                del loss
            optimizer.step()
    return Measurement(ledger, after_forward, count.peak, count.at_peak, count.timeline)


def peak(arch: Arch, run: Run, ledger: Ledger) -> int:
    """Return the peak of a training step in closed form: the highest of `peak_points`.

    Exact where the highest instant is one of them: "loss" when all layers save more than one layer's
    backward pass adds, the others when the model outweighs its activations. A lower bound elsewhere, as where
    blocks of many layers are recomputed; `measure_step` is exact always.
    """
    return max(peak_points(arch, run, ledger).values())


def peak_points(arch: Arch, run: Run, ledger: Ledger) -> dict[str, int]:
    """Return the bytes alive at the three instants of a step that depend on no layer's inside.

    With static = weights + buffers + optimizer states, n = B·S tokens and w bytes per parameter:

    - "loss": static + saved + 2·4·n·V - labels + 4. The softmax backward holds the gradients of its output
      and of the logits in float32; the loss has given its shifted labels back (8n bytes, padded to 8(n + 1)
      for B = 1). From the second micro-batch on, gradients exist too.
    - "embedding": static + gradients + w·n·h + 8n + 8. The last gradient is made from that of the embedding's
      output. Tied, both uses have one and their sum a third: w·V·h + w·max(V, n)·h in place of w·n·h.
    - "update", AdamW on CPU, tensor by tensor: static + gradients + max_i w·(2·numel_i + numel_{i-1}) + 8n:
      the root of the second moment, its quotient, and the quotient left from the tensor before. SGD: 0.

    8n are the token ids, which outlive the step, and scalars (the loss, its gradient) are 4 bytes each. A
    checkpointed run holds more at "loss" than autograd saves: the mask, rotary tables and positions that the
    layers get as keyword arguments wait for the recomputation.

    Parameters: `ledger`, the run's resident bytes (weight, buffer, optim, grad, activation), predicted or
    measured. Raises ValueError for runs that `measure_step` refuses, and for those with adafactor or amp.
    """
    _check_run(run)
    if run.optimizer == "adafactor" or run.amp:
        raise ValueError(f"run must be without adafactor and amp, got {run.optimizer!r}, amp={run.amp}")
    of = lambda kind: ledger.total(kind, view="resident")
    n, w = run.tokens, run.itemsize
    static = of("weight") + of("buffer") + of("optim")
    earlier = of("grad") if run.accumulate > 1 else 0
    labels = 8 * n if run.batch > 1 else 8 * (n + 1)
    output_grad = w * n * arch.hidden
    table = w * arch.vocab * arch.hidden
    sizes = [w * math.prod(shape) for _, shape in arch.tensors()]
    transient = (
        max(2 * size + last for last, size in pairwise([0, *sizes])) if run.optimizer == "adamw" else 0
    )
    return {
        "loss": static + earlier + of("activation") + 2 * 4 * n * arch.vocab - labels + 4,
        "embedding": static + of("grad") + 8 * n + 8
        + (table + max(table, output_grad) if arch.tied else output_grad),
        "update": static + of("grad") + transient + 8 * n,
    }  # fmt: skip


def _loss(model: nn.Module, ids: Tensor, run: Run) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=run.amp):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss / run.accumulate if run.accumulate > 1 else loss


def _collector(items: list[Item], held: Ledger) -> Callable[[Tensor], Tensor]:
    """A pack hook that notes each storage which autograd saves and `held` does not hold, once.

    `saved_tensors` says which module and op saved it and separates payload from resident bytes, for which it
    maps storages byte by byte: too large a map where the storages are those of 70 billion parameters.
    """
    seen = {item.storage for item in held.items}

    def pack(tensor: Tensor) -> Tensor:
        (item,) = of_tensors([(f"saved {len(items)}", tensor)], "activation").items
        if item.storage not in seen:
            seen.add(item.storage)
            items.append(replace(item, numel=item.resident // tensor.itemsize, payload=item.resident))
        return tensor.detach()  # an op that keeps its own output would hold itself alive

    return pack


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _check_run(run: Run) -> None:
    if run.lora_rank is not None or run.zero_stage or run.world > 1:
        raise ValueError(
            "run must train all parameters in one process here, got "
            f"lora_rank={run.lora_rank}, zero_stage={run.zero_stage}, world={run.world}"
        )
    if run.optimizer not in _OPTIMIZERS:
        raise ValueError(f"run.optimizer must be one of {', '.join(_OPTIMIZERS)} here, got {run.optimizer!r}")


def _check_made(model: nn.Module, ids: Tensor, run: Run) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"make_model must return a module, got {type(model).__name__}")
    if not isinstance(ids, Tensor):
        raise TypeError(f"make_batch must return a tensor, got {type(ids).__name__}")
    dtypes = {p.dtype for p in model.parameters()}
    if dtypes != {getattr(torch, run.dtype)}:
        raise ValueError(f"make_model must return parameters of run.dtype {run.dtype!r}, got {dtypes}")
    if model.config._attn_implementation != run.attention:
        attention = model.config._attn_implementation
        raise ValueError(f"make_model must use run.attention {run.attention!r}, got {attention!r}")
    if tuple(ids.shape) != (run.batch, run.length) or ids.dtype != torch.int64:
        raise ValueError(
            f"make_batch must return int64 ids of shape ({run.batch}, {run.length}), "
            f"got {ids.dtype} of shape {tuple(ids.shape)}"
        )
