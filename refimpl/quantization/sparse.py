"""Sparse storage: which weights are kept, and their values, in the bytes that this really takes.

A weight [d_out, d_in] with a share p kept, at b bits a value, costs per weight
- "bitmap": one bit for every weight, and the kept values: 1 + p b bits;
- "2:4": two 2-bit positions in each four neighbours, and two values: 1 + b/2 bits, in the layout of sparse
  tensor cores;
- "csr": an int16 column beside every value, an int32 pointer for every row: p (16 + b) + 32/d_in bits.

At half the weights and 16 bits that is 9, 9 and a little more than 16: CSR saves nothing. Zeros that are
stored like other numbers save nothing either. Masks are bool, True where a weight is kept.
"""

import torch
from torch import Tensor

from refimpl.quantization.grids import Quantized, dequantize
from refimpl.quantization.linear import CompressedLinear
from refimpl.quantization.packing import pack_codes, unpack_codes

__all__ = ["STORAGES", "SparseLinear", "n_m_mask", "pack_mask", "unpack_mask"]

STORAGES = ("bitmap", "2:4", "csr")
VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class SparseLinear(CompressedLinear):
    """A weight of which only a part is stored: a mask, and values or codes in its row-major order.

    Buffers: `bitmap`, or `positions` (2:4), or `columns` and `pointers` (CSR); and `values` [kept], or packed
    `codes`, `scale` and, if asymmetric, packed `zero`, as in `GridLinear`.

    >>> W = torch.linspace(-1, 1, 16 * 32).view(16, 32)
    >>> keep = n_m_mask(W.abs(), 2, 4)
    >>> for storage in STORAGES:
    ...     layer = SparseLinear.pack(W, keep, storage)
    ...     storage, layer.bits_per_weight, torch.equal(layer.weight, W.half() * keep)
    ('bitmap', 9.0, True)
    ('2:4', 9.0, True)
    ('csr', 17.0625, True)
    """

    @classmethod
    def pack(
        cls,
        W: Tensor,
        keep: Tensor,
        storage: str = "bitmap",
        dtype: torch.dtype = torch.float16,
        bias: Tensor | None = None,
    ) -> "SparseLinear":
        """Store the kept weights as they are, rounded to `dtype`.

        Parameters: `W` [d_out, d_in], finite; `keep`, bool, of the same shape, at least one True; `storage`,
        of `STORAGES`; `dtype`, float16, bfloat16 or float32; `bias` [d_out].
        Raises TypeError or ValueError for anything else, for values that the dtype cannot hold, for a mask
        that is not 2:4 stored so, and for more than 32768 columns in CSR.
        """
        if dtype not in VALUE_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, VALUE_DTYPES))}, got {dtype!r}")
        tensors = pack_mask(keep, storage)
        if not W.is_floating_point() or W.shape != keep.shape:
            raise ValueError(
                f"W must be floating point and have the mask's shape {list(keep.shape)}, "
                f"got {W.dtype} {list(W.shape)}"
            )
        values = W.detach()[keep].to(dtype)
        if not bool(values.isfinite().all()):
            raise ValueError(f"W must be finite, and its kept values must fit {dtype}")
        return cls(tuple(W.shape), tensors | {"values": values}, bias, storage=storage, bits=None)

    @classmethod
    def pack_codes(
        cls,
        q: Quantized,
        keep: Tensor,
        bits: int,
        storage: str = "bitmap",
        bias: Tensor | None = None,
    ) -> "SparseLinear":
        """Store the kept codes of a quantized matrix, b bits each; codes elsewhere are ignored.

        The groups of `q` are those of the whole matrix. Raises as `pack`, and ValueError for codes that need
        more than b bits.

        >>> from refimpl.quantization.grids import Grid
        >>> W = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
        >>> q, keep = Grid(4, "full", group=32).quantize(W), W.abs() > 0.7
        >>> layer = SparseLinear.pack_codes(q, keep, 4)
        >>> torch.equal(layer.weight, dequantize(q) * keep)
        True
        """
        tensors = pack_mask(keep, storage)
        if q.codes.shape != keep.shape:
            raise ValueError(f"q must have the mask's shape {list(keep.shape)}, got {list(q.codes.shape)}")
        tensors |= {"codes": pack_codes(q.codes[keep], bits), "scale": q.scale}
        if isinstance(q.zero, Tensor):
            tensors["zero"] = pack_codes(q.zero, bits)
        return cls(tuple(keep.shape), tensors, bias, storage=storage, bits=bits)

    @property
    def keep(self) -> Tensor:
        """The mask, bool [d_out, d_in], unpacked."""
        return unpack_mask(self._buffers, self.settings["storage"], (self.out_features, self.in_features))

    @property
    def sparsity(self) -> float:
        """The share of weights that are not stored."""
        return 1 - int(self.keep.sum()) / (self.out_features * self.in_features)

    def dequantize(self) -> Tensor:
        keep, bits = self.keep, self.settings["bits"]
        if bits is None:
            values = self.values.to(torch.promote_types(self.values.dtype, torch.float32))
            return values.new_zeros(keep.shape).masked_scatter_(keep, values)
        zero = 2 ** (bits - 1)
        if "zero" in self._buffers:
            zero = unpack_codes(self.zero, bits, self.scale.shape)
        codes = unpack_codes(self.codes, bits, (int(keep.sum()),))
        dense = codes.new_zeros(keep.shape).masked_scatter_(keep, codes)
        return dequantize(Quantized(dense, self.scale, zero)).where(keep, 0)


