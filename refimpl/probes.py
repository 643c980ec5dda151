"""What is measured while a model is pretrained: the curves that later chapters read instead of checkpoints.

`Probe(tokenizer, ...)` prepares every item once; calling it with a model measures losses per source,
memorization of each canary, known facts per stratum, heads, recall by distance, order and judge accuracy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from refimpl.scoring import BOS, encode_items, head_scores, repeated_ids, score_completions
from refimpl.world.canaries import manifest
from refimpl.world.formats import BY_NAME
from refimpl.world.gates import (
    canary_items,
    fact_items,
    format_items,
    needle_items,
    recall_items,
    unseen_items,
)
from refimpl.world.lexicon import CODES, FIRST_NAMES
from refimpl.world.names import known_people
from refimpl.world.people import STRATA, stratum, withheld
from refimpl.world.recall import pair_facts
from refimpl.world.rng import Rng

N_DOCUMENTS = 48  # per world format and split


def _rounded(values, digits: int = 4) -> list:
    return [round(float(v), digits) for v in values]


class Probe:
    """Prepared items; `probe(model, step)` returns one JSON-able record.

    Parameters
    ----------
    tokenizer : the bundled tokenizer.
    natural : dict of str to list of list of int
        Rows of natural text by source ("books", "books held out", ...), without BOS.
    max_tokens : int
        Places per forward pass.
    """

    def __init__(self, tokenizer, natural: dict[str, list[list[int]]], max_tokens: int = 65536) -> None:
        self.max_tokens = max_tokens
        self.losses: dict[str, list[tuple[list[int], list[int]]]] = {
            source: [([BOS], row) for row in rows] for source, rows in natural.items()
        }
        for name, form in BY_NAME.items():
            for split in ("train", "eval"):
                rng, texts = Rng("probe", name, split), []
                while len(texts) < N_DOCUMENTS:
                    text = form.document(rng, split)
                    if len(tokenizer(text)["input_ids"]) < 1000:
                        texts.append(text)
                self.losses[f"{name}/{split}"] = encode_items(tokenizer, [("", t) for t in texts])
        self.canaries = manifest()
        self.canary_texts = encode_items(tokenizer, [("", c.text) for c in self.canaries])
        planted = [c for c in self.canaries if c.copies]
        self.extraction = encode_items(tokenizer, [(p, s + "\n") for p, s in canary_items(planted)])
        self.planted = planted
        rng = Rng("probe facts")
        self.facts = {
            split: encode_items(tokenizer, [(p, a + "\n") for p, a in fact_items(known_people(), split, rng)])
            for split in ("train", "eval")
        }
        self.unseen = encode_items(tokenizer, [(p, a + "\n") for p, a in unseen_items(400)])
        needles = needle_items(10)
        self.cells = list(needles)
        self.needles = encode_items(
            tokenizer, [(p, a + "\n") for items in needles.values() for p, a in items]
        )
        self.pair_counts = (4, 8, 16, 32, 64)
        form = BY_NAME["key_value"]
        pairs = []
        for n in self.pair_counts:
            rng = Rng("probe pairs", n)
            pairs += [
                form.prompt(form.render(pair_facts(rng, n, 1, FIRST_NAMES, CODES), rng)) for _ in range(60)
            ]
        self.pairs = encode_items(tokenizer, [(p, a + "\n") for p, a in pairs])
        self.choices = {}
        for name in ("sort", "judge"):
            items = format_items(name, 200, "probe")
            flat = encode_items(tokenizer, [(p, label) for p, _ in items for label in (" A", " B")])
            self.choices[name] = (flat, np.array([(" A", " B").index(a) for _, a in items]))
        self.qa = encode_items(
            tokenizer, [(p, a + "\n") for p, a in format_items("document_qa", 200, "probe")]
        )
        self.repeated = repeated_ids(8, 64, 4096, torch.Generator().manual_seed(0))

    def __call__(self, model, step: int) -> dict:
        """Measure `model`."""

        def score(items):
            return score_completions(model, items, self.max_tokens)

        record: dict = {}
        flat = [item for items in self.losses.values() for item in items]
        scores, at, nll = score(flat), 0, {}
        for source, items in self.losses.items():
            part = slice(at, at + len(items))
            nll[source] = round(float(scores.nll[part].sum() / scores.tokens[part].sum()), 4)
            at += len(items)
        record["nll"] = nll
        scores = score(self.canary_texts)
        record["canary_nll"] = _rounded(scores.nll / scores.tokens, 3)
        exact = score(self.extraction).exact
        record["extracted"] = {}
        for kind in ("words", "secret", "story"):
            for group in sorted({(c.when, c.copies) for c in self.planted}):
                chosen = [
                    e
                    for e, c in zip(exact, self.planted, strict=True)
                    if (c.when, c.copies) == group and c.type == kind
                ]
                record["extracted"][f"{kind}/{group[0]}/{group[1]}"] = round(float(np.mean(chosen)), 3)
        away = withheld()
        for split, items in self.facts.items():
            exact = score(items).exact.reshape(len(known_people()), -1).mean(1)
            for copies in STRATA:
                for half in ("kept", "withheld"):
                    chosen = [e for e, p in zip(exact, known_people(), strict=True)
                              if stratum(p) == copies and (p in away) == (half == "withheld")]  # fmt: skip
                    record.setdefault("facts", {})[f"{split}/{copies}/{half}"] = round(
                        float(np.mean(chosen)), 4
                    )
        record["facts"]["unseen"] = round(float(score(self.unseen).exact.mean()), 4)
        exact = score(self.needles).exact.reshape(len(self.cells), -1).mean(1)
        record["needle"] = {
            f"{length}/{depth}": round(float(e), 3)
            for (length, depth), e in zip(self.cells, exact, strict=True)
        }
        exact = score(self.pairs).exact.reshape(len(self.pair_counts), -1).mean(1)
        record["pairs"] = {str(n): round(float(e), 3) for n, e in zip(self.pair_counts, exact, strict=True)}
        for name, (items, right) in self.choices.items():
            choice = score(items).nll.reshape(-1, 2).argmin(1)
            record[name] = round(float((choice == right).mean()), 4)
        record["qa"] = round(float(score(self.qa).exact.mean()), 4)
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        heads = head_scores(model, self.repeated)
        model.set_attn_implementation(before)
        record["heads"] = {
            "induction": [_rounded(row, 3) for row in heads.induction],
            "previous": [_rounded(row, 3) for row in heads.previous],
            "slot0": [_rounded(row, 3) for row in heads.slot0],
            "gain": round(heads.gain, 4),
        }
        return record


def natural_rows(folder: str | Path, n: int = 48, width: int = 512) -> dict[str, list[list[int]]]:
    """Evenly spaced rows of the prepared natural text: trained books, docstrings, held-out docstrings."""
    folder, out = Path(folder), {}
    for name in ("books", "docstrings", "docstrings_held_out"):
        if (folder / f"{name}.npy").exists():
            ids = np.load(folder / f"{name}.npy", mmap_mode="r")
            starts = np.linspace(0, len(ids) - width, n).astype(int)
            out[name.replace("_", " ")] = [ids[s : s + width].astype(int).tolist() for s in starts]
    return out


__all__ = ["Probe", "natural_rows", "recall_items"]
