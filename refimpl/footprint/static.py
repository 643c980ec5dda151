"""The static terms of Eq. 1: weights, buffers, gradients and optimizer states, predicted and measured.

Survey Eq. 1 adds four terms, M_total = M_model + M_optimizer + M_gradients + M_activations. Three of them do
not depend on batch and length. They follow from the shapes of the parameter tensors alone, with nothing
approximate about it: `static` predicts them to the byte, `measure_static` counts them.

What an optimizer holds per tensor of n elements, in the dtype of the parameter unless said otherwise:

    sgd         nothing
    momentum    n
    adamw       2n, and the step count, one float32
    adafactor   a matrix [r, c]: r + c; a vector: n; and the step count, one float32
    adamw8bit   2 moments of n one-byte codes and ceil(n / 256) float32 scales; embeddings and tensors below
                4096 elements: 2n float32; once per model with such codes: two maps of 256 float32
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.footprint.adam8bit import AdamW8bit
from refimpl.footprint.arch import DTYPE_BYTES, Arch, Run
from refimpl.ledger import Item, Kind, Ledger, of_model, of_tensors

__all__ = ["measure_static", "optimizer_items", "static", "static_bytes"]

BLOCK, SMALLEST = 256, 4096  # adamw8bit: elements per scale, and the smallest tensor that is quantised
EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight", "model.embed_tokens.weight")
FLOAT32 = DTYPE_BYTES["float32"]


def static(arch: Arch, run: Run) -> Ledger:
    """Predict the bytes that a training run holds whatever its batch: survey Eq. 1 without its last term.

    Gradients exist from the first backward pass until `zero_grad()`, optimizer states from the first step
    on: the ledger describes the moment after a step. Autocast (`run.amp`) changes none of these terms.
    Items are named as in `transformers`, one per tensor, ties once.

    Parameters
    ----------
    arch : geometry of the model.
    run : its `dtype` and `optimizer` count here.

    Raises TypeError for another type, ValueError for a run with LoRA or ZeRO, whose terms are accounted for
    in files of their own.

    Examples
    --------
    Float32 and AdamW are 16 bytes per parameter, and 4 per tensor for its step count:

    >>> gpt2 = Arch.from_config({"model_type": "gpt2"})
    >>> print(static(gpt2, Run(dtype="float32", optimizer="adamw")))
    kind    tensors     elements      payload B     resident B
    weight      148  124,439,808    497,759,232    497,759,232
    grad        148  124,439,808    497,759,232    497,759,232
    optim       444  248,879,764    995,519,056    995,519,056
    total       740  497,759,380  1,991,037,520  1,991,037,520
    """
    if not isinstance(arch, Arch):
        raise TypeError(f"arch must be an Arch, got {type(arch).__name__}; see Arch.from_config")
    if not isinstance(run, Run):
        raise TypeError(f"run must be a Run, got {type(run).__name__}")
    if run.lora_rank is not None:
        raise ValueError(f"run.lora_rank must be None where everything is trained, got {run.lora_rank}")
    if run.zero_stage:
        raise ValueError(f"run.zero_stage must be 0 where nothing is partitioned, got {run.zero_stage}")
    tensors = arch.tensors()
    items = [_item(name, "weight", prod(shape), run.itemsize) for name, shape in tensors]
    items += _buffers(arch)
    items += [_item(name, "grad", prod(shape), run.itemsize) for name, shape in tensors]
    return Ledger((*items, *optimizer_items(tensors, run)))


def optimizer_items(tensors: Iterable[tuple[str, tuple[int, ...]]], run: Run) -> list[Item]:
    """Predict what `run.optimizer` holds after its first step, for the tensors (name, shape) that it trains.

    >>> [(item.name, item.payload) for item in optimizer_items([("w", (8, 4))], Run(optimizer="adafactor"))]
    [('w.step', 4), ('w.row_var', 32), ('w.col_var', 16)]
    """
    items = []
    for name, shape in tensors:
        states = _states(name, shape, run.optimizer, run.itemsize)
        items += [_item(f"{name}.{state}", "optim", numel, width) for state, numel, width in states]
    if any(item.name.endswith("_codes") for item in items):
        items += [_item(name, "optim", 256, FLOAT32) for name in ("m_map", "v_map")]
    return items


def static_bytes(config: Any, dtype: str = "float32", optimizer: str = "adamw") -> dict[Kind, int]:
    """Return the resident bytes of the static terms of Eq. 1 for a configuration, by kind.

    Parameters: config, what `Arch.from_config` reads; dtype and optimizer as in `Run`. Raises ValueError for
    values that these do not know.

    Examples
    --------
    >>> static_bytes({"model_type": "gpt2"}, "bfloat16", "sgd")
    {'weight': 248879616, 'grad': 248879616}
    """
    return static(Arch.from_config(config), Run(dtype=dtype, optimizer=optimizer)).by_kind("resident")


def measure_static(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Ledger:
    """Count the weights, buffers, gradients and optimizer states that exist now, each storage once.

    Optimizers make their states in their first step: before it there is nothing to count.

    Parameters
    ----------
    model : any module, on any device, meta included.
    optimizer : one that trains parameters of this model and keeps its states per parameter.

    Raises TypeError for something else, ValueError for an optimizer of other parameters.

    Examples
    --------
    >>> model = nn.LayerNorm(8)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> measure_static(model, optimizer).by_kind()
    {'weight': 64}
    >>> model(torch.ones(1, 8)).sum().backward(); optimizer.step()
    >>> measure_static(model, optimizer).by_kind()  # the moments, and one step count for each of two tensors
    {'weight': 64, 'grad': 64, 'optim': 136}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    names = {parameter: name for name, parameter in model.named_parameters()}
    gradients = [(name, p.grad) for p, name in names.items() if p.grad is not None]
    ledger = of_model(model) + of_tensors(gradients, "grad")
    if optimizer is not None:
        ledger += of_tensors(_held(optimizer, names), "optim")
    if isinstance(optimizer, AdamW8bit):
        # Its maps belong to no parameter: its own ledger shows them, at the first tensor in 8 bits.
        maps = [item for item in optimizer.ledger().items if item.name.endswith("_map") and item.payload]
        ledger += Ledger(tuple(replace(item, name=item.name.split(".")[-1]) for item in maps))
    return ledger


