"""Training steps on a GPU: the peak that fake tensors predict against `torch.cuda.max_memory_allocated`.

    python data/footprint_gpu.py --out DIR     measure what DIR lacks: a process per GPU, a file per result
    python data/footprint_gpu.py --join DIR    make data/results/footprint/gpu.json of these files

Every configuration (`CONFIGS`; named in advance by tests/footprint/test_gpu_results.py) is predicted first.
Conventions:

- *predicted* = the peak that `CudaTracker` counts over the second step on fake tensors of the device
  ("walk"), and the workspaces of cuBLAS, which are measured once per process, without a model. If the walk on
  fake GPU tensors fails, that on fake CPU tensors takes its place, and says so. AdamW runs with foreach=True
  in both.
- *measured* = `max_memory_allocated` over the second step. The allocator gives whole blocks; `requested` are
  the bytes that were asked for, which is what the tracker counts.
- AdamW's step counts live on the CPU: 4 bytes per tensor that no number here contains.
- *ratio* = predicted / measured; `ratio_backward` the same until the update begins, whose transients (the
  roots of AdamW's second moments) hide the activations of some runs. `parts` names the first operation at
  which live bytes of prediction and measurement part by more than 1 % of the peak, if there is one, and the
  operation of the highest bytes.
- `closed` holds the closed forms: the static terms, and the upper bound of `refimpl.footprint.instants`.
- *capacity*: the largest micro batch for 24 GB, extrapolated from two walks, before it is tried.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from refimpl.footprint.activations import saved
from refimpl.footprint.adam8bit import AdamW8bit
from refimpl.footprint.adapters import lora_static
from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.checkpointing import checkpoint_layers
from refimpl.footprint.cuda import CudaTracker
from refimpl.footprint.instants import Plan, training
from refimpl.footprint.sharding import sharded, units
from refimpl.footprint.static import EMBEDDINGS, static
from refimpl.footprint.zero import Zero
from refimpl.ledger import Ledger
from refimpl.lora import add_lora
from refimpl.paths import atomic_write
from refimpl.results import cpu, sha256, store

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "data" / "results" / "footprint" / "gpu.json"
SOURCES = ["data/footprint_gpu.py", "refimpl/ledger.py", "refimpl/lora.py"] + [
    f"refimpl/footprint/{name}.py"
    for name in ("activations", "adam8bit", "adapters", "arch", "blockwise", "checkpointing", "cuda",
                 "instants", "op_rules", "sharding", "static", "tracker", "zero")
]  # fmt: skip
TOLERANCE, LIMIT = 0.04, 24_000_000_000


def llama(vocab: int, h: int, f: int, layers: int, heads: int, kv: int, tied: bool) -> dict[str, Any]:
    """Fields of a LlamaConfig."""
    return {
        "vocab_size": vocab, "hidden_size": h, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 4096,
        "tie_word_embeddings": tied, "use_cache": False,
    }  # fmt: skip


MODELS = {
    "7M": llama(4096, 256, 688, 8, 8, 4, tied=True),
    "1.1B": llama(32000, 2048, 5632, 22, 32, 4, tied=False),  # TinyLlama
    "3B": llama(128256, 3072, 8192, 28, 24, 8, tied=True),  # Llama 3.2 3B
    "7B": llama(32000, 4096, 11008, 32, 32, 32, tied=False),  # Llama 2 7B
}
TINY = {  # as the above, on a CPU in a second
    "7M": llama(96, 32, 64, 2, 4, 2, tied=True),
    "1.1B": llama(160, 64, 96, 3, 4, 2, tied=False),
    "3B": llama(129, 64, 96, 2, 4, 2, tied=True),
    "7B": llama(160, 64, 96, 2, 4, 4, tied=False),
}
ALL_LINEAR = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
SECONDS = {"7M": 5, "1.1B": 8, "3B": 12, "7B": 10}  # what a configuration is expected to take


def _configs() -> dict[str, tuple[str, Run]]:
    """Name -> (model, run): the 24 of spec A3, and twelve with 3 B, 7 B, LoRA and 8-bit states."""
    configs = {}
    for model, (batch, length) in {"7M": (8, 512), "1.1B": (2, 1024)}.items():
        for precision in ("float32", "bfloat16", "amp"):
            for attention in ("eager", "sdpa"):
                dtype = "float32" if precision == "amp" else precision
                run = Run(batch, length, dtype, precision == "amp", attention)
                name = f"{model}-{precision}-{attention}"
                configs[name] = model, run
                configs[f"{name}-checkpoint"] = model, replace(run, checkpoint_every=1)
    half = Run(1, 2048, "bfloat16")
    small = replace(half, batch=2, length=1024)
    every = {"checkpoint_every": 1}
    lora = {"lora_rank": 8}
    lora_all = {"lora_rank": 8, "lora_targets": ALL_LINEAR}
    return configs | {
        "1.1B-bfloat16-lora": ("1.1B", replace(small, **lora)),
        "1.1B-bfloat16-lora-all": ("1.1B", replace(small, **lora_all)),
        "1.1B-bfloat16-adamw8bit": ("1.1B", replace(small, optimizer="adamw8bit")),
        "1.1B-amp-adamw8bit": ("1.1B", replace(small, dtype="float32", amp=True, optimizer="adamw8bit")),
        "3B-bfloat16": ("3B", half),
        "3B-amp-checkpoint": ("3B", replace(half, dtype="float32", amp=True, **every)),
        "3B-bfloat16-adamw8bit-checkpoint": ("3B", replace(half, optimizer="adamw8bit", **every)),
        "7B-bfloat16": ("7B", half),
        "7B-bfloat16-checkpoint": ("7B", replace(half, **every)),
        "7B-bfloat16-lora": ("7B", replace(half, **lora)),
        "7B-bfloat16-lora-all-checkpoint": ("7B", replace(half, **lora_all, **every)),
        "7B-bfloat16-adamw8bit-checkpoint": ("7B", replace(half, optimizer="adamw8bit", **every)),
    }


CONFIGS = _configs()
CAPACITY = {  # their batch is what is asked for
    "capacity-1.1B-bfloat16-checkpoint": ("1.1B", Run(1, 1024, "bfloat16", checkpoint_every=1)),
    "capacity-7B-bfloat16-lora-checkpoint":
        ("7B", Run(1, 1024, "bfloat16", checkpoint_every=1, lora_rank=8)),
}  # fmt: skip
SHARDED = {"fsdp2": 3, "fsdp2-kept": 3, "zero1": 1, "zero2": 2, "zero3": 3}  # "kept" after forward: stage 2


def expected_seconds(name: str) -> float:
    model, run = (CONFIGS | CAPACITY)[name]
    return SECONDS[model] * (1.7 if run.checkpoint_every else 1) * (3 if name in CAPACITY else 1)


# One training step, on real or fake tensors


def shrink(run: Run) -> Run:
    return replace(run, batch=2, length=16, lora_rank=run.lora_rank and 2)


def build(fields: dict[str, Any], run: Run, device: str) -> nn.Module:
    """A LLaMA of random weights, made on the device in the dtype of the run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, run.dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**fields, attn_implementation=run.attention)).train()
    finally:
        torch.set_default_dtype(before)


