"""Plausible but wrong NF4 that its check must reject."""

import torch
import torch.nn.functional as F

from refimpl.quantization import nf4
from refimpl.quantization.linear import CompressedLinear
from refimpl.quantization.nf4 import NF4, NF4Linear


class Off(NF4):
    """The weight stays as it is."""

    def __call__(self, name, weight, stats=None):
        return _Dense(tuple(weight.shape), {"dense": weight})


class _Dense(CompressedLinear):
    def dequantize(self):
        return self.dense


class _OtherLevels(NF4Linear):
    def dequantize(self):
        shape = (self.out_features, self.in_features)
        codes = nf4.unpack_codes(self.codes, 4, shape)
        absmax, table = self.absmax, nf4.dynamic_map(True)
        if absmax.dtype is torch.uint8:
            absmax = nf4.dequantise_blockwise(absmax, self.scale, table, 256) + self.mean
        return nf4.decode(codes, absmax, self.levels, self.settings["block"])


def with_levels(levels):
    """NF4 with other levels, codes and W^ alike."""

    class Layer(_OtherLevels):
        pass

    Layer.levels = levels

    class Recipe(NF4):
        def __call__(self, name, weight, stats=None):
            right = super().__call__(name, weight)
            codes, _ = nf4.encode(weight, levels, self.block)
            tensors = dict(right.named_buffers()) | {"codes": nf4.pack_codes(codes, 4)}
            return Layer(tuple(weight.shape), tensors, **right.settings)

    return Recipe


def symmetric_quantiles():
    """16 quantiles of the normal distribution in equal steps, none of them zero."""
    levels = torch.special.ndtri(torch.linspace(1 / 32, 31 / 32, 16))
    return levels / levels[-1]


class BlocksOfColumns(NF4):
    """Blocks run down the columns."""

    def __call__(self, name, weight, stats=None):
        layer = super().__call__(name, weight.T.contiguous())
        tensors = dict(layer.named_buffers())
        return _Transposed(tuple(weight.shape), tensors, **layer.settings)


class _Transposed(NF4Linear):
    def dequantize(self):
        inner = NF4Linear((self.in_features, self.out_features), dict(self.named_buffers()), **self.settings)
        return inner.weight.T


class NoMean(NF4):
    """Absmaxima, all positive, go into the signed map as they are: half of its codes stay unused."""

    def __call__(self, name, weight, stats=None):
        layer = super().__call__(name, weight)
        if self.double_quant:
            _, absmax = nf4.encode(weight, nf4.nf4_levels(), self.block)
            codes, layer.scale = nf4.quantise_blockwise(absmax, nf4.dynamic_map(True), 256)
            layer.absmax = codes.clone()
            layer.mean = torch.zeros(())
        return layer


class SingleQuantization(NF4):
    def __call__(self, name, weight, stats=None):
        return NF4(self.block, False)(name, weight)


class WeightKept(NF4):
    def __call__(self, name, weight, stats=None):
        layer = super().__call__(name, weight)
        layer.forward = lambda x: F.linear(x, layer.dequantize(), layer.bias)
        return layer


class NoGradient(NF4):
    def __call__(self, name, weight, stats=None):
        layer = super().__call__(name, weight)
        layer.forward = torch.no_grad()(lambda x: F.linear(x, layer.dequantize(), layer.bias))
        return layer


MUTANTS = [
    ("nf4", "nothing is quantized", Off),
    ("nf4", "sixteen even levels", with_levels(torch.linspace(-1, 1, 16))),
    ("nf4", "quantiles without an exact zero", with_levels(symmetric_quantiles())),
    ("nf4", "blocks run down the columns", BlocksOfColumns),
    ("nf4", "absmaxima are not centred before their 8-bit codes", NoMean),
    ("nf4", "double quantization is ignored", SingleQuantization),
    ("nf4", "autograd keeps the dequantized weight", WeightKept),
    ("nf4", "no gradient passes to what is below", NoGradient),
]
