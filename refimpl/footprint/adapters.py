"""What LoRA and QLoRA hold whatever the batch: the static terms of Eq. 1 where only the factors are trained.

LoRA (arXiv 2106.09685) trains r (m + n) numbers beside a frozen [m, n] matrix, and only they have gradients
and optimizer states. QLoRA (arXiv 2305.14314) also keeps the frozen matrices of the layers in NF4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.qlora import nf4_bytes
from refimpl.footprint.static import EMBEDDINGS, optimizer_items, static
from refimpl.ledger import Item, Kind, Ledger
from refimpl.lora import is_target

__all__ = ["lora_static", "qlora_static"]


def lora_static(arch: Arch, run: Run) -> Ledger:
    """Predict weights, factors, gradients and optimizer states of a LoRA run, after a step.

    The frozen weights and buffers are those of `static`; a target matrix [m, n] gets the factors A [r, n] and
    B [m, r] in the dtype of the run, with a gradient of the same size each, and optimizer states.

    Parameters
    ----------
    arch : geometry of the model.
    run : `dtype`, `optimizer`, `lora_rank` and `lora_targets` count here.

    Raises ValueError for a run without LoRA or with ZeRO, a target without matrix, and a rank above the
    smaller side of a target.

    Examples
    --------
    >>> llama2 = Arch("llama", 32000, 4096, 4096, 11008, 32, 32, 32, 128, tied=False)
    >>> print(lora_static(llama2, Run(dtype="bfloat16", lora_rank=8)))
    kind    tensors       elements       payload B      resident B
    weight      419  6,742,609,920  13,485,219,840  13,485,219,840
    buffer        2            128               0             512
    grad        128      4,194,304       8,388,608       8,388,608
    optim       384      8,388,736      16,777,728      16,777,728
    total       933  6,755,193,088  13,510,386,176  13,510,386,688
    """
    return Ledger((*_frozen(arch, run), *_trained(arch, run)))


def qlora_static(arch: Arch, run: Run) -> Ledger:
    """Predict the same for QLoRA: every matrix of the layers in NF4, codes as "weight", the rest as "meta".

    Embeddings, output head, norms, biases and factors stay in the dtype of the run. Parameters and errors are
    those of `lora_static`.

    >>> llama2 = Arch("llama", 32000, 4096, 4096, 11008, 32, 32, 32, 128, tied=False)
    >>> run = Run(dtype="bfloat16", lora_rank=64)
    >>> [round(f(llama2, run).total() / 2**30, 2) for f in (lora_static, qlora_static)]
    [12.8, 3.85]
    """
    items: list[Item] = []
    trained = _trained(arch, run)
    matrices = dict(_matrices(arch))
    for item in _frozen(arch, run):
        name = item.name.removesuffix(".weight")
        if name == "lm_head" or name not in matrices:
            items.append(item)
            continue
        for part, nbytes in nf4_bytes(item.numel).items():
            kind, width = ("weight", 1) if part == "codes" else ("meta", 1 if part == "absmax" else 4)
            items.append(_item(f"{name}.{part}", kind, nbytes // width, width))
    # Resident once, and in no file: the 16 levels and the 256 values of the dynamic map.
    tables = (("NF4 levels", 16), ("dynamic map", 256))
    items += [replace(_item(name, "meta", numel, 4), payload=0) for name, numel in tables]
    return Ledger((*items, *trained))


def _frozen(arch: Arch, run: Run) -> list[Item]:
    """Weights and buffers of the model itself."""
    plain = static(arch, replace(run, lora_rank=None, optimizer="sgd"))
    return [item for item in plain.items if item.kind in ("weight", "buffer")]


def _trained(arch: Arch, run: Run) -> list[Item]:
    """The factors with their gradients and optimizer states."""
    factors = list(_factors(arch, run))
    items = [_item(name, kind, prod(shape), run.itemsize)
             for kind in ("weight", "grad") for name, shape in factors]  # fmt: skip
    return items + optimizer_items(factors, run)


def _item(name: str, kind: Kind, numel: int, width: int) -> Item:
    return Item(name, kind, numel, numel * width, numel * width, None)


def _factors(arch: Arch, run: Run) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, shape) of every factor, in the order of the model."""
    if run.lora_rank is None:
        raise ValueError("run.lora_rank must be an integer >= 1 for a run with LoRA, got None")
    if not run.lora_targets:
        raise ValueError("run.lora_targets must name one or more layers, got ()")
    matrices = dict(_matrices(arch))
    for target in run.lora_targets:
        if not any(is_target(name, [target]) for name in matrices):
            known = sorted({name.rpartition(".")[2] for name in matrices})
            raise ValueError(f"run.lora_targets: no {target!r} in a {arch.kind}; allowed: {', '.join(known)}")
    for name, (n_out, n_in) in matrices.items():
        if is_target(name, run.lora_targets):
            if run.lora_rank > min(n_out, n_in):
                raise ValueError(
                    f"run.lora_rank must be <= {min(n_out, n_in)} for {name}, got {run.lora_rank}"
                )
            yield f"{name}.lora.A", (run.lora_rank, n_in)
            yield f"{name}.lora.B", (n_out, run.lora_rank)


def _matrices(arch: Arch) -> Iterator[tuple[str, tuple[int, int]]]:
    """(layer's name, (out, in)) of every linear layer."""
    for name, shape in arch.tensors():
        if len(shape) == 2 and name not in EMBEDDINGS:
            transposed = arch.kind == "gpt2" and name != "lm_head.weight"
            yield name.removesuffix(".weight"), shape[::-1] if transposed else shape