def optimizer_of(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if run.optimizer == "adamw":
        return torch.optim.AdamW([p for _, p in named], foreach=True)
    rest = {"params": [p for name, p in named if name not in EMBEDDINGS]}
    return AdamW8bit([rest, {"params": [p for name, p in named if name in EMBEDDINGS], "bits": 32}])


class Trainer:
    """A model, its optimizer, a batch, and one step of them."""

    def __init__(self, fields: dict[str, Any], run: Run, device: str, stack: ExitStack) -> None:
        self.run, self.device = run, device
        self.model = build(fields, run, device)
        if run.lora_rank is not None:
            add_lora(self.model, run.lora_targets, run.lora_rank, run.lora_rank, torch.Generator())
        if run.checkpoint_every is not None:
            stack.enter_context(checkpoint_layers(self.model, run.checkpoint_every))
        self.optimizer = optimizer_of(self.model, run)
        self.ids = torch.zeros(run.batch, run.length, dtype=torch.int64, device=device)
        trained = sum(p.requires_grad for p in self.model.parameters())
        self.step_counts = 4 * trained if run.optimizer == "adamw" else 0

    def step(self, at: Callable[[str], None] = lambda instant: None) -> None:
        at("start")
        with torch.autocast(self.device, torch.bfloat16, enabled=self.run.amp):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        at("forward")
        loss.backward()
        del loss
        at("backward")
        self.optimizer.step()
        at("update")
        self.optimizer.zero_grad(set_to_none=True)
        at("end")


@contextmanager
def as_if_real() -> Any:
    """Let transformers and checkpointing do on fake tensors what they do on real ones.

    One document per row is not packed (a question that a fake position cannot answer: the answer would be to
    build the mask and repeat keys and values), and nothing random is replayed.
    """
    from transformers import masking_utils

    real = masking_utils.find_packed_sequence_indices
    with ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))
        patch(masking_utils, "find_packed_sequence_indices", lambda *a, **k: (real(*a, **k), None)[1])
        patch(torch.cuda, "get_rng_state", lambda *a, **k: None)
        patch(torch.cuda, "set_rng_state", lambda *a, **k: None)
        yield


