"""QLoRA: frozen weights in 4 bits, dequantised for one product at a time, with LoRA factors beside them.

Implements NF4 with double quantisation of arXiv 2305.14314, section 3. A weight costs 4 bits, a block of 64 a
byte for its absmax, 256 blocks a float32 scale of those bytes: 4 + 8/64 + 32/(64 * 256) = 4.127 bits.

Convention: the byte of an absmax is a code of the dynamic map (`refimpl.footprint.blockwise`), after the mean
of the tensor's absmaxima is subtracted, 4 bytes more; so does bitsandbytes. The paper says "8-bit floats".
"""

from collections.abc import Collection
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.footprint.blockwise import dequantise_blockwise, dynamic_map, quantise_blockwise
from refimpl.ledger import Kind, Ledger, of_model, of_tensors
from refimpl.packing import from_groups, pack_4bit, to_groups, unpack_4bit

__all__ = ["BLOCK", "NF4", "NF4Linear", "OUTER_BLOCK", "ledger_of", "nf4_bytes", "nf4_dequantize",
           "nf4_levels", "nf4_quantize", "quantize_model"]  # fmt: skip

BLOCK = 64  # weights that share an absmax
OUTER_BLOCK = 256  # absmaxima that share a scale


def nf4_levels() -> Tensor:
    """The 16 levels of NormalFloat-4, ascending, float32 [16].

    Implements arXiv 2305.14314, section 3 (Eq. 4 and the text below it): quantiles of the normal
    distribution, equally spaced in probability between 1/2 and 1 - d on either side, divided by the largest:
    8 steps above zero and 7 below, so that zero and both ends are levels. The outermost d is the mean of
    half a cell of 16 and half a cell of 15, d = (1/32 + 1/30) / 2; Eq. 4 itself has an infinite end.

    >>> nf4_levels()[[0, 6, 7, 8, 15]]
    tensor([-1.0000, -0.0910,  0.0000,  0.0796,  1.0000])
    """
    end = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(0.5, end, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64))
    return (torch.cat([below[:-1], above]) / above[-1]).float()


class NF4(NamedTuple):
    """A weight in NF4: `codes` uint8 [ceil(n / 2)], two to a byte; `absmax` uint8 [b = ceil(n / 64)], codes
    of the dynamic map; `scale` float32 [ceil(b / 256)]; `mean` float32 []; and the weight's `shape`."""

    codes: Tensor
    absmax: Tensor
    scale: Tensor
    mean: Tensor
    shape: tuple[int, ...]


