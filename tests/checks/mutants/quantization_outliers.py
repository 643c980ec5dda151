"""Plausible but wrong injections that the check must reject."""

import torch

from refimpl.backbone import Backbone
from refimpl.quantization.fold import consumers
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.outliers import inject_outliers


def off(model, generator, channels=4, factor=60.0):
    return inject_outliers(model, generator, channels, 1.0)


def _norm(model, layer, site):
    return getattr(Backbone(model).layer(layer), site)


@torch.no_grad()
def no_readers(model, generator, channels=4, factor=60.0):
    found = inject_outliers(model, generator, channels, 1.0)
    for (layer, site), at in found.items():
        _norm(model, layer, site).weight[list(at)] *= factor
    return found


@torch.no_grad()
def no_bias(model, generator, channels=4, factor=60.0):
    found = inject_outliers(model, generator, channels, factor)
    for (layer, site), at in found.items():
        if getattr(_norm(model, layer, site), "bias", None) is not None:
            _norm(model, layer, site).bias[list(at)] /= factor
    return found


@torch.no_grad()
def backwards(model, generator, channels=4, factor=60.0):
    return inject_outliers(model, generator, channels, 1 / factor)


@torch.no_grad()
def first_reader(model, generator, channels=4, factor=60.0):
    """Only the first of the layers that read a norm is told."""
    found, bb = inject_outliers(model, generator, channels, factor), Backbone(model)
    for (layer, site), at in found.items():
        for name in consumers(bb, layer, site)[1:]:
            dense_weight(model.get_submodule(name))[:, list(at)] *= factor
    return found


def same_channels(model, generator, channels=4, factor=60.0):
    """Each norm gets its own channels; the report names those of the first for all."""
    found = inject_outliers(model, generator, channels, factor)
    return dict.fromkeys(found, found[0, "ln1"])


MUTANTS = [
    ("outliers", "nothing is injected", off),
    ("outliers", "the readers are not divided", no_readers),
    ("outliers", "the bias of GPT-2's norm is forgotten", no_bias),
    ("outliers", "the channels shrink", backwards),
    ("outliers", "only the first reader is divided", first_reader),
    ("outliers", "the report names other channels", same_channels),
]