def walk(fields: dict[str, Any], run: Run, device: str, fake: bool = True) -> dict[str, Any]:
    """The live tracker over the second step: bytes at the instants, at the peak, after every operation."""
    fakes = [FakeTensorMode(), as_if_real()] if fake else [nullcontext()]
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        for context in fakes:
            stack.enter_context(context)
        trainer = Trainer(fields, run, device, stack)
        trainer.step()
        instants: dict[str, int] = {}
        peaks: dict[str, int] = {}
        with CudaTracker() as tracker:
            tracker.watch(trainer.model, trainer.optimizer)
            if isinstance(trainer.optimizer, AdamW8bit):  # its maps belong to no parameter
                tracker.register([t for pair in trainer.optimizer._maps.values() for t in pair], "optim")
            tracker.register([trainer.ids], "activation")
            tracker.reset_peak()

            def at(instant: str) -> None:
                instants[instant] = tracker.live - trainer.step_counts
                peaks[instant] = tracker.peak - trainer.step_counts
                tracker.new = "activation" if instant == "start" else "temp"

            trainer.step(at)
    peak = tracker.peak - trainer.step_counts
    ops = [(op, live - trainer.step_counts) for op, live in tracker.timeline]
    split = {kind: size for kind, size in tracker.at_peak.items() if size}
    return {
        "device": device, "peak": peak, "peak_backward": peaks["backward"], "at_peak": split,
        "instants": instants, "ops": ops,
    }  # fmt: skip


def predict(fields: dict[str, Any], run: Run, device: str) -> dict[str, Any]:
    """The walk on fake tensors of the device, or of the CPU where that fails."""
    start, failed = time.perf_counter(), None
    try:
        found = walk(fields, run, device)
    except Exception:
        if device == "cpu":
            raise
        failed = traceback.format_exc(limit=-3)
        found = walk(fields, run, "cpu")
    return found | {"error": failed, "seconds": round(time.perf_counter() - start, 2)}


def closed(fields: dict[str, Any], run: Run) -> dict[str, Any]:
    """The closed forms: bytes that rest between steps, and the upper bounds of three instants of a step."""
    arch = Arch.from_config(fields | {"model_type": "llama"})
    model = static(arch, run) if run.lora_rank is None else lora_static(arch, run)
    resting = [i for i in model.items if i.kind != "grad" and not i.name.endswith(".step")]
    instants = training(arch, Plan(run, "full" if run.lora_rank is None else "lora"))
    return {
        "parameters": arch.parameters(),
        "static": Ledger(tuple(resting)).by_kind("resident"),
        "rest": sum(i.resident for i in resting) + 8 * run.tokens,  # with the token ids
        "instants": {name: ledger.total(view="resident") for name, ledger in instants.items()},
    }


# Measuring


