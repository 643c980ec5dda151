"""SpQR: GPTQ in tiny groups whose scales are quantized as well, and single weights that stay 16-bit floats.

Implements arXiv 2306.03078 as in its authors' code (Vahe1994/SpQR). With U'U = H'^-1 as in `feedback`:

- weight ij is an outlier if rounding it would cost (w_ij - q_ij)^2 / U_jj^2 > tau, where tau is the
  `threshold` times the mean over columns of Var_i(W_ij) / U_jj^2. Outliers are kept as they are by then (the
  errors of columns before have been fed into them) and leave no error to feed back;
- scales are fitted when a group of columns is reached, without those weights whose absence would lower the
  group's error by more than tau (each left out in turn), and which are therefore likely outliers;
- scales and zero points (not rounded) of `meta_group` neighbouring rows share a grid of `meta_bits`.

Bits per weight: b + 2 b' / g + 64 / (g g') + 32 (1 / d_in + share of outliers), with b' and g' of the
second level. The code keeps the grids of the second level and the outliers in the model's dtype, here it is
float16, and the first are stored as step and minimum (the code's zero point, -minimum / step, has no bound).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import BoolTensor, Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.feedback import Step, by_diagonal, feedback_quantize
from refimpl.quantization.grids import Grid
from refimpl.quantization.linear import CompressedLinear
from refimpl.quantization.packing import pack_codes, unpack_codes
from refimpl.quantization.sparse import pack_mask, unpack_mask

__all__ = ["SpQR", "SpQRLinear", "SpQRSolution", "leave_one_out"]


class SpQRSolution(NamedTuple):
    """`Q` [d_out, d_in] float64, what is stored; `codes` uint8 alike; `outliers`, bool alike; `levels`, for
    scale and zero: codes [d_out, groups] uint8, step and minimum [d_out / g', groups]; `groups` [d_in], the
    group of every column; `loss` tr((W - Q) H' (W - Q)')."""

    Q: Tensor
    codes: Tensor
    outliers: BoolTensor
    levels: dict[str, tuple[Tensor, Tensor, Tensor]]
    groups: Tensor
    loss: float


class SpQRLinear(CompressedLinear):
    """Packed `codes`; for scale and zero packed codes, step, minimum; and the outliers, if any, as CSR.

    Buffers: `codes`; `scale`, `scale_step`, `scale_min`, `zero`, `zero_step`, `zero_min`; `columns` int16
    [n], `pointers` int32 [d_out + 1], `values` [n]; with act-order `groups` int16 [d_in].
    """

    def dequantize(self) -> Tensor:
        s, shape = self.settings, (self.out_features, self.in_features)
        small = (self.out_features, self.in_features // s["group"])
        scale, zero = (
            _second_level(
                unpack_codes(self._buffers[name], s["meta_bits"], small),
                self._buffers[f"{name}_step"],
                self._buffers[f"{name}_min"],
            )
            for name in ("scale", "zero")
        )
        groups = torch.arange(self.in_features, device=scale.device) // s["group"]
        if "groups" in self._buffers:
            groups = self.groups.long()
        W = _restore(unpack_codes(self.codes, s["bits"], shape), scale[:, groups], zero[:, groups])
        if "values" in self._buffers:
            W = W.masked_scatter(unpack_mask(self._buffers, "csr", shape), self.values.to(W.dtype))
        return W


@dataclass(frozen=True)
class SpQR:
    """A recipe of `compress_model`.

    Parameters
    ----------
    bits : of the weights that are no outliers, 2 to 8 (the paper: 2 to 4).
    group : columns that share a scale, a divisor of d_in (the paper: 8 to 32, mostly 16).
    threshold : of outliers, relative; 0.1 to 1, inf for none (0.2 in the paper's near-lossless runs, about
        1 % of the weights); 0 keeps whatever cannot be stored exactly.
    meta_bits, meta_group : bits of scales and zero points; rows that share their grid, a divisor of d_out.
    act_order : columns by falling H_jj, groups formed in that order; costs 16 / d_out bits per weight.
    damp : as for `GPTQ`.
    dtype : of outliers and of the second level's step and minimum.

    Raises ValueError for values that are not allowed.

    Examples
    --------
    >>> from refimpl.quantization.calibrate import stats_of
    >>> generator = torch.Generator().manual_seed(0)
    >>> W, X = torch.randn(16, 64, generator=generator), torch.randn(199, 64, generator=generator)
    >>> W[3, 5] = 40.0
    >>> layer = SpQR(3, threshold=5)("fc", W, stats_of(X))
    >>> layer.weight[3, 5].item(), layer.values.numel(), layer.bits_per_weight  # 3.625, 32 (1 + 17) / 1024
    (40.0, 1, 4.1875)
    """

    bits: int = 3
    group: int = 16
    threshold: float = 0.2
    meta_bits: int = 3
    meta_group: int = 16
    act_order: bool = False
    damp: float = 0.01
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        Grid(self.bits, scale_dtype=self.dtype)  # refuses other bits and dtypes
        for name in ("group", "meta_group"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 2:
                raise ValueError(f"{name} must be an integer >= 2, got {getattr(self, name)!r}")
        if type(self.meta_bits) is not int or not 2 <= self.meta_bits <= 8:
            raise ValueError(f"meta_bits must be an integer from 2 to 8, got {self.meta_bits!r}")
        for name in ("threshold", "damp"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be a number >= 0, got {getattr(self, name)!r}")

    def solve(self, W: Tensor, H: Tensor) -> SpQRSolution:
        """Parameters: `W` [d_out, d_in], `H` [d_in, d_in] = 2/N sum x x'. Raises TypeError or ValueError for
        a W that is no finite matrix, that the groups do not divide or whose scales or outliers the dtype
        cannot hold, and as `feedback_quantize` for H."""
        Grid(self.bits, group=self.group).check(W)
        d_out, d_in = W.shape
        if d_out % self.meta_group:
            raise ValueError(f"meta_group must divide d_out = {d_out}, got {self.meta_group}")
        if H.shape != (d_in, d_in):
            raise ValueError(f"H must be [{d_in}, {d_in}] for W {list(W.shape)}, got {list(H.shape)}")
        order = by_diagonal(H) if self.act_order else torch.arange(d_in, device=W.device)
        outliers = torch.zeros(W.shape, dtype=torch.bool, device=W.device)
        found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"scale": [], "zero": []}
        columns, top = order.tolist(), 2**self.bits - 1
        tau, grid = torch.inf, None

        def encode(step: Step) -> tuple[Tensor, Tensor]:
            nonlocal tau, grid
            at, diagonal = step.start, step.U.diagonal()
            if at == 0 and self.threshold < torch.inf:
                tau = self.threshold * float((step.W.var(0) / diagonal.square()).mean())
            if at % self.group == 0:
                part = slice(at, at + self.group)
                raw = _fit(_without_outliers(step.W[:, part], diagonal[part], self.bits, tau), self.bits)
                for name, value in zip(("scale", "zero"), raw, strict=True):
                    found[name].append(self._quantize_level(value[:, 0]))
                grid = [_second_level(*(t[:, None] for t in found[name][-1])).double() for name in found]
            codes = _steps(step.w, *grid, top)
            values = _restore(codes, *grid)
            if tau < torch.inf:
                far = ((step.w - values) / diagonal[at]).square() > tau
                outliers[:, columns[at]] = far[:, 0]
                # An outlier's code is never read: that of zero compresses best.
                codes = torch.where(far, _steps(torch.zeros_like(step.w), *grid, top), codes)
                values = torch.where(far, step.w.to(self.dtype).double(), values)
            return values, codes

        lazy = self.group * max(1, 128 // self.group)
        live = W.masked_fill(H.diagonal() == 0, 0)
        result = feedback_quantize(live, H, encode, order=order, damp=self.damp, lazy=lazy)
        levels = {
            name: tuple(torch.stack(parts, 1) for parts in zip(*of_groups, strict=True))
            for name, of_groups in found.items()
        }
        stored = [result.Q, *(t for codes, *rest in levels.values() for t in rest)]
        if not all(bool(t.isfinite().all()) for t in stored):
            raise ValueError(f"W has scales, zero points or outliers that {self.dtype} cannot hold")
        groups = order.argsort() // self.group
        return SpQRSolution(result.Q, result.codes.to(torch.uint8), outliers, levels, groups, result.loss)

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> SpQRLinear:
        solved = self.solve(weight, stats.H)
        tensors = {"codes": pack_codes(solved.codes, self.bits)}
        for level, (codes, step, minimum) in solved.levels.items():
            packed = pack_codes(codes, self.meta_bits)
            tensors |= {level: packed, f"{level}_step": step, f"{level}_min": minimum}
        if bool(solved.outliers.any()):
            tensors |= pack_mask(solved.outliers, "csr")
            tensors["values"] = solved.Q[solved.outliers].to(self.dtype)
        if self.act_order:
            tensors["groups"] = solved.groups.to(torch.int16)
        return SpQRLinear(
            tuple(weight.shape), tensors, bits=self.bits, group=self.group, meta_bits=self.meta_bits
        )

    def _quantize_level(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [d_out], step and minimum [d_out / g'] of one scale or zero point per row."""
        rows = values.view(-1, self.meta_group)
        step, zero = _fit(rows, self.meta_bits)
        minimum = (-zero * step).to(self.dtype)
        step = step.to(self.dtype)
        spread = step.double().where(step > 0, 1.0)
        codes = ((rows - minimum.double()) / spread).round().clamp(0, 2**self.meta_bits - 1)
        return codes.to(torch.uint8).flatten(), step[:, 0], minimum[:, 0]


def leave_one_out(w: Tensor, diagonal: Tensor, bits: int) -> Tensor:
    """How much a group's error sum_j (w_j - q_j)^2 / U_jj^2 falls if weight j is left out, and does not shape
    the scale either.

    Parameters: `w` [d_out, g]; `diagonal` [g], of U; `bits`. Returns [d_out, g].

    >>> leave_one_out(torch.tensor([[0.0, 1.0, 2.0, 3.0, 90.0]]), torch.ones(5), 2)
    tensor([[ 9.,  1.,  4.,  9., 14.]])
    """
    g = w.shape[1]
    j, k = torch.arange(g, device=w.device)[:, None], torch.arange(g - 1, device=w.device)
    others = k + (k >= j)  # row j: all columns but j

    def error(x: Tensor, d: Tensor) -> Tensor:
        scale, zero = _fit(x, bits)
        return ((_restore(_steps(x, scale, zero, 2**bits - 1), scale, zero) - x) / d).square().sum(-1)

    return error(w, diagonal)[:, None] - error(w[:, others], diagonal[others])


def _without_outliers(w: Tensor, diagonal: Tensor, bits: int, tau: float) -> Tensor:
    """A group [d_out, g] with its likely outliers replaced by the mean of the others, to fit a scale to."""
    if tau == torch.inf:
        return w
    usual = leave_one_out(w, diagonal, bits) <= tau
    mean = (w * usual).sum(1, keepdim=True) / usual.sum(1, keepdim=True).clamp_min(1)
    return w.where(usual, mean)


def _fit(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point, both not rounded, of the range of x along its last dimension, [..., 1].

    The range need not hold 0. Where it is empty the code takes [-1, 1].
    """
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    lo, hi = lo.where(lo < hi, -1.0), hi.where(lo < hi, 1.0)
    scale = (hi - lo) / (2**bits - 1)
    return scale, -lo / scale


def _steps(w: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    return (w / scale.clamp_min(1e-9) + zero).round().clamp(0, top)


def _restore(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return scale * (codes - zero)


def _second_level(codes: Tensor, step: Tensor, minimum: Tensor) -> Tensor:
    """minimum + step * code, [d_out, n] from codes [d_out, n] and the rest [d_out / g', n], in float32."""
    rows = len(codes) // len(step)
    step, minimum = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (step, minimum))
    return minimum.repeat_interleave(rows, 0) + step.repeat_interleave(rows, 0) * codes
