"""Codes of 1 to 8 bits, packed without a gap.

Convention: that of `refimpl.packing`, whose four-bit bytes these are for b = 4. Codes follow each other in
row-major order as one string of bits, each with its highest bit first; zeros complete the last unit, the
fewest bytes that hold a whole number of codes (b = 3: eight codes in three bytes).
"""

from collections.abc import Sequence
from math import gcd, prod

import torch
from torch import Tensor

from refimpl.packing import to_groups

__all__ = ["pack_codes", "packed_bytes", "unpack_codes"]


def packed_bytes(numel: int, bits: int) -> int:
    """The bytes of so many packed codes: whole units of lcm(b, 8) bits.

    >>> packed_bytes(1000, 3), packed_bytes(1000, 4), packed_bytes(1, 3)
    (375, 500, 3)
    """
    if type(numel) is not int or numel < 1:
        raise ValueError(f"numel must be an integer >= 1, got {numel!r}")
    codes, size = _unit(bits)
    return -(-numel // codes) * size


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes 0 .. 2^b - 1.

    Parameters: `codes`, uint8, any shape with n elements; `bits` b, 1 to 8. Returns uint8
    [`packed_bytes(n, b)`]. Raises TypeError for another dtype, ValueError for a code that needs more bits,
    for no codes and for other bits.

    >>> packed = pack_codes(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3)
    >>> "".join(f"{byte:08b}" for byte in packed.tolist())
    '001010011100101110111000'
    """
    if codes.dtype is not torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    count, size = _unit(bits)
    largest = int(codes.max()) if codes.numel() else None
    if largest is None or largest >= 1 << bits:
        what = "none" if largest is None else f"a code {largest}"
        raise ValueError(f"codes must be one or more numbers from 0 to {(1 << bits) - 1}, got {what}")
    units = to_groups(codes, count).to(_word(size))
    word = torch.zeros_like(units[:, 0])
    for i in range(count):
        word |= units[:, i] << bits * (count - 1 - i)
    return torch.stack([(word >> 8 * (size - 1 - j)) & 255 for j in range(size)], 1).to(torch.uint8).flatten()


def unpack_codes(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Undo `pack_codes`.

    Parameters: `packed`, uint8 [`packed_bytes(n, b)`]; `bits` b; `shape` of the n codes. Returns uint8 of
    that shape. Raises TypeError for another dtype, ValueError where bytes and shape disagree.

    >>> codes = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
    >>> unpack_codes(pack_codes(codes, 3), 3, (2, 3)).tolist()
    [[1, 2, 3], [4, 5, 6]]
    """
    if packed.dtype is not torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    count, size = _unit(bits)
    numel = prod(shape)
    if packed.ndim != 1 or len(packed) != packed_bytes(numel, bits):
        raise ValueError(
            f"packed must be [{packed_bytes(numel, bits)}] for codes of shape {list(shape)} in {bits} bits, "
            f"got {list(packed.shape)}"
        )
    parts = packed.view(-1, size).to(_word(size))
    word = torch.zeros_like(parts[:, 0])
    for j in range(size):
        word |= parts[:, j] << 8 * (size - 1 - j)
    codes = torch.empty(len(word), count, dtype=torch.uint8, device=packed.device)
    for i in range(count):
        codes[:, i] = (word >> bits * (count - 1 - i)) & ((1 << bits) - 1)
    return codes.view(-1)[:numel].view(tuple(shape))


def _unit(bits: int) -> tuple[int, int]:
    """Codes and bytes of the smallest unit that both fill."""
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    shared = gcd(bits, 8)
    return 8 // shared, bits // shared


def _word(size: int) -> torch.dtype:
    """An integer that holds a unit of so many bytes; shifts of uint8 stay within the byte."""
    return torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64