def nf4_bytes(numel: int) -> dict[str, int]:
    """The bytes of NF4 for so many weights, by part.

    >>> 8 * sum(nf4_bytes(4096 * 4096).values()) / 4096**2 - (4 + 8 / 64 + 32 / (64 * 256)) < 1e-5
    True
    """
    if numel < 1:
        raise ValueError(f"numel must be an integer >= 1, got {numel!r}")
    blocks = -(-numel // BLOCK)
    return {"codes": -(-numel // 2), "absmax": blocks, "scale": 4 * -(-blocks // OUTER_BLOCK), "mean": 4}


def nf4_quantize(weight: Tensor) -> NF4:
    """Quantise a weight to NF4 with double-quantised absmaxima.

    Implements arXiv 2305.14314, Eq. 1 (absmax per block) and section 3, "double quantization".
    Parameters: `weight`, floating point, any shape, finite; blocks run in row-major order.
    Raises TypeError for another dtype, ValueError for no elements or values that are not finite.

    >>> weight = torch.linspace(-1, 1, 64)
    >>> (nf4_dequantize(nf4_quantize(weight)) - weight).abs().max() < 0.16
    tensor(True)
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if weight.numel() == 0 or not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise ValueError(
            f"weight must be finite and not empty, got {weight.numel()} values, {bad} not finite"
        )
    groups = to_groups(weight.detach().float(), BLOCK)
    absmax = groups.abs().amax(1)
    levels, table = _tables(weight.device)
    # Nearest level: the cells meet halfway between neighbours. A block of zeros is divided by 1.
    cells = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(groups / absmax.where(absmax > 0, 1.0)[:, None], cells).to(torch.uint8)
    mean = absmax.mean()
    absmax_codes, scale = quantise_blockwise(absmax - mean, table, OUTER_BLOCK)
    packed = pack_4bit(from_groups(codes, weight.shape))
    # The clone lets go of the padding, whose storage the codes of the absmaxima would keep alive.
    return NF4(packed, absmax_codes.clone(), scale, mean, tuple(weight.shape))


def nf4_dequantize(quantized: NF4) -> Tensor:
    """Return the float32 weight that NF4 stands for.

    Raises TypeError where scale or mean are not float32 (a module that was cast after it was quantised).
    """
    codes, absmax_codes, scale, mean, shape = quantized
    if scale.dtype is not torch.float32 or mean.dtype is not torch.float32:
        raise TypeError(f"scale and mean must stay float32, got {scale.dtype}: cast before quantising")
    levels, table = _tables(codes.device)
    absmax = dequantise_blockwise(absmax_codes, scale, table, OUTER_BLOCK) + mean
    groups = to_groups(levels[unpack_4bit(codes, shape).int()], BLOCK)
    return from_groups(groups * absmax[:, None], shape)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The levels and the dynamic map, once for all layers of a device."""
    return nf4_levels().to(device), dynamic_map(signed=True).to(device)


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight is kept in NF4.

    Implements arXiv 2305.14314, Eq. 5, without the LoRA term, which `refimpl.lora.add_lora` adds. `weight` is
    dequantised at each access, for one product in the forward pass and one in the backward pass: a plain
    matmul would save it in between, and every layer's float weight would be alive at once.

    Parameters: `layer`, an nn.Linear or GPT-2 Conv1D, which is not changed; its bias stays as it is, frozen.
    Raises TypeError for another layer.

    >>> layer = NF4Linear(nn.Linear(64, 32))
    >>> {name: list(b.shape) for name, b in layer.named_buffers()}
    {'codes': [1024], 'absmax': [32], 'scale': [1], 'mean': []}
    """

    def __init__(self, layer: nn.Module) -> None:
        from transformers.pytorch_utils import Conv1D

        if type(layer) is not nn.Linear and not isinstance(layer, Conv1D):
            raise TypeError(f"layer must be an nn.Linear or Conv1D, got {type(layer).__name__}")
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        nn.Module.__init__(self)  # that of nn.Linear would allocate a float weight
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        quantized = nf4_quantize(weight)
        for name in ("codes", "absmax", "scale", "mean"):
            self.register_buffer(name, getattr(quantized, name))
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight [out, in], a temporary of the layer's dtype."""
        shape = (self.out_features, self.in_features)
        return nf4_dequantize(NF4(self.codes, self.absmax, self.scale, self.mean, shape)).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenProduct.apply(x, self)


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T + b, dx = dy W: nothing is saved, W is dequantised again."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.to(grad.dtype), None


def quantize_model(model: nn.Module, keep: Collection[str] = ("lm_head",)) -> tuple[str, ...]:
    """Replace the linear layers of a model by `NF4Linear`, in place, and freeze the rest.

    Parameters: `model`, with nn.Linear or Conv1D layers; `keep`, last parts of names of layers that stay as
    they are (default: the output head, which is often tied to the embedding).
    Returns the names of the replaced layers. Raises ValueError where there is none.

    >>> model = nn.ModuleDict({"fc": nn.Linear(64, 64), "lm_head": nn.Linear(64, 8)})
    >>> quantize_model(model), model.fc
    (('fc',), NF4Linear(in_features=64, out_features=64, bias=True))
    """
    from transformers.pytorch_utils import Conv1D

    names = [
        name for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and name.rpartition(".")[2] not in keep
    ]  # fmt: skip
    if not names:
        raise ValueError(f"model has no nn.Linear or Conv1D to quantise besides {', '.join(keep)}")
    quantized = {name: NF4Linear(model.get_submodule(name)) for name in names}
    model.requires_grad_(False)
    for name, layer in quantized.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return tuple(names)


def ledger_of(model: nn.Module) -> Ledger:
    """Count a model with NF4 layers: codes as "weight", absmax, scale and mean as "meta".

    The two tables, of 16 and 256 float32, are resident once, and in no file, since they follow from formulas.
    Raises ValueError for a model without NF4 layers.

    >>> ledger = ledger_of(NF4Linear(nn.Linear(64, 32, bias=False)))
    >>> ledger.by_kind(), ledger.by_kind("resident")
    ({'weight': 1024, 'meta': 40}, {'weight': 1024, 'meta': 1128})
    """
    kinds: dict[str, Kind] = {}
    devices = set()
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            at = f"{name}." if name else ""
            kinds |= {
                f"{at}codes": "weight",
                f"{at}absmax": "meta",
                f"{at}scale": "meta",
                f"{at}mean": "meta",
            }
            devices.add(module.codes.device)
    if not kinds:
        raise ValueError("model has no NF4Linear layers; quantize_model makes them")
    items = [replace(item, kind=kinds.get(item.name, item.kind)) for item in of_model(model).items]
    for device in devices:
        names = ("NF4 levels", "dynamic map")
        tables = of_tensors(zip(names, _tables(device), strict=True), "meta")
        items += [replace(item, payload=0) for item in tables.items]
    return Ledger(tuple(items))