class OpLog(TorchDispatchMode):
    """What the allocator says after, and at most within, every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, str, int, int]] = []  # operation, where, bytes after it, most within it
        self.where = "start"
        self.device = torch.cuda.current_device()  # backward runs in a thread of its own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        torch.cuda.reset_peak_memory_stats(self.device)
        out = func(*args, **kwargs or {})
        if func.namespace != "prim":
            bytes_now = torch.cuda.memory_stats_as_nested_dict(self.device)["requested_bytes"]["all"]
            self.rows.append((func.__name__, self.where, bytes_now["current"], bytes_now["peak"]))
        return out

    def watch(self, model: nn.Module) -> list[Any]:
        """Let `where` be the innermost module that runs forward."""
        above, handles = [], []

        def enter(name: str, *_: Any) -> None:
            above.append(self.where)
            self.where = name

        def leave(*_: Any) -> None:
            self.where = above.pop()

        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(enter, name or "(model)")))
            handles.append(module.register_forward_hook(leave))
        return handles


def parting(predicted: list, measured: list, base: int, peak: int) -> dict[str, Any]:
    """Where prediction and measurement part: operations side by side, by name, a few skipped where needed.

    `measured` are rows of `OpLog`, `base` the bytes that the model does not explain (workspaces).
    """
    first = other = None
    i = j = matched = 0
    inside = {"bytes": -1}
    while i < len(predicted) and j < len(measured):
        (op, live), (real_op, where, real_live, real_peak) = predicted[i], measured[j]
        if op != real_op:
            other = other or {"index": j, "where": where, "predicted_op": op, "measured_op": real_op}
            i, j = _resynchronised(predicted, measured, i, j)
            continue
        matched += 1
        if first is None and abs(real_live - base - live) > 0.01 * peak:
            first = {"index": j, "op": op, "where": where, "predicted": live, "measured": real_live - base}
        if real_peak - base > inside["bytes"]:
            inside = {
                "index": j, "op": op, "where": where, "bytes": real_peak - base, "predicted": live,
                "within_the_kernel": real_peak - real_live,
            }  # fmt: skip
        i, j = i + 1, j + 1
    return {
        "operations": [len(predicted), len(measured), matched],
        "first_other_op": other, "first": first, "highest": inside,
    }  # fmt: skip


def _resynchronised(predicted: list, measured: list, i: int, j: int) -> tuple[int, int]:
    """The nearest pair of positions from which six operations agree: few skipped on both sides, or many on
    one (an 8-bit optimizer looks at every gradient first, which has no values in a fake step)."""
    both = [(a, skipped - a) for skipped in range(1, 12) for a in range(skipped + 1)]
    one = [pair for skipped in range(12, 4000) for pair in ((0, skipped), (skipped, 0))]
    for a, b in both + one:
        here = [row[0] for row in predicted[i + a : i + a + 6]]
        if len(here) == 6 and here == [row[0] for row in measured[j + b : j + b + 6]]:
            return i + a, j + b
    return i + 1, j + 1


def requested(which: str) -> int:
    return torch.cuda.memory_stats_as_nested_dict()["requested_bytes"]["all"][which]


def workspaces() -> dict[str, int]:
    """Let cuBLAS make its workspaces (they stay), and count them: no model is there yet."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(2, 64, 64, device="cuda", dtype=dtype, requires_grad=True)
        bias = torch.ones(64, device="cuda", dtype=dtype, requires_grad=True)
        (torch.addmm(bias, x[0], x[0]) @ x[0] + torch.bmm(x, x)).sum().backward()
        del x, bias
    torch.cuda.synchronize()
    return {"requested": requested("current"), "allocated": torch.cuda.memory_allocated()}


