"""Hybrid compression: prune, quantize what is left, and repair both by distillation.

The survey (Fig. 5) names hybrid pipelines without saying which; its ref 89 (arXiv 2502.00046) measures
existing ones, Minitron (structured pruning, then distillation) foremost. This one is made of parts of this
chapter:

1. prune: SparseGPT leaves weights out, or whole MLP neurons are sliced off;
2. quantize: GPTQ, on the weights that are left (`quantize_kept`: a pruned weight stays 0, and the error that
   this makes is fed back like any other);
3. repair: the uncompressed model teaches what can be trained without touching mask and integers: norms,
   scales (as PEQA), or low-rank factors (LoRA), which stay and are counted.

Steps 1 and 2 can also change places: quantize, then leave out the weights that matter least, with no repair
by their neighbours, which are integers already; or be one pass (SparseGPT with a grid).
"""

import copy
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import BoolTensor, LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.ledger import of_model
from refimpl.quantization.calibrate import Stats, calibrate
from refimpl.quantization.distillation.repair import repair
from refimpl.quantization.feedback import Step, feedback_quantize, inverse_factor
from refimpl.quantization.gptq import GPTQ
from refimpl.quantization.grids import Grid, Quantized, dequantize
from refimpl.quantization.linear import (
    dense_weight,
)
from refimpl.quantization.model import Recipe, compress_model
from refimpl.quantization.pruning.slicing import slice_model
from refimpl.quantization.pruning.sparsegpt import SparseGPT
from refimpl.quantization.pruning.unstructured import highest
from refimpl.quantization.sparse import SparseLinear, n_m_mask
from refimpl.training import Batch, History

__all__ = [
    "ORDERS",
    "Hybrid",
    "HybridReport",
    "hybrid",
    "quantize_kept",
    "slice_neurons",
]

ORDERS = ("prune-quantize", "quantize-prune", "joint")


