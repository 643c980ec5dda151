"""Rounding with error feedback: the solver of GPTQ, LDLQ, GPTVQ and SparseGPT.

Columns are rounded one block after the other; each block's error is made up for by the columns that are
still to come, as well as the layer's inputs allow. With H = 2/N sum x x' and its damped form H', let U be the
upper Cholesky factor of H'^-1 (U'U = H'^-1). For a block B of columns

    Q_B = encode(W_B),    E_B = (W_B - Q_B) U_BB^-1,    W_rest <- W_rest - E_B U_B,rest.

This is exact block by block: with the original W, sum ||E_B||^2 = tr((W - Q) H' (W - Q)').

Implements arXiv 2210.17323, section 3, for any encoder and for blocks of more than one column (LDLQ of arXiv
2307.13304 is the same in the opposite order). Everything is computed in float64: in float32 the
factorisation of a matrix from few tokens fails.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import LongTensor, Tensor

__all__ = ["Feedback", "Step", "by_diagonal", "damped", "feedback_quantize", "inverse_factor"]


class Step(NamedTuple):
    """What an encoder sees, columns in the order of processing: `start`, the first of the block; `w`
    [d_out, v], the block; `W` [d_out, d_in], those before `start` already rounded, those of the same `lazy`
    block up to date; `U` [d_in, d_in]. `w` and `W` are views: an encoder must not write into them."""

    start: int
    w: Tensor
    W: Tensor
    U: Tensor


class Feedback(NamedTuple):
    """Result: `Q` [d_out, d_in] float64 and `codes` [d_out, c d_in / v] in the order of W, and the `loss`
    sum ||E||^2, which is tr((W - Q) H' (W - Q)')."""

    Q: Tensor
    codes: Tensor
    loss: float


def feedback_quantize(
    W: Tensor,
    H: Tensor,
    encode: Callable[[Step], tuple[Tensor, Tensor]],
    *,
    vdim: int = 1,
    order: LongTensor | None = None,
    damp: float = 0.01,
    lazy: int = 128,
) -> Feedback:
    """Round W column block by column block, feeding each error back.

    Parameters
    ----------
    W : [d_out, d_in], any floating dtype; it is not changed.
    H : [d_in, d_in], symmetric, 2/N sum x x' (`Stats.H`); any factor gives the same result.
    encode : Step -> (values [d_out, v] of the block, codes [d_out, c]).
    vdim : v, columns rounded together (GPTQ: 1; vector codebooks: 2 to 8), a divisor of d_in.
    order : permutation [d_in / v] of the blocks, the first to be rounded first (`by_diagonal`); None: as
        given.
    damp : H' = H + damp mean(diag H) I, > 0 unless H has full rank; usual 0.01.
    lazy : columns whose errors reach the columns after them in one product, a multiple of v. It changes the
        speed and not the result, unless `encode` looks at columns of `Step.W` beyond its own lazy block.

    Raises ValueError for shapes, a permutation or numbers that do not fit, and for an H' that is not positive
    definite.

    Examples
    --------
    >>> W, x = torch.tensor([[0.6, 0.6]]), torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    >>> result = feedback_quantize(W, 2 / 3 * x.T @ x, lambda step: (step.w.round(), step.w.round()), damp=0)
    >>> result.Q                                # the second entry makes up for the first, rounded up
    tensor([[1., 0.]], dtype=torch.float64)
    """
    d_out, d_in = _check(W, H, vdim, lazy)
    order = _check_order(order, d_in // vdim, W.device)
    columns = (order[:, None] * vdim + torch.arange(vdim, device=W.device)).flatten()
    U = inverse_factor(H[columns][:, columns], damp)
    # Transposed, so that a column of W is contiguous.
    Wt = W.detach().T[columns].to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    codes, loss, diagonal = [], 0.0, U.diagonal().tolist()
    for first in range(0, d_in, lazy):
        last = min(first + lazy, d_in)
        errors = Wt.new_empty(last - first, d_out)
        for start in range(first, last, vdim):
            stop = start + vdim
            block = Wt[start:stop]
            values, code = encode(Step(start, block.T, Wt.T, U))
            error = errors[start - first : stop - first]
            torch.sub(block, values.T, out=error)
            if vdim == 1:
                error /= diagonal[start]
                Wt[stop:last].addr_(U[start, stop:last], error[0], alpha=-1)
            else:
                corner = U[start:stop, start:stop].T
                error.copy_(torch.linalg.solve_triangular(corner, error, upper=False))
                Wt[stop:last].addmm_(U[start:stop, stop:last].T, error, alpha=-1)
            block.copy_(values.T)
            codes.append(code)
        Wt[last:].addmm_(U[first:last, last:].T, errors, alpha=-1)
        loss += float(errors.square().sum())
    back = order.argsort()
    in_order = torch.stack(codes)[back].transpose(0, 1).flatten(1)
    return Feedback(Wt[columns.argsort()].T.contiguous(), in_order.contiguous(), loss)


def by_diagonal(H: Tensor, vdim: int = 1) -> LongTensor:
    """The permutation of blocks by falling diagonal of H ("act-order"), sums over blocks of v columns.

    >>> by_diagonal(torch.diag(torch.tensor([1.0, 3.0, 2.0]))).tolist()
    [1, 2, 0]
    """
    if H.ndim != 2 or vdim < 1 or len(H) % vdim:
        raise ValueError(f"vdim must be a divisor of {len(H)}, got {vdim!r}")
    return H.diagonal().view(-1, vdim).sum(1).argsort(descending=True, stable=True)


def damped(H: Tensor, damp: float) -> Tensor:
    """H' = H + damp mean(diag H) I in float64; inputs that never occurred (H_jj = 0) count as 1."""
    H = H.to(torch.float64, copy=True)
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    return H


