"""E8P: eight weights in 16 bits, 65 536 points of a shifted E8 lattice that a table of 256 rows describes.

Implements arXiv 2402.04396, section 4, with the codes of its authors' program, so that a code here is the
same point there. A point is sigma s + c: a row s of the table, positive half-integers; signs sigma; and c,
+1/4 or -1/4 in all coordinates. The coordinates of sigma s have an even sum: seven signs are free, the eighth
follows. So 8 bits choose s, 7 the signs, 1 the shift.

Bits of a code: the row in 15 .. 8; in 7 .. 1 the signs of coordinates 7, 5, 3, 1, 6, 4, 2 (1: flipped). The
shift is -1/4 where the number of ones among bits 7 .. 0 is odd; coordinate 0 is flipped where that of bits
7 .. 1 is. In rows whose sum is odd, coordinate 7 starts from -s_7.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import LongTensor, Tensor

__all__ = ["CODEBOOKS", "Codebook", "decode", "e8_ball", "nearest", "patterns"]

# Where the 29 rows of squared norm 12 that complete the table have 1/2 and not 3/2; a choice of the authors.
_NORM_12 = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 "
    "045 067 057 047 056 046 014 237"
)
_BIT = (0, 4, 1, 5, 2, 6, 3, 7)  # the bit that holds the sign of coordinate i
_CHUNK = 512  # vectors at a time: [chunk, 256] floats stay in the cache


@cache
def patterns() -> Tensor:
    """The table of absolute values [256, 8]: 227 rows of squared norm <= 10 in lexicographic order, 29 of 12.

    >>> patterns().shape, int((patterns().square().sum(1) <= 10).sum())
    (torch.Size([256, 8]), 227)
    """
    values = torch.cartesian_prod(*[torch.tensor([0.5, 1.5, 2.5])] * 8)
    last = torch.full((29, 8), 1.5)
    for row, halves in zip(last, _NORM_12.split(), strict=True):
        row[[int(i) for i in halves]] = 0.5
    return torch.cat((values[values.square().sum(1) <= 10], last))


def decode(codes: LongTensor) -> Tensor:
    """The points [..., 8], float32, of codes 0 .. 65535 [...].

    Raises ValueError for other codes.

    >>> decode(torch.tensor([0, 1]))
    tensor([[0.7500, 0.7500, 0.7500, 0.7500, 0.7500, 0.7500, 0.7500, 0.7500],
            [0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if codes.is_floating_point() or (codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > 65535)):
        raise ValueError(f"codes must be integers from 0 to 65535, got {codes.dtype} {list(codes.shape)}")
    codes = codes.long()
    return _signed(codes.device)[codes >> 8] * _signs(codes.device)[codes & 255] + _shift(codes)[..., None]


def nearest(x: Tensor) -> LongTensor:
    """The code of the point nearest to each x [..., 8]: exact, without looking at 65 536 points.

    For a shift c let y = x - c. The best signs are those of y, unless they make the sum odd: then the
    cheapest coordinate is flipped. So each row s has the score

        |y| . s - |s|^2 / 2 - [sum odd] 2 min_i |y_i| s_i,

    and |y|^2 minus twice the best score is the squared distance. Raises ValueError unless x is finite with 8
    numbers on its last axis.

    >>> nearest(torch.full((8,), 0.7)), nearest(decode(torch.tensor([5, 40000])))
    (tensor(0), tensor([    5, 40000]))
    """
    if x.shape[-1:] != (8,) or not x.is_floating_point() or not bool(x.isfinite().all()):
        raise ValueError(f"x must be finite, floating point, [..., 8], got {x.dtype} {list(x.shape)}")
    parts = [_nearest(part) for part in x.detach().reshape(-1, 8).split(_CHUNK)]
    return torch.cat(parts).view(x.shape[:-1])


@cache
def e8_ball() -> Tensor:
    """256 points [256, 8] of the lattice E8: 0, the 240 shortest, of norm sqrt(2), and 15 of the 16 +-2 e_i.

    >>> e8_ball().square().sum(1).unique(return_counts=True)
    (tensor([0., 2., 4.]), tensor([  1, 240,  15]))
    """
    whole = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 8)
    half = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 8)
    points = torch.cat((whole, half))
    points = points[(points.sum(1) % 2 == 0) & (points.square().sum(1) <= 2)]
    return torch.cat((points, 2 * torch.eye(8), -2 * torch.eye(8)[:7]))


