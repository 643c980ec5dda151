"""Which output rows of a model deserve more bits: MixLLM's salience, and choosing rows by a score.

Implements arXiv 2412.14590 (section on global salience) after microsoft/MixLLM. The loss of a sequence, when
row o of a layer moves by delta_o, changes by about

    a_o + a_o^2 / 2,    a_o = g_o' delta_o,    g = dL/dW:

a Taylor series with the empirical Fisher matrix g_o g_o' of that row, all of it and not only its diagonal, in
the place of the Hessian. The absolute value is taken for each sequence: summed first, signs would cancel.
Rows of all layers are then ranked together, which is what makes the choice global.
"""

from collections.abc import Mapping

import torch
from torch import BoolTensor, LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.quantization.calibrate import input_groups
from refimpl.quantization.grids import Grid, dequantize
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.pruning.head_gates import next_token_loss

__all__ = ["row_salience", "rows_within", "top_rows"]


def row_salience(model: nn.Module, ids: LongTensor, grid: Grid) -> dict[str, Tensor]:
    """What rounding each row of each linear layer of the blocks to `grid` costs the loss.

    Parameters: `model`, whose gradients and `requires_grad` stay as they are; `ids` [B, T], T >= 2, each row
    a sequence of its own; `grid`, the low one. Returns name -> [d_out], float64, >= 0, nats per token summed
    over sequences. Raises TypeError or ValueError for another model, ids, or a group that does not fit.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> salience = row_salience(tiny("llama"), random_ids(2, 8), Grid(2, group=8))
    >>> {name.split(".")[-1]: len(scores) for name, scores in salience.items() if ".0." in name}
    {'q_proj': 32, 'k_proj': 16, 'v_proj': 16, 'o_proj': 32, 'gate_proj': 40, 'up_proj': 40, 'down_proj': 32}
    """
    bb = Backbone(model)
    bb.check_ids(ids)
    if ids.shape[1] < 2:
        raise ValueError(f"ids: expected rows of 2 tokens or more, got {list(ids.shape)}")
    names = [name for layer in range(bb.n_layers) for group in input_groups(bb, layer) for name in group]
    modules = [model.get_submodule(name) for name in names]
    weights = [dense_weight(module) for module in modules]
    deltas = [dequantize(grid.quantize(W)).to(W) - W for W in weights]
    parameters = [module.weight for module in modules]
    frozen = [not p.requires_grad for p in parameters]
    total = [torch.zeros(len(W), dtype=torch.float64, device=W.device) for W in weights]
    try:
        for p in parameters:
            p.requires_grad_(True)
        for sequence in ids.split(1):
            with torch.enable_grad():
                grads = torch.autograd.grad(next_token_loss(model, sequence), parameters)
            for sums, module, g, delta in zip(total, modules, grads, deltas, strict=True):
                g = g if isinstance(module, nn.Linear) else g.T  # Conv1D: [d_in, d_out]
                a = (g * delta).sum(1).double()
                sums += (a + a.square() / 2).abs()
    finally:
        for p, was in zip(parameters, frozen, strict=True):
            p.requires_grad_(not was)
    return dict(zip(names, total, strict=True))


def top_rows(scores: Mapping[str, Tensor], share: float) -> dict[str, BoolTensor]:
    """The floor(n share) rows of highest score among the n of all layers; of equal ones the first.

    Parameters: `scores`, name -> [d_out], no NaN; `share`, 0 to 1. Raises ValueError otherwise.

    >>> top_rows({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([4.0, 3.0])}, 0.5)
    {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    if isinstance(share, bool) or not 0 <= share <= 1:
        raise ValueError(f"share must be a number from 0 to 1, got {share!r}")
    order = _ranked(scores)
    chosen = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    chosen[order[: int(len(order) * share + 1e-9)]] = True
    return _by_name(scores, chosen)


def rows_within(scores: Mapping[str, Tensor], d_in: Mapping[str, int], weights: int) -> dict[str, BoolTensor]:
    """Rows by falling score as long as they hold no more than so many weights; a row too long is passed over.

    Equal shares of rows are not equal bytes where layers differ in d_in; this compares choices fairly.
    Parameters: `scores` as for `top_rows`; `d_in`, name -> columns; `weights` >= 0. Raises ValueError
    otherwise.

    >>> rows_within({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0])}, {"a": 4, "b": 8}, 8)
    {'a': tensor([True, True]), 'b': tensor([False])}
    """
    if type(weights) is not int or weights < 0 or scores.keys() - d_in.keys():
        raise ValueError(f"weights must be an integer >= 0, d_in of every layer given, got {weights!r}")
    widths = torch.cat([torch.full((len(s),), d_in[name]) for name, s in scores.items()]).tolist()
    chosen = torch.zeros(len(widths), dtype=torch.bool)
    for row in _ranked(scores).tolist():
        if widths[row] <= weights:
            chosen[row], weights = True, weights - widths[row]
    return _by_name(scores, chosen)


def _ranked(scores: Mapping[str, Tensor]) -> LongTensor:
    flat = torch.cat([s.detach().double().cpu() for s in scores.values()]) if scores else torch.zeros(0)
    if flat.ndim != 1 or not len(flat) or bool(flat.isnan().any()):
        raise ValueError("scores must be name -> [d_out] without NaN, of one layer or more")
    return flat.argsort(descending=True, stable=True)


def _by_name(scores: Mapping[str, Tensor], chosen: BoolTensor) -> dict[str, BoolTensor]:
    parts = chosen.split([len(s) for s in scores.values()])
    return {name: part.clone() for name, part in zip(scores, parts, strict=True)}
