"""The grid of chapter 5: methods x budgets x metrics, and streams of 200 000 tokens, token by token.

    python data/kvcache_grid.py                 measure what build/kvcache lacks, then join
    python data/kvcache_grid.py --jobs 2        over so many processes of one thread each
    python data/kvcache_grid.py --device cuda   the same on a GPU, for the grid
    python data/kvcache_grid.py --quick         2 documents, 300 tokens: to see that it runs; stores nothing

A piece of a cell is a file of build/kvcache/, so an interrupted run goes on where it stopped; pieces made
from other sources are made again. `--join` alone makes data/results/kvcache/{grid,streams}.json of what is
there.

- *grid*: llama-mini at five budgets (RetrievalAttention, whose graph is walked in Python, at three): 16
  documents of stories and 16 of pydoc's topics, 768 tokens each, the first 384 in one forward (n = 384): NLL,
  KL and attention error of each document; 32 prompts with 8 facts, the question inside the prompt and after
  its compression: NLL and exact match of each; bytes held, at most held, read. Beside it llama-nano and
  gpt2-mini at a quarter ("others"), with the first 8 documents of a kind and without RetrievalAttention.
- *streams*: up to 200 000 tokens of stories (row 0) and of pydoc's topics (row 1, repeated where they are
  shorter) in a cache of 256 slots: NLL, bytes and CPU seconds for each block of 2 000 tokens. `STREAMED` says
  how far each method is fed; the full cache eight times the context: cost and NLL show why no further.

What is stored is older than decoding steps that write a token in the place of another. Before that change
(f061073) and after it, 108 cells of llama-mini were run on two documents of 448 tokens and 3 facts: 84 came
out the same to the last bit, 20 (StreamingLLM, LaCache, low rank) with the same bytes and with NLL and KL
within 1e-6, and in 4 of budget 1 `peak` alone is 0.02 % smaller now. The first 1 500 tokens of all streams:
NLL within 2e-6. (A cell looks at the bytes after every token, which puts the slots in order again, so only
the streams compare tokens written in place; tests/kvcache/test_places.py does for every policy.) So the
numbers were kept; the streams' seconds are those of the older code.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refimpl.evaluate import bootstrap
from refimpl.kvcache.catalogue import METHODS, applicable, build
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
    "places", "policies", "rope", "slots", "steps", "texts", "view")
]  # fmt: skip
MODEL, STREAM_MODEL = "llama-mini", "llama-nano"
OTHERS, OTHER_BUDGET = ("llama-nano", "gpt2-mini"), 1 / 4
DOCUMENTS, ITEMS, LENGTH, PROMPT, BATCH = 16, 32, 768, 384, 8
BLOCK, SLOTS = 2_000, 256
SLOWEST, FEW_BUDGETS = "retrieval_attention", (1.0, 1 / 4, 1 / 16)
STREAMED = {"window": 200_000, "streaming_llm": 200_000, "h2o": 64_000, "lacache": 64_000, "full": 8_000}


KINDS = ("stories", "topics")
PIECES = (*(f"{kind} {part}" for kind in KINDS for part in range(DOCUMENTS // BATCH)), "inside", "after")
FULL = "full@1.0"

Cell = tuple[str, str, str, str]


def cells() -> list[Cell]:
    """All cells: (metric, model, method, budget)."""
    found = []
    for name, row in METHODS.items():
        if row.recipe and (not row.trained or ADD_ON.is_file()):
            budgets = FEW_BUDGETS if name == SLOWEST else row.budgets
            found += [("grid", MODEL, name, str(f)) for f in budgets]
        for model in OTHERS:
            if row.recipe and not row.trained and name != SLOWEST and applicable(name, load(model)[0]):
                budgets = row.budgets if name == "full" else {OTHER_BUDGET} & set(row.budgets)
                found += [("grid", model, name, str(f)) for f in budgets]
    return found + [("stream", STREAM_MODEL, name, "") for name in STREAMED]


def pieces(cell: Cell) -> tuple[str, ...]:
    if cell[0] == "stream":
        return ("",)
    return PIECES if cell[1] == MODEL else tuple(piece for piece in PIECES if not piece.endswith(" 1"))


def punctuation(tokenizer: Any) -> tuple[int, ...]:
    """Ids of tokens without letter or digit (FastGen's class)."""
    texts = ((i, tokenizer.decode([i])) for i in range(32, len(tokenizer)))
    return tuple(i for i, text in texts if text.strip() and not any(c.isalnum() for c in text))


def grid_piece(
    model_name: str, name: str, f: float, piece: str, quick: bool, device: str = "cpu"
) -> dict[str, Any]:
    """One method at one budget: a batch of documents, or the questions "inside" or "after" the prompt."""
    model, tokenizer = load(model_name, device=device)
    pruning = load_pruning(ADD_ON, revision=revision(MODEL))[0] if METHODS[name].trained else None
    density = layer_density(model, documents(tokenizer, "stories", 2, PROMPT, seed=9).to(device)).tolist()
    marks = punctuation(tokenizer)

    def make(n: int):
        return build(name, Setting(model, n, f, 0, marks, pruning, tuple(density)))

    if piece in ("inside", "after"):
        found = recall(model, make, facts(tokenizer, 2 if quick else ITEMS), piece)
        return {"nll": found.nll.tolist(), "exact": found.exact.tolist(), "held": found.held}
    kind, part = piece.split()
    rows = documents(tokenizer, kind, DOCUMENTS, LENGTH).split(BATCH)[int(part)]
    rows = (rows[:2, : PROMPT + 24] if quick else rows).to(device)
    run = stream(model, make(PROMPT), rows, PROMPT, _reference((model_name, piece), model, rows))
    return {what: getattr(run, what).mean(1).tolist() for what in ("nll", "kl", "error")} | {
        "layers": run.error.mean(0).tolist(),
        **{what: getattr(run, what) / len(rows) for what in ("held", "peak", "read", "moved")},
    }  # fmt: skip


_references: dict[tuple, Any] = {}


def _reference(key: tuple[str, str], model: Any, ids: torch.Tensor) -> Any:
    """The full cache's run, kept for this process's next method: 16 MB of log-probabilities a document."""
    if key not in _references:
        _references.clear()
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
    return {"rows": list(KINDS), "slots": SLOTS, "blocks": blocks(name, ids, model)}


def path_of(cell: Cell, piece: str) -> Path:
    name = "-".join(part for part in (*cell, piece) if part)
    return FOLDER / (name.replace(".", "_").replace(" ", "_") + ".json")


def made(cell: Cell, piece: str, sources: dict[str, dict[str, str]]) -> bool:
    path = path_of(cell, piece)
    return path.is_file() and json.loads(path.read_text())["sources"] == sources[cell[0]]


def work(job: tuple[Cell, str, dict[str, str], bool, str]) -> str:
    """One piece of a cell in this process."""
    cell, piece, sources, quick, device = job
    torch.set_num_threads(1)
    metric, model, name, f = cell
    start = time.perf_counter()
    try:
        if metric == "stream":
            found = stream_cell(name, quick)
        else:
            found = grid_piece(model, name, float(f), piece, quick, device)
    except Exception as error:  # a method's failure must not cost the other cells
        return f"{' '.join((*cell, piece)):60} {type(error).__name__}: {str(error)[:120]}"
    row = found | {"sources": sources, "wall_seconds": time.perf_counter() - start}
    if not quick:
        FOLDER.mkdir(parents=True, exist_ok=True)
        atomic_write(path_of(cell, piece), json.dumps(row).encode())
    return f"{' '.join((*cell, piece)):60} {row['wall_seconds']:8.1f} s"


def whole(cell: Cell) -> dict[str, Any]:
    """A cell of its pieces."""
    rows = {piece: json.loads(path_of(cell, piece).read_text()) for piece in pieces(cell)}
    out: dict[str, Any] = {
        "revision": revision(cell[1]), "wall_seconds": sum(row.pop("wall_seconds") for row in rows.values())
    }  # fmt: skip
    for row in rows.values():
        del row["sources"]
    if cell[0] == "stream":
        return rows[""] | out
    for kind in KINDS:
        parts = [row for piece, row in rows.items() if piece.startswith(kind)]
        out[kind] = {what: sum((part[what] for part in parts), []) for what in ("nll", "kl", "error")}
        for what in ("layers", "held", "peak", "read", "moved"):
            out[kind][what] = np.mean([part[what] for part in parts], axis=0).tolist()
    return out | {f"recall_{question}": rows[question] for question in ("inside", "after")}


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
    missing = [cell for cell in wanted if not all(made(cell, piece, sources) for piece in pieces(cell))]
    about = {"root": ROOT, "threads": 1}
    grids: dict[str, dict[str, Any]] = {model: {} for model in (MODEL, *OTHERS)}
    streams = {}
    for cell in wanted:
        if cell in missing:
            continue
        if cell[0] == "grid":
            grids[cell[1]][f"{cell[2]}@{cell[3]}"] = whole(cell)
        else:
            streams[cell[2]] = whole(cell)
    for grid in grids.values():
        for row in grid.values() if FULL in grid else ():
            summarise(row, grid[FULL])
    gone = {metric: ["-".join(c[1:]) for c in missing if c[0] == metric] for metric in ("grid", "stream")}
    if FULL in grids[MODEL]:
        count = sum(map(len, grids.values()))
        store(
            RESULTS / "grid.json", command="make results-kvcache", model=MODEL, cells=grids.pop(MODEL),
            others=grids, sources=SOURCES, missing=gone["grid"],
            summary=f"{count} of {sum(c[0] == 'grid' for c in wanted)} cells; {DOCUMENTS} documents a kind, "
            f"{' and '.join(OTHERS)} {BATCH}",
            setup={"documents": DOCUMENTS, "length": LENGTH, "prompt": PROMPT}, **about,
        )  # fmt: skip
    if streams:
        store(
            RESULTS / "streams.json", command="make results-kvcache", model=STREAM_MODEL,
            summary=f"{len(streams)} streams of up to {max(STREAMED.values()):,} tokens in {SLOTS} slots",
            streams=streams, sources=STREAM_SOURCES, missing=gone["stream"], **about,
        )  # fmt: skip
    print("\n".join(f"missing: {' '.join(cell)}" for cell in missing))
    return 1 if missing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--part", choices=("grid", "stream"), help="cells of this kind")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="cells of these methods")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="cells of these models")
    parser.add_argument("--limit-s", type=float, help="give up cells that are not done by then")
    parser.add_argument("--device", default="cpu", help="of the grid's models (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny amounts, nothing stored")
    parser.add_argument("--join", action="store_true", help="only make the stored files of what is there")
    args = parser.parse_args()
    sources = {
        "grid": {source: sha256(ROOT / source) for source in SOURCES},
        "stream": {source: sha256(ROOT / source) for source in STREAM_SOURCES},
    }
    if args.join:
        return join(sources)
    wanted = [cell for cell in cells() if args.part in (None, cell[0])]
    wanted = [cell for cell in wanted if not args.models or cell[1] in args.models]
    wanted = [cell for cell in wanted if not args.only or cell[2] in args.only]
    todo = [(cell, piece) for cell in wanted for piece in pieces(cell)]
    todo = [job for job in todo if args.quick or not made(*job, sources)]
    # The longest first; then what has the same reference.
    todo.sort(key=lambda job: (job[0][0] == "grid", job[0][2] != SLOWEST, job[0][1], job[1]))
    jobs = [(cell, piece, sources[cell[0]], args.quick, args.device) for cell, piece in todo]
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
