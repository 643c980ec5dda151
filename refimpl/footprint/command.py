"""`python -m refimpl footprint MODEL`: what a run needs, whether it fits, and what would make it fit.

All from closed forms, offline: the model is a name of the table of published configurations or a config.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from refimpl.footprint import published
from refimpl.footprint.arch import DTYPE_BYTES, Arch, Run
from refimpl.footprint.instants import Plan, training
from refimpl.footprint.serving import crossover, largest_batch, serving, window_of
from refimpl.ledger import Kind, Ledger

__all__ = ["add_arguments", "footprint", "nbytes"]

TRAIN = ("none", "full", "lora", "qlora")
_DEFAULTS = {"optimizer": None, "checkpoint": None, "zero": 0, "world": 1, "rank": None, "amp": False}
_LEFT_OUT = """not included: scratch space inside one operation (a matmul's workspace, gradients within one
layer), the rounding and fragmentation of an allocator, and what the runtime itself takes"""


def nbytes(text: str) -> int:
    """Read a size like "24GB" (10^9 bytes), "24GiB" (2^30) or "500MB".

    >>> nbytes("24GB"), nbytes("1.5 GiB")
    (24000000000, 1610612736)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text)
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"must be a number > 0 and a unit, as 24GB or 80GiB; got {text!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (" KMGT".index(match[2])))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("model", help="a name of the table (python -m refimpl footprint list), a config.json or its folder")
    add("--batch", type=int, default=1, help="sequences B (default 1)")
    add("--length", type=int, help="tokens per sequence (default: the model's longest, at most 4096)")
    add("--train", choices=TRAIN, default="none", help="none: serve it (default)")
    add("--dtype", choices=tuple(DTYPE_BYTES), default="bfloat16", help="default bfloat16")
    add("--amp", action="store_true", help="bfloat16 autocast over float32 parameters")
    add("--attention", choices=("sdpa", "eager"), default="sdpa", help="default sdpa")
    add("--optimizer", choices=("adamw", "adamw8bit", "adafactor", "momentum", "sgd"), help="default adamw")
    add("--checkpoint", type=int, nargs="?", const=1, metavar="LAYERS", help="recompute blocks (of 1)")
    add("--zero", type=int, choices=(0, 1, 2, 3), default=0, metavar="STAGE", help="ZeRO stage, 0 to 3")
    add("--world", type=int, default=1, metavar="N", help="GPUs that share the training state")
    add("--rank", type=int, metavar="R", help="of LoRA's factors on q and v (default 8)")
    add("--gpu", type=nbytes, metavar="SIZE", help="memory of one GPU, as 24GB (24 * 10^9 bytes) or 24GiB")


def footprint(options: argparse.Namespace) -> int:
    """Run the command: 0 if it fits (or no GPU was named), 1 if not or if the model is unknown.

    Raises ValueError for options that do not go together.
    """
    if options.model == "list":
        for name in published.names():
            print(f"{name:32} {published.count(name):>16,} parameters")
        return 0
    config = _config(options.model)
    if config is None:
        near = [n for n in published.names() if options.model.lower().split("/")[-1] in n.lower()]
        print(f"refimpl: unknown model {options.model!r}: neither in the table nor a config.json; "
              f"{'did you mean ' if near else 'known: '}{', '.join(near or published.names())}",
              file=sys.stderr)  # fmt: skip
        return 1
    arch = published.of_config(config)
    body = arch.base if isinstance(arch, published.LlamaVariant) else arch
    length = options.length if options.length is not None else min(body.positions, 4096)
    if length > body.positions:
        raise ValueError(f"--length must be <= {body.positions}, the longest of this model, got {length}")
    unused = [name for name, default in _DEFAULTS.items() if getattr(options, name) != default]
    if options.train == "none" and (unused or options.attention != "sdpa"):
        raise ValueError(f"--{(unused or ['attention'])[0]} is for training; add --train full, lora or qlora")
    if options.train == "full" and options.rank is not None:
        raise ValueError("--rank is for --train lora and qlora")
    print(f"{options.model}: {arch.parameters():,} parameters")
    if options.train == "none":
        return _serve(arch, body.positions, length, window_of(config), options)
    if not isinstance(arch, Arch):
        raise ValueError("training is accounted for GPT-2 and LLaMA-like models only; use --train none")
    return _train(arch, _plan(arch, length, options), options.gpu)


def _config(name: str) -> dict[str, Any] | None:
    """The configuration of a file, a folder or the table; None where there is none."""
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return published.config(name) if name in published.names() else None


def _plan(arch: Arch, length: int, options: argparse.Namespace) -> Plan:
    dtype = "float32" if options.amp else options.dtype
    rank = None if options.train == "full" else 8 if options.rank is None else options.rank
    run = Run(options.batch, length, dtype, options.amp, options.attention, options.optimizer or "adamw",
              options.checkpoint, zero_stage=options.zero, world=options.world, lora_rank=rank,
              lora_targets=_targets(arch))  # fmt: skip
    return Plan(run, options.train)


def _targets(arch: Arch) -> tuple[str, ...]:
    return ("c_attn",) if arch.kind == "gpt2" else ("q_proj", "v_proj")


# --- training ---


