"""The grid of chapter 5: methods x budgets x metrics, and streams of 200 000 tokens, token by token.

    python data/kvcache_grid.py                 measure what build/kvcache lacks, then join
    python data/kvcache_grid.py --jobs 2        over so many processes of one thread each
    python data/kvcache_grid.py --quick         2 documents, 300 tokens: to see that it runs; stores nothing

A cell is a file of build/kvcache/, so an interrupted run goes on where it stopped; cells made from other
sources are made again. `--join` alone makes data/results/kvcache/{grid,streams}.json of what is there.

- *grid*: llama-mini, 16 documents of stories and 16 of pydoc's topics, 768 tokens each, the first 384 in one
  forward (n = 384): NLL, KL and attention error of each document; 32 prompts with 8 facts, the question
  inside the prompt and after its compression: NLL and exact match of each; bytes held, at most held, read.
- *streams*: up to 200 000 tokens of stories (row 0) and of pydoc's topics (row 1, repeated where they are
  shorter) in a cache of 256 slots: NLL, bytes and CPU seconds for each block of 2 000 tokens. `STREAMED` says
  how far each method is fed; the full cache eight times the context: cost and NLL show why no further.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refimpl.evaluate import bootstrap
from refimpl.kvcache.catalogue import METHODS, build
from refimpl.kvcache.dcp import load_pruning
from refimpl.kvcache.harness import difference, recall, reference, stream
from refimpl.kvcache.recipes import Setting
from refimpl.kvcache.tailorkv import layer_density
from refimpl.kvcache.texts import documents, facts, text_of
from refimpl.models import load, revision
from refimpl.paths import atomic_write
from refimpl.results import sha256, store

ROOT = Path(__file__).resolve().parents[1]
ADD_ON = ROOT / "data" / "adapters" / "dcp-llama-mini-alone-0.3.safetensors"
FOLDER, RESULTS = ROOT / "build" / "kvcache", ROOT / "data" / "results" / "kvcache"
# The map's wording is no source of numbers, the recipes are.
SOURCES = ["data/kvcache_grid.py", "refimpl/backbone.py"] + sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "refimpl" / "kvcache").glob("*.py")
    if path.stem not in ("__init__", "catalogue", "dcp_training", "mla", "sizes")
)
STREAM_SOURCES = ["data/kvcache_grid.py"] + [
    f"refimpl/kvcache/{name}.py" for name in ("attention", "cache", "codecs", "h2o", "lacache", "layer",
    "policies", "rope", "slots", "texts", "view")
]  # fmt: skip
MODEL, STREAM_MODEL = "llama-mini", "llama-nano"
DOCUMENTS, ITEMS, LENGTH, PROMPT, BATCH = 16, 32, 768, 384, 8
BLOCK, SLOTS = 2_000, 256
STREAMED = {"window": 200_000, "streaming_llm": 200_000, "h2o": 64_000, "lacache": 64_000, "full": 8_000}


def cells() -> list[tuple[str, ...]]:
    """Names of all cells: (metric, method, budget)."""
    names = [
        ("grid", name, str(f)) for name, row in METHODS.items()
        if row.recipe and (not row.trained or ADD_ON.is_file()) for f in row.budgets
    ]  # fmt: skip
    return names + [("stream", name, "") for name in STREAMED]


def punctuation(tokenizer: Any) -> tuple[int, ...]:
    """Ids of tokens without letter or digit (FastGen's class)."""
    texts = ((i, tokenizer.decode([i])) for i in range(32, len(tokenizer)))
    return tuple(i for i, text in texts if text.strip() and not any(c.isalnum() for c in text))


def grid_cell(name: str, f: float, quick: bool) -> dict[str, Any]:
    """One method at one budget."""
    model, tokenizer = load(MODEL)
    count, size = (2, 2) if quick else (DOCUMENTS, BATCH)
    row: dict[str, Any] = {"revision": revision(MODEL)}
    pruning = load_pruning(ADD_ON, revision=revision(MODEL))[0] if METHODS[name].trained else None
    density = tuple(layer_density(model, documents(tokenizer, "stories", 2, PROMPT, seed=9)).tolist())

    def make(n: int):
        setting = Setting(model, n, f, 0, punctuation(tokenizer), pruning, density)
        return build(name, setting)

    for kind in ("stories", "topics"):
        rows = documents(tokenizer, kind, count, PROMPT + 24 if quick else LENGTH)
        parts = []
        for ids in rows.split(size):
            against = _reference(kind, len(parts), model, ids)
            parts.append(stream(model, make(PROMPT), ids, PROMPT, against))
        cat = lambda what, parts=parts: torch.cat([getattr(p, what).mean(1) for p in parts]).tolist()
        row[kind] = {
            "nll": cat("nll"), "kl": cat("kl"), "error": cat("error"),
            "layers": torch.cat([p.error for p in parts]).mean(0).tolist(),
            **{what: float(np.mean([getattr(p, what) for p in parts])) / size
               for what in ("held", "peak", "read", "moved")},
        }  # fmt: skip
    items = facts(tokenizer, 2 if quick else ITEMS)
    for question in ("inside", "after"):
        found = recall(model, make, items, question)
        row[f"recall_{question}"] = {
            "nll": found.nll.tolist(), "exact": found.exact.tolist(), "held": found.held
        }  # fmt: skip
    return row


_references: dict[tuple, Any] = {}


def _reference(kind: str, part: int, model: Any, ids: torch.Tensor) -> Any:
    """The full cache's run, once per process: 16 MB of log-probabilities a document."""
    key = kind, part, tuple(ids.shape)
    if key not in _references:
        _references[key] = reference(model, ids, PROMPT)
    return _references[key]


@torch.no_grad()
def blocks(name: str, ids: torch.Tensor, model: Any) -> list[dict[str, Any]]:
    """Feed ids [B, T] token by token; NLL of each row, bytes and CPU seconds of each block."""
    cache = build(name, Setting(model, SLOTS, 1.0))
    found: list[dict[str, Any]] = []
    nll, start, T = torch.zeros(ids.shape[0]), time.process_time(), ids.shape[1]
    for t in range(T - 1):
        logits = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits[:, -1]
        nll += torch.nn.functional.cross_entropy(logits, ids[:, t + 1], reduction="none")
        if (t + 1) % BLOCK == 0 or t == T - 2:
            n = (t % BLOCK) + 1
            seconds = time.process_time() - start
            found.append({"tokens": t + 1, "nll": (nll / n).tolist(), "seconds": seconds / n,
                          "held": sum(cache.nbytes().values())})  # fmt: skip
            nll, start = torch.zeros_like(nll), time.process_time()
    return found


def stream_cell(name: str, quick: bool) -> dict[str, Any]:
    model, tokenizer = load(STREAM_MODEL)
    T = 301 if quick else STREAMED[name]
    ids = torch.stack([text_of(tokenizer, kind, T) for kind in ("stories", "topics")])
    ids[:, 0] = tokenizer.bos_token_id
    return {"revision": revision(STREAM_MODEL), "rows": ["stories", "topics"], "slots": SLOTS,
            "blocks": blocks(name, ids, model)}  # fmt: skip


def path_of(cell: tuple[str, ...]) -> Path:
    return FOLDER / ("-".join(part.replace(".", "_") for part in cell if part) + ".json")


def made(cell: tuple[str, ...], sources: dict[str, dict[str, str]]) -> bool:
    path = path_of(cell)
    return path.is_file() and json.loads(path.read_text())["sources"] == sources[cell[0]]


def work(job: tuple[tuple[str, ...], dict[str, str], bool]) -> str:
    """One cell in this process."""
    cell, sources, quick = job
    torch.set_num_threads(1)
    metric, name, f = cell
    start = time.perf_counter()
    tasks: dict[str, Callable[[], dict[str, Any]]] = {
        "grid": lambda: grid_cell(name, float(f), quick),
        "stream": lambda: stream_cell(name, quick),
    }
    row = tasks[metric]() | {"cell": cell, "sources": sources, "wall_seconds": time.perf_counter() - start}
    if not quick:
        FOLDER.mkdir(parents=True, exist_ok=True)
        atomic_write(path_of(cell), json.dumps(row).encode())
    return f"{' '.join(cell):40} {row['wall_seconds']:8.1f} s"


def summarise(cell: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Estimates over documents, and paired differences to the full cache."""
    for kind in ("stories", "topics"):
        part = cell[kind]
        part["mean"] = {what: _interval(part[what]) for what in ("nll", "kl", "error")}
        part["nll_above_full"] = _pair(part["nll"], full[kind]["nll"])
    for question in ("recall_inside", "recall_after"):
        cell[question]["mean"] = {what: _interval(cell[question][what]) for what in ("nll", "exact")}
    return cell


def _interval(values: list[float]) -> list[float]:
    found = bootstrap(values, rng=np.random.default_rng(0))
    return [found.value, found.lo, found.hi]


def _pair(a: list[float], b: list[float]) -> list[float]:
    found = difference(np.array(a), np.array(b))
    return [found.value, found.lo, found.hi]


def join(sources: dict[str, dict[str, str]]) -> int:
    """The two stored files, of the cells that are there; 1 if some are missing."""
    wanted = cells()
    missing = [cell for cell in wanted if not made(cell, sources)]
    rows = {cell: json.loads(path_of(cell).read_text()) for cell in wanted if cell not in missing}
    for row in rows.values():
        del row["sources"], row["cell"]
    about = {"root": ROOT, "threads": 1, "missing": ["-".join(c) for c in missing]}
    grid = {f"{c[1]}@{c[2]}": row for c, row in rows.items() if c[0] == "grid"}
    if full := grid.get("full@1.0"):
        for row in grid.values():
            summarise(row, full)
        store(
            RESULTS / "grid.json", command="make results-kvcache", model=MODEL, cells=grid, sources=SOURCES,
            summary=f"{len(grid)} of {sum(c[0] == 'grid' for c in wanted)} cells, {DOCUMENTS} documents each",
            setup={"documents": DOCUMENTS, "length": LENGTH, "prompt": PROMPT}, **about,
        )  # fmt: skip
    if streams := {c[1]: row for c, row in rows.items() if c[0] == "stream"}:
        store(
            RESULTS / "streams.json", command="make results-kvcache", model=STREAM_MODEL,
            summary=f"{len(streams)} streams of up to {max(STREAMED.values()):,} tokens in {SLOTS} slots",
            streams=streams, sources=STREAM_SOURCES, **about,
        )  # fmt: skip
    print("\n".join(f"missing: {' '.join(cell)}" for cell in missing))
    return 1 if missing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--part", choices=("grid", "stream"), help="cells of this kind")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="cells of these methods")
    parser.add_argument("--limit-s", type=float, help="give up cells that are not done by then")
    parser.add_argument("--quick", action="store_true", help="tiny amounts, nothing stored")
    parser.add_argument("--join", action="store_true", help="only make the stored files of what is there")
    args = parser.parse_args()
    sources = {
        "grid": {source: sha256(ROOT / source) for source in SOURCES},
        "stream": {source: sha256(ROOT / source) for source in STREAM_SOURCES},
    }
    if args.join:
        return join(sources)
    todo = [cell for cell in cells() if args.quick or not made(cell, sources)]
    if args.part:
        todo = [cell for cell in todo if cell[0] == args.part]
    if args.only:
        todo = [cell for cell in todo if cell[1] in args.only]
    todo.sort(key=lambda cell: cell[0] == "grid")  # the longest first
    jobs = [(cell, sources[cell[0]], args.quick) for cell in todo]
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
    return 0 if args.quick else join(sources)


if __name__ == "__main__":
    sys.exit(main())
