"""Prompt pruning measured: methods x ratios x two kinds of context, and eviction from the cache beside them.

The command measures the cells that build/kvcache_prompt lacks, or has from other sources, and joins them to
data/results/kvcache/prompt.json, keys `kind: method@ratio`; `--quick` shows that it runs.
- `dense` (every sentence states facts) and `padded` (a sentence without a fact behind each), read by the
  scorer llama-mini; `reader`: the dense items pruned the same way and read by gpt2-mini.
- Prompt methods leave `ratio` of the context's tokens; cache methods read all and hold as many entries as a
  pruned prompt would: `inside`, the question is read with the context; `after`, later.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
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
from refimpl.kvcache.prompt.selective import SCOPES, SelectiveContext
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
ITEMS, SEGMENT, FILLERS = 32, 64, {"dense": 0.0, "padded": 1.0, "reader": 0.0}
load_once = cache(load)
MAIN = ("truncate", "random_words", "selective_context", "llmlingua", "llmlingua2")  # at every ratio


def remembered(score: Callable) -> Callable:
    known = cache(lambda ids: score(torch.tensor(ids)))
    return lambda ids: known(tuple(ids.tolist()))


@cache
def scorers() -> dict[str, Any]:
    scorer, tokenizer = load_once("llama-mini")
    second = LLMLingua2(load_classifier(), tokenizer)
    sentence, document = (SelectiveContext(scorer, tokenizer, scope=scope) for scope in SCOPES)
    sentence.unit_scores, document.unit_scores = map(remembered, (sentence.unit_scores, document.unit_scores))
    second.keep_probability = remembered(second.keep_probability)
    lingua = LLMLingua(scorer, iterative_size=SEGMENT)
    return dict(selective_context=sentence, selective_document=document, llmlingua=lingua, llmlingua2=second)


def pruners() -> dict[str, Callable | None]:
    tokenizer, rng = load_once("llama-mini")[1], lambda: torch.Generator().manual_seed(0)
    random = {"random_words": prompts.random_words(tokenizer, rng())}
    random["random_tokens"] = prompts.random_tokens(rng())
    blind = {name: lambda ids, budget, question, m=m: m.prune(ids, budget) for name, m in scorers().items()}
    blind["llmlingua_question"] = scorers()["llmlingua"].prune
    return {"full": None, "truncate": prompts.truncate} | random | blind


POLICIES: dict[str, Callable[[int], KVPolicy]] = {  # n entries -> a policy that holds so many
    "snapkv": lambda n: SnapKV(n, window=min(32, n // 2)),
    "h2o": lambda n: H2O(n // 2, n - n // 2),
    "random_eviction": lambda n: Random(n, torch.Generator().manual_seed(0)),
}


def evict(
    model: Any, tokenizer: Any, items: list[prompts.Item], name: str, question: str, ratio: float
) -> prompts.Cell:
    head, out = [BOS, *tokenizer(prompts.HEAD)["input_ids"]], []
    for item in items:
        context = tokenizer(item.context)["input_ids"]
        asked, gold = tokenizer([f"\nQuestion: {item.question}\nAnswer:", f" {item.answer}\n"])["input_ids"]
        stays = max(1, int(ratio * len(context) + 1e-9))
        held = len(head) + stays + (0 if name == "snapkv" and question == "after" else len(asked))
        fact = Fact(*(torch.tensor([ids]) for ids in (head + context, asked, gold)))
        found = recall(model, lambda _, held=held: KVCache(model, POLICIES[name](held)), [fact], question)
        out.append((bool(found.exact[0]), found.nll[0] / len(gold), stays))
    release(model)
    return prompts.Cell(*map(np.array, zip(*out, strict=True)))


def cells() -> list[tuple[str, str, float]]:
    found = [(kind, "full", 1.0) for kind in FILLERS]
    for ratio in (0.5, 0.2, 0.35, 0.8, 0.65):
        for kind in FILLERS if ratio == 0.5 else ("dense", "padded"):
            found += [(kind, name, ratio) for name in (list(pruners())[1:] if ratio == 0.5 else MAIN)]
            if kind != "reader" and ratio in (0.5, 0.2):
                found += [(kind, f"{name}_{q}", ratio) for name in POLICIES for q in ("inside", "after")]
    return found


def measure(kind: str, name: str, ratio: float, n: int) -> dict[str, Any]:
    model, tokenizer = load_once("gpt2-mini" if kind == "reader" else "llama-mini")
    items = prompts.qa_items(n, fillers=FILLERS[kind])
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
    for row in rows.values():
        for what in ("exact", "nll"):
            e = bootstrap(np.array(row[what], float), rng=np.random.default_rng(0))
            row[f"mean_{what}"] = [round(x, 5) for x in (e.value, e.lo, e.hi)]
    store(
        RESULT, command="python data/kvcache_prompt_grid.py", root=ROOT, sources=SOURCES, cells=rows,
        summary=f"prompt pruning: {len(rows)} of {len(wanted)} cells, {ITEMS} items each", items=ITEMS,
        models={n: revision(n) for n in ("llama-mini", "gpt2-mini")}, missing=[*{*wanted} - {*rows}],
    )  # fmt: skip


def main() -> None:
    quick, sources = sys.argv[1:] == ["--quick"], {source: sha256(ROOT / source) for source in SOURCES}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for kind, name, ratio in cells():
        path = FOLDER / f"{kind}-{name}-{ratio}.json"
        if path.is_file() and json.loads(path.read_text())["sources"] == sources:
            continue
        row = measure(kind, name, ratio, 2 if quick else ITEMS)
        print(path.stem, np.mean(row["exact"]), np.mean(row["nll"]), flush=True)
        if not quick:
            atomic_write(path, json.dumps(row | {"sources": sources}).encode())
            join(sources)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