def _train(arch: Arch, plan: Plan, gpu: int | None) -> int:
    run, instants = plan.run, training(arch, plan)
    words = [plan.train if plan.train == "full" else f"{plan.train} of rank {run.lora_rank}",
             f"{run.dtype}{' under autocast' * run.amp}", run.optimizer, f"{run.batch} x {run.length} tokens",
             run.attention]  # fmt: skip
    words += [f"checkpoint every {run.checkpoint_every}"] if run.checkpoint_every else []
    words += [f"ZeRO {run.zero_stage} over {run.world}"] if run.zero_stage else []
    print(", ".join(words) + "\n")
    _table(instants)
    need = _need(arch, plan)
    if plan.train != "full":
        print("\nactivations: those of full training, an upper bound")
    return _verdict(need, gpu, lambda: _ways(arch, plan, gpu))


def _need(arch: Arch, plan: Plan) -> int:
    return max(ledger.total(view="resident") for ledger in training(arch, plan).values())


def _ways(arch: Arch, plan: Plan, gpu: int) -> None:
    """Print each change alone, and together with those above it."""
    lora = {"lora_rank": plan.run.lora_rank or min(8, arch.hidden), "lora_targets": _targets(arch)}
    changes: list[tuple[str, bool, str | None, dict[str, Any]]] = [
        ("sdpa attention", plan.run.attention == "eager", None, {"attention": "sdpa"}),
        ("checkpointing every layer", plan.run.checkpoint_every is None, None, {"checkpoint_every": 1}),
        ("batch 1", plan.run.batch > 1, None, {"batch": 1}),
        ("LoRA", plan.train == "full", "lora", lora),
        ("QLoRA", plan.train != "qlora", "qlora", lora),
        ("8-bit optimizer states", plan.run.optimizer == "adamw", None, {"optimizer": "adamw8bit"}),
    ]
    print(f"\n{'what would help (GB)':28}{'alone':>10}{'with those above':>18}")
    together = shared = plan
    for name, applies, train, fields in changes:
        if not applies or (plan.run.zero_stage and (train or "optimizer" in fields)):
            continue
        alone = Plan(replace(plan.run, **fields), train or plan.train)
        together = Plan(replace(together.run, **fields), train or together.train)
        if not train and "optimizer" not in fields:
            shared = together
        both = _need(arch, together)
        print(f"{name:28}{_gb(_need(arch, alone)):>10}{_gb(both):>18}{'  fits' * (both <= gpu)}")
    if plan.train == "full" and plan.run.optimizer in ("adamw", "momentum", "sgd"):
        for base, note in ((plan, "alone"), (shared, "all trained, with the first ones above")):
            needs = {world: _need(arch, Plan(replace(base.run, zero_stage=3, world=world)))
                     for world in (2**i for i in range(1, 11)) if world > plan.run.world}  # fmt: skip
            world = next((w for w, need in needs.items() if need <= gpu), max(needs, default=None))
            if world:
                fits = "fits" if needs[world] <= gpu else "does not fit"
                print(f"ZeRO 3 over {world} GPUs, {note}: {_gb(needs[world])} each, {fits}")


# --- serving ---


def _serve(
    arch: published.Model, longest: int, length: int, window: int | None, options: argparse.Namespace
) -> int:
    batch, dtype, gpu = options.batch, options.dtype, options.gpu

    def account(tokens: int, dtype: str = dtype) -> dict[str, Ledger]:
        phases = ("prefill", "decode")
        return {phase: serving(arch, batch, tokens, dtype, phase=phase, window=window) for phase in phases}

    def need(*case: Any) -> int:
        return max(ledger.total(view="resident") for ledger in account(*case).values())

    def ways() -> None:
        most = [largest_batch(arch, length, gpu, dtype, phase=p, window=window) for p in account(1)]
        print(f"\nlargest batch at {length} tokens: {min(most)}")
        lengths = [2**i for i in range(longest.bit_length()) if need(2**i) <= gpu]
        print(f"longest power of two at batch {batch}: {max(lengths, default=0)} tokens")
        if dtype == "float32":
            print(f"bfloat16 weights and cache: {_gb(need(length, 'bfloat16'))} GB")

    print(f"serving in {dtype}, {batch} x {length} tokens{f', window {window}' if window else ''}\n")
    _table(account(length))
    if not window:
        print(f"\nthe cache outweighs the weights from {crossover(arch, batch, dtype):,} tokens on")
    if window and length > window:
        print("\nthe window's attention mask is not accounted")
    if isinstance(arch, published.Deepseek) or getattr(arch, "experts", 1) > 1:
        print("one layer's activations are not accounted for mixtures and latent attention")
    return _verdict(need(length), gpu, ways)


def _table(ledgers: dict[str, Ledger]) -> None:
    """Print the bytes of each kind, a column per ledger."""
    print(f"{'GB at':12}" + "".join(f"{name:>10}" for name in ledgers))
    present = {kind for ledger in ledgers.values() for kind in ledger.by_kind()}
    for kind in [*(kind for kind in get_args(Kind) if kind in present), None]:
        cells = [_gb(ledger.total(kind, "resident")) for ledger in ledgers.values()]
        print(f"{kind or 'total':12}" + "".join(f"{cell:>10}" for cell in cells))


def _verdict(need: int, gpu: int | None, ways: Callable[[], None]) -> int:
    """Print whether it fits and, if not, the ways to make it fit; return the exit code."""
    print(f"\nneeds {_gb(need)} GB ({need / 2**30:.2f} GiB)", end="")
    if gpu is not None:
        fits = need <= gpu
        print(f": {'fits' if fits else 'does not fit'} in {_gb(gpu)} GB, {_gb(abs(gpu - need))} "
              f"{'left' if fits else 'too much'}", end="")  # fmt: skip
        if not fits:
            print()
            ways()
    print(f"\n{_LEFT_OUT}")
    return 0 if gpu is None or need <= gpu else 1


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f}"
