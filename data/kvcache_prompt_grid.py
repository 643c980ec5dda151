"""Prompt pruning measured: methods x ratios x two kinds of context, and eviction from the cache beside them.

The command measures the cells that build/kvcache_prompt lacks, or has from other sources, and joins them to
data/results/kvcache/prompt.json, keys `kind: method@ratio`; `--quick` shows that it runs.

- `dense` (every sentence states facts) and `padded` (a sentence without a fact behind each), read by the
  scorer llama-mini; `reader`: the dense items pruned the same way and read by gpt2-mini.
- Prompt methods leave `ratio` of the context's tokens. Cache methods read the whole prompt and then hold as
  many entries as a pruned prompt would: `inside`, the question is read with the context; `after`, later.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refimpl.evaluate import bootstrap
from refimpl.kvcache.attention import release
from refimpl.kvcache.cache import KVCache
from refimpl.kvcache.h2o import H2O
from refimpl.kvcache.harness import recall
from refimpl.kvcache.policies import KVPolicy, Random
from refimpl.kvcache.prompt import harness as prompts
from refimpl.kvcache.prompt.llmlingua import LLMLingua
from refimpl.kvcache.prompt.llmlingua2 import LLMLingua2, load_classifier
from refimpl.kvcache.prompt.selective import SelectiveContext
from refimpl.kvcache.snapkv import SnapKV
from refimpl.kvcache.texts import Fact
from refimpl.models import load, revision
from refimpl.paths import atomic_write
from refimpl.results import sha256, store
from refimpl.scoring import BOS

ROOT = Path(__file__).resolve().parents[1]
FOLDER, RESULT = ROOT / "build" / "kvcache_prompt", ROOT / "data" / "results" / "kvcache" / "prompt.json"
SOURCES = ["data/kvcache_prompt_grid.py", "data/adapters/llmlingua2.safetensors", "refimpl/scoring.py"]
_USED = "harness llmlingua llmlingua2 selective units ../cache ../h2o ../harness ../policies ../snapkv"
SOURCES += [f"refimpl/kvcache/prompt/{name}.py".replace("prompt/../", "") for name in _USED.split()]
ITEMS, SEGMENT, FILLERS = 48, 64, {"dense": 0.0, "padded": 1.0, "reader": 0.0}
load_once = lru_cache(load)


def pruners() -> dict[str, Callable | None]:
    """Every prompt method by name: (context, budget, question) -> Pruned."""
    (scorer, tokenizer), rng = load_once("llama-mini"), lambda: torch.Generator().manual_seed(0)
    lingua = LLMLingua(scorer, iterative_size=SEGMENT)
    blind: dict[str, Any] = {
        "selective_context": SelectiveContext(scorer, tokenizer),
        "selective_document": SelectiveContext(scorer, tokenizer, scope="document"),
        "llmlingua": lingua, "llmlingua2": LLMLingua2(load_classifier(), tokenizer),
    }  # fmt: skip
    return {
        "full": None, "truncate": prompts.truncate,
        "random_words": prompts.random_words(tokenizer, rng()), "random_tokens": prompts.random_tokens(rng()),
        **{name: lambda ids, budget, question, m=m: m.prune(ids, budget) for name, m in blind.items()},
        "llmlingua_question": lingua.prune,
    }  # fmt: skip


POLICIES: dict[str, Callable[[int], KVPolicy]] = {  # n entries -> a policy that holds so many
    "snapkv": lambda n: SnapKV(n, window=min(32, n // 2)),
    "h2o": lambda n: H2O(n // 2, n - n // 2),
    "random_eviction": lambda n: Random(n, torch.Generator().manual_seed(0)),
}


def evict(
    model: Any, tokenizer: Any, items: list[prompts.Item], name: str, question: str, ratio: float
) -> prompts.Cell:
    """Answer from a cache that holds what a pruned prompt would: head, ratio x context, question."""
    head, out = [BOS, *tokenizer(prompts.HEAD)["input_ids"]], []
    for item in items:
        context = tokenizer(item.context)["input_ids"]
        asked = tokenizer(f"\nQuestion: {item.question}\nAnswer:")["input_ids"]
        gold = tokenizer(f" {item.answer}\n")["input_ids"]
        stays = max(1, int(ratio * len(context) + 1e-9))
        held = len(head) + stays + (0 if name == "snapkv" and question == "after" else len(asked))
        fact = Fact(*(torch.tensor([ids]) for ids in (head + context, asked, gold)))
        found = recall(model, lambda _, held=held: KVCache(model, POLICIES[name](held)), [fact], question)
        out.append((bool(found.exact[0]), found.nll[0] / len(gold), stays))
    release(model)  # plain attention again
    return prompts.Cell(*map(np.array, zip(*out, strict=True)))


def cells() -> list[tuple[str, str, float]]:
    """(kind, method, ratio) of all cells; one ratio after the other, the middle first."""
    found = [(kind, "full", 1.0) for kind in FILLERS]
    others = [(kind, ratio) for ratio in prompts.RATIOS if ratio != 0.5 for kind in ("dense", "padded")]
    for kind, ratio in [*((kind, 0.5) for kind in FILLERS), *others]:
        found += [(kind, name, ratio) for name in list(pruners())[1:]]
        if kind != "reader":
            found += [(kind, f"{name}_{q}", ratio) for name in POLICIES for q in ("inside", "after")]
    return found


def measure(kind: str, name: str, ratio: float, n: int) -> dict[str, Any]:
    items = prompts.qa_items(n, fillers=FILLERS[kind])
    model, tokenizer = load_once("gpt2-mini" if kind == "reader" else "llama-mini")
    if name.endswith(("_inside", "_after")):
        cell = evict(model, tokenizer, items, *name.rsplit("_", 1), ratio)
    else:
        cell = prompts.evaluate(model, tokenizer, items, pruners()[name], ratio)
    return {"exact": cell.exact.tolist(), "nll": cell.nll.round(5).tolist(), "kept": cell.kept.tolist()}


def join(sources: dict[str, str]) -> None:
    rows, wanted = {}, [f"{kind}: {name}@{ratio}" for kind, name, ratio in cells()]
    for (kind, name, ratio), key in zip(cells(), wanted, strict=True):
        row = json.loads(p.read_text()) if (p := FOLDER / f"{kind}-{name}-{ratio}.json").is_file() else {}
        rows |= {key: row} if row.pop("sources", None) == sources else {}
    as_cell = lambda row: prompts.Cell(*(np.array(row[k]) for k in ("exact", "nll", "kept")))
    interval = lambda e: [round(x, 5) for x in (e.value, e.lo, e.hi)]
    for key, row in rows.items():
        both = [bootstrap(np.array(row[k], float), rng=np.random.default_rng(0)) for k in ("exact", "nll")]
        row["mean_exact"], row["mean_nll"] = map(interval, both)
        against = f"{key.split(':')[0]}: random_words@{key.rsplit('@', 1)[1]}"
        if against in rows and against != key:  # both positive where the method is better
            both = prompts.gain(as_cell(row), as_cell(rows[against]), np.random.default_rng(0))
            row["gain_over_random_words"] = dict(zip(("exact", "nll"), map(interval, both), strict=True))
    store(
        RESULT, command="python data/kvcache_prompt_grid.py", root=ROOT, sources=SOURCES, cells=rows,
        summary=f"prompt pruning: {len(rows)} of {len(wanted)} cells, {ITEMS} items each", items=ITEMS,
        models={n: revision(n) for n in ("llama-mini", "gpt2-mini")}, missing=[*{*wanted} - {*rows}],
    )  # fmt: skip


def main() -> None:
    quick, sources = sys.argv[1:] == ["--quick"], {source: sha256(ROOT / source) for source in SOURCES}
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for kind, name, ratio in cells():
        path = FOLDER / f"{kind}-{name}-{ratio}.json"
        if not quick and path.is_file() and json.loads(path.read_text())["sources"] == sources:
            continue
        row = measure(kind, name, ratio, 2 if quick else ITEMS)
        print(path.stem, np.mean(row["exact"]), np.mean(row["nll"]), flush=True)
        if not quick:
            atomic_write(path, json.dumps(row | {"sources": sources}).encode())
            join(sources)


if __name__ == "__main__":
    main()