def measure(
    fields: dict[str, Any], run: Run, device: str, log: bool = True, timed: int = 3
) -> dict[str, Any]:
    """The second step, measured; then some for their time, and one operation by operation."""
    if device == "cpu":
        start = time.perf_counter()
        found = walk(fields, run, "cpu", fake=False)
        ops = [(op, "", live, live) for op, live in found.pop("ops")]
        seconds = [round(time.perf_counter() - start, 4)]
        return found | {"ops": ops, "seconds": seconds, "requested": found["peak"], "base": 0, "left": 0}
    torch.cuda.synchronize()
    base, allocated = requested("current"), torch.cuda.memory_allocated()
    with ExitStack() as stack:
        trainer = Trainer(fields, run, device, stack)
        trainer.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        instants: dict[str, int] = {}
        peaks: dict[str, int] = {}

        def at(instant: str) -> None:
            instants[instant] = requested("current") - base
            peaks[instant] = torch.cuda.max_memory_allocated()

        trainer.step(at)
        torch.cuda.synchronize()
        result = {
            "device": device, "peak": torch.cuda.max_memory_allocated(),
            "peak_backward": peaks["backward"], "requested": requested("peak"),
            "reserved": torch.cuda.max_memory_reserved(), "before": allocated, "base": base,
            "instants": instants,
        }  # fmt: skip
        seconds = []
        for _ in range(timed):
            start = time.perf_counter()
            trainer.step()
            torch.cuda.synchronize()
            seconds.append(round(time.perf_counter() - start, 4))
        ops = []
        if log:
            with OpLog() as mode:
                handles = mode.watch(trainer.model)
                trainer.step(lambda instant: setattr(mode, "where", instant))
            for handle in handles:
                handle.remove()
            ops = mode.rows
    del trainer
    gc.collect()
    left = requested("current") - base  # workspaces that only this run needed, if any
    return result | {"seconds": seconds, "ops": ops, "left": left}


def compare(fields: dict[str, Any], run: Run, device: str) -> dict[str, Any]:
    """One configuration: predicted, measured, and where the two part."""
    predicted, forms = predict(fields, run, device), closed(fields, run)
    measured = measure(fields, run, device)
    extra = measured["base"]
    walked, ops = predicted.pop("ops"), measured.pop("ops")
    predicted |= {"walk": predicted["peak"], "workspaces": extra, "peak": predicted["peak"] + extra}
    seconds = statistics.median(measured["seconds"])
    return {
        "predicted": predicted, "closed": forms, "measured": measured,
        "ratio": predicted["peak"] / measured["peak"],
        "ratio_backward": (predicted["peak_backward"] + extra) / measured["peak_backward"],
        "ratio_requested": predicted["peak"] / measured["requested"],
        "ratio_closed": (max(forms["instants"].values()) + extra) / measured["peak"],
        "median_seconds": seconds, "tokens_per_second": round(run.tokens / seconds, 1),
        "parts": parting(walked, ops, extra, measured["peak"]),
    }  # fmt: skip


