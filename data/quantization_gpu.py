"""Compressing LLaMAs of 1.3 and 7 billion random weights on a GPU, layer by layer: seconds and peak memory.

    python data/quantization_gpu.py --out DIR --limit-s 400    measure what DIR lacks
    python data/quantization_gpu.py --join DIR                 make data/results/quantization/gpu.json of it

Weights are drawn on the device: they do not matter for time and bytes. Calibration is as in the papers, 128
rows of 2048 tokens, here random ones, all hidden states on the device. A configuration is a model and a
method; stored for it are

- every compressed linear layer: its block, shape, seconds of the method alone (the device waited for), and
  the most that was allocated meanwhile above what was allocated before;
- every block: seconds from the end of the block before, so with the calibration passes of its layers;
- the whole: seconds, peak, bytes of the model before and after.

Errors are a configuration's result, and the next one starts from an emptied device. Every result is a file of
its own, written at once; a run that is cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.backbone import Backbone
from refimpl.paths import atomic_write
from refimpl.quantization import GPTQ, RTN, Stats, compress_model
from refimpl.quantization.calibrate import input_groups
from refimpl.results import cpu, sha256, store

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "data" / "results" / "quantization" / "gpu.json"
SOURCES = ["data/quantization_gpu.py"] + [
    f"refimpl/quantization/{name}.py"
    for name in ("calibrate", "feedback", "gptq", "grids", "linear", "model", "packing", "rtn")
]
MODELS = {
    "1.3B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
             "num_attention_heads": 16, "num_key_value_heads": 16},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32},
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2}  # fmt: skip
METHODS: dict[str, Callable[[int], Any]] = {
    "gptq-4-g128": lambda g: GPTQ(4, group=g),
    "rtn-4-g128": lambda g: RTN(4, group=g),
}
ORDER = [(size, name) for name in METHODS for size in MODELS]


def build(fields: dict[str, int], device: str, dtype: torch.dtype) -> nn.Module:
    """A LLaMA with random weights, drawn on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, attn_implementation="sdpa", **fields)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


class Clock:
    """A recipe that times another one."""

    def __init__(self, recipe: Any, device: str, blocks: dict[str, int]) -> None:
        self.recipe, self.device, self.blocks, self.rows = recipe, device, blocks, []
        self.ends: dict[int, float] = {}

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> nn.Module:
        start, cuda = self.now(), self.device == "cuda"
        base = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        layer = self.recipe(name, weight, stats)
        end = self.now()
        self.rows.append({
            "name": name, "block": self.blocks[name], "shape": list(weight.shape),
            "seconds": round(end - start, 4),
            "peak": torch.cuda.max_memory_allocated() - base if cuda else None,
            "nbytes": layer.nbytes(),
        })  # fmt: skip
        self.ends[self.blocks[name]] = end
        return layer


def measure(fields: dict[str, int], method: str, device: str, tiny: bool) -> dict[str, Any]:
    """One configuration."""
    dtype = torch.float32 if tiny else torch.bfloat16
    model = build(fields, device, dtype)
    rows, length = (2, 64) if tiny else (128, 2048)
    ids = torch.randint(0, 32000, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    bb = Backbone(model)
    blocks = {
        name: layer for layer in range(bb.n_layers) for group in input_groups(bb, layer) for name in group
    }
    clock = Clock(METHODS[method](32 if tiny else 128), device, blocks)
    start = clock.now()
    report = compress_model(model, clock, ids, batch=8)
    total = clock.now() - start
    ends = [start] + [clock.ends[layer] for layer in range(bb.n_layers)]
    return {
        "seconds": round(total, 2),
        "blocks_s": [round(b - a, 3) for a, b in zip(ends, ends[1:], strict=False)],
        "layers": clock.rows,
        "weights": sum(row["shape"][0] * row["shape"][1] for row in clock.rows),
        "bits": report.bits, "bytes_before": report.bytes_before, "bytes_after": report.bytes_after,
        "calibration": [rows, length],
    }  # fmt: skip


def finished(path: Path, sources: dict[str, str]) -> bool:
    """Whether a result is there, without error, of these sources."""
    if not path.is_file():
        return False
    row = json.loads(path.read_text())
    return row["error"] is None and row["sources"] == sources


def run(args: argparse.Namespace) -> int:
    """Measure what the folder lacks; 1 if something failed or was left out."""
    start, out, device = time.perf_counter(), Path(args.out), args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --tiny --device cpu runs the same path on a CPU")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sources = {source: sha256(ROOT / source) for source in SOURCES}
    versions = {package: metadata.version(package) for package in ("torch", "transformers")}
    missing = 0
    for size, method in ORDER:
        name = f"{size}-{method}"
        path = out / f"{name}.json"
        if finished(path, sources):
            continue
        if time.perf_counter() - start > args.limit_s:
            print(f"{name}: left out: the limit of {args.limit_s:.0f} s is over", flush=True)
            missing += 1
            continue
        fields = TINY if args.tiny else MODELS[size]
        row: dict[str, Any] = {
            "name": name, "model": size, "method": method, "fields": fields, "tiny": args.tiny,
            "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu(), "sources": sources,
            "date": time.strftime("%Y-%m-%d"), "error": None,
            "versions": {"python": sys.version.split()[0], **versions},
        }  # fmt: skip
        try:
            row |= measure(fields, method, device, args.tiny)
            print(f"{name:16} {row['seconds']:7.1f} s, {row['bits']:.3f} bits", flush=True)
        except Exception:  # one configuration's failure must not cost the others
            row["error"] = traceback.format_exc(limit=-6)
            missing += 1
            print(f"{name}: {row['error'].splitlines()[-1][:150]}", flush=True)
        atomic_write(path, (json.dumps(row, indent=1) + "\n").encode())
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    print(f"{len(ORDER) - missing} of {len(ORDER)} in {time.perf_counter() - start:.0f} s")
    return 1 if missing else 0


def join(folder: Path, to: Path) -> int:
    """One file of all results; ValueError where they come from other sources or several machines."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
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
    runs = {row["name"]: {k: v for k, v in row.items() if k not in (*shared, "sources")} for row in rows}
    good = [row for row in runs.values() if row["error"] is None]
    slowest = max(good, key=lambda row: row["seconds"])
    result = store(
        to,
        command="python data/quantization_gpu.py --out DIR; python data/quantization_gpu.py --join DIR",
        summary=f"layer by layer: {len(good)} of {len(runs)} configurations; {slowest['name']} takes "
        f"{slowest['seconds']:.0f} s",
        root=ROOT, sources=SOURCES, hardware=shared["hardware"], runs=runs,
    )  # fmt: skip
    # Joining may happen on another machine and day than measuring.
    result |= {"versions": shared["versions"], "date": max(row["date"] for row in rows)}
    atomic_write(to, (json.dumps(result, indent=1) + "\n").encode())
    print(f"{to}: {result['summary']}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="DIR", help="measure; one JSON file per result goes here")
    parser.add_argument("--tiny", action="store_true", help="a toy model and few tokens")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--limit-s", type=float, default=3600, help="start no configuration after this")
    parser.add_argument("--join", metavar="DIR", help="make one file of the results in this folder")
    parser.add_argument("--to", default=str(RESULT), metavar="FILE", help="which file (default: %(default)s)")
    args = parser.parse_args()
    if bool(args.out) == bool(args.join):
        parser.error("give either --out DIR or --join DIR")
    return run(args) if args.out else join(Path(args.join), Path(args.to))


if __name__ == "__main__":
    sys.exit(main())
