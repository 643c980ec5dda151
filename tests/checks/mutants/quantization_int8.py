"""Plausible but wrong LLM.int8() that its check must reject."""

import math

import torch

from refimpl.quantization.activations import Int8Linear, integer_product
from refimpl.quantization.int8 import LLMInt8, LLMInt8Linear


def recipe(layer_class):
    def make(threshold=6.0, keep_weight=False):
        def call(name, weight, stats=None):
            real = LLMInt8(threshold, keep_weight)(name, weight)
            return layer_class(
                (real.out_features, real.in_features), dict(real.named_buffers()), **real.settings
            )

        return call

    return make


def off(threshold=6.0, keep_weight=False):
    """Everything in int8, per token and per row."""
    return LLMInt8(math.inf, keep_weight)


class ScaleFirst(LLMInt8Linear):
    """The tokens' scales are those of the whole input, outliers included."""

    def product(self, x):
        columns = self.outlier_columns(x)
        s = x.abs().amax(-1, keepdim=True) / 127
        s = s.where(s > 0, 1.0)
        codes = (x / s).round().index_fill(-1, columns, 0).to(torch.int8)
        y = integer_product(codes, self.codes) * s * self.scale.T
        W = self._buffers.get("kept", self.dequantize())
        return y + x[..., columns] @ W[:, columns].to(x.dtype).T


class EntriesOnly(LLMInt8Linear):
    """Outlier entries go through the float product, the rest of their columns does not."""

    def product(self, x):
        large = x.abs() >= self.settings["threshold"]
        W = self._buffers.get("kept", self.dequantize()).to(x.dtype)
        return Int8Linear.product(self, x.masked_fill(large, 0)) + x.masked_fill(~large, 0) @ W.T


class PositiveOnly(LLMInt8Linear):
    def outlier_columns(self, x):
        return (x >= self.settings["threshold"]).flatten(0, -2).any(0).nonzero().flatten()


class Beyond(LLMInt8Linear):
    """A value that equals the threshold is no outlier."""

    def outlier_columns(self, x):
        return (x.abs() > self.settings["threshold"]).flatten(0, -2).any(0).nonzero().flatten()


class OnceForAll(LLMInt8Linear):
    """The columns of the first call stay."""

    def outlier_columns(self, x):
        if not hasattr(self, "first"):
            self.first = super().outlier_columns(x)
        return self.first


class IntegerWeights(LLMInt8Linear):
    """The float weight is stored and not used."""

    def __init__(self, shape, tensors, bias=None, **settings):
        super().__init__(shape, {k: t for k, t in tensors.items() if k != "kept"}, bias, **settings)


MUTANTS = [
    ("int8", "no decomposition", off),
    ("int8", "scales are taken before the outliers are zeroed", recipe(ScaleFirst)),
    ("int8", "entries are separated, not columns", recipe(EntriesOnly)),
    ("int8", "negative outliers are missed", recipe(PositiveOnly)),
    ("int8", "the threshold itself is no outlier", recipe(Beyond)),
    ("int8", "outlier columns are found once", recipe(OnceForAll)),
    ("int8", "outliers always use the rounded weight", recipe(IntegerWeights)),
]
