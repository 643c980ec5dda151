"""EDGE-LLM, layer-wise unified compression (LUC): each block its own sparsity and bits, from its sensitivity.

Implements arXiv 2406.15758, section on LUC, and the authors' code, in which a "layer" is a block:

    s_l = mean over the block's linear layers and several sparsities of the mean squared output error,
    s'_l = (s_l - min s) / (max s - min s),    sparsity_l = (1 - s'_l) / sum_k (1 - s'_k) * L * target,

and few bits where the same measure for rounding is low. Weights are pruned by SparseGPT; what is left is
rounded to nearest with one symmetric scale per row (s = max |W| / (2^(b-1) - 1), the convention of LLM-QAT,
on which the code builds). The survey also speaks of distillation: there is none. Tuning and voting are in
`refimpl.quantization.edge_llm_tuning`.

Slips of the code that are not copied: sparsities above 1 are not clipped (here they are, and the excess goes
to the others, so that the mean is the target); equal sensitivities divide by zero (here: all get the target);
sensitivities are read in the order in which the file system lists the files, not in that of the layers; the
few layers with few bits (2, 29, 30, 31 of 32) are constants, not chosen from anything measured. The code
also rounds activations to 8 or 4 bits; here only weights are compressed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.quantization.calibrate import Stats, calibrate
from refimpl.quantization.grids import Grid
from refimpl.quantization.linear import CompressedLinear, GridLinear, dense_weight
from refimpl.quantization.model import Report, compress_model
from refimpl.quantization.pruning.sparsegpt import SparseGPT
from refimpl.quantization.rtn import RTN
from refimpl.quantization.sparse import SparseLinear
from refimpl.quantization.symmetric import output_distortion

__all__ = [
    "Policy", "PruneRound", "Sensitivity", "bit_widths", "compress", "make_policy", "pruning_ratios",
    "sensitivities",
]  # fmt: skip

SPARSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class PruneRound:
    """A recipe of `compress_model`: SparseGPT, then the kept weights rounded to nearest, symmetric, per row.

    Parameters: `sparsity`, 0 <= s < 1; 0 stores no mask; `bits`, 2 to 8. Raises ValueError for others.

    >>> from refimpl.quantization.calibrate import stats_of
    >>> W, X = torch.tensor([[0.1, 0.8, -1.4, 0.2]]), torch.eye(4)
    >>> PruneRound(0.5, 4)("fc", W, stats_of(X)).weight
    tensor([[ 0.0000,  0.7998, -1.3997,  0.0000]])
    """

    sparsity: float
    bits: int

    def __post_init__(self) -> None:
        self._steps()  # raises for values that are not allowed

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> CompressedLinear:
        pruner, grid = self._steps()
        if self.sparsity == 0:
            return GridLinear.pack(grid.quantize(weight), self.bits)
        pruned = pruner.solve(weight, stats.H)
        return SparseLinear.pack_codes(grid.quantize(pruned.Q), pruned.keep, self.bits)

    def _steps(self) -> tuple[SparseGPT, Grid]:
        return SparseGPT(self.sparsity, torch.float32), Grid(self.bits, "restricted", "row")


@dataclass(frozen=True)
class Sensitivity:
    """Mean squared output error of each block's linear layers, [L] float64: `pruning`, mean over sparsities;
    `rounding`, at the low bit width."""

    pruning: Tensor
    rounding: Tensor


@dataclass(frozen=True)
class Policy:
    """A `sparsity` and `bits` for each of L blocks."""

    sparsity: tuple[float, ...]
    bits: tuple[int, ...]

    @classmethod
    def uniform(cls, n_layers: int, sparsity: float, bits: int) -> "Policy":
        """The same for all blocks."""
        return cls((sparsity,) * n_layers, (bits,) * n_layers)


def sensitivities(
    model: nn.Module,
    ids: LongTensor,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    bits: int = 4,
    batch: int = 8,
) -> Sensitivity:
    """How much the outputs of each block's linear layers change, each compressed alone, inputs unchanged.

    The error of a layer is mean over tokens and outputs of (W x - W^ x)^2 = tr(dW H dW') / (2 d_out).

    Parameters: `model`, of a family of `refimpl.backbone`, uncompressed; `ids` [B, T], calibration tokens
    without padding; `sparsities` to average over (default: the code's); `bits`, the low bit width; `batch`,
    rows at a time. Raises TypeError or ValueError for others; the model is not changed.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> sensitivities(tiny("gpt2"), random_ids(4, 16), sparsities=(0.2, 0.5)).pruning.shape
    torch.Size([3])
    """
    if not sparsities:
        raise ValueError("sparsities must not be empty")
    pruners = [SparseGPT(sparsity, dtype=torch.float32) for sparsity in sparsities]
    rounder = RTN(bits, "restricted", "row")
    bb = Backbone(model)
    layer_of = {ref.name: ref.layer for ref in bb.linears()}
    found: dict[str, list[list[float]]] = {"pruning": [], "rounding": []}
    for kinds in found.values():
        kinds += [[] for _ in range(bb.n_layers)]
    for name, stats in calibrate(model, ids, batch=batch).items():
        W = dense_weight(model.get_submodule(name))
        for kind, recipes in (("pruning", pruners), ("rounding", [rounder])):
            errors = [output_distortion(W, r(name, W, stats).weight, stats.H) for r in recipes]
            found[kind][layer_of[name]] += [error / (2 * len(W)) for error in errors]
    return Sensitivity(*(_means(found[kind]) for kind in ("pruning", "rounding")))


def pruning_ratios(sensitivity: Tensor, target: float, largest: float = 0.95) -> tuple[float, ...]:
    """Sparsities of L blocks whose mean is the target: the less sensitive, the sparser.

    Ratios in proportion to 1 - s'; where that is more than `largest`, they are clipped and what is missing is
    spread over the others in the same proportions, again and again; over the most sensitive (1 - s' = 0) only
    when no others are left. Equal sensitivities give all the target.

    Parameters: `sensitivity` [L], finite; `target`, 0 <= target <= `largest` < 1. Raises ValueError for
    others.

    >>> [round(r, 3) for r in pruning_ratios(torch.tensor([1.0, 2.0, 3.0]), 0.4)]
    [0.8, 0.4, 0.0]
    >>> [round(r, 3) for r in pruning_ratios(torch.tensor([1.0, 2.0, 3.0]), 0.6)]
    [0.95, 0.85, 0.0]
    """
    s = _check_sensitivity(sensitivity)
    if not 0 <= target <= largest < 1:
        raise ValueError(f"target must be a number, 0 <= target <= {largest} < 1, got {target!r}")
    low, high = float(s.min()), float(s.max())
    weight = torch.ones_like(s) if low == high else 1 - (s - low) / (high - low)
    ratio, free = torch.zeros_like(s), torch.ones_like(s, dtype=torch.bool)
    left = target * len(s)
    while left > 1e-12 and bool(free.any()):
        share = weight * free if float((weight * free).sum()) > 0 else free.double()
        ratio += share / share.sum() * left
        free &= ratio < largest
        left = float((ratio - largest).clamp(min=0).sum())
        ratio = ratio.clamp(max=largest)
    return tuple(ratio.tolist())


def bit_widths(sensitivity: Tensor, low: int = 4, high: int = 8, n_low: int | None = None) -> tuple[int, ...]:
    """Bits of L blocks: `high` for those of more than average sensitivity, `low` for the others (the paper's
    rule as it is commonly reported); or `low` for the `n_low` least sensitive, which fixes the mean.

    Parameters: `sensitivity` [L], finite; 2 <= `low` <= `high` <= 8; `n_low`, 0 to L. Raises ValueError for
    others.

    >>> bit_widths(torch.tensor([1.0, 9.0, 2.0, 0.5])), bit_widths(torch.tensor([1.0, 9.0, 2.0]), 2, 4, 1)
    ((4, 8, 4, 4), (2, 4, 4))
    """
    s = _check_sensitivity(sensitivity)
    if type(low) is not int or type(high) is not int or not 2 <= low <= high <= 8:
        raise ValueError(f"low and high must be integers, 2 <= low <= high <= 8, got {low!r} and {high!r}")
    if n_low is None:
        # The mean of equal numbers may round to just below them.
        average = s.mean().clamp(s.min(), s.max())
        return tuple(high if value > average else low for value in s)
    if type(n_low) is not int or not 0 <= n_low <= len(s):
        raise ValueError(f"n_low must be an integer from 0 to {len(s)}, got {n_low!r}")
    least = set(s.argsort(stable=True)[:n_low].tolist())
    return tuple(low if layer in least else high for layer in range(len(s)))


def make_policy(
    model: nn.Module,
    ids: LongTensor,
    *,
    sparsity: float = 0.5,
    low: int = 4,
    high: int = 8,
    n_low: int | None = None,
    batch: int = 8,
) -> Policy:
    """Measure a model and give each block its sparsity and bits.

    Parameters: `sparsity`, the mean (the code's 0.5); `low`, `high`, `n_low`, as for `bit_widths` (the code:
    4, 8, 4 of 32); the others, as for `sensitivities`. Raises as those three functions.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> policy = make_policy(tiny("llama"), random_ids(8, 16), n_low=1)
    >>> sorted(policy.bits), round(sum(policy.sparsity) / 3, 9)
    ([4, 8, 8], 0.5)
    """
    found = sensitivities(model, ids, bits=low, batch=batch)
    return Policy(pruning_ratios(found.pruning, sparsity), bit_widths(found.rounding, low, high, n_low))


def compress(model: nn.Module, policy: Policy, ids: LongTensor, *, batch: int = 8) -> Report:
    """Prune and round every linear layer of a model's blocks by a policy, in place; see `compress_model`.

    Raises ValueError for a policy of another number of blocks, and as `PruneRound` and `compress_model`;
    nothing is changed then.
    """
    bb = Backbone(model)
    if not len(policy.sparsity) == len(policy.bits) == bb.n_layers:
        raise ValueError(
            f"policy must be of {bb.n_layers} blocks, got {len(policy.sparsity)} and {len(policy.bits)}"
        )
    recipes = [PruneRound(*pair) for pair in zip(policy.sparsity, policy.bits, strict=True)]
    layer_of = {ref.name: ref.layer for ref in bb.linears()}
    recipe = lambda name, weight, stats: recipes[layer_of[name]](name, weight, stats)
    return compress_model(model, recipe, ids, batch=batch)


def _means(rows: list[list[float]]) -> Tensor:
    return torch.tensor([sum(row) / len(row) for row in rows], dtype=torch.float64)


def _check_sensitivity(sensitivity: Tensor) -> Tensor:
    s = torch.as_tensor(sensitivity, dtype=torch.float64)
    if s.ndim != 1 or s.numel() == 0 or not bool(s.isfinite().all()):
        raise ValueError(f"sensitivity must be finite numbers [L], got {list(s.shape)}")
    return s
