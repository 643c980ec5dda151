"""Products with packed weights on a CPU: torch's own kernels where they are, blocks of rows where not.

A product with one token reads every weight once; at best its time is bytes over bandwidth. Making the float
weight first costs far more, for that is written and read again. The kernels multiply codes as they lie in
memory:

- `PackedInt8`, `torch._weight_int8pack_mm`: int8 codes. A scale per row stands outside the sum, so the
  kernel is given ones, and the stored scales multiply its result in float32. For `MANY` tokens and more,
  blocks of rows cast to bfloat16 and multiplied as matrices are faster than the kernel, and take its place.
- `PackedInt4`, `torch._weight_int4pack_mm_for_cpu`: codes in an order of the processor's, and for each group
  in bfloat16 s and s (8 - z): W^ = s (code - 8) + s (8 - z).
- `PackedW8A8`, `torch._int_mm`: int8 times int8 in int32, exactly what `Int8Linear` computes in floats.

Conventions
- The two weight-only kernels are fast for bfloat16 alone (others run a scalar loop, tens of times slower), so
  x is cast, in int4 the scales too: y is off by about 2^-9 of its size. It has the dtype of x. Where the
  gradient of x is asked for, the dequantizing reference computes.
- The names are private to torch. Each is tried once (`available`). A layer without its kernel works in blocks
  of rows in float32, and its repr says so: slower than a float layer, faster than unpacking it whole.
- Codes are rearranged when a layer is made. `state_dict`, and so a file, has the plain storage of the layer
  before, and W^ is exactly its W^. A file of packed layers packs again on the machine that loads it.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.quantization.activations import Int8Linear, integer_product, quantize_activations
from refimpl.quantization.linear import CompressedLinear, GridLinear, put_module
from refimpl.quantization.packing import pack_codes, unpack_codes

__all__ = ["PackedInt4", "PackedInt8", "PackedW8A8", "available", "pack_for_cpu", "unpack_from_cpu"]

INT8, INT4, W8A8 = "_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "_int_mm"
GROUPS = (256, 128, 64, 32)  # weights that may share a scale in the int4 kernel
MANY = 16  # tokens
BLOCK = 2**20  # weights of a block: few enough for their floats to stay in a cache
BLOCKS = "blocks of rows"


@cache
def available(kernel: str) -> bool:
    """Whether torch has a kernel that is right on this processor, tried on one product.

    Parameters: `kernel`, "_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu" or "_int_mm". Raises ValueError
    for another one. The last is tried with codes whose products, made unsigned and added in pairs, leave 16
    bits: processors without VNNI do so, and saturate.

    >>> available("_int_mm") in (True, False)
    True
    """
    if kernel not in (INT8, INT4, W8A8):
        raise ValueError(f"kernel must be one of {INT8}, {INT4}, {W8A8}, got {kernel!r}")
    signs = torch.arange(64 * 64).view(64, 64) % 3 - 1
    x, ones = signs[:2], torch.ones(64, dtype=torch.bfloat16)
    try:
        if kernel == INT8:
            y = torch._weight_int8pack_mm(x.bfloat16(), (127 * signs).to(torch.int8), ones)
            return torch.equal(y, (127 * x @ signs.T).bfloat16())
        if kernel == INT4:
            packed = torch._convert_weight_to_int4pack_for_cpu((8 + 7 * signs).int(), 1)
            unit = torch.stack((ones, 0 * ones), -1).repeat(2, 1, 1)
            y = torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, 32, unit)
            return torch.equal(y, (7 * x @ signs.T).bfloat16())
        a, b = torch.full((3, 256), 127, dtype=torch.int8), torch.full((64, 256), -127, dtype=torch.int8)
        return torch.equal(torch._int_mm(a, b.T), integer_product(a, b))
    except (AttributeError, RuntimeError):
        return False


@cache
def _ones(n: int) -> Tensor:
    """One for all layers of n rows."""
    return torch.ones(n, dtype=torch.bfloat16)


class _Packed(GridLinear):
    """A `GridLinear` whose codes lie in another order; `product` multiplies by them."""

    def __init__(
        self,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        **settings: Any,
    ) -> None:
        others = {name: tensor for name, tensor in tensors.items() if name != "codes"}
        super().__init__(shape, others, bias, **settings)
        if reason := self.refuses(self):
            raise ValueError(f"tensors: {type(self).__name__} cannot hold them: {reason}")
        self.kernel = BLOCKS
        self._pack(unpack_codes(tensors["codes"], settings["bits"], shape))

    @property
    def codes(self) -> Tensor:
        """The plain storage of the codes, made anew."""
        return pack_codes(self._unpack(), self.settings["bits"])

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., {self.in_features}], got {list(x.shape)}")
        if x.device.type != "cpu":
            raise ValueError(f"x is on {x.device}, the layer is packed for a CPU: see unpack_from_cpu")
        if x.requires_grad and torch.is_grad_enabled():
            return super().forward(x)
        rows = x.detach().reshape(-1, self.in_features).contiguous()  # the kernels want no strides
        y = self.product(rows).view(*x.shape[:-1], self.out_features)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.kernel}"

    def _in_blocks(self, x: Tensor, floats: Callable[[slice], Tensor]) -> Tensor:
        """x W^' [M, d_out] by blocks of rows of W^, which `floats` makes."""
        y = x.new_empty(len(x), self.out_features)
        step = max(1, BLOCK // self.in_features)
        for rows in (slice(i, i + step) for i in range(0, self.out_features, step)):
            y[:, rows] = x @ floats(rows).T
        return y

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = self.codes


class PackedInt8(_Packed):
    """Eight bits, symmetric, a scale per row or tensor: `signed` int8 [d_out, d_in] = code - 128.

    >>> from refimpl.quantization import RTN
    >>> plain = RTN(8, "restricted")("fc", torch.linspace(-1, 1, 8 * 32).view(8, 32))
    >>> layer = PackedInt8((8, 32), dict(plain.named_buffers()), bits=8)
    >>> torch.equal(layer.weight, plain.weight), layer.nbytes() - plain.nbytes()
    (True, 0)
    """

    @staticmethod
    def refuses(layer: GridLinear) -> str | None:
        """Why a layer cannot be packed so, or None."""
        if layer.settings["bits"] != 8:
            return f"{layer.settings['bits']} bits"
        if "zero" in layer._buffers:
            return "8 bits with zero points"
        return None if layer.scale.shape[1] == 1 else "8 bits in groups"

    def product(self, x: Tensor) -> Tensor:
        """x W^' [M, d_out], for x [M, d_in]."""
        scale = self.scale.view(-1)  # float16, times bfloat16 makes float32
        if self.kernel == INT8 and len(x) < MANY:
            return torch._weight_int8pack_mm(x.bfloat16(), self.signed, _ones(self.out_features)) * scale
        # Products of bfloat16 matrices are fast where the processor has instructions for them.
        fast = self.kernel == INT8 and torch.backends.cpu.get_cpu_capability() == "AVX512"
        dtype = torch.bfloat16 if fast else torch.float32
        return self._in_blocks(x.to(dtype), lambda rows: self.signed[rows].to(dtype)) * scale

    def _pack(self, codes: Tensor) -> None:
        self.register_buffer("signed", (codes.to(torch.int16) - 128).to(torch.int8), persistent=False)
        # The kernel does not check d_in: rows of other lengths give wrong sums, or end the process.
        if self.in_features % 32 == 0 and available(INT8):
            self.kernel = INT8

    def _unpack(self) -> Tensor:
        return (self.signed.to(torch.int16) + 128).to(torch.uint8)


class PackedInt4(_Packed):
    """Four bits: `packed` uint8 in the kernel's order, `affine` bfloat16 [d_in / g, d_out, 2], and the stored
    scale and zero point themselves. The kernel wants groups of a multiple of 32 and d_out a multiple of 16;
    other layers keep the bytes of `pack_codes`.

    >>> from refimpl.quantization import RTN
    >>> plain = RTN(4, group=32)("fc", torch.linspace(-1, 1, 16 * 64).view(16, 64))
    >>> layer = PackedInt4((16, 64), dict(plain.named_buffers()), bits=4)
    >>> torch.equal(layer.weight, plain.weight), list(layer.state_dict()) == ["scale", "zero", "codes"]
    (True, True)
    """

    @staticmethod
    def refuses(layer: GridLinear) -> str | None:
        """Why a layer cannot be packed so, or None."""
        if layer.settings["bits"] != 4:
            return f"{layer.settings['bits']} bits"
        return "groups of odd length" if _width(layer) % 2 else None

    def product(self, x: Tensor) -> Tensor:
        """x W^' [M, d_out], for x [M, d_in]."""
        if self.kernel == INT4:
            return self._kernel(x.bfloat16(), self.affine)
        # A byte's two codes are neighbours. Instead of putting them side by side, x is taken apart, and zero
        # points meet sums of x: y = s (x_even high' + x_odd low' - z sum x).
        x, n, stored = x.float(), self.scale.shape[1], self.packed.view(self.out_features, -1)
        scale = self.scale.float().expand(self.out_features, n)

        def scaled(codes: Tensor, rows: slice) -> Tensor:
            return codes.float().view(len(codes), n, -1).mul_(scale[rows, :, None]).flatten(1)

        y = self._in_blocks(x[:, 0::2], lambda rows: scaled(stored[rows] >> 4, rows))
        y += self._in_blocks(x[:, 1::2], lambda rows: scaled(stored[rows] & 15, rows))
        return y - x.reshape(len(x), n, _width(self)).sum(-1) @ (scale * self._zero()).T

    def _pack(self, codes: Tensor) -> None:
        width = _width(self)
        group = next((g for g in GROUPS if width % g == 0), None)
        if group is None or self.out_features % 16 or not available(INT4):
            self.register_buffer("packed", pack_codes(codes, 4), persistent=False)
            return
        self.kernel = INT4
        s = self.scale.bfloat16().float()
        affine = torch.stack((s, s * (8 - self._zero())), -1).repeat_interleave(width // group, 1)
        affine = affine.expand(self.out_features, -1, -1).transpose(0, 1).bfloat16().contiguous()
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        self.register_buffer("affine", affine, persistent=False)
        self.register_buffer("packed", packed, persistent=False)

    def _unpack(self) -> Tensor:
        if self.kernel == BLOCKS:
            return unpack_codes(self.packed, 4, (self.out_features, self.in_features))
        # The order of `packed` is torch's own affair. Products with unit vectors are the codes, exactly.
        codes = torch.empty(self.out_features, self.in_features, dtype=torch.uint8)
        plain = torch.zeros_like(self.affine)
        plain[..., 0] = 1
        for i in range(0, self.in_features, 256):
            x = torch.zeros(min(256, self.in_features - i), self.in_features, dtype=torch.bfloat16)
            x[:, i : i + 256].fill_diagonal_(1)
            codes[:, i : i + 256] = (self._kernel(x, plain).T + 8).to(torch.uint8)
        return codes

    def _zero(self) -> Tensor | float:
        return unpack_codes(self.zero, 4, self.scale.shape).float() if "zero" in self._buffers else 8.0

    def _kernel(self, x: Tensor, affine: Tensor) -> Tensor:
        group = self.in_features // len(affine)
        return torch._weight_int4pack_mm_for_cpu(x, self.packed, group, affine)


class PackedW8A8(Int8Linear):
    """An `Int8Linear` that multiplies by `torch._int_mm`, in int32 and exactly, if it is `available`."""

    @property
    def kernel(self) -> str:
        return W8A8 if available(W8A8) else "products of floats"

    def product(self, x: Tensor) -> Tensor:
        """As `Int8Linear`."""
        if not available(W8A8):
            return super().product(x)
        codes, s = quantize_activations(x, self.settings["activations"], self._buffers.get("x_scale"))
        rows = codes.reshape(-1, self.in_features).contiguous()
        sums = torch._int_mm(rows, self.codes.T).view(*x.shape[:-1], self.out_features)
        return (sums * s).mul_(self.scale.flatten()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.kernel}"


def pack_for_cpu(model: nn.Module) -> dict[str, str]:
    """Give a model's compressed layers the products of this module, in place.

    Parameters: `model`, on the CPU. Each `GridLinear` of 4 bits (groups of even length) or of 8 bits
    (symmetric, a scale per row or tensor) becomes a `PackedInt4` or `PackedInt8`, each `Int8Linear` a
    `PackedW8A8`; W^ does not change. Other layers stay.

    Returns for every compressed layer's name what multiplies there, or "unchanged: " and why. Raises
    ValueError for a model without compressed layers or with one on another device.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.quantization import RTN, compress_model
    >>> model = tiny("llama")
    >>> _ = compress_model(model, RTN(3, group=8), random_ids(2, 16))
    >>> set(pack_for_cpu(model).values())
    {'unchanged: 3 bits'}
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, CompressedLinear)}
    if not layers:
        raise ValueError("model has no compressed layers; compress_model makes them")
    for name, layer in layers.items():
        if elsewhere := [t.device for t in layer.buffers() if t.device.type != "cpu"]:
            raise ValueError(f"model: {name} is on {elsewhere[0]}, not on the CPU")
    return {name: _pack_one(model, name, layer) for name, layer in layers.items()}


def unpack_from_cpu(model: nn.Module) -> tuple[str, ...]:
    """Undo `pack_for_cpu` in place, exactly: before a model goes to another device. Returns the names."""
    packed = {name: m for name, m in model.named_modules() if isinstance(m, (_Packed, PackedW8A8))}
    for name, layer in packed.items():
        put_module(model, name, _as(GridLinear if isinstance(layer, _Packed) else Int8Linear, layer))
    return tuple(packed)


def _pack_one(model: nn.Module, name: str, layer: CompressedLinear) -> str:
    if isinstance(layer, (_Packed, PackedW8A8)):
        return layer.kernel
    if type(layer) is Int8Linear:
        cls = PackedW8A8
    elif type(layer) is GridLinear:
        cls = PackedInt8 if layer.settings["bits"] == 8 else PackedInt4
        if reason := cls.refuses(layer):
            return f"unchanged: {reason}"
    else:
        return f"unchanged: {type(layer).__name__}"
    put_module(model, name, _as(cls, layer))
    return model.get_submodule(name).kernel


def _as(cls: type[CompressedLinear], layer: CompressedLinear) -> CompressedLinear:
    """A layer of another class with the stored tensors, bias and settings of this one."""
    tensors = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
    shape = layer.out_features, layer.in_features
    return cls(shape, tensors, layer.bias, **layer.settings).train(layer.training)


def _width(layer: GridLinear) -> int:
    """Weights that share a scale."""
    return layer.in_features // layer.scale.shape[1]
