"""NF4 and QLoRA: frozen weights at 16 quantiles of the normal distribution, trained factors beside them.

Implements arXiv 2305.14314, section 3. NF4: each block of 64 weights is divided by its absmax a, and every
quotient is replaced by the nearest of 16 levels. Double quantization: the absmaxima, less their mean, are
8-bit codes of the dynamic map, 256 of them to a float32 scale. QLoRA (Eq. 5): y = W^ x + (alpha / r) B A x,
where only A and B are trained. The levels and the 8-bit map are those of chapter 1 (`refimpl.footprint`).

Conventions, all of bitsandbytes: blocks run over the matrix row by row; the mean is stored, 4 bytes a matrix
(the paper does not speak of it, and calls the codes "8-bit floats"); without double quantization an absmax
is float32.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from refimpl.footprint.blockwise import decode, dequantise_blockwise, dynamic_map, encode, quantise_blockwise
from refimpl.footprint.qlora import OUTER_BLOCK, nf4_levels
from refimpl.ledger import of_model
from refimpl.lora import add_lora
from refimpl.quantization.calibrate import Stats
from refimpl.quantization.frozen import Adapted, adapted, compress_frozen
from refimpl.quantization.linear import CompressedLinear, put_module
from refimpl.quantization.packing import pack_codes, packed_bytes, unpack_codes

__all__ = ["NF4", "NF4Linear", "qlora"]


class NF4Linear(CompressedLinear):
    """A weight in NF4: packed `codes`; `absmax`, float32 per block, or uint8 codes with float32 `scale` and
    `mean`. W^ has the dtype of the weight it was made from, in which QLoRA computes.
    """

    def dequantize(self) -> Tensor:
        levels, table = _tables(self.codes.device)
        codes = unpack_codes(self.codes, 4, (self.out_features, self.in_features))
        absmax = self.absmax
        if absmax.dtype is torch.uint8:
            absmax = dequantise_blockwise(absmax, self.scale, table, OUTER_BLOCK) + self.mean
        W = decode(codes, absmax, levels, self.settings["block"])
        return W.to(getattr(torch, self.settings["dtype"]))


@dataclass(frozen=True)
class NF4:
    """A recipe of `compress_model` that stores 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight.

    Called with a layer's name, weight and statistics (name and statistics are ignored).

    Parameters
    ----------
    block : neighbours in row-major order that share an absmax (64 in the paper and usual; 32 to 4096 occur).
    double_quant : keep the absmaxima in 8 bits, not in float32 (which costs 4.5 bits a weight at block 64).

    Raises ValueError for another block; called, TypeError unless the weight is floating point, ValueError
    unless it is a finite matrix that is not empty.

    Examples
    --------
    >>> layer = NF4()("fc", torch.linspace(-1, 1, 128 * 256).view(128, 256))
    >>> {name: list(b.shape) for name, b in layer.named_buffers()}, layer.bits_per_weight
    ({'codes': [16384], 'absmax': [512], 'scale': [2], 'mean': []}, 4.1279296875)
    """

    block: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if type(self.block) is not int or self.block < 1:
            raise ValueError(f"block must be an integer >= 1, got {self.block!r}")
        if type(self.double_quant) is not bool:
            raise ValueError(f"double_quant must be True or False, got {self.double_quant!r}")

    def __call__(self, name: str, weight: Tensor, stats: Stats | None = None) -> NF4Linear:
        if not weight.is_floating_point():
            raise TypeError(f"weight must be floating point, got {weight.dtype}")
        if weight.ndim != 2 or weight.numel() == 0 or not bool(weight.isfinite().all()):
            raise ValueError(f"weight must be a finite matrix [d_out, d_in], got {list(weight.shape)}")
        levels, table = _tables(weight.device)
        codes, absmax = encode(weight.detach(), levels, self.block)
        tensors = {"codes": pack_codes(codes, 4), "absmax": absmax}
        if self.double_quant:
            mean = absmax.mean()
            inner, scale = quantise_blockwise(absmax - mean, table, OUTER_BLOCK)
            tensors |= {"absmax": inner, "scale": scale, "mean": mean}
        dtype = str(weight.dtype).removeprefix("torch.")
        return NF4Linear(tuple(weight.shape), tensors, block=self.block, dtype=dtype)

    def nbytes(self, d_out: int, d_in: int) -> int:
        """The bytes of a matrix, without a bias.

        >>> round(8 * NF4().nbytes(4096, 4096) / 4096**2, 3), 8 * NF4(64, False).nbytes(64, 64) / 64**2
        (4.127, 4.5)
        """
        blocks = -(-d_out * d_in // self.block)
        inner = blocks + 4 * -(-blocks // OUTER_BLOCK) + 4 if self.double_quant else 4 * blocks
        return packed_bytes(d_out * d_in, 4) + inner


def qlora(
    model: nn.Module, rank: int, alpha: float, generator: torch.Generator, recipe: NF4 | None = None
) -> Adapted:
    """Make a model ready for QLoRA, in place: its blocks' linear layers in NF4, all frozen, factors on each.

    Train it with `refimpl.training.train`; `refimpl.lora` saves, loads and removes the factors. Factors
    cannot be merged: W^ + (alpha / r) B A has no NF4 form, and rounding it again loses most of what small
    factors say.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, uncompressed, in the dtype that it shall compute in (the paper:
        bfloat16, for the factors too).
    rank, alpha, generator : as for `add_lora` (the paper's models: 64 and 16).
    recipe : an `NF4`; None: `NF4()`.

    Raises as `add_lora` and `compress_model`, before anything is changed.

    Examples
    --------
    >>> from refimpl.checks.tiny import tiny
    >>> model = tiny("llama")
    >>> report = qlora(model, rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    >>> len(report.names), report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    (21, True)
    """
    before = of_model(model).total()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    originals = dict(model.named_modules())
    names = compress_frozen(model, recipe or NF4())
    try:
        add_lora(model, names, rank, alpha, generator)
    except (TypeError, ValueError):
        for name in names:
            put_module(model, name, originals[name])
        for parameter in trained:
            parameter.requires_grad_()
        raise
    return adapted(model, names, before)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The levels and the 8-bit map, once for all layers of a device."""
    return nf4_levels().to(device), dynamic_map(signed=True).to(device)
