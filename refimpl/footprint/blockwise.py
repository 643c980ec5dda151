"""Block-wise quantisation to 8 bits with the dynamic map (Dettmers et al. 2110.02861).

A tensor is read as one line of numbers and cut into blocks. Each block is divided by its largest magnitude
(absmax), and each quotient in [-1, 1] is replaced by the index of the nearest of 256 fixed values, the map.
An outlier therefore coarsens its own block only. Bytes per element: 1 + 4 / block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MAPS", "dequantise_blockwise", "dynamic_map", "linear_map", "n_blocks", "quantise_blockwise"]

EXPONENTS = 7  # decades of the dynamic map: 10^0 down to 10^-6


def dynamic_map(signed: bool) -> Tensor:
    """Return the 256 values of the 8-bit dynamic data type, ascending [256], float32.

    Implements dynamic tree quantisation (2110.02861, section 1.3; unsigned: its section 2.2). The bits of a
    magnitude are k zeros, a one, and f bits more. The zeros count decades, the f bits cut the decade evenly:

        value = 10^-k · (0.1 + 0.9 · (j + 1/2) / 2^f),    j = 0 … 2^f - 1,  k = 0 … 6

    Large values get many fraction bits and small ones many decades. Signed: one bit is the sign, f = 6 - k.
    Unsigned: the bit of the sign lengthens the fraction, f = 7 - k. That makes 2 · 127 or 254 values; the two
    codes left over stand for 0 and 1.

    Parameters
    ----------
    signed : True for values of both signs (Adam's m), False for values >= 0 (Adam's v).

    Raises TypeError for a `signed` that is no bool.

    Examples
    --------
    >>> m, v = dynamic_map(True), dynamic_map(False)
    >>> m[0].item(), m[127].item(), m[-1].item()
    (-0.992968738079071, 0.0, 1.0)
    >>> v[0].item(), round(v[1].item() * 1e6, 3), v[-1].item()
    (0.0, 0.325, 1.0)
    """
    _check_signed(signed)
    values = [0.0, 1.0]
    for k in range(EXPONENTS):
        steps = 2 ** (EXPONENTS - 1 - k if signed else EXPONENTS - k)
        decade = [10.0**-k * (0.1 + 0.9 * (j + 0.5) / steps) for j in range(steps)]
        values += decade + [-value for value in decade] if signed else decade
    return torch.tensor(sorted(values))


def linear_map(signed: bool) -> Tensor:
    """Return 256 evenly spaced values, ascending [256], float32: the baseline, plain int8 or uint8.

    Signed: -128/127 … 127/127, whose first is never the nearest; unsigned: 0 … 255/255.

    Examples
    --------
    >>> linear_map(True)[128].item(), linear_map(False)[51].item()
    (0.0, 0.20000000298023224)
    """
    _check_signed(signed)
    return torch.arange(-128, 128) / 127 if signed else torch.arange(256) / 255


MAPS = {"dynamic": dynamic_map, "linear": linear_map}


def n_blocks(numel: int, block: int | None = 256) -> int:
    """Return how many blocks, and so absmax values, a tensor has; the last block may be shorter.

    Parameters: `numel` >= 1; `block`, elements per block >= 1, None for one block over the whole tensor.
    Raises ValueError for a value out of range.

    >>> n_blocks(1000), n_blocks(1000, None)
    (4, 1)
    """
    for name, value in (("numel", numel), ("block", 1 if block is None else block)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return 1 if block is None else math.ceil(numel / block)


def quantise_blockwise(x: Tensor, table: Tensor, block: int | None = 256) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 of the shape of `x`, and absmax, float32 [blocks].

    Implements 2110.02861, section 2.1: code_i = argmin_j |table_j - x_i / absmax_b|, where absmax_b is the
    largest |x_i| of block b; exactly between two values the lower one wins. Blocks run over `x` row by row.

    Parameters
    ----------
    x : floating-point tensor of any shape, not empty, finite; all >= 0 if the table has no negative values.
    table : the map, float32 [256], ascending, on the device of `x`.
    block : elements per block, default 256 (today's libraries; the paper has 2048); None for one block.

    Raises TypeError or ValueError for arguments that are not so.

    Examples
    --------
    >>> codes, absmax = quantise_blockwise(torch.tensor([0.1, -8.0, 8.0, 0.0]), dynamic_map(True), block=2)
    >>> codes.tolist(), absmax.tolist()
    ([159, 0, 255, 127], [8.0, 8.0])
    """
    _check_table(table)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.numel() == 0:
        raise ValueError("x must not be empty")
    n_blocks(x.numel(), block)  # refuses a bad block
    flat = x.detach().float()
    if not torch.isfinite(flat).all():
        raise ValueError("x must be finite: no code stands for NaN or an infinity")
    if table[0] >= 0 and (flat < 0).any():
        raise ValueError(
            f"x must be >= 0 for a map without negative values, its least is {flat.min().item()}"
        )
    return encode(x.detach(), table, block)


