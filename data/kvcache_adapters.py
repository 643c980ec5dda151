"""Train the add-ons of Dynamic Context Pruning, and measure them against a window of equal bytes.

    python data/kvcache_adapters.py --out build/kvcache --device cuda --limit-s 150
    python data/kvcache_adapters.py --out DIR --device cpu --tiny          a run of seconds, for the test

Trains llama-mini and gpt2-mini, each with several gammas: the add-on alone (shipped: DIR/adapters), and the
add-on with all weights, as in the paper (too large to ship: measured only). Every run is written at once and
whole; a second call goes on where the first one stopped. DIR/dcp.json and DIR/adapters/dcp.md sum up.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from refimpl.backbone import Backbone
from refimpl.evaluate import paired_bootstrap
from refimpl.kvcache.dcp import save_pruning
from refimpl.kvcache.dcp_training import (
    PruningRun,
    pruned_scores,
    slot_width,
    train_pruning,
    window_scores,
    world_rows,
)
from refimpl.models import load, revision
from refimpl.paths import atomic_write
from refimpl.results import cpu, store

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("data/kvcache_adapters.py", "refimpl/kvcache/dcp.py", "refimpl/kvcache/dcp_training.py",
           "refimpl/backbone.py")  # fmt: skip
MODELS, GAMMAS = ("llama-mini", "gpt2-mini"), (0.3, 0.1, 1.0)


def main() -> int:
    """Train what is missing; 1 if the time limit left something out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no run that ends later")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--gammas", nargs="+", type=float, default=GAMMAS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=512, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=64, help="rows of the evaluation")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="one model, one gamma, two steps")
    args = parser.parse_args()
    if args.tiny:
        args.models, args.gammas = ["llama-pocket"], [0.3]
        args.steps, args.batch, args.width, args.rows, args.r = 2, 2, 32, 3, 4
    began = time.monotonic()
    (args.out / "adapters").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the work is the GPU's; on a CPU the numbers are those of one thread
    # The backward pass through a float mask needs an alignment that rows of any width do not have.
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)

    # The add-on alone comes first: that is what is shipped.
    jobs = [(name, gamma, alone)
            for alone in (True, False) for gamma in args.gammas for name in args.models]  # fmt: skip
    data: tuple[torch.Tensor, ...] = ()  # the models share their tokenizer
    longest = 0.0
    for name, gamma, alone in jobs:
        label = f"dcp-{name}-{'alone' if alone else 'whole'}-{gamma:g}"
        # b starts as in the released script; from a larger one gates reach 1, without gradient, sooner.
        wanted = PruningRun(
            gamma, steps=args.steps, r=args.r, interaction_only=alone, bias=2.0,
            lr_interaction=1e-2 if alone else 3e-3, lr=2e-4,
        )  # fmt: skip
        settings = asdict(wanted) | {"batch": args.batch, "width": args.width, "rows": args.rows}
        settings |= {"model": name, "revision": revision(name)}
        file = args.out / f"{label}.json"
        if file.exists() and json.loads(file.read_text())["settings"] == settings:
            continue
        if time.monotonic() - began + longest > args.limit_s:
            print(f"{label}: left out, the time limit is near", flush=True)
            continue
        model, tokenizer = load(name, device=args.device)
        data = data or (
            world_rows(tokenizer, args.steps * args.batch, args.width, "train", seed=0),
            world_rows(tokenizer, args.rows, args.width, "eval", seed=1),
        )
        start = time.monotonic()
        result = one_run(model, *data, wanted, args.batch)
        seconds = time.monotonic() - start
        longest = max(longest, seconds)
        if alone:
            about = {"model": name, "revision": revision(name), "gamma": gamma, "r": args.r,
                     "steps": args.steps}  # fmt: skip
            save_pruning(args.out / "adapters" / f"{label}.safetensors", result.pop("pruning"), **about)
        else:
            del result["pruning"]
        result = {"label": label, "settings": settings, "seconds": round(seconds, 1), **result}
        atomic_write(file, json.dumps(result, indent=1).encode())
        print(summary(result), flush=True)
    finish(args)
    return int(len(list(args.out.glob("dcp-*.json"))) < len(jobs))


