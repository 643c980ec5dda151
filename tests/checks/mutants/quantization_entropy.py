"""Plausible but wrong entropy coders that the check must reject."""

import zlib

import torch

from refimpl.quantization.coders import huffman_decode, huffman_encode
from refimpl.quantization.entropy import EntropyRTN, RansLinear
from refimpl.quantization.grids import Grid, Quantized
from refimpl.quantization.linear import GridLinear
from refimpl.quantization.packing import pack_codes


class Off(EntropyRTN):
    """Codes are packed, not coded."""

    def __call__(self, name, weight, stats=None):
        return GridLinear.pack(self.quantize(weight), self.bits)


class HuffmanLinear(RansLinear):
    @classmethod
    def pack(cls, q, bits, bias=None):
        stream = torch.frombuffer(bytearray(huffman_encode(q.codes, bits)), dtype=torch.uint8)
        return cls(tuple(q.codes.shape), {"stream": stream, "scale": q.scale}, bias, bits=bits)

    def quantized(self):
        bits, shape = self.settings["bits"], (self.out_features, self.in_features)
        codes = huffman_decode(self.stream.numpy().tobytes(), bits, shape[0] * shape[1]).view(shape)
        return Quantized(codes, self.scale, 2 ** (bits - 1))


class WholeBits(EntropyRTN):
    """Huffman, which cannot go below one bit."""

    def __call__(self, name, weight, stats=None):
        return HuffmanLinear.pack(self.quantize(weight), self.bits)


class Elsewhere(RansLinear):
    """The codes stay in an attribute that no one counts."""

    @classmethod
    def pack(cls, q, bits, bias=None):
        layer = super().pack(q, bits, bias)
        layer.hidden, layer.stream = q, layer.stream[: 2 << bits]
        return layer

    def quantized(self):
        return self.hidden


class TableNotCounted(EntropyRTN):
    def __call__(self, name, weight, stats=None):
        return Elsewhere.pack(self.quantize(weight), self.bits)


class Nibbles(RansLinear):
    """zlib on packed codes, which it sees as bytes."""

    @classmethod
    def pack(cls, q, bits, bias=None):
        data = zlib.compress(pack_codes(q.codes, bits).numpy().tobytes(), 9)
        stream = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        layer = cls(tuple(q.codes.shape), {"stream": stream, "scale": q.scale}, bias, bits=bits)
        layer.hidden = q
        return layer

    def quantized(self):
        return self.hidden


class ZlibOfPacked(EntropyRTN):
    def __call__(self, name, weight, stats=None):
        return Nibbles.pack(self.quantize(weight), self.bits)


class OneScale(EntropyRTN):
    """Smaller, because every matrix gets one scale whatever is asked for."""

    def __call__(self, name, weight, stats=None):
        return RansLinear.pack(Grid(self.bits, self.scheme, "tensor").quantize(weight), self.bits)


MUTANTS = [
    ("quantized_entropy", "off: packed, not coded", Off),
    ("quantized_entropy", "whole bits", WholeBits),
    ("quantized_entropy", "codes that nobody counts", TableNotCounted),
    ("quantized_entropy", "zlib on packed codes", ZlibOfPacked),
    ("quantized_entropy", "one scale for a better compression", OneScale),
]
