"""Compression in long contexts: is what it costs the same at every position, and what helps?

Implements the measurements of arXiv 2406.06773 (ref 91, a course report on LLaMA-2-7B-32K) and its remedy:
loss of the compressed minus loss of the uncompressed model at every position, with its slope; a needle found
at growing distance; and 2 % of the groups of weights, those of largest magnitude, kept at 8 bits while the
rest has 3 or 4. The report does not say which magnitude of a group: here it is its largest |w|, which sets
the step of its grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from refimpl.evaluate import Estimate
from refimpl.quantization.calibrate import Stats
from refimpl.quantization.grids import Grid, Quantized, dequantize
from refimpl.quantization.harness import Item, change
from refimpl.quantization.linear import CompressedLinear
from refimpl.quantization.packing import pack_codes, unpack_codes
from refimpl.scoring import encode_items, score_completions
from refimpl.world.formats import BY_NAME
from refimpl.world.lexicon import FIRST_NAMES
from refimpl.world.recall import needle_facts
from refimpl.world.rng import Rng

__all__ = [
    "LargestGroups", "LongContext", "MixedGridLinear", "PositionGap", "compare_contexts", "needle_items",
    "position_gap", "token_losses",
]  # fmt: skip


@dataclass(frozen=True)
class PositionGap:
    """Loss of the compressed - loss of the uncompressed model, in nats.

    - gaps: [documents, positions]; position p is the prediction behind p tokens, p = 1, 2, ...
    - slope: nats per 1000 positions, a least-squares line per document.
    - bins: (first, last) position -> mean gap there.
    """

    gaps: np.ndarray
    slope: Estimate
    bins: dict[tuple[int, int], Estimate]

    def __str__(self) -> str:
        lines = [f"gap in nats per token; slope {self.slope} nats per 1000 positions"]
        return "\n".join([*lines, *(f"  {a:5} to {b:5}: {gap}" for (a, b), gap in self.bins.items())])


@dataclass(frozen=True)
class LongContext:
    """`position`; and distance -> share of needles found by the compressed model (`found`), by the
    uncompressed one (`before`), and the paired change (`moved`)."""

    position: PositionGap
    found: dict[int, Estimate]
    before: dict[int, Estimate]
    moved: dict[int, Estimate]

    def __str__(self) -> str:
        lines = [str(self.position), "needles found: uncompressed, compressed, change"]
        for d in self.found:
            lines.append(
                f"  {d:5} tokens: {self.before[d].value:.3f}  {self.found[d].value:.3f}  {self.moved[d]}"
            )
        return "\n".join(lines)


@torch.no_grad()
def token_losses(model: nn.Module, ids: LongTensor, batch: int = 8) -> np.ndarray:
    """Nats of every token but the first, [n, T - 1], for ids [n, T]."""
    found = []
    for part in ids.split(batch):
        logits = model(part.to(model.device), use_cache=False).logits[:, :-1].float()
        targets = part[:, 1:].to(logits.device)
        found.append(F.cross_entropy(logits.mT, targets, reduction="none").cpu())
    return torch.cat(found).double().numpy()


def position_gap(new: np.ndarray, old: np.ndarray, n_bins: int = 5, seed: int = 0) -> PositionGap:
    """How much more a compressed model loses, by position, on the same documents.

    Parameters: `new`, `old`: nats [documents >= 2, positions >= 2] of the compressed and the uncompressed
    model; `n_bins` bins of growing width (equal in the log of position; those that would be empty are left
    out). Intervals are over documents. Raises ValueError for other shapes or values that are not finite.

    >>> old = np.zeros((3, 100))
    >>> round(position_gap(old + 0.01 * np.arange(1, 101), old).slope.value, 6)
    10.0
    """
    new, old = np.asarray(new, float), np.asarray(old, float)
    if new.shape != old.shape or new.ndim != 2 or min(new.shape) < 2:
        raise ValueError(
            f"new and old must be [documents >= 2, positions >= 2], got {new.shape}, {old.shape}"
        )
    if not (np.isfinite(new).all() and np.isfinite(old).all()):
        raise ValueError("new and old must be finite")
    if n_bins < 1:
        raise ValueError(f"n_bins must be >= 1, got {n_bins}")
    gaps = new - old
    T = gaps.shape[1]
    p = np.arange(1, T + 1) - (T + 1) / 2
    slopes = 1000 * gaps @ p / (p @ p)
    edges = np.unique(np.geomspace(1, T + 1, n_bins + 1).round().astype(int))
    over = lambda values: change(values, np.zeros_like(values), seed)
    bins = {
        (int(a), int(b) - 1): over(gaps[:, a - 1 : b - 1].mean(1))
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    }
    return PositionGap(gaps, over(slopes), bins)


def needle_items(
    tokenizer: Any, distances: Sequence[int] = (64, 128, 256, 512, 960), n: int = 50, seed: int = 0
) -> dict[int, list[Item]]:
    """Codes to be found at the beginning of a haystack of about so many tokens, n for each distance.

    Raises ValueError for a distance below 64 or n below 1.
    """
    if n < 1 or not distances or min(distances) < 64:
        raise ValueError(f"n must be >= 1 and distances >= 64, got {n} and {list(distances)}")
    form, found = BY_NAME["needle"], {}
    for distance in distances:
        rng, pairs = Rng("quantization", "long context", distance, seed), []
        for _ in range(n):
            facts = needle_facts(rng, max(1, int((distance - 45) * 0.7)), [0.0], FIRST_NAMES)
            pairs.append(form.prompt(form.render(facts, rng)))
        found[distance] = encode_items(tokenizer, pairs)
    return found


def compare_contexts(
    model: nn.Module, reference: nn.Module, ids: LongTensor, needles: dict[int, list[Item]], n_bins: int = 5
) -> LongContext:
    """Compare a compressed model with the one it was made from in long contexts.

    Parameters: `ids` [n, T], long documents within the model's context; `needles`, of `needle_items`.
    Raises as `position_gap`.
    """
    position = position_gap(token_losses(model, ids), token_losses(reference, ids), n_bins)
    exact = lambda m: {d: score_completions(m, items).exact.astype(float) for d, items in needles.items()}
    new, old = exact(model), exact(reference)
    zero = {d: np.zeros_like(v) for d, v in new.items()}
    return LongContext(
        position, {d: change(new[d], zero[d]) for d in new}, {d: change(old[d], zero[d]) for d in new},
        {d: change(new[d], old[d]) for d in new},
    )  # fmt: skip


class MixedGridLinear(CompressedLinear):
    """A weight whose groups have one of two widths: `chosen`, a bit per group; for the chosen groups and
    for the others packed codes, scales and zero points (`codes_high`, `codes_low`, ...)."""

    def dequantize(self) -> Tensor:
        s = self.settings
        count = self.out_features * self.in_features // s["group"]
        chosen = unpack_codes(self.chosen, 1, (count,)).bool()
        W = torch.empty(count, s["group"], device=chosen.device)
        for part, mask in (("high", chosen), ("low", ~chosen)):
            codes, scale, zero = (self._buffers.get(f"{what}_{part}") for what in ("codes", "scale", "zero"))
            if codes is not None:
                shape = (int(mask.sum()), s["group"])
                q = Quantized(
                    unpack_codes(codes, s[part], shape), scale, unpack_codes(zero, s[part], (shape[0], 1))
                )
                W[mask] = dequantize(q)
        return W.view(self.out_features, self.in_features)


@dataclass(frozen=True)
class LargestGroups:
    """Round to nearest, a few groups with more bits; a recipe of `compress_model`.

    Parameters
    ----------
    low, high : bits of the other groups and of the chosen ones (the report: 3 or 4, and 8).
    share : of a layer's groups that are chosen (0.02), rounded to a whole number.
    group : weights of a row that share a scale, a divisor of d_in.
    generator : None: the groups of largest |w| are chosen; else random ones, as many: the control at equal
        bytes.

    Raises ValueError for a share outside 0 .. 1, and as `Grid`.

    >>> W = torch.linspace(-1, 1, 64 * 32).view(64, 32)
    >>> layer = LargestGroups(3, share=0.5, group=16)("fc", W)
    >>> layer.bits_per_weight        # (3 + 8) / 2 for codes, 1 for scales, 5.5 / 16 for zeros, 1 / 16
    6.90625
    """

    low: int = 3
    high: int = 8
    share: float = 0.02
    group: int = 32
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for bits in (self.low, self.high):
            Grid(bits, group=self.group)
        if not isinstance(self.group, int) or not 0 <= self.share <= 1:
            raise ValueError(
                f"group must be an integer and 0 <= share <= 1, got {self.group!r}, {self.share!r}"
            )

    def chosen(self, W: Tensor) -> Tensor:
        """Which groups of W [d_out, d_in] get the high bits, bool [d_out d_in / group]."""
        size = W.reshape(-1, self.group).abs().amax(1)
        count = round(self.share * len(size))
        if self.generator is None:
            first = size.argsort(descending=True, stable=True)[:count]
        else:
            first = torch.randperm(len(size), generator=self.generator)[:count].to(W.device)
        return torch.zeros(len(size), dtype=torch.bool, device=W.device).index_fill_(0, first, True)

    def __call__(self, name: str, weight: Tensor, stats: Stats | None = None) -> MixedGridLinear:
        Grid(self.low, group=self.group).check(weight)
        chosen = self.chosen(weight)
        groups = weight.reshape(-1, self.group)
        tensors = {"chosen": pack_codes(chosen.to(torch.uint8), 1)}
        for part, bits, mask in (("high", self.high, chosen), ("low", self.low, ~chosen)):
            if bool(mask.any()):
                q = Grid(bits).quantize(groups[mask])
                tensors |= {
                    f"codes_{part}": pack_codes(q.codes, bits), f"scale_{part}": q.scale,
                    f"zero_{part}": pack_codes(q.zero, bits),
                }  # fmt: skip
        return MixedGridLinear(
            tuple(weight.shape), tensors, low=self.low, high=self.high, group=self.group
        )  # fmt: skip