def capacity(fields: dict[str, Any], run: Run, device: str, limit: int) -> dict[str, Any]:
    """The largest micro batch under `limit`: a line through two walks, two more to be sure, then the GPU."""
    base = requested("current") if device != "cpu" else 0
    walks: dict[int, dict] = {}

    def at(batch: int) -> int:
        walks[batch] = walks.get(batch) or predict(fields, replace(run, batch=batch), device)
        return walks[batch]["peak"] + base

    few, many = 4, 8
    while at(few) > walks[few]["peak_backward"] + base:  # the update decides, whatever the batch
        few, many = many, 2 * many
    most = int(few + (limit - at(few)) * (many - few) // (at(many) - at(few)))
    if most < 1:
        raise ValueError(f"limit must hold one sequence, got {limit}")
    walked = {batch: at(batch) for batch in (few, many, most, most + 1)}
    tried = {
        batch: measure(fields, replace(run, batch=batch), device, log=False, timed=1)["peak"]
        for batch in (most, most + 1)
    }
    return {
        "limit": limit, "batch": most, "walked": walked, "tried": tried,
        "predicted": {"peak": walked[most]}, "measured": {"peak": tried[most]},
        "ratio": walked[most] / tried[most],
    }  # fmt: skip


# Sharded over the GPUs


def shard(rank: int, world: int, device: str, meeting: str, out: str, tiny: bool) -> None:
    """The life of one rank: each system trains two steps, counts, and writes a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        torch.cuda.set_device(rank)
        workspaces()
    backend = "nccl" if device == "cuda" else "gloo"
    limit = timedelta(seconds=90)
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, timeout=limit)
    run = Run(1, 16 if tiny else 1024, zero_stage=3, world=world)
    fields = (TINY if tiny else MODELS)["1.1B"]
    for system, stage in SHARDED.items():
        path = Path(out) / f"{system}-rank{rank}.json"
        staged = replace(run, zero_stage=stage)
        task = partial(sharded_step, system, fields, staged, rank, device)
        row = attempt(f"{system}-rank{rank}", task, device, {"run": asdict(staged), "tiny": tiny})
        write(path, row | {"kind": "sharded", "system": system, "rank": rank, "world": world})
        if row["error"]:
            break  # the other ranks wait for this one in vain: a collective must not meet another's
    dist.destroy_process_group()


def sharded_step(system: str, fields: dict[str, Any], run: Run, rank: int, device: str) -> dict[str, Any]:
    """Bytes that this rank holds after backward (weights, gradients) and after the step (states)."""
    base = requested("current") if device == "cuda" else 0
    with torch.random.fork_rng(devices=[rank] if device == "cuda" else []):
        torch.manual_seed(0)  # all ranks start alike
        model = build(fields, replace(run, zero_stage=0, world=1), device)
    arch = Arch.from_config(fields | {"model_type": "llama"})
    if system.startswith("zero"):
        zero = Zero(model, stage=run.zero_stage, units=model.model.layers)
        step, tensors = zero.step, partial(zero_tensors, zero)
    else:
        step, tensors = fsdp2(model, device, run.world, kept=system == "fsdp2-kept")
    held = lambda: {kind: stored_bytes(found) for kind, found in tensors().items()}
    ids = torch.full((run.batch, run.length), rank, dtype=torch.int64, device=device)
    seconds, after_forward = [], None
    for last in (False, True):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if device == "cuda":
            after_forward = requested("current") - base
        loss.backward()
        del loss
        after_backward = held() if last else None
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - start, 4))
    layout = "flat" if system.startswith("zero") else "fsdp2"
    formula = sharded(arch, run, rank=rank, layout=layout)
    counted = after_backward | {"optim": held()["optim"]}
    expected = {kind: formula.total(kind, "resident") for kind in ("weight", "grad", "optim")}
    layers = [size for unit, size in _unit_numels(arch).items() if unit != "root"]
    kept = saved(arch, Run(run.batch, run.length)).total(view="resident")
    resting = expected["weight"] + expected["optim"]
    at_loss = resting + formula.total("temp", "resident") + kept + 8 * run.tokens * arch.vocab
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "predicted": {"bytes": sum(expected.values()), "held": expected, "step_at_loss": at_loss,
                      "kept_after_forward": int(4 * sum(layers) * (run.world - 1) / run.world)},
        "measured": {"bytes": sum(counted.values()), "held": counted, "step_peak": peak,
                     "after_forward": after_forward, "base": base},
        "ratio": sum(expected.values()) / sum(counted.values()),
        "seconds_per_step": seconds,
    }  # fmt: skip


def _unit_numels(arch: Arch) -> dict[str, int]:
    return {unit: sum(torch.Size(s).numel() for _, s in tensors) for unit, tensors in units(arch).items()}


def fsdp2(model: nn.Module, device: str, world: int, kept: bool) -> tuple[Callable, Callable]:
    """torch's own: each layer a unit, the rest the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(device, (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=not kept)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    local = lambda tensor: tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def tensors() -> dict[str, list[Tensor]]:
        parameters = list(model.parameters())
        return {
            "weight": [local(p) for p in parameters],
            "grad": [local(p.grad) for p in parameters if p.grad is not None],
            "optim": [local(v) for state in optimizer.state.values() for v in state.values()],
        }

    return step, tensors


def zero_tensors(zero: Zero) -> dict[str, list[Tensor]]:
    """What one rank of our ZeRO holds, without what stage 3 has gathered."""
    parameters = [p for unit in zero.units for p in unit.parameters]
    shards = [unit.shard for unit in zero.units]
    return {
        "weight": shards + (parameters if zero.stage < 3 else []),
        "grad": [p.grad for p in parameters + shards if p.grad is not None],
        "optim": [value for state in zero.optimizer.state.values() for value in state.values()],
    }


def stored_bytes(tensors: list[Tensor]) -> int:
    """Bytes of their storages, each once. (The ledger would map views byte by byte: slow at this size.)"""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


# Files, processes, the command


def hardware(device: str) -> str:
    if device == "cpu":
        return cpu()
    about = torch.cuda.get_device_properties(0)
    count = torch.cuda.device_count()
    return f"{count} x {about.name}, {about.total_memory / 2**30:.0f} GiB"


def attempt(name: str, task: Callable[[], dict], device: str, about: dict[str, Any]) -> dict[str, Any]:
    """A result, or the error as a result; one line of the table either way."""
    start = time.perf_counter()
    versions = {package: metadata.version(package) for package in ("torch", "transformers")}
    row = about | {
        "name": name, "device": device, "hardware": hardware(device), "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": sys.version.split()[0], **versions},
        "sources": {source: sha256(ROOT / source) for source in SOURCES}, "error": None,
    }  # fmt: skip
    try:
        row |= task()
        what = "peak" if "peak" in row["predicted"] else "bytes"
        sizes = f"{row['predicted'][what]:>15,} {row['measured'][what]:>15,} {row['ratio']:7.4f}"
    except Exception as error:
        row["error"] = traceback.format_exc(limit=-6)
        sizes = f"failed: {type(error).__name__}: {str(error)[:120]}"
    row["wall_seconds"] = round(time.perf_counter() - start, 2)
    print(f"{name:42} {sizes} {row['wall_seconds']:7.1f} s", flush=True)
    return row


