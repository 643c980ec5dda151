"""`python -m refimpl footprint MODEL`: what a run needs, whether it fits, and what would make it fit.

All from closed forms, offline: the model is a name of the table of published configurations or a config.json.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any

from refimpl.footprint import published
from refimpl.footprint.arch import DTYPE_BYTES, Arch, Run
from refimpl.footprint.instants import Plan
from refimpl.footprint.report import largest_rank, serving_report, training_report
from refimpl.footprint.serving import window_of
from refimpl.footprint.sharding import MOMENTS

__all__ = ["add_arguments", "footprint", "nbytes"]

TRAIN = ("none", "full", "lora", "qlora")
_DEFAULTS = {"optimizer": None, "checkpoint": None, "zero": 0, "world": 1, "rank": None, "amp": False}


def nbytes(text: str) -> int:
    """Read a size like "24GB" (10^9 bytes), "24GiB" (2^30) or "500MB".

    >>> nbytes("24GB"), nbytes("1.5 GiB")
    (24000000000, 1610612736)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text)
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** (" KMGT".index(match[2]))) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a number > 0 and a unit, as 24GB or 80GiB; got {text!r}")
    return size


def _count(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("model", help="a name of the table (python -m refimpl footprint list), a config.json or its folder")
    add("--batch", type=_count, default=1, help="sequences B (default 1)")
    add("--length", type=_count, help="tokens per sequence (default: the model's longest, at most 4096)")
    add("--train", choices=TRAIN, default="none", help="none: serve it (default)")
    add("--dtype", choices=tuple(DTYPE_BYTES), help="default bfloat16; with --amp float32, and no other")
    add("--amp", action="store_true", help="bfloat16 autocast over float32 parameters")
    add("--attention", choices=("sdpa", "eager"), default="sdpa", help="default sdpa")
    add("--optimizer", choices=("adamw", "adamw8bit", "adafactor", "momentum", "sgd"), help="default adamw")
    add("--checkpoint", type=_count, nargs="?", const=1, metavar="LAYERS", help="recompute blocks (of 1)")
    add("--zero", type=int, choices=(0, 1, 2, 3), default=0, metavar="STAGE", help="ZeRO stage, 0 to 3")
    add("--world", type=_count, default=1, metavar="N", help="GPUs over which --zero shards")
    add("--rank", type=_count, metavar="R", help="of LoRA's factors on q and v (default 8)")
    add("--gpu", type=nbytes, metavar="SIZE", help="memory of one GPU, as 24GB (24 * 10^9 bytes) or 24GiB")


def footprint(options: argparse.Namespace) -> int:
    """Run the command: 0 if it fits (or no GPU was named), 1 if not or if the model is unknown.

    Raises ValueError, before anything is printed, for options that do not go together or with the model.
    """
    if options.model == "list":
        for name in published.names():
            print(f"{name:32} {published.count(name):>16,} parameters")
        return 0
    config = _config(options.model)
    if config is None:
        near = _near(options.model)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        print(f"refimpl: unknown model {options.model!r}: neither in the table nor a config.json{hint}\n"
              "python -m refimpl footprint list shows the table", file=sys.stderr)  # fmt: skip
        return 1
    arch = published.of_config(config)
    longest = (arch.base if isinstance(arch, published.LlamaVariant) else arch).positions
    length = min(longest, 4096) if options.length is None else options.length
    if length > longest:
        raise ValueError(f"--length must be <= {longest}, the longest of this model, got {length}")
    unused = [name for name, default in _DEFAULTS.items() if getattr(options, name) != default]
    if options.train == "none" and (unused or options.attention != "sdpa"):
        raise ValueError(f"--{(unused or ['attention'])[0]} is for training; add --train full, lora or qlora")
    title = f"{options.model}: {arch.parameters():,} parameters"
    if options.train == "none":
        print(title)
        return serving_report(arch, options.batch, length, options.dtype or "bfloat16",
                              longest=longest, window=window_of(config), gpu=options.gpu)  # fmt: skip
    if not isinstance(arch, Arch):
        raise ValueError("training is accounted for GPT-2 and LLaMA-like models only; use --train none")
    plan = _plan(arch, length, options)
    print(title)
    return training_report(arch, plan, options.gpu)


def _config(name: str) -> dict[str, Any] | None:
    """The configuration of a file, a folder or the table; None where there is none."""
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if path.is_file():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    return published.config(name) if name in published.names() else None


def _near(name: str) -> list[str]:
    """Up to five names of the table that contain this one, or else that are spelled like it."""
    table = {known.split("/")[-1].lower(): known for known in published.names()}
    wanted = name.rstrip("/").split("/")[-1].lower()
    inside = [short for short in table if wanted and wanted in short]
    return [table[short] for short in inside[:5] or difflib.get_close_matches(wanted, table)]


def _plan(arch: Arch, length: int, options: argparse.Namespace) -> Plan:
    _check_sharing(options)
    if options.amp and options.dtype not in (None, "float32"):
        raise ValueError("--amp is bfloat16 autocast over float32 parameters: leave out --dtype or make it "
                         f"float32, got {options.dtype}")  # fmt: skip
    if length < 2:
        raise ValueError(f"--length must be >= 2 to train (one token has no next token), got {length}")
    if (options.checkpoint or 1) > arch.layers:
        raise ValueError(
            f"--checkpoint must be <= {arch.layers}, the model's layers, got {options.checkpoint}"
        )
    if options.train == "full" and options.rank is not None:
        raise ValueError("--rank is for --train lora and qlora")
    rank = None if options.train == "full" else options.rank or 8
    if (rank or 1) > largest_rank(arch):
        got = f"{rank}{' (the default)' if options.rank is None else ''}"
        raise ValueError(f"--rank must be <= {largest_rank(arch)}, the smaller side of v, got {got}")
    dtype = "float32" if options.amp else options.dtype or "bfloat16"
    run = Run(options.batch, length, dtype, options.amp, options.attention, options.optimizer or "adamw",
              options.checkpoint, zero_stage=options.zero, world=options.world, lora_rank=rank,
              lora_targets=("c_attn",) if arch.kind == "gpt2" else ("q_proj", "v_proj"))  # fmt: skip
    return Plan(run, options.train)


def _check_sharing(options: argparse.Namespace) -> None:
    stage, world = options.zero, options.world
    if options.train != "full" and (stage or world > 1):
        raise ValueError("--zero and --world are for --train full: "
                         f"ZeRO is accounted for full training, not for {options.train}")  # fmt: skip
    if stage and world == 1:
        raise ValueError(f"--zero {stage} shards over the GPUs of --world: add --world 2 or more, got 1")
    if world > 1 and not stage:
        raise ValueError(f"--world {world} needs --zero 1, 2 or 3; plain data parallelism shares no memory: "
                         "each GPU then needs what one does without --world")  # fmt: skip
    if stage and options.optimizer not in (None, *MOMENTS):
        raise ValueError(f"with --zero, --optimizer must be one of {', '.join(MOMENTS)} (ZeRO is accounted "
                         f"for these only), got {options.optimizer}")  # fmt: skip
