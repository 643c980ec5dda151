"""Plausible but wrong W8A8 layers that the check must reject."""

import torch

from refimpl.quantization import RTN
from refimpl.quantization.activations import W8A8, Int8Linear, quantize_activations


def recipe(layer_class=Int8Linear, **changed):
    """The recipe with another layer, or with a choice that is ignored."""

    def make(weights="row", activations="token"):
        choice = {"weights": weights, "activations": activations} | changed

        def call(name, weight, stats=None):
            real = W8A8(**choice)(name, weight, stats)
            return layer_class(
                (real.out_features, real.in_features), dict(real.named_buffers()), **real.settings
            )

        return call

    return make


class WeightOnly(Int8Linear):
    def product(self, x):
        return x @ self.dequantize().to(x.dtype).T


class FloatSum(Int8Linear):
    """The codes are multiplied in bfloat16's sum of floats, where long sums are rounded."""

    def product(self, x):
        codes, s = quantize_activations(x, self.settings["activations"], self._buffers.get("x_scale"))
        product = (codes.bfloat16() @ self.codes.bfloat16().T).to(x.dtype)
        return product * s * self.scale.T


class Truncated(Int8Linear):
    def product(self, x):
        codes, s = quantize_activations(x, self.settings["activations"], self._buffers.get("x_scale"))
        codes = (x / s).trunc().clamp(-127, 127)
        return (codes @ self.codes.to(x.dtype).T) * s * self.scale.T


class Dynamic(Int8Linear):
    """Static scales are forgotten and found anew."""

    def product(self, x):
        if self.settings["activations"] != "static":
            return super().product(x)
        codes, s = quantize_activations(x, "tensor")
        return (codes.to(x.dtype) @ self.codes.to(x.dtype).T) * s * self.scale.T


class FloatStorage:
    """The right numbers from codes that take eight bytes each."""

    def __init__(self, weights="row", activations="token"):
        self.real = W8A8(weights, activations)

    def __call__(self, name, weight, stats=None):
        layer = self.real(name, weight, stats)
        layer.codes = layer.codes.double()
        layer.product = lambda x: self.real(name, weight, stats).product(x)
        return layer


def float_activations(weights="row", activations="token"):
    return lambda name, weight, stats=None: RTN(8, "restricted", weights, scale_dtype=torch.float32)(
        name, weight
    )


MUTANTS = [
    ("activations", "activations stay float", recipe(WeightOnly)),
    ("activations", "weights are rounded and nothing else", float_activations),
    ("activations", "one activation scale for all tokens", recipe(activations="tensor")),
    ("activations", "one weight scale per row whatever was asked", recipe(weights="row")),
    ("activations", "the integer sum is rounded", recipe(FloatSum)),
    ("activations", "activations are cut off, not rounded", recipe(Truncated)),
    ("activations", "the static scale is dynamic", recipe(Dynamic)),
    ("activations", "codes are stored as floats", FloatStorage),
]
