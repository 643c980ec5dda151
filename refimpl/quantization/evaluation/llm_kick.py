"""LLM-KICK: what a compressed model still knows, where perplexity says that nothing happened.

Implements the central comparison of arXiv 2310.01382 (ref 35): questions answered by heart (closed book) and
the same questions with the evidence in the context (open book), under pruning and under quantization. The
paper compares methods at equal sparsity or bits and reads perplexity beside. Here families are compared *at
the same increase of perplexity*, by interpolation between the two variants around it, item by item. Factoid
questions of our world stand in for FreebaseQA and TriviaQA; MMLU, summaries and a judge have no counterpart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.evaluate import Estimate
from refimpl.quantization.harness import Item, Measured, change
from refimpl.scoring import encode_items
from refimpl.world.names import known_people
from refimpl.world.people import ATTRIBUTES, STRATA, stratum
from refimpl.world.relations import ask, known_facts, state
from refimpl.world.rng import Rng

__all__ = ["Kick", "Match", "book_items", "compare_knowledge", "match"]


@dataclass(frozen=True)
class Match:
    """The values of a family at one increase of loss.

    - between: numbers of the two variants around it, -1 for the uncompressed model; weight, that of the
      second; apart, their distance in nats: the closer they are, the less is left to the interpolation.
    - values: [items], interpolated.
    """

    between: tuple[int, int]
    weight: float
    apart: float
    values: np.ndarray


@dataclass(frozen=True)
class Kick:
    """Accuracy lost at an increase of `increase` nats per token (log of the ratio of perplexities).

    - closed, open: family -> drop of accuracy (positive: lost), paired with the uncompressed model.
    - memory: family -> closed drop - open drop, paired by question.
    - between: family -> names of the variants around the increase, the weight of the second, and how many
      nats they are apart.
    - contrasts: (family, family) -> closed drop of the first - that of the second.
    - items: family -> "closed", "open" -> drop of every question.
    """

    increase: float
    closed: dict[str, Estimate]
    open: dict[str, Estimate]
    memory: dict[str, Estimate]
    between: dict[str, tuple[str, str, float, float]]
    contrasts: dict[tuple[str, str], Estimate]
    items: dict[str, dict[str, np.ndarray]]

    def __str__(self) -> str:
        lines = [f"at {self.increase:.3f} nats per token more (perplexity x {np.exp(self.increase):.3f}):"]
        for name, (low, high, weight, apart) in self.between.items():
            lines.append(
                f"  {name}: {1 - weight:.2f} of {low} and {weight:.2f} of {high}, {apart:.3f} nats apart"
            )
            lines.append(f"    closed book lost  {self.closed[name]}")
            lines.append(f"    open book lost    {self.open[name]}")
            lines.append(f"    closed - open     {self.memory[name]}")
        lines += [f"  closed book, {a} - {b}: {value}" for (a, b), value in self.contrasts.items()]
        return "\n".join(lines)


def book_items(tokenizer: Any, n: int = 200, seed: int = 0, level: int = STRATA[-1]) -> dict[str, list[Item]]:
    """n questions about known people, each twice: "closed", alone, and "open", behind three numbered
    passages one of which holds the answer (the others are about other people). Items of one index belong
    together.

    Parameters: `level`, how often training mentioned the people's facts, one of `STRATA`. Raises ValueError
    for n below 1, another level, or more questions than there are facts.
    """
    if level not in STRATA:
        raise ValueError(f"level must be one of {STRATA}, got {level!r}")
    facts, rng = known_facts(), Rng("quantization", "books", level, seed)
    pairs = [(p, r) for p in known_people() if stratum(p) == level for r in ATTRIBUTES if (p, r) in facts]
    if not 1 <= n <= len(pairs):
        raise ValueError(f"n must be from 1 to {len(pairs)}, got {n}")
    closed, opened = [], []
    for person, relation in rng.sample(pairs, n):
        question = f"Question: {ask(relation, person, rng, 'train')}\nAnswer:"
        answer = f" {facts[person, relation]}\n"
        others = [pair for pair in rng.sample(pairs, 4) if pair[0] != person][:2]
        told = [(person, relation), *others]
        rng.shuffle(told)
        lines = [f"[{i}] {state(r, p, facts[p, r], rng)}\n" for i, (p, r) in enumerate(told, 1)]
        closed.append((question, answer))
        opened.append((f"Context:\n{''.join(lines)}{question}", answer))
    return {"closed": encode_items(tokenizer, closed), "open": encode_items(tokenizer, opened)}


def match(
    nll: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    dense_nll: np.ndarray,
    dense_values: np.ndarray,
    increase: float,
) -> Match:
    """Values of a family of variants where its mean loss lies `increase` above the uncompressed model's.

    The variants are put in the order of their loss, the uncompressed model among them; between the two
    around the wanted loss every item's value is interpolated linearly in the loss (the log of perplexity).

    Parameters: `nll` [variants, documents], mean nats; `values` [variants, items]; `dense_nll` [documents];
    `dense_values` [items]; `increase`, nats > 0. Raises ValueError for shapes that disagree, values that are
    not finite, and an increase that no variant reaches: nothing is extrapolated.

    >>> found = match([[1.2, 1.2], [1.6, 1.6]], [[1, 1], [0, 1]], [1.0, 1.0], [1, 1], 0.4)
    >>> found.between, round(found.weight, 3), found.values
    ((0, 1), 0.5, array([0.5, 1. ]))
    """
    nll, values = np.asarray(nll, float), np.asarray(values, float)
    dense_nll, dense_values = np.asarray(dense_nll, float), np.asarray(dense_values, float)
    if nll.ndim != 2 or values.ndim != 2 or len(nll) != len(values) or not (nll.size and values.size):
        raise ValueError(f"nll and values must be [variants, n], got {list(nll.shape)}, {list(values.shape)}")
    if nll.shape[1:] != dense_nll.shape or values.shape[1:] != dense_values.shape:
        raise ValueError("nll and values must be of the documents and items of the uncompressed model")
    if not all(np.isfinite(a).all() for a in (nll, values, dense_nll, dense_values)):
        raise ValueError("nll and values must be finite")
    if not increase > 0:
        raise ValueError(f"increase must be > 0 nats, got {increase!r}")
    points = np.concatenate([[0.0], (nll - dense_nll).mean(1)])
    order = np.argsort(points, kind="stable")
    above = int(np.searchsorted(points[order], increase))
    if above == len(points):
        raise ValueError(
            f"increase must be at most {points.max():.4g} nats, the most of any variant, got {increase}"
        )
    low, high = int(order[above - 1]), int(order[above])
    apart = points[high] - points[low]
    weight = (increase - points[low]) / apart
    each = np.concatenate([dense_values[None], values])
    return Match(
        (low - 1, high - 1), float(weight), float(apart), (1 - weight) * each[low] + weight * each[high]
    )


def compare_knowledge(
    dense: Measured,
    families: Mapping[str, Mapping[str, Measured]],
    increase: float,
    *,
    text: str = "stories",
    closed: str = "closed",
    open: str = "open",
) -> Kick:
    """Compare what families of compressed models lose at one increase of loss.

    Parameters: `dense`, the uncompressed model measured; `families`, name ("pruning") -> variants, name ->
    measured on the same probe; `increase`, nats per token on `text`; `closed`, `open`, names of two sets of
    items of equal size, those of `book_items` or two of the stored grid ("known", "context").
    Intervals are over items; the interpolation weights come from all documents and stay.
    Raises ValueError without families, for sets of different size, and as `match`.
    """
    if not families or not all(families.values()):
        raise ValueError("families: at least one, and each of at least one variant, are needed")
    if dense.exact[closed].shape != dense.exact[open].shape:
        raise ValueError(f"closed and open must have as many items, got {closed!r} and {open!r}")
    lost: dict[str, dict[str, np.ndarray]] = {}
    between = {}
    for family, variants in families.items():
        nll = [m.nll[text] for m in variants.values()]
        lost[family] = {}
        for kind, name in (("closed", closed), ("open", open)):
            exact = [m.exact[name] for m in variants.values()]
            found = match(nll, exact, dense.nll[text], dense.exact[name], increase)
            lost[family][kind] = dense.exact[name] - found.values
        names = ["uncompressed", *variants]
        low, high = (names[i + 1] for i in found.between)
        between[family] = (low, high, found.weight, found.apart)
    drop = lambda kind: {f: change(items[kind], np.zeros_like(items[kind])) for f, items in lost.items()}
    names = list(lost)
    return Kick(
        increase, drop("closed"), drop("open"),
        {f: change(items["closed"], items["open"]) for f, items in lost.items()},
        between,
        {(a, b): change(lost[a]["closed"], lost[b]["closed"])
         for i, a in enumerate(names) for b in names[i + 1 :]},
        lost,
    )  # fmt: skip