@dataclass(frozen=True)
class Hybrid:
    """Steps 1 and 2 for one layer: a recipe of `compress_model` that makes a `SparseLinear` of codes.

    Bits per weight: 1 of the mask, b for each weight that is kept, and scales for all groups; half of the
    weights at 4 bits cost what all do at 3.

    Parameters
    ----------
    sparsity : share of weights to leave out, 0 <= s < 1, or "n:m", as for `SparseGPT`; usual 0.5, "2:4".
    grid : a `Grid`, for the kept weights.
    order : "prune-quantize", SparseGPT and then GPTQ; "quantize-prune", GPTQ and then the lowest
        w^2 / U_jj^2 of the whole layer go; "joint", SparseGPT's own single pass.

    Raises ValueError for another order, and as `SparseGPT`.

    Examples
    --------
    >>> from refimpl.quantization.calibrate import stats_of
    >>> from refimpl.quantization.symmetric import output_distortion
    >>> generator = torch.Generator().manual_seed(0)
    >>> W, mix = torch.randn(16, 32, generator=generator), torch.randn(32, 32, generator=generator)
    >>> stats = stats_of(torch.randn(200, 32, generator=generator) @ mix)
    >>> lost = {}
    >>> for order in ORDERS:
    ...     layer = Hybrid(0.5, Grid(3, group=16), order)("fc", W, stats)
    ...     lost[order] = output_distortion(W, layer.weight, stats.H)
    >>> lost["prune-quantize"] < lost["quantize-prune"], layer.bits_per_weight
    (True, 3.6875)
    """

    sparsity: float | str = 0.5
    grid: Grid = Grid(4, group=32)  # noqa: RUF009
    order: str = "prune-quantize"

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Grid):
            raise ValueError(f"grid must be a Grid, got {self.grid!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        SparseGPT(self.sparsity)

    def solve(self, W: Tensor, H: Tensor) -> tuple[Quantized, BoolTensor]:
        """Codes of W [d_out, d_in] for inputs with H = 2/N sum x x', and the mask of those to keep.

        Raises as `SparseGPT.solve` and `Grid.quantize`.
        """
        self.grid.check(W)
        pruner = SparseGPT(self.sparsity, torch.float32, self.grid if self.order == "joint" else None)
        if self.order != "quantize-prune":
            pruned = pruner.solve(W, H)
            return pruned.quantized or quantize_kept(pruned.Q, H, pruned.keep, self.grid), pruned.keep
        q = GPTQ(*astuple(self.grid)).solve(W, H)
        score = (dequantize(q) / inverse_factor(H, pruner.damp).diagonal()).square()
        if pruner.pattern:
            return q, n_m_mask(score, *pruner.pattern)
        return q, highest(score.flatten(), pruner.sparsity).view(score.shape)

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> SparseLinear:
        return SparseLinear.pack_codes(
            *self.solve(weight, stats.H), self.grid.bits, SparseGPT(self.sparsity).storage
        )


def quantize_kept(W: Tensor, H: Tensor, keep: BoolTensor, grid: Grid, damp: float = 0.01) -> Quantized:
    """GPTQ for a sparse matrix: the kept weights are rounded, the others stay 0, all errors are fed back.

    The others would not stay 0 by themselves: each error moves all columns to come. Scales as in `GPTQ`: per
    row from W, those of groups from the weight as it is when the group is reached, on its kept entries.

    Parameters: `W` [d_out, d_in], 0 where `keep` [d_out, d_in] is False; `H` [d_in, d_in]; `grid`; `damp`, as
    for `GPTQ`. Codes where keep is False mean nothing. Raises ValueError for a W that is not 0 there or masks
    of another shape, and as `Grid.quantize` and `feedback_quantize`.
    """
    grid.check(W)
    if keep.dtype is not torch.bool or keep.shape != W.shape or bool(W[~keep].any()):
        raise ValueError(f"keep must be bool {list(W.shape)} and W 0 where it is False")
    d_in = W.shape[1]
    width = grid.group if isinstance(grid.group, int) else d_in
    scale, zero = grid.fit(W)
    one_group = Grid(grid.bits, grid.scheme, "row", grid.clip_norm, grid.scale_dtype)

    def encode(step: Step) -> tuple[Tensor, Tensor]:
        g, kept = step.start // width, keep[:, step.start, None]
        if width < d_in and step.start % width == 0:
            part = slice(step.start, step.start + width)
            s, z = one_group.fit(step.W[:, part] * keep[:, part])
            scale[:, [g]] = s
            if isinstance(zero, Tensor):
                zero[:, [g]] = z
        s, z = scale[:, [g]].double(), zero if isinstance(zero, int) else zero[:, [g]].double()
        codes = grid.steps(step.w, s, z)
        return (codes - z) * s * kept, codes

    # Whole groups, so that a group's columns are up to date when its scale is fitted.
    lazy = width * max(1, 128 // width)
    codes = feedback_quantize(W, H, encode, damp=damp, lazy=lazy).codes
    return Quantized(codes.to(torch.uint8), scale, zero)


def slice_neurons(model: nn.Module, ids: LongTensor, kept: int) -> None:
    """Step 1, structured: keep the MLP neurons of each layer that contribute most, and slice the others off.

    A neuron counts ||w_down,j|| ||h_j||, the norm of its activations over the calibration tokens times that
    of its column: the contribution of its Frobenius norm. In place. Parameters: `model` and `ids` [B, T], as
    for `compress_model`; `kept`, neurons of a layer, 1 to F; a grid's group should divide it.
    Raises ValueError for another number, and as `slice_model` and `calibrate`.
    """
    bb = Backbone(model)
    if type(kept) is not int or not 1 <= kept <= bb.F:
        raise ValueError(f"kept must be an integer from 1 to {bb.F}, got {kept!r}")
    stats = calibrate(model, ids)
    masks = []
    for ref in bb.linears():
        if ref.role == "down":
            score = dense_weight(ref.module).double().norm(dim=0) * stats[ref.name].sqnorm.sqrt()
            mask = torch.zeros(bb.F, dtype=torch.bool)
            masks.append(mask.scatter_(0, score.topk(kept).indices.cpu(), True))
    slice_model(model, torch.ones(bb.n_layers, bb.H, dtype=torch.bool), torch.stack(masks))


@dataclass(frozen=True)
class HybridReport:
    """Bytes of the whole model before, after steps 1 and 2, and in the end; how many numbers were `trained`;
    the `history` of the distillation."""

    bytes_before: int
    bytes_compressed: int
    bytes_after: int
    trained: int
    history: History


def hybrid(
    teacher: nn.Module,
    ids: LongTensor,
    batches: Callable[[int], Batch],
    *,
    recipe: Recipe = Hybrid(),  # noqa: B008
    neurons: int | None = None,
    **training: Any,
) -> tuple[nn.Module, HybridReport]:
    """The whole pipeline: prune and quantize a copy of a model, and let the model teach it.

    Parameters
    ----------
    teacher : of a family of `refimpl.backbone`, uncompressed; it stays as it is.
    ids : [B, T] calibration tokens, as for `compress_model`.
    batches : of the distillation, as for `refimpl.training.train`.
    recipe : of `compress_model`: a `Hybrid`, or `GPTQ`, `SparseGPT` and others for parts of the pipeline.
    neurons : of each layer to keep (`slice_neurons`); None: all.
    training : as for `repair`.

    Returns the compressed model, which `save_compressed` takes, and the report. Raises as the steps do.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> rows = lambda step: random_ids(4, 16, seed=step)
    >>> recipe = Hybrid(grid=Grid(4, group=8))
    >>> model, report = hybrid(tiny("llama"), rows(99), rows, recipe=recipe, steps=10, batch=4, lr=1e-3)
    >>> report.bytes_before > report.bytes_compressed == report.bytes_after
    True
    """
    model = copy.deepcopy(teacher)
    if neurons is not None:
        slice_neurons(model, ids, neurons)
    compress_model(model, recipe, ids)
    compressed = of_model(model).total()
    trained, history = repair(model, teacher, batches, **training)
    return model, HybridReport(
        of_model(teacher).total(), compressed, of_model(model).total(), trained, history
    )
