"""Entropy coding of quantized weights: the bits that codes need, and the bits that coders use.

A study of arXiv 2403.01384 (survey ref. 50; no code published): integer codes are stored by a lossless coder,
so that less is read from disk. With one table for a matrix, H = -sum p log2 p bits per code are ideal;
`refimpl.quantization.coders` comes close.

Beware: *codes that compress well are codes that are badly used*. An outlier in a matrix with a single scale
puts nearly all codes on zero, and the bits vanish because the information did. Compare methods by their
quality at equal coded bits, never by compression.
"""

import lzma
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.coders import count_codes, huffman_encode, rans_decode, rans_encode
from refimpl.quantization.grids import Grid, Quantized
from refimpl.quantization.linear import GridLinear
from refimpl.quantization.packing import pack_codes, unpack_codes

__all__ = ["CodeSizes", "EntropyRTN", "RansLinear", "code_sizes", "entropy"]


def entropy(codes: Tensor) -> float:
    """H = -sum p log2 p of the codes of a tensor, in bits per code.

    Parameters: `codes`, uint8, any shape. Raises TypeError for another dtype, ValueError for no codes.

    >>> entropy(torch.tensor([0, 0, 1, 3], dtype=torch.uint8))
    1.5
    """
    counts = count_codes(codes, 8)
    p = counts[counts > 0] / counts.sum()
    return abs(float((p * np.log2(p)).sum()))


class RansLinear(GridLinear):
    """A weight on uniform grids whose codes are stored by rANS (`stream`, uint8); decoded at every use."""

    @classmethod
    def pack(cls, q: Quantized, bits: int, bias: Tensor | None = None) -> "RansLinear":
        """Code a quantized matrix of b bits; raises as `rans_encode`."""
        stream = torch.frombuffer(bytearray(rans_encode(q.codes, bits)), dtype=torch.uint8)
        tensors = {"stream": stream.to(q.codes.device), "scale": q.scale}
        if isinstance(q.zero, Tensor):
            tensors["zero"] = pack_codes(q.zero, bits)
        return cls(tuple(q.codes.shape), tensors, bias, bits=bits)

    def quantized(self) -> Quantized:
        """Codes, scale and zero point."""
        bits, shape = self.settings["bits"], (self.out_features, self.in_features)
        codes = rans_decode(self.stream.cpu().numpy().tobytes(), bits, shape[0] * shape[1])
        zero = 2 ** (bits - 1)
        if "zero" in self._buffers:
            zero = unpack_codes(self.zero, bits, self.scale.shape)
        return Quantized(codes.view(shape).to(self.scale.device), self.scale, zero)


@dataclass(frozen=True)
class EntropyRTN(Grid):
    """Round to nearest, codes stored by rANS: a recipe of `compress_model`; parameters as for `Grid`.

    >>> W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> layer = EntropyRTN(8, "restricted", "tensor")("fc", W)
    >>> 7 < layer.bits_per_weight < 8.1
    True
    """

    def __call__(self, name: str, weight: Tensor, stats: Stats | None = None) -> RansLinear:
        return RansLinear.pack(self.quantize(weight), self.bits)


@dataclass(frozen=True)
class CodeSizes:
    """Bits per weight: of packed codes, their `entropy` (a table for each matrix), `huffman`, `rans`, and
    `zlib` and `lzma` on one code per byte; and of scales and zero points (`side`), which none of them
    includes. `error`: sum ||W - W^||^2 / sum ||W||^2."""

    grid: Grid
    packed: float
    entropy: float
    huffman: float
    rans: float
    zlib: float
    lzma: float
    side: float
    error: float


def code_sizes(weights: Sequence[Tensor], grid: Grid) -> CodeSizes:
    """What the codes of some matrices on a grid take, by every coder.

    Parameters: `weights`, matrices [d_out, d_in]; `grid`. Raises ValueError for no matrix, and as
    `Grid.quantize`.

    >>> W = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    >>> W[0, 0] = 100                                                       # an outlier
    >>> one, rows = (code_sizes([W], Grid(4, "restricted", group)) for group in ("tensor", "row"))
    >>> one.rans < 0.1 < 3 < rows.rans < rows.packed, one.error > 10 * rows.error
    (True, True)
    """
    if not weights:
        raise ValueError("weights must be one or more matrices, got none")
    sums, total, lost, power = np.zeros(7), 0, 0.0, 0.0
    for W in weights:
        q = grid.quantize(W)
        layer, n, raw = GridLinear.pack(q, grid.bits), W.numel(), q.codes.cpu().numpy().tobytes()
        coded = [huffman_encode(q.codes, grid.bits), rans_encode(q.codes, grid.bits)]
        coded += [zlib.compress(raw, 9), lzma.compress(raw, preset=9)]
        packed = layer.codes.nbytes
        ideal = entropy(q.codes) * n / 8
        sums += 8 * np.array([packed, ideal, *map(len, coded), layer.nbytes() - packed])
        total += n
        lost += float((layer.weight - W).square().sum())
        power += float(W.square().sum())
    return CodeSizes(grid, *(sums / total).tolist(), lost / power)
