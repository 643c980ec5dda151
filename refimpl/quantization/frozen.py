"""Compressed models that are frozen, with something trainable on top: what QLoRA and PEQA have in common."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from refimpl.backbone import Backbone
from refimpl.ledger import of_model
from refimpl.lora import LoRA
from refimpl.quantization.linear import CompressedLinear, check_replaceable, dense_weight, replace_linear

__all__ = ["Adapted", "adapted", "compress_frozen"]


@dataclass(frozen=True)
class Adapted:
    """A model made ready for training: `names` of its compressed layers; how many numbers are `trainable`;
    bytes of the whole model before and after, what is trainable included."""

    names: tuple[str, ...]
    trainable: int
    bytes_before: int
    bytes_after: int


def compress_frozen(
    model: nn.Module, recipe: Callable[[str, Tensor, None], CompressedLinear]
) -> tuple[str, ...]:
    """Replace the linear layers of a model's blocks, without calibration, and freeze the rest, in place.

    Parameters: `model`, of a family of `refimpl.backbone`, uncompressed; `recipe`, as for `compress_model`,
    one that looks at weights only: its third argument is None.
    Returns the layers' names. Raises as `compress_model`, and ValueError for a model with LoRA factors: the
    model is then as it was.

    >>> from refimpl.checks.tiny import tiny
    >>> from refimpl.quantization.rtn import RTN
    >>> len(compress_frozen(tiny("gpt2"), RTN(4, group=8)))
    12
    """
    if any(isinstance(module, LoRA) for module in model.modules()):
        raise ValueError("model has LoRA factors, which would be lost: merge_lora or remove_lora first")
    layers = {}
    for name in dict.fromkeys(ref.name for ref in Backbone(model).linears()):
        check_replaceable(model, name)
        old = model.get_submodule(name)
        layers[name] = recipe(name, dense_weight(old), None)
        if old.bias is not None:
            layers[name].bias = nn.Parameter(old.bias.detach().clone(), requires_grad=False)
    model.requires_grad_(False)
    for name, layer in layers.items():
        replace_linear(model, name, layer)
    return tuple(layers)


def adapted(model: nn.Module, names: tuple[str, ...], bytes_before: int) -> Adapted:
    """The report of a model that is ready for training."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Adapted(names, trainable, bytes_before, of_model(model).total())
