"""A linear layer that keeps its weight compressed, and how it takes the place of a float one.

Every method of this chapter ends in such a layer. A new storage is a subclass with one method, `dequantize`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.quantization.grids import Quantized, dequantize
from refimpl.quantization.packing import pack_codes, unpack_codes

__all__ = [
    "CompressedLinear",
    "GridLinear",
    "check_replaceable",
    "compressed_names",
    "dense_weight",
    "frozen_product",
    "put_module",
    "replace_linear",
    "untie_head",
]


def frozen_product(x: Tensor, make_weight: Callable[[], Tensor], bias: Tensor | None = None) -> Tensor:
    """y = W^ x + bias, with gradients for x and bias, and none for W^, which is made anew for dx = dy W^.

    A plain product would make autograd keep W^ until the backward pass, in every layer at once: the float
    model that compression was to avoid.

    Parameters: `x` [..., d_in], in whose dtype it computes; `make_weight`, without arguments, gives W^
    [d_out, d_in], the same at both times; `bias` [d_out].

    >>> x = torch.ones(1, 2, requires_grad=True)
    >>> frozen_product(x, lambda: torch.tensor([[1.0, 2.0]])).sum().backward()
    >>> x.grad
    tensor([[1., 2.]])
    """
    return _FrozenProduct.apply(x, bias, make_weight)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, make_weight: Callable[[], Tensor]) -> Tensor:
        ctx.make_weight = make_weight
        return F.linear(x, make_weight().to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = grad @ ctx.make_weight().to(grad.dtype) if ctx.needs_input_grad[0] else None
        return dx, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


class CompressedLinear(nn.Linear):
    """y = W^ x + bias, where W^ is made from a few stored tensors for one product at a time.

    The tensors are buffers of exactly their size. `model.to(device)` moves them; no cast (`half()`,
    `to(bfloat16)`) changes them, for then W^ would be another one. It counts as an `nn.Linear`, so that
    `Backbone` and `add_lora` take it, but has no parameter `weight`. Subclasses give `dequantize`.

    Parameters
    ----------
    shape : (d_out, d_in).
    tensors : what is stored, by name.
    bias : [d_out] or None, frozen.
    settings : numbers and strings that `weight` needs besides the tensors; saved as JSON.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        **settings: Any,
    ) -> None:
        nn.Module.__init__(self)  # an nn.Linear's own would make the float weight
        self.out_features, self.in_features = shape
        self.settings = settings
        for name, tensor in tensors.items():
            # A clone lets go of a larger storage of which the tensor may be a part.
            self.register_buffer(name, tensor.detach().clone(memory_format=torch.contiguous_format))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def dequantize(self) -> Tensor:
        """W^ [d_out, d_in], made anew: a temporary."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """W^ [d_out, d_in], made anew at each use; writing into it changes nothing."""
        return self.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        return frozen_product(x, self.dequantize, self.bias)

    def nbytes(self) -> int:
        """Bytes of everything stored, the bias included."""
        return sum(t.nbytes for t in (*self.buffers(), *self.parameters()))

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight, without the bias."""
        stored = self.nbytes() - (0 if self.bias is None else self.bias.nbytes)
        return 8 * stored / (self.out_features * self.in_features)

    def extra_repr(self) -> str:
        shown = "".join(f", {name}={value}" for name, value in self.settings.items())
        bits = f"{self.bits_per_weight:.3f} bits per weight"
        return f"in_features={self.in_features}, out_features={self.out_features}, {bits}{shown}"

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        stored = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            self._buffers[name] = tensor.to(self._buffers[name].device)
        return self


class GridLinear(CompressedLinear):
    """A weight on uniform grids: packed `codes`, `scale`, and, if asymmetric, packed `zero`.

    >>> from refimpl.quantization.grids import Grid
    >>> W = torch.linspace(-1, 1, 64 * 32).view(64, 32)
    >>> layer = GridLinear.pack(Grid(3, group=32).quantize(W), bits=3)
    >>> {name: list(b.shape) for name, b in layer.named_buffers()}, layer.bits_per_weight
    ({'codes': [768], 'scale': [64, 1], 'zero': [24]}, 3.59375)
    """

    @classmethod
    def pack(cls, q: Quantized, bits: int, bias: Tensor | None = None) -> "GridLinear":
        """Pack a quantized matrix of b bits; raises ValueError for codes that need more."""
        tensors = {"codes": pack_codes(q.codes, bits), "scale": q.scale}
        if isinstance(q.zero, Tensor):
            tensors["zero"] = pack_codes(q.zero, bits)
        return cls(tuple(q.codes.shape), tensors, bias, bits=bits)

    def quantized(self) -> Quantized:
        """Codes, scale and zero point, unpacked."""
        bits = self.settings["bits"]
        zero = 2 ** (bits - 1)
        if "zero" in self._buffers:
            zero = unpack_codes(self.zero, bits, self.scale.shape)
        return Quantized(
            unpack_codes(self.codes, bits, (self.out_features, self.in_features)), self.scale, zero
        )

    def dequantize(self) -> Tensor:
        return dequantize(self.quantized())


def dense_weight(layer: nn.Module) -> Tensor:
    """A view [d_out, d_in] of the weight of an nn.Linear, or of a Conv1D, which stores [d_in, d_out].

    Raises TypeError for another layer, a compressed one included.
    """
    if isinstance(layer, nn.Linear) and not isinstance(layer, CompressedLinear):
        return layer.weight.detach()
    if type(layer).__name__ == "Conv1D":
        return layer.weight.detach().T
    raise TypeError(f"layer must be an nn.Linear or Conv1D, got {type(layer).__name__}")


def replace_linear(model: nn.Module, name: str, layer: CompressedLinear) -> None:
    """Put a compressed layer in the place of the linear layer called `name`.

    Raises TypeError unless an nn.Linear or Conv1D is there, ValueError for another shape and for a layer that
    shares its weight with another module (a head tied to the embedding): see `untie_head`.
    """
    check_replaceable(model, name)
    shape = tuple(dense_weight(model.get_submodule(name)).shape)
    if shape != (layer.out_features, layer.in_features):
        raise ValueError(f"layer must be {list(shape)}, got [{layer.out_features}, {layer.in_features}]")
    put_module(model, name, layer)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` the submodule of that dotted name, whatever is there."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def check_replaceable(model: nn.Module, name: str) -> None:
    """Raise as `replace_linear` for a layer that cannot be replaced."""
    found = model.get_submodule(name)
    dense_weight(found)
    sharing = [
        key for key, p in model.named_parameters(remove_duplicate=False)
        if p is found.weight and key != f"{name}.weight"
    ]  # fmt: skip
    if sharing:
        raise ValueError(
            f"{name} shares its weight with {', '.join(sharing)}, which would stay as it is and be stored "
            "beside the compressed copy: call untie_head(model) first if that is what you want"
        )


def untie_head(model: nn.Module) -> None:
    """Give a head that is tied to the embedding a copy of its own, which may then be compressed.

    The model computes what it did; it holds one more matrix [V, d] until the head is compressed. Raises
    ValueError for a model whose head is not tied.
    """
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        raise ValueError("model has no head that is tied to its embedding")
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = False


def compressed_names(model: nn.Module) -> tuple[str, ...]:
    """Names of a model's compressed layers, in its order."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, CompressedLinear))