def n_m_mask(score: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """N:M sparsity: in each m neighbours of a row keep the n of largest score; of equal ones the later.

    Parameters: `score` [..., d_in], no NaN; 0 < `n` < `m`, m a divisor of d_in. Returns a bool mask of the
    same shape. Raises ValueError otherwise.

    >>> n_m_mask(torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 0.0, 5.0]])).int().tolist()
    [[0, 1, 1, 0, 0, 0, 1, 1]]
    """
    if type(n) is not int or type(m) is not int or not 0 < n < m:
        raise ValueError(f"n:m must be integers with 0 < n < m, got {n!r}:{m!r}")
    if score.ndim == 0 or score.numel() == 0 or score.shape[-1] % m:
        raise ValueError(f"score must be [..., d_in] with d_in a multiple of {m}, got {list(score.shape)}")
    if bool(score.isnan().any()):
        raise ValueError("score must have no NaN")
    groups = score.unflatten(-1, (-1, m))
    order = groups.argsort(dim=-1, stable=True)
    keep = torch.zeros(groups.shape, dtype=torch.bool, device=score.device)
    return keep.scatter_(-1, order[..., m - n :], True).view(score.shape)


def pack_mask(keep: Tensor, storage: str) -> dict[str, Tensor]:
    """The tensors that say which weights are kept; to be stored beside the kept values in row-major order.

    Parameters: `keep`, bool [d_out, d_in], at least one True; `storage`, of `STORAGES`. Returns
    - "bitmap": {"bitmap": uint8 [d_out d_in / 8]};
    - "2:4": {"positions": uint8 [d_out d_in / 8]}, the two positions in each four, 2 bits each, ascending;
    - "csr": {"columns": int16 [kept], "pointers": int32 [d_out + 1]}.
    Raises as `SparseLinear.pack`.

    >>> keep = torch.tensor([[True, False, False, True, False, True, True, False]])
    >>> {name: t.tolist() for s in STORAGES for name, t in pack_mask(keep, s).items()}
    {'bitmap': [150], 'positions': [54], 'columns': [0, 3, 5, 6], 'pointers': [0, 4]}
    """
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    if keep.dtype is not torch.bool or keep.ndim != 2:
        raise TypeError(f"keep must be bool [d_out, d_in], got {keep.dtype} {list(keep.shape)}")
    if not bool(keep.any()):
        raise ValueError(f"keep must keep at least one weight of {list(keep.shape)}")
    if storage == "bitmap":
        return {"bitmap": pack_codes(keep.to(torch.uint8), 1)}
    if storage == "2:4":
        if keep.shape[1] % 4 or bool((keep.unflatten(1, (-1, 4)).sum(-1) != 2).any()):
            raise ValueError("keep must keep two in each four neighbours of a row to be stored as 2:4")
        return {"positions": pack_codes((keep.nonzero()[:, 1] % 4).to(torch.uint8), 2)}
    if keep.shape[1] > 2**15:
        raise ValueError(f"keep must have at most 32768 columns to be stored as csr, got {keep.shape[1]}")
    pointers = torch.cat((torch.zeros(1, device=keep.device), keep.sum(1).cumsum(0)))
    return {"columns": keep.nonzero()[:, 1].to(torch.int16), "pointers": pointers.to(torch.int32)}


def unpack_mask(tensors: dict[str, Tensor], storage: str, shape: tuple[int, int]) -> Tensor:
    """Undo `pack_mask`: the mask, bool [d_out, d_in]. Other tensors in the dictionary are ignored.

    >>> keep = torch.tensor([[True, False, False, True]])
    >>> all(torch.equal(unpack_mask(pack_mask(keep, s), s, (1, 4)), keep) for s in STORAGES)
    True
    """
    if storage == "bitmap":
        return unpack_codes(tensors["bitmap"], 1, shape).bool()
    if storage == "2:4":
        fours = shape[0] * shape[1] // 4
        columns = unpack_codes(tensors["positions"], 2, (fours, 2)).long()
        keep = torch.zeros(fours, 4, dtype=torch.bool, device=columns.device)
        return keep.scatter_(1, columns, True).view(shape)
    if storage != "csr":
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    counts = tensors["pointers"].diff()
    rows = torch.arange(shape[0], device=counts.device).repeat_interleave(counts)
    keep = torch.zeros(shape, dtype=torch.bool, device=counts.device)
    keep[rows, tensors["columns"].long()] = True
    return keep
