"""The grid of chapter 4: models x methods x calibration seeds, everything that `harness.measure` measures.

    python data/quantization_grid.py               measure what build/quantization lacks, then join
    python data/quantization_grid.py --jobs 2      over so many processes of one thread each
    python data/quantization_grid.py --quick       2 documents, few items: to see that it runs; stores nothing

A cell is a file of build/quantization/, so an interrupted run goes on where it stopped; cells made from other
sources are made again. `--join` alone makes data/results/quantization/grid.json of what is there.

Calibration: 32 rows of 256 tokens of stories and 32 of pydoc's topics, other ones for every seed. Measured on
the chapter's probe (32 documents a kind, 200 items a set), with the uncompressed model as reference. Cells of
"MODEL + outliers" start from the injected copy (`inject_outliers`, 4 channels a norm, factor 60).
`--device cuda` measures on GPUs, in turn over those there are; compression stays on the CPU.

On 2026-11-22 calibrate.py and model.py were made faster (one pass through a block instead of five). All 58
methods on llama-nano and seven on gpt2-mini gave compressed models of the same bits before and after, so the
cells that were there were kept and carry the hashes of the new files.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
import multiprocessing as mp
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refimpl.models import load, revision
from refimpl.paths import atomic_write
from refimpl.quantization.catalogue import METHODS, compress
from refimpl.quantization.harness import change, measure, standard_probe
from refimpl.quantization.outliers import inject_outliers
from refimpl.quantization.texts import calibration_ids
from refimpl.results import sha256, store

ROOT = Path(__file__).resolve().parents[1]
FOLDER, RESULT = ROOT / "build" / "quantization", ROOT / "data" / "results" / "quantization" / "grid.json"
CORE = (
    "calibrate",
    "feedback",
    "fold",
    "grids",
    "harness",
    "linear",
    "model",
    "outliers",
    "packing",
    "texts",
)
MODELS = ("llama-nano", "llama-mini", "gpt2-mini")
DENSE = "none"
# With outliers only these have something to show (spec, section 0).
ON_OUTLIERS = (
    "w8a8 per token", "w8a8 per tensor", "llm.int8()", "llm.int8(), float kept", "smoothquant 0.5 per tensor",
    "rtn 3 g32", "clip 3 g32", "awq 3 g32", "gptq 3 g32", "rtn w4a8", "aser w4a8", "magnitude 0.5",
    "wanda 0.5", "sparsegpt 0.5", "rtn 2 g32", "quip# 2",
)  # fmt: skip
SLOWEST = "aqlm 2x4 g4"
SEEDS = 3
INJECTED = " + outliers"


def cells() -> list[tuple[str, str, int]]:
    """All cells, the most telling first: (model, method, seed)."""
    found = [(model, DENSE, 0) for model in MODELS]
    found += [(model, SLOWEST, seed) for seed in range(SEEDS) for model in MODELS]
    found += [(model + INJECTED, DENSE, 0) for model in MODELS]
    for seed in range(SEEDS):
        for model in ("llama-mini", "llama-nano", "gpt2-mini"):
            for name in (model, model + INJECTED):
                of_it = METHODS if name == model else ON_OUTLIERS
                found += [(name, m, seed) for m in of_it if METHODS[m].calibrated or seed == 0]
    return list(dict.fromkeys(found))


def cell(model_name: str, method: str, seed: int, quick: bool, device: str) -> dict[str, Any]:
    """Compress and measure."""
    base = model_name.removesuffix(INJECTED)
    model, tokenizer = load(base)
    if model_name.endswith(INJECTED):
        inject_outliers(model, torch.Generator().manual_seed(0))
    count = 2 if quick else 32
    ids = torch.cat([calibration_ids(tokenizer, count, 256, kind, seed) for kind in ("stories", "topics")])
    probe = standard_probe(tokenizer, 2, 8) if quick else standard_probe(tokenizer)
    dense = copy.deepcopy(model)
    row: dict[str, Any] = {"revision": revision(base)}
    if method != DENSE:
        start = time.process_time()
        report = compress(method, model, ids)
        row |= {
            "seconds": time.process_time() - start, "bits": report.bits,
            "bytes_before": report.bytes_before, "bytes_after": report.bytes_after,
            "weight_error": report.weight_error, "output_error": report.output_error,
        }  # fmt: skip
    found = measure(model.to(device), probe, dense.to(device))
    return row | {
        what: {name: np.round(values, 6).tolist() for name, values in getattr(found, what).items()}
        for what in ("nll", "kl", "flip", "exact", "answer_nll")
    }


def path_of(key: tuple[str, str, int]) -> Path:
    name = "-".join(map(str, key))
    return FOLDER / ("".join(c if c.isalnum() or c in "-+" else "_" for c in name) + ".json")


def sources_of(method: str) -> list[str]:
    """Files that decide the numbers of a method's cells, besides its settings and `cell`."""
    own = () if method == DENSE else METHODS[method].modules
    files = [f"refimpl/quantization/{name}.py" for name in sorted({*CORE, *own})]
    return ["refimpl/backbone.py", *files]


