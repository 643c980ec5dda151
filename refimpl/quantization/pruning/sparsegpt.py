"""SparseGPT: leave weights out column by column, and let the columns to come make up for each of them.

Pruning is rounding to {w, 0}: the solver is that of GPTQ (`refimpl.quantization.feedback`), with damping
0.01. Optimal brain surgery (OBS) says that removing w_j alone costs w_j^2 / [H^-1]_jj; when all columns
before j are settled, the inverse of what is left of H has U_jj^2 there (U'U = H'^-1), hence the score
w_ij^2 / U_jj^2.

Implements arXiv 2301.00774 (Algorithm 1) as in its authors' code, mask and grid in one pass included. Here
exactly floor(k s) of the k weights of a block go (the code's `<=` takes one more), and the rounding of the
kept values to the stored dtype is fed back like any other error.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.feedback import Step, damped, feedback_quantize, inverse_factor
from refimpl.quantization.grids import Grid, Quantized
from refimpl.quantization.pruning.unstructured import Pruner, check_weight, highest
from refimpl.quantization.sparse import SparseLinear, n_m_mask

__all__ = ["Pruned", "SparseGPT", "refit"]


class Pruned(NamedTuple):
    """`Q` [d_out, d_in], float64, what is stored; `keep`, bool; `quantized`, the codes and their grid, or
    None; `loss` tr((W - Q) H' (W - Q)')."""

    Q: Tensor
    keep: Tensor
    quantized: Quantized | None
    loss: float


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """Error feedback with a mask that is chosen on the way.

    Parameters
    ----------
    sparsity, dtype : as for `Pruner`. A share holds in each block of columns, over all rows together, chosen
        when its first column is reached; n:m when the first of the m columns is reached.
    grid : None; or a `Grid`, to round what is kept in the same pass: scales per row from the original
        weight, those of groups from the weight as it is when the group is reached.
    block : columns of a block, a multiple of m (the paper: 128).
    damp : share of the mean of diag H that is added to it (the paper: 0.01).

    An object is a recipe of `compress_model`. Raises ValueError as `Pruner`, and for another block or damp.

    Examples
    --------
    >>> from refimpl.quantization.pruning.unstructured import Magnitude
    >>> generator = torch.Generator().manual_seed(0)
    >>> W = torch.randn(8, 16, generator=generator)
    >>> X = torch.randn(64, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    >>> error = lambda Q: float(((Q - W) @ X.T).square().sum())
    >>> error(SparseGPT(0.5).solve(W, X.T @ X).Q.float()) < 0.5 * error(Magnitude(0.5)("fc", W).weight)
    True
    """

    grid: Grid | None = None
    block: int = 128
    damp: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        m = self.pattern[1] if self.pattern else 1
        if type(self.block) is not int or self.block < 1 or self.block % m:
            raise ValueError(f"block must be a multiple of {m}, >= 1, got {self.block!r}")
        if not self.damp >= 0:
            raise ValueError(f"damp must be a number >= 0, got {self.damp!r}")

    def solve(self, W: Tensor, H: Tensor) -> Pruned:
        """Prune W [d_out, d_in] for inputs with H = 2/N sum x x' [d_in, d_in].

        Raises TypeError or ValueError for a W that is no finite matrix, that n:m or the grid's groups do not
        divide, and as `feedback_quantize` for H.
        """
        check_weight(W)
        d_in = W.shape[1]
        if self.pattern and d_in % self.pattern[1]:
            raise ValueError(f"d_in must be a multiple of {self.pattern[1]}, got {d_in}")
        keep = torch.ones(W.shape, dtype=torch.bool, device=W.device)
        width = self.grid.group if self.grid and isinstance(self.grid.group, int) else d_in
        scale, zero = self.grid.fit(W) if self.grid else (None, None)
        span = self.pattern[1] if self.pattern else self.block

        def encode(step: Step) -> tuple[Tensor, Tensor]:
            at = step.start
            if at % span == 0:
                part = slice(at, min(at + span, d_in))
                score = (step.W[:, part] / step.U.diagonal()[part]).square()
                keep[:, part] = self._select(score)
            kept = keep[:, at, None]
            if self.grid is None:
                return step.w.to(self.dtype).double() * kept, kept
            g = at // width
            if width < d_in and at % width == 0:
                s, z = replace(self.grid, group="row").fit(step.W[:, at : at + width])
                scale[:, [g]] = s
                if isinstance(zero, Tensor):
                    zero[:, [g]] = z
            s, z = scale[:, [g]].double(), zero if isinstance(zero, int) else zero[:, [g]].double()
            codes = self.grid.steps(step.w, s, z)
            return (codes - z) * s * kept, codes

        # Whole blocks and groups, so that their columns are up to date when they are reached.
        lazy = math.lcm(self.block, width if width < d_in else 1)
        live = W.masked_fill(H.diagonal() == 0, 0) if H.shape == (d_in, d_in) else W
        result = feedback_quantize(live, H, encode, damp=self.damp, lazy=lazy)
        quantized = Quantized(result.codes.to(torch.uint8), scale, zero) if self.grid else None
        return Pruned(result.Q, keep, quantized, result.loss)

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> SparseLinear:
        result = self.solve(weight, stats.H)
        if result.quantized is None:
            return SparseLinear.pack(result.Q, result.keep, self.storage, self.dtype)
        return SparseLinear.pack_codes(result.quantized, result.keep, self.grid.bits, self.storage)

    def _select(self, score: Tensor) -> Tensor:
        if self.pattern:
            return n_m_mask(score, *self.pattern)
        return highest(score.flatten(), self.sparsity).view(score.shape)


def refit(W: Tensor, H: Tensor, keep: Tensor, damp: float = 0.01) -> Tensor:
    """The best weights on a given mask: what SparseGPT could reach, at the price of one solve for each row.

    min over W^ that are 0 where `keep` is False of tr((W - W^) H' (W - W^)'):
    w^_K = w_K + H'_KK^-1 H'_KP w_P, for each row, with K its kept columns and P the others.

    Parameters: `W` [d_out, d_in]; `H` [d_in, d_in]; `keep`, bool, as W; `damp`, as for `SparseGPT`. Returns
    [d_out, d_in], float64. Raises ValueError for shapes that do not fit and an H' that is singular.

    >>> W, H = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> refit(W, H, torch.tensor([[True, False]]), damp=0)
    tensor([[1.5000, 0.0000]], dtype=torch.float64)
    """
    check_weight(W)
    if H.shape != (W.shape[1], W.shape[1]) or keep.shape != W.shape or keep.dtype is not torch.bool:
        raise ValueError(
            f"H must be [{W.shape[1]}, {W.shape[1]}] and keep bool {list(W.shape)}, "
            f"got {list(H.shape)}, {keep.dtype} {list(keep.shape)}"
        )
    inverse_factor(H, damp)  # raises where H' is not positive definite
    H, result = damped(H, damp), torch.zeros(W.shape, dtype=torch.float64, device=W.device)
    for row, w, kept in zip(result, W.double(), keep, strict=True):
        row[kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ w)
    return result
