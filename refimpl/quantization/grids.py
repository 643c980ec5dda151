"""Uniform grids: integer codes, a scale, a zero point, for a tensor, each row, or groups along a row.

Conventions
- W is [d_out, d_in]. A group is g neighbours *along d_in*, the axis that a product sums over.
- Codes are unsigned, 0 .. 2^b - 1, and W^ = s (code - z). Symmetric schemes have z = 2^(b-1), not stored.
- Scales are stored as float16 unless said otherwise, and codes are counted in steps of the *stored* scale.
  Then W^ is exact in float32: 11 bits of scale times at most 9 of code.
- Halves are rounded to even, as torch and numpy do.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SCHEMES", "Grid", "Quantized", "dequantize"]

SCHEMES = ("restricted", "full", "no-clip", "asymmetric")
# The search of the GPTQ code: the range is shrunk to 1, 0.99, ..., 0.21 of itself.
SHRINK = tuple(1 - i / 100 for i in range(80))


class Quantized(NamedTuple):
    """Codes, uint8 [d_out, d_in]; scale [1, 1] (tensor), [d_out, 1] (row) or [d_out, d_in / g]; zero point,
    uint8 of the scale's shape, or the number 2^(b-1) where the scheme is symmetric."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | int


def dequantize(q: Quantized) -> Tensor:
    """W^ = s (code - z), [d_out, d_in], in float32 or the scale's dtype if that is wider.

    >>> dequantize(Quantized(torch.tensor([[0, 2, 3]], dtype=torch.uint8), torch.tensor([[0.5]]), 2))
    tensor([[-1.0000,  0.0000,  0.5000]])
    """
    return _decode(q.codes, q.scale, q.zero, torch.promote_types(q.scale.dtype, torch.float32))


