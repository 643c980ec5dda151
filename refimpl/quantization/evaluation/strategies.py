"""The evaluation of quantization strategies: methods x three dimensions, and what perplexity says of them.

Implements the protocol of arXiv 2402.16775 (Qwen-Chat of 7, 14 and 72 billion weights; ref 36): one table of
methods and bits in three dimensions, knowledge & capacity, alignment, efficiency; whether perplexity stands
for the rest; whether a larger model in fewer bits beats a smaller one in more. A base model has no chat
alignment: here that dimension is whether answers follow the context that is given (the paper's FollowBench
asks for obedience to the prompt), and, if the probe has them, questions about two groups (its BBQ).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from refimpl.evaluate import Estimate
from refimpl.ledger import of_model
from refimpl.quantization.harness import Measured, Probe, change, measure
from refimpl.quantization.linear import CompressedLinear

__all__ = [
    "DIMENSIONS", "Duel", "Strategy", "StrategyTable", "compare_at_equal_bytes", "compare_strategies",
    "from_grid", "measure_strategy", "rank_correlation", "spearman",
]  # fmt: skip

DIMENSIONS = {"knowledge & capacity": ("known", "rare"), "alignment": ("context",)}


@dataclass(frozen=True)
class Strategy:
    """One row: `name` of the method, `model` it was applied to, `bits` per weight of the compressed layers,
    `nbytes` of the whole model (floats counted in 16 bits, the papers' baseline), what was `measured`, and
    tokens per second if they were timed (the third dimension, with the bytes)."""

    name: str
    model: str
    bits: float
    nbytes: int
    measured: Measured
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class StrategyTable:
    """`rows`; `dimensions`, name -> item sets; `proxy`, the rank correlation of falling perplexity with
    accuracy over the rows, 1 where the lower perplexity always has the higher accuracy."""

    rows: tuple[Strategy, ...]
    dimensions: Mapping[str, tuple[str, ...]]
    text: str
    proxy: Estimate

    def __str__(self) -> str:
        width = max(len(f"{row.model} {row.name}") for row in self.rows)
        names = [f"{name:>20}" for name in self.dimensions]
        lines = [
            f"{'':{width}}  {'bits':>6} {'bytes':>11} {'tokens/s':>9} {'perplexity':>10} " + " ".join(names)
        ]
        for row in self.rows:
            speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}"
            shown = " ".join(f"{accuracy(row.measured, sets):20.3f}" for sets in self.dimensions.values())
            lines.append(
                f"{row.model + ' ' + row.name:{width}}  {row.bits:6.3f} {row.nbytes:11,} {speed:>9} "
                f"{row.measured.perplexity(self.text):10.3f} {shown}"
            )
        return "\n".join([*lines, f"rank correlation of falling perplexity and accuracy: {self.proxy}"])


@dataclass(frozen=True)
class Duel:
    """A smaller model against a larger one that takes no more bytes: `gain`, accuracy of the larger minus
    accuracy of the smaller, paired by item."""

    smaller: Strategy
    larger: Strategy
    gain: Estimate

    def __str__(self) -> str:
        a, b = self.larger, self.smaller
        return (
            f"{a.model} {a.name} ({a.nbytes:,} bytes) - {b.model} {b.name} ({b.nbytes:,} bytes): {self.gain}"
        )


def measure_strategy(
    name: str, model_name: str, model: nn.Module, probe: Probe, *, tokens_per_second: float | None = None
) -> Strategy:
    """Measure a model, compressed or not, as one row of the table; parameters as in `Strategy`.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> row = measure_strategy("none", "tiny", tiny("llama"), Probe({"stories": random_ids(2, 8)}, {}))
    >>> row.bits
    16.0
    """
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    numel = [m.in_features * m.out_features for m in layers]
    bits = float(np.average([m.bits_per_weight for m in layers], weights=numel)) if layers else 16.0
    nbytes = of_model(model, stored_as=torch.bfloat16).total()
    return Strategy(name, model_name, bits, nbytes, measure(model, probe), tokens_per_second)


def from_grid(row: Mapping[str, Any]) -> Measured:
    """What the stored grid holds of one method on one model (a `summarise` row), the mean of its seeds.

    The grid keeps items of losses and answers only: KL, flips and the answers' loss stay empty.

    >>> row = {"seeds": 2, "nll": {"stories": {"items": [1, 3]}}, "exact": {"known": {"items": "021"}}}
    >>> from_grid(row).nll["stories"].tolist(), from_grid(row).exact["known"].tolist()
    ([1.0, 3.0], [0.0, 1.0, 0.5])
    """
    nll = {name: np.array(cell["items"], float) for name, cell in row["nll"].items()}
    # A digit for each item: in how many seeds the answer was right.
    exact = {name: np.array(list(cell["items"]), float) / row["seeds"] for name, cell in row["exact"].items()}
    return Measured(nll, exact, {})


def accuracy(measured: Measured, sets: Sequence[str]) -> float:
    """Share of right answers over all items of the sets."""
    return float(_items(measured, sets).mean())


def compare_strategies(
    rows: Sequence[Strategy],
    dimensions: Mapping[str, tuple[str, ...]] = DIMENSIONS,
    *,
    text: str = "stories",
    rng: np.random.Generator,
    n_boot: int = 1000,
) -> StrategyTable:
    """The table of methods, and how far perplexity on `text` ranks them as accuracy does.

    Parameters: `rows`, at least three, measured with one probe; `dimensions`, name -> item sets of the probe;
    accuracy is over all of them. Raises ValueError for fewer rows, a set or text that a row lacks, and rows
    that were measured on other items.
    """
    if len(rows) < 3:
        raise ValueError(f"rows: a rank correlation needs at least 3, got {len(rows)}")
    sets = tuple(name for of_one in dimensions.values() for name in of_one)
    if not sets:
        raise ValueError("dimensions name no set of items")
    for row in rows:
        if missing := [name for name in sets if name not in row.measured.exact]:
            raise ValueError(f"rows: {row.model} {row.name} was not measured on {missing[0]!r}")
        if text not in row.measured.nll:
            raise ValueError(f"text: {row.model} {row.name} was not measured on {text!r}")
    nll = [row.measured.nll[text] for row in rows]
    exact = [_items(row.measured, sets) for row in rows]
    return StrategyTable(
        tuple(rows), dict(dimensions), text, rank_correlation(nll, exact, rng=rng, n_boot=n_boot)
    )


def rank_correlation(
    nll: Sequence[np.ndarray], exact: Sequence[np.ndarray], *, rng: np.random.Generator, n_boot: int = 1000
) -> Estimate:
    """Spearman's rho of falling perplexity and accuracy over variants, with a 95 % interval.

    The interval resamples documents and items, the same ones for all variants; the variants stay.

    Parameters: `nll` [variants, documents], mean nats; `exact` [variants, items]. Returns an Estimate whose n
    counts variants. Raises ValueError for other shapes, fewer than three variants, and where all are equal.

    >>> nll = [[1.0, 1.2], [1.5, 1.6], [2.0, 2.1]]
    >>> rank_correlation(nll, [[1, 1], [1, 0], [0, 0]], rng=np.random.default_rng(0)).value
    1.0
    """
    x, y = np.asarray(nll, float), np.asarray(exact, float)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 3 or not (x.size and y.size):
        raise ValueError(f"nll and exact must be [variants >= 3, n], got {list(x.shape)} and {list(y.shape)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("nll and exact must be finite")
    value = spearman(-x.mean(1), y.mean(1))
    if np.isnan(value):
        raise ValueError("all variants have the same perplexity or the same accuracy: there are no ranks")
    draws = []
    for _ in range(n_boot):
        documents, items = (rng.integers(0, a.shape[1], a.shape[1]) for a in (x, y))
        draws.append(spearman(-x[:, documents].mean(1), y[:, items].mean(1)))
    lo, hi = np.nanpercentile(draws, [2.5, 97.5])
    return Estimate(value, float(lo), float(hi), len(x))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of the ranks, ties at their mean rank; NaN where one side is constant.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 10.0, 40.0])).__round__(4)
    0.866
    """
    ra, rb = (_ranks(np.asarray(x, float)) for x in (a, b))
    ra, rb = ra - ra.mean(), rb - rb.mean()
    norm = np.sqrt((ra @ ra) * (rb @ rb))
    return float(ra @ rb / norm) if norm > 0 else float("nan")


def compare_at_equal_bytes(
    larger: Sequence[Strategy],
    smaller: Sequence[Strategy],
    sets: Sequence[str] = ("known", "rare", "context"),
) -> tuple[Duel, ...]:
    """For each variant of the smaller model: the variant of the larger one that fills its bytes best.

    The larger one takes the most bytes it can without exceeding those of its opponent, so that it never wins
    by size. Variants of the smaller model that are below all of the larger one have no opponent and are left
    out. Raises ValueError if none has one, or for sets that were not measured.
    """
    duels = []
    for row in smaller:
        fitting = [other for other in larger if other.nbytes <= row.nbytes]
        if fitting:
            best = max(fitting, key=lambda other: other.nbytes)
            gain = change(_items(best.measured, sets), _items(row.measured, sets))
            duels.append(Duel(row, best, gain))
    if not duels:
        raise ValueError("larger: every variant takes more bytes than every variant of the smaller model")
    return tuple(duels)


def _items(measured: Measured, sets: Sequence[str]) -> np.ndarray:
    if missing := [name for name in sets if name not in measured.exact]:
        raise ValueError(f"sets: {missing[0]!r} was not measured; there are {', '.join(measured.exact)}")
    return np.concatenate([measured.exact[name] for name in sets])


def _ranks(x: np.ndarray) -> np.ndarray:
    return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])
