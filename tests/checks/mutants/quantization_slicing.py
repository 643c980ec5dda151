"""Plausible but wrong slicing that its check must reject."""

import torch

from refimpl.backbone import Backbone
from refimpl.quantization.pruning.slicing import slice_model


def off(model, heads, neurons):
    """Nothing is removed."""


def zeros(model, heads, neurons):
    """The matrices keep their size and get zeros."""
    bb = Backbone(model)
    with torch.no_grad():
        for ref in bb.linears():
            if ref.role == "o":
                ref.weight.mul_(heads[ref.layer].repeat_interleave(bb.D))
            if ref.role == "down":
                ref.weight.mul_(neurons[ref.layer])


def kv_heads_in_turn(model, heads, neurons):
    """Query head h is taken to read K/V head h mod G, not h // (H / G)."""
    bb = Backbone(model)
    slice_model(model, heads.unflatten(1, (-1, bb.G)).transpose(1, 2).flatten(1), neurons)


def another_layer(model, heads, neurons):
    slice_model(model, heads.flip(0), neurons)


def complement(model, heads, neurons):
    """Neurons: the mask is read as what goes."""
    slice_model(model, heads, ~neurons)


def output_bias_lost(model, heads, neurons):
    """A layer without heads loses its output bias with them."""
    slice_model(model, heads, neurons)
    for module in model.modules():
        if type(module).__name__ == "NoHeads":
            module.bias = None


def kv_heads_not_repeated_in_step(model, heads, neurons):
    """Uneven query heads: K/V heads are repeated in turn, not each for its own queries."""
    slice_model(model, heads, neurons)
    for module in model.modules():
        if type(module).__name__ == "RepeatHeads":
            module.index = module.index.flip(0)


MUTANTS = [
    ("slicing", "nothing is removed", off),
    ("slicing", "zeros in matrices of the old size", zeros),
    ("slicing", "query heads read K/V heads in turn", kv_heads_in_turn),
    ("slicing", "masks of another layer", another_layer),
    ("slicing", "the mask of neurons says what goes", complement),
    ("slicing", "the output bias goes with the last head", output_bias_lost),
    ("slicing", "repeated K/V heads serve the wrong queries", kv_heads_not_repeated_in_step),
]
