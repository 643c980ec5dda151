"""Aggressive post-training compression: one threshold for the whole model, then SparseGPT on a grid.

A reconstruction. Of arXiv 2409.20094 (ref 114 of the survey) the abstract and a summary could be read, no
code and no equations. They give: layers get sparsities of their own from an estimate of the pruning loss made
of the inverse Hessian, "log-level clustering" of these estimates, SparseGPT as the pruner and the baseline,
sparsities above 0.7, INT4. Ours are: the estimate w_ij^2 / U_jj^2 of the uncompressed model (the score of
SparseGPT itself, which supposes that all columns before j are settled), one threshold on it for all layers,
found in buckets of its logarithm, and the bounds around the mean.

One threshold takes an error in the output of any layer to be as bad as in any other. On our small models it
is not: the rule empties o and down of the first blocks, whose outputs are small, and loses to one sparsity
for all layers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.quantization.calibrate import Hidden, Stats, input_groups
from refimpl.quantization.feedback import inverse_factor
from refimpl.quantization.grids import Grid
from refimpl.quantization.linear import check_replaceable, dense_weight
from refimpl.quantization.model import Report, compress_model
from refimpl.quantization.pruning.sparsegpt import SparseGPT
from refimpl.quantization.sparse import SparseLinear

__all__ = ["Aggressive", "Allocation", "aggressive_ptc", "allocate", "obs_errors"]

# Buckets of 0.5 % in the error; errors below the smallest are as good as 0.
PER_E_FOLD, SMALLEST = 200, 1e-30


@dataclass(frozen=True)
class Allocation:
    """`sparsities` by layer; `threshold`, the error below which weights go, where no bound intervenes."""

    sparsities: dict[str, float]
    threshold: float


@dataclass(frozen=True)
class Aggressive:
    """What `aggressive_ptc` did: the `allocation` and the `report` of the second pass; `sparsity`, the share
    of weights left out, over the linear layers of the blocks (embeddings and norms stay as they are)."""

    allocation: Allocation
    report: Report
    sparsity: float


def aggressive_ptc(
    model: nn.Module,
    ids: LongTensor,
    *,
    sparsity: float = 0.7,
    bits: int | None = 4,
    group: int | str = "row",
    spread: float = 0.15,
    damp: float = 0.01,
    batch: int = 8,
) -> Aggressive:
    """Prune a model unevenly and put what is left on a grid, in place, in two passes over the ids.

    Pass 1 collects the errors w_ij^2 / U_jj^2 of the uncompressed model and turns them into a sparsity for
    each layer (`allocate`). Pass 2 runs `SparseGPT` with these sparsities, mask and grid at once, each layer
    on the inputs that the compressed ones before it produce. Reconstructs arXiv 2409.20094: see the module.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, uncompressed.
    ids : [B, T] calibration tokens without padding.
    sparsity : s, share of the weights of the blocks' linear layers to leave out (the paper: above 0.7).
    bits : of an asymmetric grid, 2 to 8 (the paper: INT4), or None: float16 values.
    group : of the grid: "row" or a number of neighbours.
    spread : layers get between s - spread and s + spread, which must be >= 0 and < 1.
    damp : as for `SparseGPT`.
    batch : rows of ids at a time.

    Returns `Aggressive`. Raises TypeError or ValueError as `compress_model` and for the numbers above; the
    model is then as it was.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> result = aggressive_ptc(tiny("llama"), random_ids(8, 32), sparsity=0.7, bits=4, group=8)
    >>> round(result.sparsity, 3), min(result.allocation.sparsities.values()) >= 0.55
    (0.7, True)
    """
    _check_bounds(sparsity, spread)
    grid = None if bits is None else Grid(bits, group=group)
    allocation = allocate(_errors(model, ids, damp, batch), sparsity, spread)

    def recipe(name: str, weight: Tensor, stats: Stats) -> SparseLinear:
        return SparseGPT(allocation.sparsities[name], grid=grid, damp=damp)(name, weight, stats)

    report = compress_model(model, recipe, ids, batch=batch)
    layers = [model.get_submodule(row.name) for row in report.rows]
    pruned = sum(layer.sparsity * layer.in_features * layer.out_features for layer in layers)
    return Aggressive(allocation, report, pruned / sum(l.in_features * l.out_features for l in layers))


def obs_errors(W: Tensor, H: Tensor, damp: float = 0.01) -> Tensor:
    """What it costs to leave out each weight when the columns before it are settled: w_ij^2 / U_jj^2.

    Parameters: `W` [d_out, d_in]; `H` = 2/N sum x x' [d_in, d_in]; `damp`. Returns [d_out, d_in], float64, 0
    for inputs that never occurred. Raises ValueError as `inverse_factor`.

    >>> obs_errors(torch.tensor([[3.0, 2.0]]), torch.diag(torch.tensor([2.0, 0.5])), damp=0)
    tensor([[18.0000,  2.0000]], dtype=torch.float64)
    """
    live = W.double().masked_fill(H.diagonal() == 0, 0)
    return (live / inverse_factor(H, damp).diagonal()).square()


def allocate(errors: Iterable[tuple[str, Tensor]], sparsity: float, spread: float = 0.15) -> Allocation:
    """A sparsity for each layer from one threshold t on the errors of all weights.

    Layer l gets clip(share of its errors below t, s - spread, s + spread), with t such that s of all weights
    go. Errors are only counted, in buckets of 0.5 % on a logarithmic scale, one layer after the other; within
    the last bucket counts are interpolated, so that the total is exact.

    Parameters: `errors`, (layer, errors >= 0 of any shape), may be a generator; `sparsity` s; `spread`.
    Raises ValueError for bounds outside [0, 1), for no layers and for errors that are negative or not finite.

    >>> allocation = allocate({"a": torch.arange(1, 101), "b": torch.arange(21, 121)}.items(), 0.5)
    >>> {name: round(share, 2) for name, share in allocation.sparsities.items()}, allocation.threshold
    ({'a': 0.6, 'b': 0.4}, 60.0...)
    """
    _check_bounds(sparsity, spread)
    counted = {name: _buckets(name, e) for name, e in errors}
    if not counted:
        raise ValueError("errors must be of at least one layer")
    first = min(int(index[0]) for index, _ in counted.values())
    last = max(int(index[-1]) for index, _ in counted.values())
    # below[l, k]: weights of layer l in the buckets before the k-th.
    below = torch.zeros(len(counted), last - first + 2, dtype=torch.float64)
    for row, (index, count) in zip(below, counted.values(), strict=True):
        row[index - first + 1] = count.double()
    below = below.cumsum(1)
    sizes = below[:, -1:]
    shares = (below / sizes).clamp(sparsity - spread, sparsity + spread)
    total, wanted = (shares * sizes).sum(0), sparsity * float(sizes.sum())
    # total rises from below `wanted` to above it; the share of the bucket in which it passes.
    k = int(torch.searchsorted(total, torch.tensor(wanted, dtype=torch.float64)).clamp(1, len(total) - 1))
    step = float(total[k] - total[k - 1])
    part = (wanted - float(total[k - 1])) / step if step else 0.0
    chosen = torch.lerp(shares[:, k - 1], shares[:, k], part).tolist()
    threshold = torch.tensor((first + k - 1 + part) / PER_E_FOLD, dtype=torch.float64).exp().item()
    return Allocation(dict(zip(counted, chosen, strict=True)), threshold)


def _errors(model: nn.Module, ids: LongTensor, damp: float, batch: int) -> Iterator[tuple[str, Tensor]]:
    """The errors of one layer after the other, on the inputs of the uncompressed model."""
    bb = Backbone(model)
    hidden = Hidden(bb, ids, batch)
    blocks = [input_groups(bb, layer) for layer in range(bb.n_layers)]
    for name in (name for groups in blocks for group in groups for name in group):
        check_replaceable(model, name)
    for layer, groups in enumerate(blocks):
        stats = hidden.stats(layer, groups)
        hidden.advance(layer)
        for name, of_one in stats.items():
            yield name, obs_errors(dense_weight(model.get_submodule(name)), of_one.H, damp)


def _buckets(name: str, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the buckets that occur, rising, and how many errors are in each."""
    if errors.numel() == 0 or not bool((errors.isfinite() & (errors >= 0)).all()):
        raise ValueError(f"errors of {name} must be finite numbers >= 0, one or more")
    index = (errors.double().clamp(min=SMALLEST).log() * PER_E_FOLD).floor().long()
    index, count = index.flatten().unique(return_counts=True)
    return index.cpu(), count.cpu()


def _check_bounds(sparsity: float, spread: float) -> None:
    if not (spread >= 0 and sparsity - spread >= 0 and sparsity + spread < 1):
        raise ValueError(
            "sparsity - spread and sparsity + spread must be at least 0 and below 1, with spread >= 0; "
            f"got sparsity = {sparsity!r}, spread = {spread!r}"
        )