def _item(name: str, kind: Kind, numel: int, width: int) -> Item:
    return Item(name, kind, numel, numel * width, numel * width, None)


def _buffers(arch: Arch) -> list[Item]:
    """RoPE: d/2 frequencies and the copy that `transformers` keeps of them. No file holds them, so their
    payload is 0; they are float32 in a model that was built or loaded in any dtype, and half of that only
    after `model.to(torch.bfloat16)`, which rounds them. GPT-2 makes its causal mask as it goes."""
    if arch.kind == "gpt2":
        return []
    numel = len(range(0, arch.head_dim, 2))
    names = ("model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq")
    return [Item(name, "buffer", numel, 0, numel * FLOAT32, None) for name in names]


def _states(name: str, shape: tuple[int, ...], optimizer: str, width: int) -> list[tuple[str, int, int]]:
    """The states (name, elements, bytes per element) of one parameter tensor, those of torch.optim or of
    `AdamW8bit`, whose step count is a plain number."""
    n, step = prod(shape), ("step", 1, FLOAT32)
    if optimizer == "sgd":
        return []
    if optimizer == "momentum":
        return [("momentum_buffer", n, width)]
    if optimizer == "adamw":
        return [step, ("exp_avg", n, width), ("exp_avg_sq", n, width)]
    if optimizer == "adafactor":
        if len(shape) == 1:
            return [step, ("variance", n, width)]
        return [step, ("row_var", n // shape[-1], width), ("col_var", n // shape[-2], width)]
    if optimizer == "adamw8bit":
        if n < SMALLEST or name in EMBEDDINGS:
            return [("m", n, FLOAT32), ("v", n, FLOAT32)]
        parts = (("codes", n, 1), ("absmax", ceil(n / BLOCK), FLOAT32))
        return [(f"{moment}_{part}", *size) for moment in "mv" for part, *size in parts]
    raise ValueError(f"optimizer has no formula here: {optimizer!r}")


def _held(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an optimizer keeps, named after their parameters."""
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    if foreign := sum(p not in names for p in trained):
        raise ValueError(f"optimizer trains {foreign} of {len(trained)} tensors that model does not have")
    for parameter, states in optimizer.state.items():
        for state, value in states.items():
            if isinstance(value, Tensor):
                yield f"{names[parameter]}.{state}", value
