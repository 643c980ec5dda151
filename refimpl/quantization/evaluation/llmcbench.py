"""LLMCBench: six tracks, each the root mean square of ratios between a compressed model and the dense one.

Implements the aggregation of arXiv 2410.21352 (ref 103) as commonly reported:

    overall metric of a track = sqrt( (1/N) sum_i r_i^2 ),  r_i = compressed / dense where more is better,
                                                            r_i = dense / compressed where less is better,

so the dense model has 1 in every track and larger is better. The tracks: performance, generalisation (other
texts or models), cost of compressing, cost of inference, speed, trustworthiness. The dense model costs
nothing to compress; ours counts one pass over the calibration text on both sides, so that the ratio exists
and is 1
(the paper's denominator could not be verified). FLOPs are those that are executed: weight-only quantization
multiplies the same matrices, and zeros that are stored away are multiplied after they were put back.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import LongTensor, nn

from refimpl.backbone import Backbone
from refimpl.ledger import of_model
from refimpl.quantization.harness import Measured

__all__ = [
    "TRACKS", "Bench", "Quantity", "Usage", "accuracies", "benchmark", "cost_tracks", "flops_per_token",
    "overall", "ratio", "used",
]  # fmt: skip

TRACKS = (
    "performance", "generalisation", "compression cost", "inference cost", "speed", "trustworthiness",
)  # fmt: skip
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Quantity:
    """A measured number, and whether less of it is better (seconds, bytes, perplexity)."""

    value: float
    less_is_better: bool = False


Entry = Mapping[str, Mapping[str, Quantity]]


@dataclass(frozen=True)
class Bench:
    """`ratios`, method -> track -> task -> ratio to the dense model; `overall`, method -> track -> their
    root mean square. The dense model is the method "dense"."""

    ratios: dict[str, dict[str, dict[str, float]]]
    overall: dict[str, dict[str, float]]

    def order(self, track: str) -> list[str]:
        """The methods, the best in the track first."""
        return sorted(self.overall, key=lambda name: -self.overall[name][track])

    def __str__(self) -> str:
        tracks = list(self.overall["dense"])
        width = max(len(name) for name in self.overall)
        lines = [" ".join([" " * width, *(f"{track:>16}" for track in tracks)])]
        for name, row in self.overall.items():
            lines.append(" ".join([f"{name:{width}}", *(f"{row[track]:16.3f}" for track in tracks)]))
        lines += [f"{track}: {' > '.join(self.order(track))}" for track in tracks]
        return "\n".join(lines)


def ratio(new: Quantity, dense: Quantity) -> float:
    """How many times as good as the dense model's; ValueError where that is not a number.

    >>> ratio(Quantity(2.0, True), Quantity(3.0, True)), ratio(Quantity(2.0), Quantity(4.0))
    (1.5, 0.5)
    """
    if not (new.value >= 0 and dense.value > 0) or (new.less_is_better and new.value == 0):
        raise ValueError(f"a ratio needs numbers > 0, got {new.value} and {dense.value} (dense)")
    return dense.value / new.value if new.less_is_better else new.value / dense.value


def overall(ratios: Mapping[str, float]) -> float:
    """Root mean square of the ratios; ValueError for none, or one that is negative or not finite.

    >>> overall({"a": 0.5, "b": 1.5}).__round__(4)
    1.118
    """
    if not ratios or not all(math.isfinite(r) and r >= 0 for r in ratios.values()):
        raise ValueError(f"ratios must be finite numbers >= 0, at least one, got {dict(ratios)}")
    return math.sqrt(sum(r * r for r in ratios.values()) / len(ratios))


def benchmark(dense: Entry, methods: Mapping[str, Entry]) -> Bench:
    """Set compressed models against the dense one, track by track.

    Parameters: `dense`, track -> task -> Quantity; `methods`, name -> the same of a compressed model.
    Raises ValueError for tracks that are not in `TRACKS`, for methods with other tracks or tasks than the
    dense model, for a quantity that is better one way here and the other way there, and as `ratio`.

    >>> dense = {"inference cost": {"bytes": Quantity(400, True)}, "performance": {"facts": Quantity(0.8)}}
    >>> half = {"inference cost": {"bytes": Quantity(100, True)}, "performance": {"facts": Quantity(0.6)}}
    >>> {track: round(v, 3) for track, v in benchmark(dense, {"half": half}).overall["half"].items()}
    {'inference cost': 4.0, 'performance': 0.75}
    """
    if unknown := [track for track in dense if track not in TRACKS]:
        raise ValueError(f"dense: tracks are {', '.join(TRACKS)}, got {unknown[0]!r}")
    if "dense" in methods:
        raise ValueError("methods: 'dense' is the name of the dense model")
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for name, entry in {"dense": dense, **methods}.items():
        if entry.keys() != dense.keys():
            raise ValueError(f"methods: {name} has the tracks {list(entry)}, dense has {list(dense)}")
        ratios[name] = {}
        for track, tasks in dense.items():
            found = entry[track]
            same = found.keys() == tasks.keys() and all(
                found[t].less_is_better == tasks[t].less_is_better for t in tasks
            )
            if not same:
                raise ValueError(f"methods: {name} and dense differ in the tasks of {track!r}")
            ratios[name][track] = {task: ratio(found[task], tasks[task]) for task in tasks}
    table = {n: {track: overall(of_one) for track, of_one in row.items()} for n, row in ratios.items()}
    return Bench(ratios, table)


def accuracies(measured: Measured, sets: tuple[str, ...], texts: tuple[str, ...] = ()) -> dict[str, Quantity]:
    """The tasks of a track: accuracy on each set of items, perplexity (less is better) on each text."""
    found = {name: Quantity(measured.accuracy(name)) for name in sets}
    return found | {f"perplexity {name}": Quantity(measured.perplexity(name), True) for name in texts}


@dataclass(frozen=True)
class Usage:
    """What a call took: `seconds` of processor time, and by how many bytes it raised the process's resident
    memory at its peak (None where the system does not tell: only Linux does)."""

    seconds: float
    memory: int | None


def used(run: Callable[[], object]) -> Usage:
    """Call something without arguments and say what it took.

    >>> used(lambda: torch.ones(100) @ torch.ones(100)).seconds < 1
    True
    """
    told = os.access(_CLEAR, os.W_OK)
    if told:
        _CLEAR.write_text("5")  # sets the peak to what is resident now
    before, start = _status("VmRSS") if told else 0, time.process_time()
    run()
    seconds = time.process_time() - start
    return Usage(seconds, max(0, _status("VmHWM") - before) if told else None)


@torch.no_grad()
def cost_tracks(
    model: nn.Module, ids: LongTensor, base: Usage, compression: Usage | None = None,
    *, repeats: int = 3, new_tokens: int = 16,
) -> dict[str, dict[str, Quantity]]:  # fmt: skip
    """The three tracks of costs, measured.

    Parameters: `model`, compressed or not; `ids` [B, T], prompts for speed; `base`, what one pass of
    the dense model over the calibration text takes, counted on both sides; `compression`, what compressing
    took, None for the dense model; `repeats`, of which the fastest counts; `new_tokens`, decoded from one
    prompt. Returns "compression cost" (seconds; memory), "inference cost" (bytes, with floats in 16 bits;
    executed FLOPs of a token behind T - 1 others; memory, the model's as it is plus what decoding adds),
    "speed" (tokens per second, prefill and decode). Memory is left out where the system does not tell.
    """
    if repeats < 1 or new_tokens < 1:
        raise ValueError(f"repeats and new_tokens must be >= 1, got {repeats} and {new_tokens}")
    seconds, memory = (compression.seconds, compression.memory) if compression else (0.0, 0)
    cost = {"seconds": Quantity(base.seconds + seconds, True)}
    if base.memory and memory is not None:
        cost["memory"] = Quantity(base.memory + memory, True)
    prefill = _fastest(lambda: model(ids, use_cache=True), repeats)
    step = lambda: model.generate(
        ids[:1], max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
        attention_mask=torch.ones_like(ids[:1]), pad_token_id=0,
    )  # fmt: skip
    inference = {
        "bytes": Quantity(of_model(model, stored_as=torch.bfloat16).total(), True),
        "flops": Quantity(flops_per_token(model, ids.shape[1]), True),
    }
    if (added := used(step).memory) is not None:
        inference["memory"] = Quantity(of_model(model).total(view="resident") + added, True)
    return {
        "compression cost": cost,
        "inference cost": inference,
        "speed": {
            "prefill": Quantity(ids.numel() / prefill),
            "decode": Quantity(new_tokens / _fastest(step, repeats)),
        },
    }


def flops_per_token(model: nn.Module, context: int = 1) -> int:
    """Executed floating-point operations of one token behind context - 1 others: 2 d_in d_out for every
    linear layer, however its weight is stored, and 4 H D for every token that a layer attends to.

    Raises TypeError for a model that `Backbone` refuses, ValueError for a context below 1.

    >>> from refimpl.checks.tiny import tiny
    >>> flops_per_token(tiny("llama")) - 2 * 3 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 40) - 2 * 32 * 48
    384
    """
    if context < 1:
        raise ValueError(f"context must be >= 1, got {context}")
    bb = Backbone(model)
    linear = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            linear += module.in_features * module.out_features
        elif type(module).__name__ == "Conv1D":
            linear += module.weight.numel()
    windows = [bb.window(layer) for layer in range(bb.n_layers)]
    seen = sum(context if w is None else min(context, w) for w in windows)
    return 2 * linear + 4 * bb.H * bb.D * seen


def _fastest(run: Callable[[], object], repeats: int) -> float:
    run()  # the first call allocates
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.min(times))


def _status(field: str) -> int:
    """Bytes of one line of /proc/self/status."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
