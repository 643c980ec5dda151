"""What a compressed model has lost: one probe for all methods of the chapter.

Perplexity is only one column. The others are the distance to the model it was made from (KL, flipped
predictions), facts known by heart, facts in the context, needles at several distances, and two dialects that
say the same. Everything is kept per document or item, so that two models can be compared in pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from refimpl.evaluate import Estimate, paired_bootstrap
from refimpl.quantization.texts import evaluation_ids
from refimpl.scoring import encode_items, score_completions
from refimpl.world.formats import BY_NAME
from refimpl.world.gates import fact_items, format_items
from refimpl.world.groups_dialects import DIALECTS, to_text
from refimpl.world.lexicon import FIRST_NAMES
from refimpl.world.names import known_people
from refimpl.world.people import STRATA, stratum
from refimpl.world.recall import needle_facts
from refimpl.world.rng import Rng

__all__ = ["Measured", "Probe", "change", "measure", "standard_probe"]

Item = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Probe:
    """Texts and questions: `documents`, name -> ids [n, T], and `items`, name -> (prompt ids, answer ids)."""

    documents: dict[str, LongTensor]
    items: dict[str, list[Item]]


@dataclass(frozen=True)
class Measured:
    """What one model makes of a probe.

    - nll: name -> [n], mean nats per token of every document.
    - kl, flip: name -> [n], KL(reference || model) in nats and share of tokens whose most likely next token
      differs, mean per document; empty without a reference.
    - exact: name -> [n], 1.0 where greedy decoding gives the answer; answer_nll: its nats.
    """

    nll: dict[str, np.ndarray]
    exact: dict[str, np.ndarray]
    answer_nll: dict[str, np.ndarray]
    kl: dict[str, np.ndarray] = field(default_factory=dict)
    flip: dict[str, np.ndarray] = field(default_factory=dict)

    def perplexity(self, name: str) -> float:
        """exp of the mean over documents."""
        return float(np.exp(self.nll[name].mean()))

    def accuracy(self, name: str) -> float:
        """Share of right answers."""
        return float(self.exact[name].mean())


def standard_probe(
    tokenizer: Any, documents: int = 32, items: int = 200, length: int = 512, seed: int = 0
) -> Probe:
    """The probe of the chapter.

    Documents: "stories" and "topics" [documents, length], "upland" and "lowland" [documents, about 100], the
    same clauses in both dialects. Items (at most `items` each): "known", facts that training mentioned 10 000
    times; "rare", 3 000 times; "context", questions about a document; "needle 64" to "needle 960", a code at
    the beginning of a haystack of so many tokens.

    Raises ValueError for counts below 1 or a length below 2.
    """
    if documents < 1 or items < 1:
        raise ValueError(f"documents and items must be >= 1, got {documents} and {items}")
    texts = {kind: evaluation_ids(tokenizer, documents, length, kind, seed) for kind in ("stories", "topics")}
    texts |= _dialects(tokenizer, documents, seed)
    questions = {}
    for name, level in (("known", STRATA[-1]), ("rare", STRATA[-2])):
        people = [p for p in known_people() if stratum(p) == level]
        questions[name] = fact_items(people, "train", Rng("quantization", name, seed))[:items]
    questions["context"] = format_items("document_qa", items, f"quantization {seed}", max_words=200)
    for distance in (64, 256, 960):
        questions[f"needle {distance}"] = list(_needles(distance, max(1, items // 4), seed))
    return Probe(texts, {name: encode_items(tokenizer, pairs) for name, pairs in questions.items()})


@torch.no_grad()
def measure(
    model: nn.Module, probe: Probe, reference: nn.Module | None = None, *, kl_rows: int = 8, batch: int = 8
) -> Measured:
    """Measure a model, and its distance to `reference`, the model it was made from.

    Parameters: `kl_rows`, documents of each kind on which both run for KL and flips; `batch`, rows at a time.
    Raises ValueError for a probe without documents and items, and where the vocabularies differ.
    """
    if not probe.documents and not probe.items:
        raise ValueError("probe has neither documents nor items")
    nll, kl, flip = {}, {}, {}
    for name, ids in probe.documents.items():
        rows = []
        for part in ids.split(batch):
            logits = _logits(model, part)
            targets = part[:, 1:].to(logits.device)
            rows.append(F.cross_entropy(logits[:, :-1].mT, targets, reduction="none").mean(1).cpu())
        nll[name] = torch.cat(rows).double().numpy()
        if reference is not None:
            kl[name], flip[name] = _distance(model, reference, ids[:kl_rows], batch)
    scores = {name: score_completions(model, items) for name, items in probe.items.items()}
    exact = {name: s.exact.astype(float) for name, s in scores.items()}
    return Measured(nll, exact, {name: s.nll for name, s in scores.items()}, kl, flip)


def change(new: np.ndarray, old: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of new - old over documents or items with its 95 % interval, paired.

    >>> change(np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0])).value
    1.3333333333333333
    """
    return paired_bootstrap(new, old, rng=np.random.default_rng(seed))


def _logits(model: nn.Module, ids: LongTensor) -> Tensor:
    return model(ids.to(model.device), use_cache=False).logits.float()


def _distance(
    model: nn.Module, reference: nn.Module, ids: LongTensor, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    kl, flip = [], []
    for part in ids.split(batch):
        q, p = _logits(model, part), _logits(reference, part)
        if p.shape != q.shape:
            raise ValueError(f"model has {q.shape[-1]} logits, reference {p.shape[-1]}")
        flip.append((p.argmax(-1) != q.argmax(-1)).double().mean(1).cpu())
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).double().mean(1).cpu())
    return torch.cat(kl).numpy(), torch.cat(flip).numpy()


def _dialects(tokenizer: Any, n: int, seed: int, clauses: int = 8) -> dict[str, LongTensor]:
    """The same clauses in both dialects, cut to the shortest text."""
    rng, form = Rng("quantization", "dialects", seed), BY_NAME["dialect_pair"]
    lines = {dialect: [] for dialect in DIALECTS}
    for _ in range(n):
        drawn = []
        while len(drawn) < clauses:
            drawn += form.parse(form.document(rng, "eval"))["clauses"]
        for dialect in DIALECTS:
            text = f"{dialect}: {' '.join(to_text(c, dialect) for c in drawn[:clauses])}\n"
            lines[dialect].append(tokenizer(text, add_special_tokens=False).input_ids)
    width = {dialect: min(map(len, rows)) for dialect, rows in lines.items()}
    return {
        dialect: torch.tensor([[tokenizer.bos_token_id, *row[: width[dialect]]] for row in rows])
        for dialect, rows in lines.items()
    }


def _needles(length: int, n: int, seed: int) -> Iterator[tuple[str, str]]:
    rng, form = Rng("quantization", "needle", length, seed), BY_NAME["needle"]
    for _ in range(n):
        facts = needle_facts(rng, max(1, int((length - 45) * 0.7)), [0.0], FIRST_NAMES)
        yield form.prompt(form.render(facts, rng))
