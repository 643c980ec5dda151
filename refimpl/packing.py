"""Packing: 4-bit codes two to a byte, and groups of weights that share a scale.

Convention: of two neighbours in row-major order the first is the high half of the byte. A count that does not
fill the last byte or the last group is completed with zeros, which `numel` or `shape` cut off again.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["from_groups", "pack_4bit", "to_groups", "unpack_4bit"]


def pack_4bit(codes: Tensor) -> Tensor:
    """Pack codes 0..15 into half as many bytes.

    Parameters: `codes`, uint8, any shape with n elements. Returns uint8 [ceil(n / 2)].
    Raises TypeError for another dtype, ValueError for a code above 15 or no codes.

    >>> pack_4bit(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist()      # 0x12, 0xF0
    [18, 240]
    """
    if codes.dtype is not torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    if codes.numel() == 0 or codes.max() > 15:
        what = f"a code {codes.max().item()}" if codes.numel() else "none"
        raise ValueError(f"codes must be one or more numbers from 0 to 15, got {what}")
    pairs = to_groups(codes, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def unpack_4bit(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack_4bit`.

    Parameters: `packed`, uint8 [ceil(n / 2)]; `shape` of the n codes. Returns uint8 of that shape.
    Raises TypeError for another dtype, ValueError where bytes and shape disagree.

    >>> unpack_4bit(torch.tensor([18, 240], dtype=torch.uint8), (3,)).tolist()
    [1, 2, 15]
    """
    if packed.dtype is not torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    numel = prod(shape)
    if packed.ndim != 1 or len(packed) != (numel + 1) // 2:
        raise ValueError(
            f"packed must be [{(numel + 1) // 2}] for codes of shape {list(shape)}, got {list(packed.shape)}"
        )
    return from_groups(torch.stack([packed >> 4, packed & 15], dim=1), shape)


def to_groups(x: Tensor, size: int) -> Tensor:
    """Cut a tensor into groups of consecutive elements, in row-major order.

    Parameters: `x`, n elements of any shape and dtype; `size` g, elements per group.
    Returns [ceil(n / g), g], the last group completed with zeros. Raises ValueError for size < 1.

    >>> to_groups(torch.tensor([[3., -4.], [1., 2.], [5., 0.]]), 4).abs().amax(1)   # a scale per group
    tensor([4., 5.])
    """
    if size < 1:
        raise ValueError(f"size must be an integer >= 1, got {size!r}")
    return F.pad(x.flatten(), (0, -x.numel() % size)).view(-1, size)


def from_groups(groups: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `to_groups`: the first elements of [ceil(n / g), g] in `shape`.

    Raises ValueError where the groups do not hold that many elements.

    >>> from_groups(to_groups(torch.arange(6), 4), (2, 3)).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    numel = prod(shape)
    if groups.ndim != 2 or len(groups) != -(-numel // groups.shape[1]):
        raise ValueError(f"groups of shape {list(groups.shape)} do not hold a tensor of shape {list(shape)}")
    return groups.flatten()[:numel].view(tuple(shape))
