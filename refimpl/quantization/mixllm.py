"""MixLLM: 8 bits for the few output rows of the whole model that the loss needs most, 4 for the others.

Implements arXiv 2412.14590 after its authors' code (microsoft/MixLLM). A row of W is an output feature. What
it costs the loss to round row o is estimated for each calibration sequence on its own,

    a_o = g_o' delta_o,   delta = RTN(W) - W,   g = dL/dW,   score_o = sum over sequences |a_o + a_o^2 / 2|

(`refimpl.quantization.mixllm_rows`). The rows of all layers are ranked together; the first p % get 8 bits,
symmetric, the others 4 bits, asymmetric. Both sets are then rounded by GPTQ, groups of columns in the order
of their sum of H_jj.

Differences from the code. (1) With reordered groups it searches the clipping of one group on the inputs of
another; here they are the group's own. (2) It calibrates on the inputs of the uncompressed model; here see
`sequential`. (3) Its 8-bit codes go down to -128, and its 4-bit ranges need not hold 0; the grids here are
"restricted" and "asymmetric" of `Grid`. (4) Its GPU kernels with two-step dequantization are not here; the
8-bit inputs are, as numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import BoolTensor, LongTensor, Tensor, nn

from refimpl.quantization.activations import quantize_activations
from refimpl.quantization.calibrate import Stats
from refimpl.quantization.feedback import Step, by_diagonal, feedback_quantize
from refimpl.quantization.grids import Grid, Quantized, dequantize
from refimpl.quantization.linear import CompressedLinear, frozen_product
from refimpl.quantization.mixllm_rows import row_salience, top_rows
from refimpl.quantization.model import Report, compress_model
from refimpl.quantization.packing import pack_codes, unpack_codes

__all__ = ["MixLLM", "MixReport", "MixedRows", "grouped_gptq", "mixllm"]

# The code tries 80 %, 82 %, ..., 100 % of a group's range.
CLIPS = tuple(percent / 100 for percent in range(80, 101, 2))


class MixedRows(CompressedLinear):
    """Two sets of rows, each on grids of its own.

    Buffers: `rows`, one packed bit for every row (1: high); for each set that is not empty, packed `low` and
    `high` codes, `low_scale`, packed `low_zero`, `high_scale` (symmetric). Settings: the bits of both, the
    group, and `a8`: round inputs to 8 bits, symmetric, per token and group, before the product. Backwards
    the rounding of inputs is passed straight through.
    """

    def dequantize(self) -> Tensor:
        rows = unpack_codes(self.rows, 1, (self.out_features,)).bool()
        W = torch.empty(self.out_features, self.in_features, device=rows.device)
        for name, which in (("low", ~rows), ("high", rows)):
            if name in self._buffers:
                bits, scale = self.settings[name], self._buffers[f"{name}_scale"]
                zero = self._buffers.get(f"{name}_zero")
                zero = 2 ** (bits - 1) if zero is None else unpack_codes(zero, bits, scale.shape)
                codes = unpack_codes(self._buffers[name], bits, (len(scale), self.in_features))
                W[which] = dequantize(Quantized(codes, scale, zero))
        return W

    def forward(self, x: Tensor) -> Tensor:
        if self.settings["a8"]:
            codes, scale = quantize_activations(x.detach().unflatten(-1, (-1, self.settings["group"])))
            x = x + ((codes * scale).flatten(-2).to(x.dtype) - x).detach()
        return frozen_product(x, self.dequantize, self.bias)


@dataclass(frozen=True, eq=False)
class MixLLM:
    """A recipe of `compress_model`: GPTQ of two row sets that were chosen before.

    Parameters
    ----------
    rows : module name -> bool [d_out], True for rows of high precision; see `top_rows`.
    low, high : bits, 2 <= low < high <= 8 (the paper: 4 and 8).
    group : columns that share a scale, a divisor of every d_in (the paper: 128; our small models: 32).
    clip : search the range of each group, for the least error of its outputs.
    a8 : 8-bit inputs.
    damp : as for `GPTQ`.

    Raises ValueError for values that are not allowed, and, called, for a layer without rows.

    Examples
    --------
    >>> from refimpl.quantization.calibrate import stats_of
    >>> generator = torch.Generator().manual_seed(0)
    >>> W, X = torch.randn(8, 32, generator=generator), torch.randn(99, 32, generator=generator)
    >>> layer = MixLLM({"fc": torch.arange(8) == 3}, low=2, group=32)("fc", W, stats_of(X))
    >>> (layer.weight - W).abs().amax(1) < 0.05
    tensor([False, False, False,  True, False, False, False, False])
    """

    rows: Mapping[str, BoolTensor] = field(repr=False)
    low: int = 4
    high: int = 8
    group: int = 128
    clip: bool = True
    a8: bool = True
    damp: float = 0.01

    def __post_init__(self) -> None:
        if type(self.group) is not int or self.group < 1:
            raise ValueError(f"group must be an integer >= 1, got {self.group!r}")
        for grid in self.grids:  # builds them, which checks the bits
            if self.low >= self.high:
                raise ValueError(f"low must be below high, got {self.low} and {grid.bits} bits")
        for name, which in self.rows.items():
            if not isinstance(which, Tensor) or which.dtype is not torch.bool or which.ndim != 1:
                raise ValueError(f"rows of {name} must be a bool tensor [d_out]")
        if not self.damp >= 0:
            raise ValueError(f"damp must be a number >= 0, got {self.damp!r}")

    @property
    def grids(self) -> tuple[Grid, Grid]:
        """The low grid, asymmetric, and the high, symmetric."""
        return Grid(self.low, "asymmetric", self.group), Grid(self.high, "restricted", self.group)

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> MixedRows:
        which = self.rows.get(name)
        if which is None or which.shape != weight.shape[:1]:
            given = "none" if which is None else list(which.shape)
            raise ValueError(f"rows of {name} must be bool [{len(weight)}], got {given}")
        tensors = {"rows": pack_codes(which.to(torch.uint8), 1)}
        for key, part, grid in zip(("low", "high"), (~which, which), self.grids, strict=True):
            if bool(part.any()):
                q = grouped_gptq(weight[part.to(weight.device)], stats.H, grid, self.clip, self.damp)
                tensors |= {key: pack_codes(q.codes, grid.bits), f"{key}_scale": q.scale}
                if isinstance(q.zero, Tensor):
                    tensors[f"{key}_zero"] = pack_codes(q.zero, grid.bits)
        settings = {"low": self.low, "high": self.high, "group": self.group, "a8": self.a8}
        return MixedRows(tuple(weight.shape), tensors, **settings)


@dataclass(frozen=True)
class MixReport:
    """What `mixllm` did: `salience`, name -> [d_out]; `rows`, name -> bool [d_out], the rows with high bits;
    `report` of `compress_model`."""

    salience: dict[str, Tensor] = field(repr=False)
    rows: dict[str, BoolTensor] = field(repr=False)
    report: Report


def mixllm(
    model: nn.Module,
    ids: LongTensor,
    share: float = 0.1,
    *,
    low: int = 4,
    high: int = 8,
    group: int = 128,
    clip: bool = True,
    a8: bool = True,
    sequential: bool = True,
) -> MixReport:
    """Find the salient rows of a model, and compress it, in place.

    Parameters: `model`, of a family of `refimpl.backbone`, uncompressed; `ids` [B, T], T >= 2, calibration
    tokens without padding (the paper: 128 x 2048); `share` of all rows that get `high` bits, 0 to 1 (0.1 is
    the paper's W4.4A8); the rest as for `MixLLM` and `compress_model`. Raises as `row_salience`, `top_rows`,
    `MixLLM` and `compress_model`; the model is then as it was.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> done = mixllm(tiny("llama"), random_ids(4, 24), 0.25, low=2, group=8)
    >>> sum(int(rows.sum()) for rows in done.rows.values()), sum(len(rows) for rows in done.rows.values())
    (156, 624)
    """
    recipe = MixLLM({}, low, high, group, clip, a8)
    top_rows({"": torch.zeros(1)}, share)  # a wrong share is refused before the long part
    salience = row_salience(model, ids, recipe.grids[0])
    rows = top_rows(salience, share)
    report = compress_model(model, replace(recipe, rows=rows), ids, sequential=sequential)
    return MixReport(salience, rows, report)


def grouped_gptq(W: Tensor, H: Tensor, grid: Grid, clip: bool = True, damp: float = 0.01) -> Quantized:
    """GPTQ, whole groups of columns in the order of their falling sum of H_jj, which stay where they are.

    A group's scale is fitted when its turn comes, to the weight as it is then: to the whole range, or, with
    `clip`, for each row to the share of it, 0.8 to 1, of the least (W - W^)_g H_gg (W - W^)_g'.
    Parameters as for `GPTQ.solve`, `grid` with an integer group. Raises ValueError or TypeError likewise.
    """
    grid.check(W)
    g, d_in = grid.group, W.shape[1]
    if type(g) is not int or H.shape != (d_in, d_in):
        raise ValueError(f"H must be [{d_in}, {d_in}] and group an integer, got {list(H.shape)} and {g!r}")
    groups = by_diagonal(H, g)
    order = (groups[:, None] * g + torch.arange(g, device=groups.device)).flatten()
    row_grid, fitted = replace(grid, group="row"), []

    def encode(step: Step) -> tuple[Tensor, Tensor]:
        if step.start % g == 0:
            own = order[step.start : step.start + g]
            block = step.W[:, step.start : step.start + g]
            fitted.append(_clipped(row_grid, block, H[own][:, own]) if clip else row_grid.fit(block))
        scale, zero = fitted[-1]
        zero = zero if isinstance(zero, int) else zero.double()
        codes = grid.steps(step.w, scale.double(), zero)
        return (codes - zero) * scale.double(), codes

    live = W.masked_fill(H.diagonal() == 0, 0)
    result = feedback_quantize(live, H, encode, order=order, damp=damp, lazy=g)
    scales, zeros = zip(*fitted, strict=True)
    back = groups.argsort()
    zero = zeros[0] if grid.symmetric else torch.cat(zeros, 1)[:, back]
    return Quantized(result.codes.to(torch.uint8), torch.cat(scales, 1)[:, back], zero)


def _clipped(grid: Grid, w: Tensor, H: Tensor) -> tuple[Tensor, Tensor | int]:
    """Scale and zero point, [d_out, 1], of the least error of a group's outputs; of equal ones the first."""
    scale, zero = grid.fit(torch.cat([clip * w for clip in CLIPS]))
    many = w.repeat(len(CLIPS), 1)
    delta = dequantize(Quantized(grid.encode(many, scale, zero), scale, zero)).to(w) - many
    best = ((delta @ H.to(w)) * delta).sum(1).view(len(CLIPS), -1).argmin(0)
    chosen = best * len(w) + torch.arange(len(w), device=w.device)
    return scale[chosen], zero if isinstance(zero, int) else zero[chosen]
