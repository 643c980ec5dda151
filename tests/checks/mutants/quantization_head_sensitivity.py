"""Plausible but wrong importances of heads that their check must reject."""

import torch

from refimpl.backbone import Backbone
from refimpl.quantization.pruning.gating import gated
from refimpl.quantization.pruning.head_gates import next_token_loss
from refimpl.quantization.pruning.head_sensitivity import head_ablation, head_importance


def off(model, ids, *, heads=None, normalise=True, batch=8):
    """All heads alike."""
    bb = Backbone(model)
    same = torch.ones(bb.n_layers, bb.H, dtype=torch.float64)
    return same / same.norm(dim=1, keepdim=True) if normalise else same


def batch_level(model, ids, *, heads=None, normalise=True, batch=8):
    """The absolute value of the batch's gradient: examples of opposite sign cancel."""
    bb, total = Backbone(model), 0
    heads = torch.ones(bb.n_layers, bb.H) if heads is None else heads.float()
    for rows in ids.split(batch):
        gates = heads.clone().requires_grad_()
        with gated(bb, gates):
            loss = next_token_loss(model, rows) * len(rows)
            total = total + torch.autograd.grad(loss, gates)[0].abs().double()
    return _finish(total / len(ids) * heads, normalise)


def signed(model, ids, *, heads=None, normalise=True, batch=8):
    """Without absolute values: how much the loss would fall."""
    return _finish(_by_row(model, ids, heads, lambda x: x.sum((1, 3))), normalise)


def by_position(model, ids, *, heads=None, normalise=True, batch=8):
    """The absolute value at each position of each example."""
    return _finish(_by_row(model, ids, heads, lambda x: x.sum(3).abs().sum(1)), normalise)


def squared(model, ids, *, heads=None, normalise=True, batch=8):
    """Fisher information: the mean squared gradient."""
    return _finish(_by_row(model, ids, heads, lambda x: x.sum((1, 3)).square()), normalise)


def not_normalised(model, ids, *, normalise=True, **settings):
    return head_importance(model, ids, normalise=False, **settings)


def sum_of_rows(model, ids, *, normalise=True, **settings):
    found = head_importance(model, ids, normalise=normalise, **settings)
    return found if normalise else found * len(ids)


def normalised_over_the_model(model, ids, *, normalise=True, **settings):
    found = head_importance(model, ids, normalise=False, **settings)
    return found / found.norm() if normalise else found


def ablation(model, ids, *, heads=None, normalise=True, batch=8):
    """What it is an estimate of."""
    return _finish(head_ablation(model, ids).mean(-1).abs().double(), normalise)


def pruned_heads_open(model, ids, *, heads=None, **settings):
    found = head_importance(model, ids, **settings)
    return found if heads is None else found * heads


def _by_row(model, ids, heads, reduce):
    bb, seen = Backbone(model), []

    def keep(_, inputs):
        inputs[0].retain_grad()
        seen.append(inputs[0])

    hooks = [bb.layer(l).o.register_forward_pre_hook(keep) for l in range(bb.n_layers)]
    next_token_loss(model, ids, "none").mean(1).sum().backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    found = [reduce((z * z.grad).detach().unflatten(-1, (bb.H, -1))).mean(0) for z in seen]
    return torch.stack(found).double() * (1 if heads is None else heads)


def _finish(total, normalise):
    return total / total.norm(dim=1, keepdim=True) if normalise else total


MUTANTS = [
    ("head_sensitivity", "all heads alike", off),
    ("head_sensitivity", "the absolute value is taken of the batch's gradient", batch_level),
    ("head_sensitivity", "no absolute value", signed),
    ("head_sensitivity", "the absolute value is taken at each position", by_position),
    ("head_sensitivity", "squared gradients", squared),
    ("head_sensitivity", "layers are not normalised", not_normalised),
    ("head_sensitivity", "normalised over the whole model", normalised_over_the_model),
    ("head_sensitivity", "a sum over rows", sum_of_rows),
    ("head_sensitivity", "the ablation itself", ablation),
    ("head_sensitivity", "heads pruned already are open", pruned_heads_open),
]
