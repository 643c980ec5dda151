"""Closed forms of sharded training: the bytes that each of N ranks holds under ZeRO 0-3 and FSDP2.

Implements the memory account of ZeRO (Rajbhandari et al., arXiv 1910.02054, §5.4) and its padded, exact
version for two layouts: the flat chunks of `refimpl.footprint.zero` and FSDP2's chunks of rows: the
static terms of survey Eq. 1, per rank.
"""

from __future__ import annotations

import re
from math import prod
from typing import Literal, get_args

from torch import nn

from refimpl.footprint.arch import Arch, Run
from refimpl.ledger import Item, Kind, Ledger

__all__ = ["deepspeed_estimate", "dim0_shard", "flat_shard", "partition", "sharded", "units", "zero_bytes"]

Layout = Literal["flat", "fsdp2"]
MOMENTS = {"adamw": 2, "momentum": 1, "sgd": 0}
STEP_BYTES = 4  # AdamW counts its steps in one float32 scalar per tensor that it updates


def flat_shard(numel: int, rank: int, world: int) -> tuple[int, int]:
    """Return (stored, own): the elements of a flat chunk, and how many of them are not padding.

    stored = ceil(numel / N), on every rank; the chunks of the last ranks may hold padding, even nothing else.

    Parameters: numel, elements of the unit; rank, 0 to world - 1; world, N ranks. ValueError otherwise.

    >>> [flat_shard(10, rank, 4) for rank in range(4)]
    [(3, 3), (3, 3), (3, 3), (3, 1)]
    """
    _require_count("numel", numel)
    _require_rank(rank, world)
    stored = -(-numel // world)
    return stored, min(max(numel - rank * stored, 0), stored)


def dim0_shard(shape: tuple[int, ...], rank: int, world: int) -> tuple[int, int]:
    """Return (stored, own) elements of one tensor under FSDP2: chunks of ceil(d0 / N) rows.

    Parameters: shape, (d0, ...); rank, 0 to world - 1; world, N ranks. Raises ValueError for a scalar.

    >>> [dim0_shard((5, 8), rank, 2) for rank in range(2)]
    [(24, 24), (24, 16)]
    """
    if not shape:
        raise ValueError("shape must have a dimension 0 to chunk, got ()")
    stored, own = flat_shard(shape[0], rank, world)
    return stored * prod(shape[1:]), own * prod(shape[1:])


def zero_bytes(
    parameters: int, stage: int, world: int, *, weight: int = 4, grad: int = 4, optim: int = 8
) -> float:
    """Return the paper's bytes per rank of weights, gradients and optimizer states, without padding.

    Implements arXiv 1910.02054 §5.4: of (weight + grad + optim) · P bytes, stage 1 divides the optimizer's
    by N, stage 2 the gradients' also, stage 3 all. The defaults are float32 AdamW (16P); the paper's mixed
    precision is weight=2, grad=2, optim=12.

    Parameters: parameters, P; stage, 0 to 3; world, N; weight, grad, optim, bytes per parameter. Raises
    ValueError out of range.

    >>> [round(zero_bytes(7_500_000_000, s, 64, weight=2, grad=2, optim=12) / 1e9, 1) for s in range(4)]
    [120.0, 31.4, 16.6, 1.9]
    """
    _require_count("parameters", parameters)
    _require_rank(0, world)
    _require_choice("stage", stage, (0, 1, 2, 3))
    sizes = (optim, grad, weight)
    return parameters * sum(size / world if stage > i else size for i, size in enumerate(sizes))


def deepspeed_estimate(parameters: int, stage: int, world: int, largest_layer: int = 0) -> int:
    """Return DeepSpeed's estimate of the GPU bytes per rank for model states, without offload.

    What its `estimate_zero2/3_model_states_mem_needs` compute: stage 2: 2P + 18P/N (a 16-bit copy; sharded
    16-bit and 32-bit gradients, master weights, moments), in old versions 4P + 16P/N; stage 3: 4 ·
    largest_layer + 18P/N. Its host-side `additional_buffer_factor` (1.5) is a guess and left out here.

    Parameters: parameters, P; stage, 2 or 3; world, N; largest_layer, parameters of the largest layer (stage
    3 only). Raises ValueError otherwise.

    >>> deepspeed_estimate(1_000_000, 2, 8), deepspeed_estimate(1_000_000, 3, 8, largest_layer=50_000)
    (4250000, 2450000)
    """
    _require_count("parameters", parameters)
    _require_rank(0, world)
    _require_choice("stage", stage, (2, 3))
    if (stage == 3) != (largest_layer > 0):
        raise ValueError(f"largest_layer must be >= 1 at stage 3 and 0 at stage 2, got {largest_layer!r}")
    return (2 * parameters if stage == 2 else 4 * largest_layer) + 18 * parameters // world


def units(arch: Arch) -> dict[str, tuple[tuple[str, tuple[int, ...]], ...]]:
    """Return {unit: ((name, shape), ...)}: "root" and one unit for each decoder layer, by its module's name.

    >>> list(units(Arch("llama", 64, 32, 8, 16, 2, 2, 1, 4, tied=True)))
    ['root', 'model.layers.0', 'model.layers.1']
    """
    grouped: dict[str, list[tuple[str, tuple[int, ...]]]] = {"root": []}
    for name, shape in arch.tensors():
        layer = re.match(r"(transformer\.h|model\.layers)\.\d+", name)
        grouped.setdefault(layer[0] if layer else "root", []).append((name, shape))
    return {unit: tuple(tensors) for unit, tensors in grouped.items()}


def partition(model: nn.Module, units: list[nn.Module]) -> dict[str, tuple[nn.Module, list[nn.Parameter]]]:
    """Return {name: (module, its parameters)} of a model: "(root)" with what no unit holds, then the units.

    Parameters: model; units, submodules of it. Raises ValueError for a model without parameters, with frozen
    ones or several dtypes, for units that are nested or not in the model, and for a parameter in two of them.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    >>> {name: len(parameters) for name, (_, parameters) in partition(model, [model[1]]).items()}
    {'(root)': 2, '1': 2}
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not parameters:
        raise ValueError("model has no parameters")
    frozen = [name for name, p in parameters.items() if not p.requires_grad]
    if frozen:
        raise ValueError(f"model: {frozen[0]} is frozen; this ZeRO shards trainable parameters only")
    dtypes = {str(p.dtype) for p in parameters.values()}
    if len(dtypes) > 1:
        raise ValueError(f"model mixes dtypes: {', '.join(sorted(dtypes))}; cast it to one")
    module_names = {module: name for name, module in model.named_modules()}
    names = []
    for unit in units:
        if not module_names.get(unit):  # the model's own name is empty
            raise ValueError(f"units: a {type(unit).__name__} is not a submodule of model")
        names.append(module_names[unit])
    for i, name in enumerate(names):
        for other in names[:i]:
            if f"{name}.".startswith(f"{other}.") or other.startswith(f"{name}."):
                raise ValueError(f"units: {name} and {other} are nested")
    owners: dict[nn.Parameter, str] = {}
    for name, p in parameters.items():
        owner = next((unit for unit in names if name.startswith(f"{unit}.")), "(root)")
        if owners.setdefault(p, owner) != owner:
            raise ValueError(f"units: {name} is shared with {owners[p]}; tied parameters stay in the root")
    groups = {"(root)": model} | dict(zip(names, units, strict=True))
    owned = {name: [p for p, owner in owners.items() if owner == name] for name in groups}
    return {name: (module, owned[name]) for name, module in groups.items() if owned[name]}


def sharded(arch: Arch, run: Run, *, rank: int = 0, layout: Layout = "flat") -> Ledger:
    """Predict what one rank holds after the first backward: weights, gradients, optimizer states.

    With P the parameters and N ranks, in float32 with AdamW: 16P, 8P + 8P/N, 4P + 12P/N, 16P/N bytes at stage
    0 to 3 (arXiv 1910.02054; survey Eq. 1), here with each unit's padding and AdamW's step counts. "temp"
    holds what stage 3 has gathered at its peak: the root, which stays, and the largest layer (a system that
    prefetches gathers two). Resident bytes include padding, payload bytes are the rank's true share: over
    ranks their sum is the whole. Left out: buffers, activations, and the one unit whose gradients are on
    their way into the reduce-scatter.

    Parameters
    ----------
    arch, run : the model; the run's `zero_stage`, `world`, `dtype` and `optimizer` (adamw, momentum, sgd).
    rank : 0 to run.world - 1.
    layout : "flat", as in `refimpl.footprint.zero` (a unit is one padded buffer), or "fsdp2", stage 3 only
        (each tensor in chunks of ceil(d0 / N) rows).

    Raises ValueError for a rank, layout or optimizer outside these, and for a run with LoRA.

    Examples
    --------
    >>> gpt2 = Arch.from_config({"model_type": "gpt2"})
    >>> for stage in range(4):
    ...     print(stage, sharded(gpt2, Run(zero_stage=stage, world=8)).by_kind())
    0 {'weight': 497759232, 'grad': 497759232, 'optim': 995519056}
    1 {'weight': 497759232, 'grad': 497759232, 'optim': 124439860}
    2 {'weight': 497759232, 'grad': 62219904, 'optim': 124439860}
    3 {'weight': 62219904, 'grad': 62219904, 'optim': 124439860, 'temp': 185892864}
    """
    _require_choice("layout", layout, get_args(Layout))
    _require_choice("optimizer", run.optimizer, tuple(MOMENTS))
    _require_rank(rank, run.world)
    if run.lora_rank is not None:
        raise ValueError(f"lora_rank must be None: frozen parameters are not sharded, got {run.lora_rank}")
    stage = run.zero_stage
    if layout == "fsdp2" and stage != 3:
        raise ValueError(f"layout 'fsdp2' shards parameters, so zero_stage must be 3, got {stage}")

    # Pieces are what is chunked: (name, elements, own, stored), by unit.
    pieces: dict[str, list[tuple[str, int, int, int]]] = {}
    for unit, tensors in units(arch).items():
        sizes = [(name, prod(shape)) for name, shape in tensors]
        numel = sum(size for _, size in sizes)
        if stage == 0:
            pieces[unit] = [(name, size, size, size) for name, size in sizes]
        elif layout == "flat":
            stored, own = flat_shard(numel, rank, run.world)
            pieces[unit] = [(unit, numel, own, stored)]
        else:
            chunks = [dim0_shard(shape, rank, run.world) for _, shape in tensors]
            pieces[unit] = [(*size, own, stored) for size, (stored, own) in zip(sizes, chunks, strict=True)]

    items: list[Item] = []

    def hold(name: str, kind: Kind, numel: int, stored: int, *, steps: int = 0) -> None:
        payload, resident = (n * run.itemsize + steps * STEP_BYTES for n in (numel, stored))
        items.append(Item(name, kind, numel + steps, payload, resident, None))

    ranks, moments = (run.world if stage else 1), MOMENTS[run.optimizer]
    for name, numel, own, stored in (piece for unit in pieces.values() for piece in unit):
        # Up to stage 2 the weights stay views of the unit's full, padded buffer.
        hold(name, "weight", *((own, stored) if stage == 3 else (numel, ranks * stored)))
        hold(name, "grad", *((own, stored) if stage >= 2 else (numel, numel)))
        if moments:  # made like the shard without its padding
            hold(name, "optim", moments * own, moments * own, steps=int(run.optimizer == "adamw"))
    if stage == 3:
        whole = {
            unit: (sum(p[1] for p in parts), run.world * sum(p[3] for p in parts))
            for unit, parts in pieces.items()
        }
        hold("root, gathered", "temp", *whole.pop("root"))
        hold("largest layer, gathered", "temp", *max(whole.values()))
    return Ledger(tuple(items))


def _require_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _require_rank(rank: int, world: int) -> None:
    _require_count("world", world)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world:
        raise ValueError(f"rank must be an integer from 0 to {world - 1}, got {rank!r}")


def _require_choice(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