def one_run(model: torch.nn.Module, rows: torch.Tensor, held_out: torch.Tensor, run: PruningRun, batch: int):
    """Train and measure: nll per row with all tokens, pruned, and with a window of the same mean bytes."""
    width = rows.shape[1]
    full = window_scores(model, held_out, width)["nll"]
    pruning, records = train_pruning(model, lambda step: rows[step * batch : (step + 1) * batch], run)
    scores = pruned_scores(model, pruning, held_out)
    bb = Backbone(model)
    # A slot of the pruned cache also holds the small key: the window gets as many numbers, so more slots.
    budget = float(scores["slots"].mean()) * slot_width(bb, run.r) / slot_width(bb)
    window = window_of_mean(budget, width)
    baseline = window_scores(model, held_out, window)
    kept_all = window_scores(model, held_out, width)["nll"]  # of the weights after training
    pair = paired_bootstrap(scores["nll"].numpy(), baseline["nll"].numpy(), rng=np.random.default_rng(0))
    numbers = {"nll_before": full, "nll_after": kept_all, "nll_pruned": scores["nll"],
               "nll_window": baseline["nll"], "slots": scores["slots"], "last": scores["last"]}  # fmt: skip
    return {
        "pruning": pruning,
        "window": window,
        "slots_of_window": float(baseline["slots"][0]),
        "slots_of_all": (width + 1) / 2,
        "numbers_per_slot": [slot_width(bb, run.r), slot_width(bb)],
        "pruned_minus_window": {"value": pair.value, "lo": pair.lo, "hi": pair.hi, "n": pair.n},
        "rows": {name: [round(x, 5) for x in t.tolist()] for name, t in numbers.items()},
        "records": records,
    }


def window_of_mean(slots: float, width: int) -> int:
    """The smallest window whose cache, averaged over the tokens of a row, holds at least `slots` slots."""
    at = np.arange(1, width + 1)
    return next((w for w in range(1, width) if np.minimum(at, w).mean() >= slots), width)


def summary(result: dict) -> str:
    """One line."""
    mean = {name: float(np.mean(values)) for name, values in result["rows"].items()}
    pair, kept = result["pruned_minus_window"], mean["slots"] / result["slots_of_all"]
    return (
        f"{result['label']:28} keeps {kept:5.1%} of slots; nll {mean['nll_before']:.3f} before, "
        f"{mean['nll_after']:.3f} after with all, {mean['nll_pruned']:.3f} pruned, {mean['nll_window']:.3f} "
        f"window {result['window']}; pruned - window {pair['value']:+.3f} [{pair['lo']:+.3f}, "
        f"{pair['hi']:+.3f}] ({result['seconds']:.0f} s)"
    )


def finish(args: argparse.Namespace) -> None:
    """Write DIR/dcp.json and the add-ons' card from the runs that are there."""
    runs = [json.loads(file.read_text()) for file in sorted(args.out.glob("dcp-*.json"))]
    if not runs:
        return
    hardware = torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu()
    command = shlex.join(["python", "data/kvcache_adapters.py", *sys.argv[1:]])
    best = min(runs, key=lambda run: run["pruned_minus_window"]["value"])
    store(
        args.out / "dcp.json", command=command, summary=summary(best), sources=SOURCES, root=ROOT,
        hardware=hardware, runs=runs,
    )  # fmt: skip
    lines = [
        "# Add-ons of Dynamic Context Pruning", "",
        "Small queries, small keys and one bias per layer (arXiv 2305.15805), trained beside our models by "
        "`data/kvcache_adapters.py` on rows of the synthetic world; the models' own weights stay as they are "
        "(`alone`). Runs that train all weights, as the paper does (`whole`), are measured and not shipped.",
        "", f"- command: `{command}`", f"- hardware: {hardware}", f"- date: {time.strftime('%Y-%m-%d')}",
        "- licence: Apache-2.0, as the models", "",
        "Held-out rows of the world; nll in nats per token; the window holds as many bytes on average.", "",
        "| run | slots kept | nll, all weights before | nll pruned | nll window | pruned - window, 95 % |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for run in runs:
        mean = {name: float(np.mean(values)) for name, values in run["rows"].items()}
        pair = run["pruned_minus_window"]
        lines.append(
            f"| {run['label']} | {mean['slots'] / run['slots_of_all']:.1%} | {mean['nll_before']:.3f} | "
            f"{mean['nll_pruned']:.3f} | {mean['nll_window']:.3f} | {pair['value']:+.3f} "
            f"[{pair['lo']:+.3f}, {pair['hi']:+.3f}] |"
        )
    atomic_write(args.out / "adapters" / "dcp.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
