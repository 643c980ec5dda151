"""Plausible but wrong packed layers that their checks must reject."""

import torch

from refimpl.quantization.activations import Int8Linear, quantize_activations
from refimpl.quantization.kernels import PackedInt4, PackedInt8, PackedW8A8
from refimpl.quantization.linear import GridLinear
from refimpl.quantization.packing import pack_codes


class FloatsKept(GridLinear):
    """Fast, because the float weight was made once and stays."""

    def __init__(self, shape, tensors, bias=None, **settings):
        super().__init__(shape, tensors, bias, **settings)
        self.register_buffer("floats", self.dequantize(), persistent=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.floats, self.bias)


class Offset(PackedInt8):
    """The bytes are read as int8 as they are: codes above 127 become negative."""

    def _pack(self, codes):
        super()._pack(codes)
        self.signed = codes.view(torch.int8)

    def _unpack(self):
        return self.signed.view(torch.uint8)


class KernelsOrderInTheFile8(PackedInt8):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = self.signed


class ScaleOfTheFirstRow(PackedInt8):
    def product(self, x):
        return super().product(x) / self.scale.flatten() * self.scale[0]


class KernelsOrderInTheFile4(PackedInt4):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = self.packed.flatten()


class NoZeroPoint(PackedInt4):
    """The kernel's own 8 stands for every group's zero point."""

    def _zero(self):
        return 8.0


class LowHalfFirst(PackedInt4):
    """Codes of a byte in the other order, as most code has them."""

    def __init__(self, shape, tensors, bias=None, **settings):
        swapped = (tensors["codes"] << 4) | (tensors["codes"] >> 4)
        super().__init__(shape, {**tensors, "codes": swapped}, bias, **settings)


class BothOrdersKept(PackedInt4):
    """Plain bytes stay beside the kernel's."""

    def _pack(self, codes):
        super()._pack(codes)
        self.register_buffer("plain_codes", pack_codes(codes, 4), persistent=False)


class WeightOnly(Int8Linear):
    """Activations are not quantized."""

    def product(self, x):
        return x @ self.dequantize().to(x.dtype).T


class ScaleOfAllTokens(PackedW8A8):
    def product(self, x):
        codes, s = quantize_activations(x, "tensor")
        return (codes.float() @ self.codes.float().T) * s * self.scale.flatten()


class SixteenBits(PackedW8A8):
    """Codes of x are made unsigned, and pairs of products added in 16 bits, which saturate: what processors
    without VNNI do."""

    def product(self, x):
        codes, s = quantize_activations(x)
        products = (codes.int() + 128)[..., None, :] * self.codes.int()
        pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(-1) - 128 * self.codes.sum(1)) * s * self.scale.flatten()


class SumsInHalf(PackedW8A8):
    """Integers, but multiplied in bfloat16."""

    def product(self, x):
        codes, s = quantize_activations(x)
        return (codes.bfloat16() @ self.codes.bfloat16().T) * s * self.scale.flatten()


MUTANTS = [
    ("packed_int8", "the float weight stays in memory", FloatsKept),
    ("packed_int8", "unsigned bytes are read as signed", Offset),
    ("packed_int8", "the file has the kernel's order", KernelsOrderInTheFile8),
    ("packed_int8", "one scale for all rows", ScaleOfTheFirstRow),
    ("packed_int4", "the float weight stays in memory", FloatsKept),
    ("packed_int4", "the file has the kernel's order", KernelsOrderInTheFile4),
    ("packed_int4", "zero points are ignored", NoZeroPoint),
    ("packed_int4", "the low half of a byte is the first code", LowHalfFirst),
    ("packed_int4", "codes are kept in both orders", BothOrdersKept),
    ("packed_w8a8", "activations are not quantized", WeightOnly),
    ("packed_w8a8", "one scale for all tokens", ScaleOfAllTokens),
    ("packed_w8a8", "sums saturate in 16 bits", SixteenBits),
    ("packed_w8a8", "sums are in bfloat16", SumsInHalf),
]