def inverse_factor(H: Tensor, damp: float) -> Tensor:
    """U, upper triangular, with U'U = (H')^-1, H' = `damped(H, damp)`; float64.

    Raises ValueError for a negative damp and where H' is not positive definite.

    >>> H = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> U = inverse_factor(H, damp=0.5)
    >>> torch.allclose(torch.linalg.inv(U.T @ U), damped(H, 0.5))
    True
    """
    if not damp >= 0:
        raise ValueError(f"damp must be a number >= 0, got {damp!r}")
    lower, failed = torch.linalg.cholesky_ex(damped(H, damp))
    if failed:
        raise ValueError(
            f"H is not positive definite with damp = {damp}: raise damp, or calibrate with more tokens "
            f"than the {len(H)} inputs"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def _check(W: Tensor, H: Tensor, vdim: int, lazy: int) -> tuple[int, int]:
    if not W.is_floating_point() or W.ndim != 2 or W.numel() == 0 or not bool(W.isfinite().all()):
        raise ValueError(
            f"W must be a finite floating-point matrix [d_out, d_in], got {W.dtype} {list(W.shape)}"
        )
    d_out, d_in = W.shape
    if H.shape != (d_in, d_in) or not bool(H.isfinite().all()):
        raise ValueError(f"H must be finite, [{d_in}, {d_in}] for W {list(W.shape)}, got {list(H.shape)}")
    if type(vdim) is not int or vdim < 1 or d_in % vdim:
        raise ValueError(f"vdim must be a divisor of d_in = {d_in}, got {vdim!r}")
    if type(lazy) is not int or lazy < 1 or lazy % vdim:
        raise ValueError(f"lazy must be a multiple of vdim = {vdim}, got {lazy!r}")
    return d_out, d_in


def _check_order(order: LongTensor | None, blocks: int, device: torch.device) -> LongTensor:
    everything = torch.arange(blocks, device=device)
    if order is None:
        return everything
    if order.shape != (blocks,) or not torch.equal(order.sort().values, everything):
        raise ValueError(f"order must be a permutation of 0..{blocks - 1}, got {list(order.shape)}")
    return order