def state_of(method: str) -> dict[str, Any]:
    """Settings and hashes by which a stored cell is recognised as current."""
    settings = "" if method == DENSE else METHODS[method].settings
    code = hashlib.sha256(inspect.getsource(cell).encode()).hexdigest()
    hashes = {file: sha256(ROOT / file) for file in sources_of(method)}
    return {"settings": settings, "code": code, "sources": hashes}


def made(key: tuple[str, str, int]) -> bool:
    path = path_of(key)
    if not path.is_file():
        return False
    row = json.loads(path.read_text())
    state = state_of(key[1])
    return {what: row[what] for what in state} == state


def work(job: tuple[tuple[str, str, int], bool, str]) -> str:
    """One cell in this process."""
    key, quick, device = job
    torch.set_num_threads(1)
    if device == "cuda":
        device = f"cuda:{os.getpid() % torch.cuda.device_count()}"
    start = time.perf_counter()
    try:
        row = cell(*key, quick, device)
    except Exception as error:  # a method's failure must not cost the other cells
        return f"{'  '.join(map(str, key)):60} {type(error).__name__}: {str(error)[:120]}"
    row |= {"cell": key, **state_of(key[1]), "wall_seconds": time.perf_counter() - start}
    if not quick:
        FOLDER.mkdir(parents=True, exist_ok=True)
        atomic_write(path_of(key), json.dumps(row).encode())
    story = float(np.exp(np.mean(row["nll"]["stories"])))
    return f"{'  '.join(map(str, key)):60} {row['wall_seconds']:7.1f} s  stories {story:8.3f}"


def summarise(rows: list[dict[str, Any]], dense: dict[str, Any]) -> dict[str, Any]:
    """One method on one model: numbers of its seeds, means with intervals over documents or items."""
    out: dict[str, Any] = {
        key: rows[0][key] for key in ("bits", "bytes_before", "bytes_after") if key in rows[0]
    }
    out["seeds"] = len(rows)
    for key in ("seconds", "weight_error", "output_error"):
        if key in rows[0]:
            out[key] = [row[key] for row in rows]
    for what in ("nll", "kl", "flip", "exact", "answer_nll"):
        out[what] = {}
        for name in rows[0][what]:
            each = np.array([row[what][name] for row in rows])
            moved = change(each.mean(0), np.array(dense[what][name]))
            out[what][name] = found = {
                "mean": round(float(each.mean()), 6), "by_seed": each.mean(1).round(6).tolist(),
                "above_dense": [round(v, 6) for v in (moved.value, moved.lo, moved.hi)],
            }  # fmt: skip
            if what == "nll":
                found["items"] = each.mean(0).round(5).tolist()
            elif what == "exact":  # a digit for each item: in how many seeds the answer was right
                found["items"] = "".join(map(str, each.sum(0).astype(int)))
    return out


def join() -> int:
    """The stored file, of the cells that are there; 1 if some are missing."""
    wanted = cells()
    there = {key: json.loads(path_of(key).read_text()) for key in wanted if made(key)}
    missing = [key for key in wanted if key not in there]
    table: dict[str, dict[str, Any]] = {}
    for model in dict.fromkeys(key[0] for key in there):
        dense = there.get((model, DENSE, 0))
        if dense is None:
            continue
        methods = dict.fromkeys(key[1] for key in there if key[0] == model)
        table[model] = {
            name: summarise([row for key, row in there.items() if key[:2] == (model, name)], dense)
            for name in methods
        }
    count = sum(len(methods) for methods in table.values())
    methods = {key[1] for key in there}
    sources = sorted({file for method in methods for file in sources_of(method)})
    store(
        RESULT, command="make results-quantization", root=ROOT, sources=sources, threads=1,
        summary=f"{count} methods on {len(table)} models, {len(there)} of {len(wanted)} cells",
        missing=["  ".join(map(str, key)) for key in missing], models=table,
        revisions={model: revision(model) for model in MODELS},
        settings={name: METHODS[name].settings for name in METHODS if name in methods},
    )  # fmt: skip
    print(f"{len(missing)} missing")
    return 1 if missing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="cells of these methods")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="cells of these models")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where models are measured")
    parser.add_argument("--limit-s", type=float, help="give up cells that are not done by then")
    parser.add_argument("--quick", action="store_true", help="tiny amounts, nothing stored")
    parser.add_argument("--join", action="store_true", help="only make the stored file of what is there")
    args = parser.parse_args()
    if args.join:
        return join()
    todo = [key for key in cells() if args.quick or not made(key)]
    todo = [key for key in todo if not args.only or key[1] in args.only]
    todo = [key for key in todo if not args.models or key[0] in args.models]
    jobs = [(key, args.quick, args.device) for key in todo]
    if args.jobs == 1:
        for job in jobs:
            print(work(job), flush=True)
    else:
        end = time.monotonic() + (args.limit_s or 1e9)
        with mp.get_context("spawn").Pool(args.jobs) as pool:
            lines = pool.imap_unordered(work, jobs)
            for _ in jobs:
                try:
                    print(lines.next(max(0.0, end - time.monotonic())), flush=True)
                except mp.TimeoutError:
                    break  # leaving the pool ends its processes; cells are written whole or not at all
    return 0 if args.quick else join()


if __name__ == "__main__":
    sys.exit(main())