def dequantise_blockwise(codes: Tensor, absmax: Tensor, table: Tensor, block: int | None = 256) -> Tensor:
    """Return table[code_i] · absmax_b, float32 of the shape of `codes` (2110.02861, section 2.1).

    Parameters: `codes`, uint8 of any shape, and `absmax`, float32 [blocks], from `quantise_blockwise`;
    `table` and `block` as there. Raises TypeError or ValueError for arguments that do not fit together.

    >>> x = torch.tensor([0.5, -0.25, 100.0, 99.0])
    >>> codes, absmax = quantise_blockwise(x, dynamic_map(True), block=2)
    >>> dequantise_blockwise(codes, absmax, dynamic_map(True), block=2)
    tensor([  0.5000,  -0.2504, 100.0000,  99.2969])
    """
    _check_table(table)
    if not isinstance(codes, Tensor) or codes.dtype is not torch.uint8:
        raise TypeError(f"codes must be a uint8 tensor, got {getattr(codes, 'dtype', type(codes).__name__)}")
    if codes.numel() == 0:
        raise ValueError("codes must not be empty")
    blocks = n_blocks(codes.numel(), block)
    if not isinstance(absmax, Tensor) or absmax.dtype is not torch.float32:
        raise TypeError(
            f"absmax must be a float32 tensor, got {getattr(absmax, 'dtype', type(absmax).__name__)}"
        )
    if absmax.shape != (blocks,):
        raise ValueError(f"absmax must have shape [{blocks}], one per block, got {list(absmax.shape)}")
    return decode(codes, absmax, table, block)


def encode(x: Tensor, table: Tensor, block: int | None) -> tuple[Tensor, Tensor]:
    """`quantise_blockwise` without a look at the values: for tensors on a GPU, fake or known to be right."""
    rows = _rows(x.float(), block)
    absmax = rows.abs().amax(dim=1)
    units = rows / torch.where(absmax == 0, 1.0, absmax)[:, None]  # a block of zeros stays zeros
    midpoints = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(units, midpoints, out_int32=True).to(torch.uint8)
    return codes.flatten()[: x.numel()].view(x.shape), absmax


def decode(codes: Tensor, absmax: Tensor, table: Tensor, block: int | None) -> Tensor:
    """`dequantise_blockwise` without a look at the values."""
    values = table[codes.int()]  # uint8 as an index would be read as a mask
    return (_rows(values, block) * absmax[:, None]).flatten()[: codes.numel()].view(codes.shape)


def _rows(x: Tensor, block: int | None) -> Tensor:
    """The blocks of a tensor as rows [blocks, block], the last one filled with zeros."""
    size = block or x.numel()
    missing = -x.numel() % size
    flat = F.pad(x.flatten(), (0, missing)) if missing else x.flatten()
    return flat.view(-1, size)


def _check_signed(signed: object) -> None:
    if not isinstance(signed, bool):
        raise TypeError(f"signed must be True or False, got {signed!r}")


def _check_table(table: object) -> None:
    if not isinstance(table, Tensor) or table.dtype is not torch.float32 or table.shape != (256,):
        raise ValueError("table must be a float32 tensor [256], as dynamic_map returns")
    if not (table[1:] > table[:-1]).all():
        raise ValueError("table must be ascending")