class Codebook(NamedTuple):
    """2, 3 or 4 bits per weight: E8P, alone or with a second code for what is left, the residual.

    `scale`: the rms of what is to be rounded, at which Gaussian numbers lose least; `residual_scale`: the
    residual is multiplied by it. Both are the constants of the authors' program.
    """

    bits: int
    scale: float
    residual_scale: float | None = None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values [N, 8] in the dtype of x and codes, uint8 [N, bits], of x [N, 8].

        >>> x = torch.linspace(-1, 1, 8)[None]
        >>> values, codes = CODEBOOKS[4].encode(x)
        >>> codes.shape, float((values - x).abs().max()) < 0.3
        (torch.Size([1, 4]), True)
        """
        code = nearest(x)
        parts = [code >> 8, code & 255]
        if self.bits > 2:
            rest = (x - decode(code).to(x)) * self.residual_scale
            if self.bits == 3:
                ball = e8_ball().to(x)
                parts.append((rest @ ball.T - ball.square().sum(1) / 2).argmax(-1))
            else:
                second = nearest(rest)
                parts += [second >> 8, second & 255]
        codes = torch.stack(parts, -1).to(torch.uint8)
        return self.decode(codes).to(x), codes

    def decode(self, codes: Tensor) -> Tensor:
        """Values [..., 8], float32, of codes, uint8 [..., bits]; raises ValueError for others."""
        if codes.dtype is not torch.uint8 or codes.shape[-1:] != (self.bits,):
            raise ValueError(f"codes must be uint8 [..., {self.bits}], got {codes.dtype} {list(codes.shape)}")
        c = codes.long()
        values = decode(c[..., 0] << 8 | c[..., 1])
        if self.bits == 2:
            return values
        rest = e8_ball().to(codes.device)[c[..., 2]] if self.bits == 3 else decode(c[..., 2] << 8 | c[..., 3])
        return values + rest / self.residual_scale


CODEBOOKS = {2: Codebook(2, 1.03), 3: Codebook(3, 0.98, 2.04), 4: Codebook(4, 1.03, 3.45)}


def _nearest(x: Tensor) -> LongTensor:
    table = patterns().to(x)
    half_norm = table.square().sum(1) / 2
    odd_rows = table.sum(1) % 2 == 1
    best: list[tuple[Tensor, Tensor, Tensor]] = []
    for shift in (0.25, -0.25):
        y = x - shift
        size = y.abs()
        odd = ((y < 0).sum(1) % 2 == 1)[:, None] ^ odd_rows
        cheapest = size[:, :1] * table[:, 0]
        product = torch.empty_like(cheapest)
        for i in range(1, 8):
            torch.mul(size[:, i : i + 1], table[:, i], out=product)
            torch.minimum(cheapest, product, out=cheapest)
        score, row = (size @ table.T).sub_(half_norm).sub_(cheapest.mul_(odd), alpha=2).max(1)
        best.append((y.square().sum(1) - 2 * score, row, odd.gather(1, row[:, None])[:, 0]))
    (plus, plus_row, plus_odd), (minus, minus_row, minus_odd) = best
    down = minus < plus
    row = torch.where(down, minus_row, plus_row)
    odd = torch.where(down, minus_odd, plus_odd)
    y = x - torch.where(down, -0.25, 0.25)[:, None]
    flip = (y.abs() * table[row]).argmin(1, keepdim=True)
    negative = (y < 0).scatter(1, flip, (y < 0).gather(1, flip) ^ odd[:, None])
    negative[:, 7] ^= odd_rows[row]
    bits = (negative[:, 1:] << torch.tensor(_BIT[1:], device=x.device)).sum(1)
    # Bit 0 states the shift; what coordinate 0 needs follows from the other seven.
    return row << 8 | bits | (_ones(bits) & 1 ^ down.long())


def _signed(device: torch.device) -> Tensor:
    """The table with minus s_7 in the rows whose sum is odd: then an even number of flips is always right."""
    table = patterns().to(device, copy=True)
    table[:, 7] *= 1 - 2 * (table.sum(1) % 2)
    return table


def _signs(device: torch.device) -> Tensor:
    """The signs [256, 8] of the low bytes of codes."""
    low = torch.arange(256, device=device)
    low = low ^ (_ones(low) & 1)
    return 1.0 - 2 * (low[:, None] >> torch.tensor(_BIT, device=device) & 1)


def _shift(codes: LongTensor) -> Tensor:
    return 0.25 - 0.5 * (_ones(codes & 255) & 1)


def _ones(n: LongTensor) -> LongTensor:
    """The number of ones among the low 8 bits."""
    return sum(n >> i & 1 for i in range(8))
