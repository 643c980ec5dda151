"""Head sensitivity: prune the attention heads whose gate the loss feels least.

Implements Michel et al., "Are sixteen heads really better than one?", arXiv 1905.10650.
"""

from collections.abc import Sequence

import torch
from torch import BoolTensor, LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.quantization.pruning.gating import gated
from refimpl.quantization.pruning.head_gates import next_token_loss

__all__ = ["head_ablation", "head_importance", "pruning_masks"]


def head_importance(
    model: nn.Module,
    ids: LongTensor,
    *,
    heads: BoolTensor | None = None,
    normalise: bool = True,
    batch: int = 8,
) -> Tensor:
    """How much the loss feels each head: I_h = E_x |dL(x) / dxi_h| at xi_h = 1, in one backward pass.

    Implements arXiv 1905.10650, section 4.1; |dL/dxi_h| = |Att_h(x)' dL/dAtt_h(x)|. An example x is a row of
    `ids`, and the absolute value is taken of each example's gradient: over a batch, signs cancel (the code of
    differentiable subset pruning does that). The paper's own code takes it at each position of each example,
    which is larger and need not rank the heads alike.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, not sliced.
    ids : [N, T] token ids without padding, T >= 2: training text, never the text the pruned model is judged
        on. L(x) is the row's mean loss in nats per token.
    heads : [L, H], False for heads that are pruned already: they are closed, and their importance is 0.
    normalise : divide by each layer's L2 norm, as the paper does (section 4.1). It removes what layers differ
        by: where one layer matters most, as the first does in small models, the order is worse for it.
    batch : rows at a time; the result does not depend on it.

    Returns [L, H], float64, >= 0. Raises TypeError or ValueError for another model, ids or mask.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> head_importance(tiny("gpt2"), random_ids(4, 8)).square().sum(1).round(decimals=9)
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    bb = _checked(model, ids, batch)
    shape = bb.n_layers, bb.H
    if heads is None:
        heads = torch.ones(shape, dtype=torch.bool)
    if not isinstance(heads, Tensor) or heads.dtype != torch.bool or heads.shape != shape:
        raise ValueError(f"heads must be a BoolTensor [{bb.n_layers}, {bb.H}]")
    total = torch.zeros(shape, dtype=torch.float64)
    for rows in ids.split(batch):
        # One table of gates for each row: its gradient is that example's alone.
        gates = heads.to(rows.device, torch.float32).expand(len(rows), -1, -1).clone().requires_grad_()
        with torch.enable_grad(), gated(bb, gates):
            loss = next_token_loss(model, rows, "none").mean(1).sum()
            (grad,) = torch.autograd.grad(loss, gates)
        total += grad.abs().sum(0).cpu().double()
    total = total / len(ids) * heads.cpu()
    if normalise:
        norm = total.norm(dim=1, keepdim=True)
        total = total / norm.where(norm > 0, 1)
    return total


def pruning_masks(
    model: nn.Module, ids: LongTensor, removed: Sequence[int], *, exact: bool = False, batch: int = 8
) -> list[BoolTensor]:
    """Masks of the heads that stay when the least important ones are removed, over the whole model.

    Implements arXiv 1905.10650, section 4: all heads are sorted once, and removed from the bottom. A layer
    may lose all (the paper's code can be told to keep some).

    Parameters
    ----------
    model, ids, batch : see `head_importance`.
    removed : how many heads each mask removes, ascending, from 0 to L * H; the paper goes by tenths.
    exact : importances are computed anew, on the model as pruned so far, before each step of `removed`.

    Returns a mask [L, H] for each count, each within the one before; True is a head that stays, as
    `slice_model` takes it. Raises as `head_importance`, and ValueError for other counts.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> masks = pruning_masks(tiny("llama"), random_ids(4, 8), [0, 3, 9])
    >>> [int(mask.sum()) for mask in masks]
    [12, 9, 3]
    """
    bb = _checked(model, ids, batch)
    n = bb.n_layers * bb.H
    counts = list(removed)
    if not counts or any(type(c) is not int or not 0 <= c <= n for c in counts) or counts != sorted(counts):
        raise ValueError(f"removed must be ascending integers from 0 to {n}, at least one, got {counts}")
    heads = torch.ones(bb.n_layers, bb.H, dtype=torch.bool)
    importance = head_importance(model, ids, batch=batch)
    masks = []
    for count in counts:
        gone = int((~heads).sum())
        if exact and 0 < gone < count:
            importance = head_importance(model, ids, heads=heads, batch=batch)
        order = importance.masked_fill(~heads, torch.inf).flatten().argsort(stable=True)
        heads = heads.clone()
        heads.view(-1)[order[: count - gone]] = False
        masks.append(heads)
    return masks


def head_ablation(model: nn.Module, ids: LongTensor, *, others: bool = False, batch: int = 8) -> Tensor:
    """The change of each row's loss when one head is removed, or all the others of its layer are.

    Implements the two tables of arXiv 1905.10650, sections 3.2 and 3.3: what `head_importance` estimates
    without running the model L * H times.

    Parameters: `model`, `ids` [N, T], `batch` as above; `others`, remove the layer's other heads instead.
    Returns [L, H, N] in nats per token, positive where the model got worse; its mean over N is the table, and
    its rows are pairs for `paired_bootstrap`. Raises as `head_importance`.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> head_ablation(tiny("llama"), random_ids(2, 8)).shape
    torch.Size([3, 4, 2])
    """
    bb = _checked(model, ids, batch)

    def losses(gates: Tensor | None) -> Tensor:
        with torch.no_grad(), gated(bb, gates):
            return torch.cat([next_token_loss(model, r, "none").mean(1).cpu() for r in ids.split(batch)])

    plain = losses(None)
    changes = torch.zeros(bb.n_layers, bb.H, len(ids))
    for l in range(bb.n_layers):
        for h in range(bb.H):
            gates = torch.ones(bb.n_layers, bb.H, device=ids.device)
            if others:
                gates[l] = 0
            gates[l, h] = float(others)
            changes[l, h] = losses(gates) - plain
    return changes


def _checked(model: nn.Module, ids: LongTensor, batch: int) -> Backbone:
    bb = Backbone(model)
    bb.check_ids(ids)
    if ids.shape[1] < 2:
        raise ValueError(f"ids: expected rows of 2 tokens or more, got {list(ids.shape)}")
    if type(batch) is not int or batch < 1:
        raise ValueError(f"batch must be an integer >= 1, got {batch!r}")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"model: {name} holds NaN or infinity; allowed: finite weights")
    return bb
