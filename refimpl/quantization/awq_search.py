"""The two searches of AWQ for one matrix: scales for its input channels, and how far to clip its groups.

Implements arXiv 2306.00978 as its authors' code does; see `refimpl.quantization.awq` for the whole model.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.grids import Grid, dequantize

__all__ = ["RATIOS", "Loss", "check_ratios", "clip_groups", "linear_loss", "search", "search_scale"]

RATIOS = tuple(i / 20 for i in range(20))
SHRINK = tuple(1 - i / 20 for i in range(10))

# The mean squared error of the outputs for a W^, or anything >= the bound if it is not below the bound.
Loss = Callable[[Tensor, float], float]


def search_scale(
    W: Tensor, stats: Stats, grid: Grid, ratios: Sequence[float] = RATIOS
) -> tuple[float, Tensor, float, float]:
    """The best scales for one linear layer by itself.

    Parameters: `W` [d_out, d_in]; `stats` of its inputs; `grid`; `ratios` as for `awq`. Returns what `search`
    returns. Raises as `Grid.quantize` for W, and ValueError for the ratios.

    >>> from refimpl.quantization.calibrate import stats_of
    >>> generator = torch.Generator().manual_seed(0)
    >>> W, X = torch.randn(16, 8, generator=generator), torch.randn(64, 8, generator=generator)
    >>> X[:, 3] *= 50                                                     # a channel that carries much
    >>> ratio, s, plain, loss = search_scale(W, stats_of(X), Grid(3, group=4))
    >>> loss < 0.5 * plain, int(s.argmax())
    (True, 3)
    """
    check_ratios(ratios)
    grid.check(W)
    return search(W, stats.absmean, grid, ratios, linear_loss(W, stats.H))


def search(
    W: Tensor, absmean: Tensor, grid: Grid, ratios: Sequence[float], loss: Loss
) -> tuple[float, Tensor, float, float]:
    """The best ratio, its scale s [d_in], the loss without scales and the loss with s.

    Parameters: `W` [d_out, d_in], all layers with this input one below the other; `absmean` [d_in], mean
    |x_j|; `loss` of W^ = Q(W diag(s)) diag(s)^-1. Raises ValueError where no loss is finite.
    """
    W = W.float()
    least = plain = float("inf")
    for ratio in ratios:
        s = absmean.to(W.dtype).pow(ratio).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        found = loss(dequantize(grid.quantize(W * s)) / s, least)
        if ratio == 0:
            plain = found
        if found < least:
            least, best = found, (ratio, s)
    if least == float("inf"):
        raise ValueError("the model's outputs are not finite; load it in float32")
    return *best, plain, least


def linear_loss(W: Tensor, H: Tensor) -> Loss:
    """The loss of one layer y = W x: tr((W^ - W) H (W^ - W)') / (2 d_out), with H = 2/N sum x x'."""
    W, H = W.float(), H.float()

    def loss(W_hat: Tensor, bound: float) -> float:
        e = W_hat - W
        return float(((e @ H) * e).sum()) / (2 * len(W))

    return loss


def clip_groups(W: Tensor, H: Tensor, grid: Grid) -> Tensor:
    """W [d_out, d_in] with every group of weights clipped as far as rounding then costs its output least.

    A group's cost is e H_gg e', e its error after clipping and rounding, H_gg its part of H [d_in, d_in].
    Raises as `Grid.quantize` for W.

    >>> W = torch.tensor([[1.0, 0.3, -0.3, 0.1]])
    >>> clip_groups(W, torch.diag(torch.tensor([0.0, 1.0, 1.0, 1.0])), Grid(2))
    tensor([[ 0.6000,  0.3000, -0.3000,  0.1000]])
    """
    grid.check(W)
    groups = grid.layout(*W.shape)[1]
    parts = W.reshape(len(W), groups, -1)
    g = parts.shape[2]
    blocks = H.to(W.dtype).view(groups, g, groups, g).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    top = parts.abs().amax(-1, keepdim=True)
    best, least = parts, torch.full_like(top, float("inf"))
    for shrink in SHRINK:
        clipped = parts.clamp(-shrink * top, shrink * top)
        e = (dequantize(grid.quantize(clipped.view_as(W))) - W).view_as(parts)
        error = (torch.einsum("ogi,gij->ogj", e, blocks) * e).sum(-1, keepdim=True)
        better = error < least
        best, least = best.where(~better, clipped), least.where(~better, error)
    return best.reshape(W.shape)


def check_ratios(ratios: Sequence[float]) -> None:
    """Raise ValueError unless the first exponent is 0 and all are within 0 .. 1."""
    if len(ratios) == 0 or ratios[0] != 0 or not all(0 <= ratio <= 1 for ratio in ratios):
        raise ValueError(f"ratios must be numbers from 0 to 1, the first one 0, got {list(ratios)}")
