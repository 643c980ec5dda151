"""GPTQ: round column by column, and let the columns to come make up for each error.

Implements arXiv 2210.17323 (Algorithm 1) as in its authors' code: damping 0.01; scales per row from the
original weight, or, with groups, from the weight as it is when the group's first column is reached; inputs
that never occurred get weight 0. Act-order (the code's option, not in the paper's algorithm) rounds columns
of large H_jj first; with groups the scales are then fitted beforehand to the original columns (the code's
"static groups"), so that groups stay where they are and no index per column is stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.feedback import Step, by_diagonal, feedback_quantize
from refimpl.quantization.grids import Grid, Quantized
from refimpl.quantization.linear import GridLinear

__all__ = ["GPTQ"]


@dataclass(frozen=True)
class GPTQ(Grid):
    """Error feedback on a uniform grid.

    Parameters
    ----------
    bits, scheme, group, clip_norm, scale_dtype : the grid, as for `Grid`.
    act_order : round columns in the order of falling H_jj.
    damp : share of the mean of diag H that is added to it (the paper: 0.01).

    An object is a recipe of `compress_model`. Raises ValueError as `Grid`, and for a negative damp.

    Examples
    --------
    >>> from refimpl.quantization.grids import dequantize
    >>> generator = torch.Generator().manual_seed(0)
    >>> W = torch.randn(8, 16, generator=generator)
    >>> X = torch.randn(64, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    >>> error = lambda q: float(((dequantize(q) - W) @ X.T).square().sum())
    >>> error(GPTQ(3).solve(W, X.T @ X)) < 0.5 * error(Grid(3).quantize(W))
    True
    """

    act_order: bool = False
    damp: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damp >= 0:
            raise ValueError(f"damp must be a number >= 0, got {self.damp!r}")

    def solve(self, W: Tensor, H: Tensor) -> Quantized:
        """Codes, scale and zero point of W [d_out, d_in] for inputs with H = 2/N sum x x' [d_in, d_in].

        Raises as `Grid.quantize` for W and as `feedback_quantize` for H.
        """
        self.check(W)
        d_out, d_in = W.shape
        if H.shape != (d_in, d_in):
            raise ValueError(f"H must be [{d_in}, {d_in}] for W {list(W.shape)}, got {list(H.shape)}")
        width = self.group if isinstance(self.group, int) else d_in
        order = by_diagonal(H) if self.act_order else torch.arange(d_in, device=W.device)
        columns = order.tolist()
        refit = width < d_in and not self.act_order
        one_group = Grid(self.bits, self.scheme, "row", self.clip_norm, self.scale_dtype)
        fitted = [] if refit else [self.fit(W)]
        grids = [grid for pair in fitted for grid in _by_group(*pair)]

        def encode(step: Step) -> tuple[Tensor, Tensor]:
            if refit and step.start % width == 0:
                fitted.append(one_group.fit(step.W[:, step.start : step.start + width]))
                grids.extend(_by_group(*fitted[-1]))
            scale, zero = grids[columns[step.start] // width]
            codes = self.steps(step.w, scale, zero)
            return (codes - zero) * scale, codes

        # Whole groups, so that a group's columns are up to date when its scale is fitted.
        lazy = width * max(1, 128 // width)
        live = W.masked_fill(H.diagonal() == 0, 0)
        result = feedback_quantize(live, H, encode, order=order, damp=self.damp, lazy=lazy)
        scales, zeros = zip(*fitted, strict=True)
        zero = zeros[0] if self.symmetric else torch.cat(zeros, 1)
        return Quantized(result.codes.to(torch.uint8), torch.cat(scales, 1), zero)

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> GridLinear:
        return GridLinear.pack(self.solve(weight, stats.H), self.bits)


def _by_group(scale: Tensor, zero: Tensor | int) -> list[tuple[Tensor, Tensor | int]]:
    """Scale and zero point of each group of columns, [d_out, 1] or [1, 1], in the float64 of the solver."""
    scales = scale.double().split(1, dim=1)
    zeros = [zero] * len(scales) if isinstance(zero, int) else zero.double().split(1, dim=1)
    return list(zip(scales, zeros, strict=True))