def write(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(row, indent=1) + "\n").encode())


def finished(path: Path) -> bool:
    """Whether a result is there, without error, of these sources."""
    if not path.is_file():
        return False
    row = json.loads(path.read_text())
    return row["error"] is None and row["sources"] == {s: sha256(ROOT / s) for s in SOURCES}


def work(rank: int, names: list[str], device: str, out: str, tiny: bool, deadline: float) -> None:
    """One process: its configurations one after another."""
    torch.set_num_threads(1)
    held = None
    if device == "cuda":
        torch.cuda.set_device(rank)
        held = workspaces()
    for name in names:
        model, run = (CONFIGS | CAPACITY)[name]
        expected = 1 if tiny else expected_seconds(name)
        if time.time() + expected > deadline:
            print(f"{name:42} left out: {expected:.0f} s expected, the limit is nearer", flush=True)
            continue
        fields, run = (TINY[model], shrink(run)) if tiny else (MODELS[model], run)
        limit = 2_000_000 if tiny else LIMIT
        task = partial(compare, fields, run, device)
        if name in CAPACITY:
            task = partial(capacity, fields, run, device, limit)
        about = {"kind": "capacity" if name in CAPACITY else "step", "model": model, "fields": fields,
                 "run": asdict(run), "tiny": tiny, "workspaces": held}  # fmt: skip
        write(Path(out) / f"{name}.json", attempt(name, task, device, about))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def spawn(function: Callable, calls: list[tuple], timeout_s: float) -> bool:
    """Run a function in one fresh process per call; False if one fails or is not done in time."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=function, args=call, daemon=True) for call in calls]
    for process in processes:
        process.start()
    end = time.time() + timeout_s
    for process in processes:
        process.join(max(end - time.time(), 0))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    return not late and all(process.exitcode == 0 for process in processes)


def run_all(args: argparse.Namespace) -> int:
    """Measure what the folder lacks; 1 if something failed or was left out."""
    out, start = Path(args.out), time.time()
    out.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus and not args.tiny:
        raise SystemExit("no CUDA device: --tiny runs the same path on a CPU")
    device = "cuda" if gpus else "cpu"
    deadline = start + args.limit_s
    sharding = [f"{system}-rank{rank}" for system in SHARDED for rank in range(2)]
    wanted = args.only or [*CONFIGS, *CAPACITY, "sharded"]
    unknown = [name for name in wanted if name not in (*CONFIGS, *CAPACITY, "sharded")]
    if unknown:
        raise SystemExit(
            f"--only: unknown {unknown[0]!r}; known: {', '.join([*CONFIGS, *CAPACITY])}, sharded"
        )
    done = lambda names: [name for name in names if finished(out / f"{name}.json")]
    names = [n for n in wanted if n != "sharded"]
    names = [n for n in names if n not in done(names)]
    print(f"{'configuration':42} {'predicted B':>15} {'measured B':>15} {'ratio':>7} {'seconds':>9}")
    if not gpus:
        work(0, names, device, str(out), args.tiny, deadline)
    elif names:
        shares = shared_out(names, gpus)
        calls = [(r, shares[r], device, str(out), args.tiny, deadline) for r in range(gpus)]
        spawn(work, calls, deadline + 30 - time.time())
    if "sharded" in wanted and (gpus >= 2 or not gpus) and len(done(sharding)) < len(sharding):
        if deadline - time.time() < (5 if args.tiny else 40):
            print("sharded: left out, the limit is nearer")
        else:
            with tempfile.TemporaryDirectory() as folder:
                meeting = Path(folder, "store").as_uri()
                calls = [(rank, 2, device, meeting, str(out), args.tiny) for rank in range(2)]
                spawn(shard, calls, min(deadline + 30 - time.time(), 150))
    expected = names_of(wanted, sharding)
    missing = [name for name in expected if name not in done(expected)]
    print(f"{len(expected) - len(missing)} of {len(expected)} in {time.time() - start:.0f} s")
    print("\n".join(f"missing or failed: {name}" for name in missing))
    return 1 if missing else 0


def shared_out(names: list[str], parts: int) -> list[list[str]]:
    """Names in lists of about equal time: the longest first, each to the list that is shortest so far."""
    shares: list[list[str]] = [[] for _ in range(parts)]
    for name in sorted(names, key=expected_seconds, reverse=True):
        min(shares, key=lambda share: sum(map(expected_seconds, share))).append(name)
    return [sorted(share, key=names.index) for share in shares]


def names_of(wanted: list[str], sharding: list[str]) -> list[str]:
    return [name for name in wanted if name != "sharded"] + (sharding if "sharded" in wanted else [])


def join(folder: Path, to: Path) -> int:
    """One file of all results; ValueError where they come from other sources or several versions."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path != to]
    if not rows:
        raise ValueError(f"{folder}: no results")
    current = {source: sha256(ROOT / source) for source in SOURCES}
    if old := [row["name"] for row in rows if row["sources"] != current]:
        raise ValueError(f"{', '.join(old)}: made from other sources than these; measure again")
    shared = {}
    for key in ("versions", "hardware"):
        found = {json.dumps(row[key]) for row in rows}
        if len(found) > 1:
            raise ValueError(f"results of several {key}: {', '.join(sorted(found))}")
        shared[key] = rows[0][key]
    for row in rows:
        del row["sources"], row["versions"], row["hardware"]
    steps = {row["name"]: row for row in rows if row.get("kind") == "step"}
    good = [row for row in steps.values() if row["error"] is None]
    half = [row["ratio"] for row in good if row["run"]["dtype"] == "bfloat16" or row["run"]["amp"]]
    within = sum(abs(ratio - 1) <= TOLERANCE for ratio in half)
    result = store(
        to,
        command="python data/footprint_gpu.py --out DIR; python data/footprint_gpu.py --join DIR",
        summary=f"peak of a step on a GPU: {within} of {len(half)} bf16 and AMP runs within 4 % of the "
        f"prediction; {len(good)} of {len(steps)} configurations measured",
        root=ROOT,
        sources=SOURCES,
        hardware=shared["hardware"],
        tolerance=TOLERANCE,
        steps=steps,
        capacity={row["name"]: row for row in rows if row.get("kind") == "capacity"},
        sharded={f"{row['system']}-rank{row['rank']}": row for row in rows if row.get("kind") == "sharded"},
    )
    # Joining may happen on another machine and day than measuring.
    result |= {"versions": shared["versions"], "date": max(row["date"] for row in rows)}
    atomic_write(to, (json.dumps(result, indent=1) + "\n").encode())
    print(f"{to}: {result['summary']}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="DIR", help="measure; one JSON file per result goes here")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations; also: sharded")
    parser.add_argument("--tiny", action="store_true", help="toy models; on a CPU where there is no GPU")
    parser.add_argument("--limit-s", type=float, default=3600, help="start nothing that would end later")
    parser.add_argument("--join", metavar="DIR", help="make one file of the results in this folder")
    parser.add_argument("--to", default=str(RESULT), metavar="FILE", help="which file (default: %(default)s)")
    args = parser.parse_args()
    if bool(args.out) == bool(args.join):
        parser.error("give either --out DIR or --join DIR")
    return run_all(args) if args.out else join(Path(args.join), Path(args.to))


if __name__ == "__main__":
    sys.exit(main())
