"""Plausible but wrong roundings to a grid that `check_rtn` must reject."""

from dataclasses import replace

import torch

from refimpl.quantization.grids import Quantized, dequantize
from refimpl.quantization.linear import CompressedLinear
from refimpl.quantization.rtn import RTN


class Dense(CompressedLinear):
    def dequantize(self):
        return self.dense


class Bytes(CompressedLinear):
    def dequantize(self):
        zero = self._buffers.get("zero", self.settings.get("half"))
        return dequantize(Quantized(self.codes, self.scale, zero))


class Simulated(RTN):
    """The rounded weight is kept as a float matrix: nothing is saved."""

    def __call__(self, name, weight, stats=None):
        return Dense(tuple(weight.shape), {"dense": super().__call__(name, weight, stats).weight})


class OneCodePerByte(RTN):
    def __call__(self, name, weight, stats=None):
        codes, scale, zero = self.quantize(weight)
        if isinstance(zero, int):
            return Bytes(tuple(weight.shape), {"codes": codes, "scale": scale}, half=zero)
        return Bytes(tuple(weight.shape), {"codes": codes, "scale": scale, "zero": zero})


class Interleaved(RTN):
    """A group is every n-th column, not neighbours."""

    def quantize(self, W):
        if not isinstance(self.group, int):
            return super().quantize(W)
        mixed = torch.arange(W.shape[1]).view(self.group, -1).T.flatten()
        codes, scale, zero = super().quantize(W[:, mixed])
        return Quantized(codes[:, mixed.argsort()], scale, zero)


class ZeroOutside(RTN):
    """The range of a group is [min, max], whether or not zero lies in it."""

    def fit(self, W):
        groups = W.reshape(*self.layout(*W.shape), -1)
        return self._parameters(groups.amin(-1), groups.amax(-1))


class WideScales(RTN):
    def quantize(self, W):
        return RTN.quantize(replace(self, scale_dtype=torch.float32), W)


class Truncated(RTN):
    def encode(self, W, scale, zero):
        steps = (W.reshape(*scale.shape, -1) / scale.to(W.dtype)[..., None]).trunc()
        zero = zero if isinstance(zero, int) else zero[..., None].float()
        return (steps + zero).clamp(0, 2**self.bits - 1).to(torch.uint8).view(W.shape)


MUTANTS = [
    ("rtn", "the rounded weight stays a float matrix", Simulated),
    ("rtn", "one code per byte", OneCodePerByte),
    ("rtn", "a group is not of neighbours", Interleaved),
    ("rtn", "zero may lie outside the range", ZeroOutside),
    ("rtn", "scales of 32 bits", WideScales),
    ("rtn", "digits are cut off instead of rounded", Truncated),
]
