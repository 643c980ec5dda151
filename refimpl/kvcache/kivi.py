"""KIVI (2402.02750): keys quantised per channel, values per token, the newest tokens kept as they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.codecs import CONTIGUOUS, DenseTail, first_real

__all__ = ["KIVI", "Quantised", "dequantise", "quantise"]

BITS = (1, 2, 4, 8)


class Quantised(NamedTuple):
    """Packed codes with one scale and one zero point per group; the groups lie along dimension `axis`.

    Attributes
    - codes: uint8, of x's shape, but shorter along `axis` by 8/bits: neighbours share a byte, the first in
      its highest bits.
    - scale, zero: in x's dtype, of x's shape, but along `axis` they count groups.
    - bits; axis: -2 for groups of consecutive tokens (per channel), -1 for groups of channels (per token).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    axis: int


def quantise(x: Tensor, bits: int, group: int, axis: int) -> Quantised:
    """Quantise groups asymmetrically and pack the codes.

    In every group of `group` neighbours along `axis`: zero = min, scale = (max - min) / (2^bits - 1), code =
    round((x - zero) / scale). So |x - dequantised| <= scale/2, and with 1 bit a group is {min, max}. A group
    of equal numbers has scale 0 and is restored exactly; one with NaN or infinity comes back not finite.

    Parameters: x [..., n, D], floating; bits, one of 1, 2, 4, 8; group, a multiple of 8/bits that divides the
    size along axis (KIVI: 32); axis, -2 or -1. Raises ValueError for others, TypeError for x of integers.

    >>> q = quantise(torch.tensor([[0., 1., 2., 3.]]), bits=2, group=4, axis=-1)
    >>> q.codes.tolist(), q.scale.tolist(), dequantise(q).tolist()  # 0b00_01_10_11 = 27
    ([[27]], [[1.0]], [[0.0, 1.0, 2.0, 3.0]])
    """
    if bits not in BITS:
        raise ValueError(f"bits: {bits!r}; allowed: {', '.join(map(str, BITS))}")
    if axis not in (-2, -1):
        raise ValueError(f"axis: {axis!r}; allowed: -2 (tokens), -1 (channels)")
    _check_group("group", group, 8 // bits)
    if not x.is_floating_point():
        raise TypeError(f"x: expected floating-point numbers, got {x.dtype}")
    if x.ndim < 2 or x.shape[axis] % group or not x.numel():
        got = f"x: shape {list(x.shape)}"
        raise ValueError(f"{got}; allowed: [..., n, D], of which dimension {axis} is a multiple of {group}")
    groups = x.unflatten(axis, (-1, group))  # a group's own elements are then at `axis` again
    low, high = groups.aminmax(dim=axis, keepdim=True)
    scale = ((high.float() - low.float()) / (2**bits - 1)).to(x.dtype)
    # Codes count steps of the scale as stored: its rounding to x's dtype must not add to the error.
    codes = (groups.float() - low.float()).div_(torch.where(scale == 0, 1, scale.float())).round_()
    codes = codes.clamp_(0, 2**bits - 1).to(torch.uint8).flatten(axis - 1, axis)
    packed = (codes.unflatten(axis, (-1, 8 // bits)) << _shifts(bits, axis, x)).sum(axis, dtype=torch.uint8)
    return Quantised(packed, scale.squeeze(axis), low.squeeze(axis), bits, axis)


def dequantise(q: Quantised) -> Tensor:
    """Return code · scale + zero in the dtype of the scales, shaped like what was quantised.

    >>> x = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    >>> q = quantise(x, bits=4, group=8, axis=-2)
    >>> bool(((dequantise(q) - x).abs() <= q.scale / 2 + 1e-6).all())
    True
    """
    codes = (q.codes.unsqueeze(q.axis) >> _shifts(q.bits, q.axis, q.codes)) & (2**q.bits - 1)
    groups = codes.flatten(q.axis - 1, q.axis).unflatten(q.axis, (q.scale.shape[q.axis], -1))
    x = groups.to(q.scale.dtype).mul_(q.scale.unsqueeze(q.axis)).add_(q.zero.unsqueeze(q.axis))
    return x.flatten(q.axis - 1, q.axis)


class KIVI(DenseTail):
    """Keys in groups of consecutive tokens per channel, values in groups of channels per token (2402.02750).

    A few channels of the keys are large at every token, so a group must not span channels; values have no
    such channels. Of the prompt's n keys, the last n mod R stay dense, and whenever R are waiting they are
    quantised together: what is quantised never changes. Of the values the last R stay dense, a window that
    slides by a token a step. A forward's own attention sees its new keys and values unquantised.

    With b bits, groups g and g', and e bytes per number, a quantised token costs each KV head 2 D b/8 bytes
    of codes and 2 D e/g + 2 D e/g' of scales and zeros. With compact positions the un-rotated keys are
    quantised. The transformers `QuantizedCache` is something else: by default it groups keys per token, and
    quantises everything anew at each flush.

    Parameters
    - bits: 1, 2, 4, 8; 16 stands for no quantisation (the paper: 2).
    - group: tokens in a group of keys, a multiple of 8/bits (the paper: 32).
    - residual: R, a multiple of group (the paper: 128; for prompts of a few hundred tokens: 32).
    - value_group: channels in a group of values, a divisor of the head dim D; None: as `group`.

    Raises ValueError for others, for a value_group that does not divide D (at the first forward), and for a
    policy that evicts or merges after the prefill, or leaves heads with different numbers of slots. Padding
    counts as tokens of a group, but is replaced by a real entry and so widens none.

    >>> codec = KIVI(2, group=4, residual=4)
    >>> codec.append(torch.ones(1, 2, 10, 8), torch.ones(1, 2, 10, 8))
    >>> codec.commit(None)  # 8 keys, 6 values; the tails of 2 and 4 are float32
    >>> 2 * 8 * (8 + 6) // 4 + 2 * 8 * 6 * 4, 4 * 2 * 2 * (2 * 8 + 6 * 2)
    (440, 448)
    >>> codec.nbytes()
    {'payload': 440, 'meta': 448}
    """

    keys: Quantised | None = None
    values: Quantised | None = None

    def __init__(
        self, bits: int = 2, *, group: int = 32, residual: int = 128, value_group: int | None = None
    ) -> None:
        if bits not in (*BITS, 16):
            raise ValueError(f"bits: {bits!r}; allowed: {', '.join(map(str, (*BITS, 16)))}")
        value_group = group if value_group is None else value_group
        for name, size in (("group", group), ("value_group", value_group)):
            _check_group(name, size, max(1, 8 // bits))
        if isinstance(residual, bool) or not isinstance(residual, int) or residual < 1 or residual % group:
            raise ValueError(f"residual: {residual!r}; allowed: multiples of {group}, the group")
        self.bits, self.group, self.residual, self.value_group = bits, group, residual, value_group

    def due(self, keys: int, values: int) -> tuple[int, int]:
        """How many of the keys and values that wait in the tail are to be quantised now, the oldest first."""
        return keys - keys % self.residual, max(0, values - self.residual)

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.bits != 16 and k.shape[-1] % self.value_group:
            dim = k.shape[-1]
            raise ValueError(f"value_group: {self.value_group}; allowed: divisors of {dim}, the head dim")
        super().append(k, v)

    def older(self) -> tuple[Tensor | None, Tensor | None]:
        return tuple(None if q is None else dequantise(q) for q in (self.keys, self.values))

    def commit(self, ok: Tensor | None) -> None:
        if self.bits == 16:
            return
        waiting = [0 if t is None else t.shape[2] for t in (self.k, self.v)]
        keys, values = self.due(*waiting)
        if keys:
            front, self.k = _split(self.k, keys, ok)
            self.keys = _append(self.keys, quantise(front, self.bits, self.group, -2))
        if values:
            front, self.v = _split(self.v, values, ok)
            self.values = _append(self.values, quantise(front, self.bits, self.value_group, -1))

    def take_rows(self, rows: LongTensor) -> None:
        super().take_rows(rows)
        for name in ("keys", "values"):
            if (q := getattr(self, name)) is not None:
                setattr(self, name, Quantised(*(t.index_select(0, rows) for t in q[:3]), q.bits, q.axis))

    def compressed(self) -> dict[str, dict[str, Tensor]]:
        named = [(name, q) for name, q in (("key", self.keys), ("value", self.values)) if q is not None]
        return {
            "payload": {f"{name}_codes": q.codes for name, q in named},
            "meta": {f"{name}_{part}": getattr(q, part) for name, q in named for part in ("scale", "zero")},
        }


def _split(tail: Tensor, n: int, ok: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The n oldest entries of the tail, padding filled in, and the others in memory of their own."""
    rest = tail[:, :, n:].clone(memory_format=CONTIGUOUS) if n < tail.shape[2] else None
    return first_real(tail, None if ok is None else ok[..., -tail.shape[2] :])[:, :, :n], rest


def _append(older: Quantised | None, newer: Quantised) -> Quantised:
    if older is None:
        return newer
    parts = (torch.cat(pair, -2) for pair in zip(older[:3], newer[:3], strict=True))
    return Quantised(*parts, newer.bits, newer.axis)


def _shifts(bits: int, axis: int, like: Tensor) -> Tensor:
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=like.device)
    return shifts if axis == -1 else shifts[:, None]


def _check_group(name: str, size: int, per_byte: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % per_byte:
        raise ValueError(f"{name}: {size!r}; allowed: multiples of {per_byte}, the codes in a byte")
