"""Plausible but wrong PEQA that its check must reject."""

import torch
import torch.nn.functional as F
from torch import nn

from refimpl.quantization import peqa as room
from refimpl.quantization.frozen import compress_frozen
from refimpl.quantization.grids import Grid
from refimpl.quantization.peqa import PEQALinear, peqa


def off(model, bits, group):
    """Quantized and frozen: nothing trains."""
    report = peqa(model, bits, group)
    model.requires_grad_(False)
    return report


def without_search(model, bits, group):
    """Scales from the whole range, not of least squares."""
    grid = Grid(bits, "asymmetric", group, scale_dtype=torch.float32)
    compress_frozen(model, lambda name, W, stats: PEQALinear.pack(grid.quantize(W), bits))
    room._only_scales(model)


def norms_train(model, bits, group):
    peqa(model, bits, group)
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            parameter.requires_grad_()


def replaced_by(cls):
    """PEQA with another layer."""

    def mutant(model, bits, group):
        grid = Grid(bits, "asymmetric", group, clip_norm=2.0, scale_dtype=torch.float32)

        def make(name, W, stats):
            layer = cls.pack(grid.quantize(W), bits)
            layer.W = W.clone()
            return layer

        compress_frozen(model, make)
        room._only_scales(model)
        if cls is ZeroTrains:
            for layer in room._layers(model).values():
                layer.z.requires_grad_()

    return mutant


class CodesForget(PEQALinear):
    """The gradient counts codes from 0, not from the zero point."""

    def integers(self):
        return self.quantized().codes.float()


class WeightKept(PEQALinear):
    """Plain autograd, which keeps W^ and the integers as floats."""

    def forward(self, x):
        return F.linear(x, self.dequantize(), self.bias)


class RoundedAgain(PEQALinear):
    """The integers follow the scale: quantization-aware training of the float weight."""

    def dequantize(self):
        _, scale, zero = self.quantized()
        bits = self.settings["bits"]
        z = zero[..., None].float()
        steps = (self.W.reshape(*scale.shape, -1) / scale[..., None]).round() + z
        return ((steps.clamp(0, 2**bits - 1) - z) * scale[..., None]).view(self.W.shape)


class ZeroTrains(PEQALinear):
    def __init__(self, shape, tensors, bias=None, **settings):
        super().__init__(shape, tensors, bias, **settings)
        self.z = nn.Parameter(torch.zeros_like(self.scale))


class OneGroup(PEQALinear):
    """Every row has the gradient of the mean row: one number for the layer."""

    def integers(self):
        return super().integers().mean(0, keepdim=True).expand(self.out_features, -1)


MUTANTS = [
    ("peqa", "nothing trains", off),
    ("peqa", "scales of the whole range", without_search),
    ("peqa", "norms train as well", norms_train),
    ("peqa", "zero points train as well", replaced_by(ZeroTrains)),
    ("peqa", "the gradient forgets the zero point", replaced_by(CodesForget)),
    ("peqa", "the gradient is not of the row itself", replaced_by(OneGroup)),
    ("peqa", "autograd keeps W^", replaced_by(WeightKept)),
    ("peqa", "the integers follow the scale", replaced_by(RoundedAgain)),
]