@dataclass(frozen=True)
class Grid:
    """A uniform grid of 2^b values for each group of weights.

    Parameters
    ----------
    bits : b, 2 to 8.
    scheme : how the range [lo, hi] of a group, 0 included, becomes scale and zero point:
        "restricted", s = max(-lo, hi) / (2^(b-1) - 1), codes +-(2^(b-1) - 1): the survey's Algorithm 2;
        "full", s = max(-lo, hi) / ((2^b - 1) / 2), all 2^b codes, the largest weight may be clipped by s / 2;
        "no-clip", s = max(-lo / 2^(b-1), hi / (2^(b-1) - 1)), all 2^b codes, nothing clipped;
        "asymmetric", s = (hi - lo) / (2^b - 1), z = round(-lo / s): zero stays exactly zero.
    group : "tensor", "row", or g, weights of a row that share a scale (usual: 32 to 128), a divisor of d_in.
    clip_norm : p: of 80 ranges from all to 0.21 of [lo, hi] take, per group, the one with the least
        sum |W - W^|^p (2: least squares; 2.4 in the GPTQ code); None: the whole range.
    scale_dtype : of the stored scales.

    Raises ValueError for values that are not allowed.

    Examples
    --------
    >>> W = torch.tensor([[0.0, 0.26, 1.0, -0.5]])
    >>> q = Grid(2).quantize(W)
    >>> q.codes.tolist(), q.scale.item(), q.zero.item(), dequantize(q).tolist()
    ([[1, 2, 3, 0]], 0.5, 1, [[0.0, 0.5, 1.0, -0.5]])
    >>> Grid(4, group=128).bits_per_weight(4096, 4096), Grid(4, "full", 128).bits_per_weight(4096, 4096)
    (4.15625, 4.125)
    """

    bits: int = 4
    scheme: str = "asymmetric"
    group: int | str = "row"
    clip_norm: float | None = None
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be an integer from 2 to 8, got {self.bits!r}")
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {self.scheme!r}")
        if self.group not in ("tensor", "row") and (type(self.group) is not int or self.group < 1):
            raise ValueError(f"group must be 'tensor', 'row' or an integer >= 1, got {self.group!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be None or a number > 0, got {self.clip_norm!r}")
        if self.scale_dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"scale_dtype must be a floating-point dtype, got {self.scale_dtype!r}")

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is the fixed 2^(b-1)."""
        return self.scheme != "asymmetric"

    def quantize(self, W: Tensor) -> Quantized:
        """Round W [d_out, d_in] to the nearest value of its group's grid.

        Raises TypeError unless W is floating point, ValueError unless it is a finite matrix whose d_in the
        group divides and whose scales the scale_dtype can hold.
        """
        scale, zero = self.fit(W)
        return Quantized(self.encode(W, scale, zero), scale, zero)

    def fit(self, W: Tensor) -> tuple[Tensor, Tensor | int]:
        """Scale and zero point of each group of W, as in `Quantized`; raises as `quantize`."""
        self.check(W)
        groups = W.detach().reshape(*self.layout(*W.shape), -1)
        if groups.dtype in (torch.float16, torch.bfloat16):
            groups = groups.float()
        lo, hi = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale, zero = self._parameters(lo, hi)
        if self.clip_norm is None:
            return scale, zero
        least = self._error(groups, scale, zero)
        for shrink in SHRINK[1:]:
            new_scale, new_zero = self._parameters(shrink * lo, shrink * hi)
            error = self._error(groups, new_scale, new_zero)
            better = error < least
            least, scale = least.where(~better, error), scale.where(~better, new_scale)
            zero = zero if self.symmetric else zero.where(~better, new_zero)
        return scale, zero

    def encode(self, W: Tensor, scale: Tensor, zero: Tensor | int) -> Tensor:
        """Codes, uint8, of the values nearest to W on given grids; values beyond the ends get the ends."""
        dtype = torch.promote_types(W.dtype, torch.promote_types(scale.dtype, torch.float32))
        groups = W.reshape(*scale.shape, -1)
        return self.steps(groups, scale.to(dtype)[..., None], _spread(zero)).to(torch.uint8).view(W.shape)

    def steps(self, W: Tensor, scale: Tensor, zero: Tensor | int) -> Tensor:
        """clip(round(W / s) + z), the codes as floats, for tensors that broadcast."""
        return (W / scale).round_().add_(zero).clamp_(self.scheme == "restricted", 2**self.bits - 1)

    def layout(self, d_out: int, d_in: int) -> tuple[int, int]:
        """The shape of the scales of a matrix; ValueError where the group does not divide d_in."""
        if self.group == "tensor":
            return 1, 1
        g = d_in if self.group == "row" else self.group
        if d_in % g:
            raise ValueError(f"group must divide d_in = {d_in}, got {g}")
        return d_out, d_in // g

    def bits_per_weight(self, d_out: int, d_in: int) -> float:
        """Bits stored for each weight: b, and its share of scale and, if asymmetric, zero point of b bits."""
        rows, groups = self.layout(d_out, d_in)
        each = self.scale_dtype.itemsize * 8 + (0 if self.symmetric else self.bits)
        return self.bits + rows * groups * each / (d_out * d_in)

    def check(self, W: Tensor) -> None:
        """Raise as `quantize` for a W that is no finite, floating-point matrix [d_out, d_in]."""
        if not W.is_floating_point():
            raise TypeError(f"W must be floating point, got {W.dtype}")
        if W.ndim != 2 or W.numel() == 0:
            raise ValueError(f"W must be a matrix [d_out, d_in] that is not empty, got {list(W.shape)}")
        if not bool(W.isfinite().all()):
            raise ValueError(f"W must be finite, got {int((~W.isfinite()).sum())} values that are not")
        self.layout(*W.shape)

    def _parameters(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor | int]:
        half = 2 ** (self.bits - 1)
        scale = {
            "restricted": lambda: torch.maximum(-lo, hi) / (half - 1),
            "full": lambda: torch.maximum(-lo, hi) / (half - 0.5),
            "no-clip": lambda: torch.maximum(-lo / half, hi / (half - 1)),
            "asymmetric": lambda: (hi - lo) / (2 * half - 1),
        }[self.scheme]().to(self.scale_dtype)
        if not bool(scale.isfinite().all()):
            raise ValueError(f"W is too large for scales in {self.scale_dtype}; give another scale_dtype")
        # A group of zeros, or of numbers below the smallest scale, is all zero on any grid.
        scale = scale.where(scale > 0, 1.0)
        if self.symmetric:
            return scale, half
        return scale, (-lo / scale.to(lo.dtype)).round().clamp(0, 2 * half - 1).to(torch.uint8)

    def _error(self, groups: Tensor, scale: Tensor, zero: Tensor | int) -> Tensor:
        restored = _decode(self.encode(groups, scale, zero), scale, zero, groups.dtype)
        return (restored - groups).abs().pow(self.clip_norm).sum(-1)


def _decode(codes: Tensor, scale: Tensor, zero: Tensor | int, dtype: torch.dtype) -> Tensor:
    steps = codes.reshape(*scale.shape, -1).to(dtype) - _spread(zero)
    return (steps * scale.to(dtype)[..., None]).view(codes.shape)


def _spread(zero: Tensor | int) -> Tensor | int:
    """A zero point for every group, to be added to all weights of the group."""
    return zero if isinstance(zero, int) else zero[..., None].to(torch.int16)
