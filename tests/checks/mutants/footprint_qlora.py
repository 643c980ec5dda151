"""Plausible but wrong 4-bit layers that `check_qlora` must reject."""

import copy

import torch
import torch.nn.functional as F

from refimpl.footprint.blockwise import dequantise_blockwise, dynamic_map, quantise_blockwise
from refimpl.footprint.qlora import NF4Linear, nf4_levels
from refimpl.packing import from_groups, pack_4bit, to_groups, unpack_4bit


class _FourBit(torch.nn.Module):
    """A frozen 4-bit layer with its choices as class attributes; the right ones here."""

    levels, block, outer, offset, temporary, straight = nf4_levels(), 64, 256, True, True, False

    def __init__(self, layer):
        super().__init__()
        self.shape = layer.weight.shape
        groups = to_groups(layer.weight.detach(), self.block)
        absmax = groups.abs().amax(1)
        codes = (groups / absmax[:, None])[:, :, None].sub(self.levels).abs().argmin(2).to(torch.uint8)
        self.register_buffer("codes", pack_4bit(from_groups(codes, self.shape)))
        self.register_buffer("mean", absmax.mean() if self.offset else torch.zeros(()))
        if self.outer:
            absmax, scale = quantise_blockwise(absmax - self.mean, dynamic_map(True), self.outer)
            self.register_buffer("scale", scale)
        self.register_buffer("absmax", absmax.clone())
        self.bias = torch.nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def weight(self):
        absmax = self.absmax
        if self.outer:
            absmax = dequantise_blockwise(absmax, self.scale, dynamic_map(True), self.outer) + self.mean
        groups = to_groups(self.levels[unpack_4bit(self.codes, self.shape).int()], self.block)
        return from_groups(groups * absmax[:, None], self.shape)

    def forward(self, x):
        return _Product.apply(x, self) if self.temporary else F.linear(x, self.weight(), self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.weight(), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.layer.weight()
        return grad @ (weight.round(decimals=1) if ctx.layer.straight else weight), None


def not_quantised(layer):
    return copy.deepcopy(layer).requires_grad_(False)


class WeightKept(NF4Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class NoGradient(NF4Linear):
    def forward(self, x):
        with torch.no_grad():
            y = super().forward(x)
        return y + 0 * x.sum()


class BiasTrains(NF4Linear):
    def __init__(self, layer):
        super().__init__(layer)
        self.bias.requires_grad_()


def variant(**choices):
    return type("Variant", (_FourBit,), choices)


MUTANTS = [
    ("qlora", "nothing is quantised", not_quantised),
    ("qlora", "autograd keeps the dequantised weight", WeightKept),
    ("qlora", "autograd keeps it, own product", variant(temporary=False)),
    ("qlora", "16 evenly spaced levels", variant(levels=torch.linspace(-1, 1, 16))),
    ("qlora", "absmaxima stay float32", variant(outer=None, offset=False)),
    ("qlora", "blocks of 128", variant(block=128)),
    ("qlora", "absmaxima are quantised without the offset", variant(offset=False)),
    ("qlora", "the input gets no gradient", NoGradient),
    ("qlora", "the backward pass uses a coarser weight", variant(straight=True)),
    ("qlora", "the bias trains", BiasTrains),
]
