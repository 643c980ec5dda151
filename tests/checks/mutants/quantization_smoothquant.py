"""Plausible but wrong SmoothQuant that its check must reject."""

import torch
from torch import nn

from refimpl.backbone import Backbone
from refimpl.quantization import compress_model
from refimpl.quantization.activations import W8A8
from refimpl.quantization.calibrate import calibrate
from refimpl.quantization.fold import consumers, fold
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.smoothquant import smooth, smoothing_factor, smoothquant


def off(model, ids, alpha=0.5):
    compress_model(model, W8A8(), ids)


def smoothed_only(model, ids, alpha=0.5):
    smooth(model, ids, alpha)


def swapped(model, ids, alpha=0.5):
    smoothquant(model, ids, 1 - alpha)


def per_tensor(model, ids, alpha=0.5):
    smoothquant(model, ids, alpha, W8A8("tensor", "token"))


def _by_hand(model, ids, alpha, statistic=lambda s: s.absmax, weights=lambda ws: ws):
    bb, stats = Backbone(model), calibrate(model, ids)
    for layer in range(bb.n_layers):
        for site in ("ln1", "ln2"):
            names = consumers(bb, layer, site)
            ws = weights([dense_weight(model.get_submodule(name)) for name in names])
            fold(bb, layer, site, smoothing_factor(statistic(stats[names[0]]), ws, alpha))
    compress_model(model, W8A8(), ids, sequential=False)


def mean_inputs(model, ids, alpha=0.5):
    """The mean of the inputs, as in AWQ, for their maximum."""
    _by_hand(model, ids, alpha, statistic=lambda s: s.absmean)


def first_weight(model, ids, alpha=0.5):
    """The factor of q for q, k and v."""
    _by_hand(model, ids, alpha, weights=lambda ws: ws[:1])


@torch.no_grad()
def no_bias(model, ids, alpha=0.5):
    """The bias of GPT-2's norms stays as it was."""
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    before = [m.bias.clone() for m in norms]
    smoothquant(model, ids, alpha)
    for m, bias in zip(norms, before, strict=True):
        m.bias.copy_(bias)


MUTANTS = [
    ("smoothquant", "no smoothing", off),
    ("smoothquant", "no quantization", smoothed_only),
    ("smoothquant", "alpha and 1 - alpha are swapped", swapped),
    ("smoothquant", "weights have one scale in all", per_tensor),
    ("smoothquant", "means of the inputs, not maxima", mean_inputs),
    ("smoothquant", "the factor of q for q, k and v", first_weight),
    ("smoothquant", "the bias of the norm is forgotten", no_bias),
]
