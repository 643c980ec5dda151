"""Compressed models on disk: one safetensors file with the packed tensors as they are.

The file's metadata names, for every compressed layer, its class and settings. Tied tensors are stored once.
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from refimpl.paths import atomic_write
from refimpl.quantization.linear import CompressedLinear, dense_weight, replace_linear, untie_head

__all__ = ["load_compressed", "save_compressed"]

_ROOM = "refimpl.quantization."


def save_compressed(model: nn.Module, file: str | os.PathLike[str]) -> int:
    """Write a model with compressed layers to a file and return the file's bytes.

    Everything keeps its dtype: load a model in bfloat16 before compressing it if its embeddings are to be
    stored so. Raises ValueError for a model without compressed layers.
    """
    from safetensors.torch import save

    layers = {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear)}
    if not layers:
        raise ValueError("model has no compressed layers; compress_model makes them")
    about = {
        name: {
            "class": f"{type(layer).__module__}:{type(layer).__qualname__}",
            "shape": [layer.out_features, layer.in_features],
            "settings": layer.settings,
        }
        for name, layer in layers.items()
    }
    metadata = {"layers": json.dumps(about), "tied": json.dumps(_tied(model))}
    content = save(_once(model), metadata=metadata)
    atomic_write(Path(file), content)
    return len(content)


def load_compressed(model: nn.Module, file: str | os.PathLike[str]) -> tuple[str, ...]:
    """Make an uncompressed model of the same geometry (`refimpl.models.new`) the one in a file, in place.

    Returns the names of the compressed layers. Raises ValueError, before anything is changed, for a file that
    `save_compressed` did not write, and for layers, shapes, dtypes or ties that the model does not have (a
    head that was untied in the file is untied here).
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    if not {"layers", "tied"} <= metadata.keys():
        raise ValueError(f"file: {file} was not written by save_compressed")
    layers = {
        name: _layer(model, name, about, tensors) for name, about in json.loads(metadata["layers"]).items()
    }
    tied = json.loads(metadata["tied"])
    if tied and not _tied(model):
        raise ValueError(f"file: the head in {file} is tied to the embedding, the model's is not")
    inside = tuple(f"{name}." for name in layers)
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(inside)}
    state = _once(model) if tied else model.state_dict()
    expected = {key: tensor for key, tensor in state.items() if not key.startswith(inside)}
    if different := sorted(rest.keys() ^ expected.keys()):
        raise ValueError(f"file: {file} and the model differ in their tensors: {', '.join(different[:4])}")
    for key, tensor in rest.items():
        if tensor.shape != expected[key].shape or tensor.dtype != expected[key].dtype:
            has = f"{expected[key].dtype} {list(expected[key].shape)}"
            raise ValueError(f"file: {key} is {tensor.dtype} {list(tensor.shape)}, the model has {has}")
    if _tied(model) and not tied:
        untie_head(model)
    for name, layer in layers.items():
        replace_linear(model, name, layer.to(model.get_submodule(name).weight.device))
    model.load_state_dict(rest, strict=False)
    return tuple(layers)


def _layer(
    model: nn.Module, name: str, about: dict[str, Any], tensors: dict[str, Tensor]
) -> CompressedLinear:
    """The layer that a file describes; ValueError unless the model has a linear layer of its shape there."""
    module, _, attribute = about["class"].partition(":")
    if not module.startswith(_ROOM):
        raise ValueError(f"file: {name} is a {about['class']}, not a class of {_ROOM}*")
    cls = getattr(importlib.import_module(module), attribute)
    if name not in dict(model.named_modules()):
        raise ValueError(f"file: the model has no layer {name}")
    here, shape = tuple(dense_weight(model.get_submodule(name)).shape), tuple(about["shape"])
    if here != shape:
        raise ValueError(f"file: {name} is {list(shape)}, the model has {list(here)}")
    own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    bias = own.pop("bias", None)
    layer = cls(shape, own, bias, **about["settings"])
    if layer.weight.shape != shape:
        raise ValueError(f"file: the tensors of {name} do not make a weight {list(shape)}")
    return layer


def _tied(model: nn.Module) -> bool:
    """Whether the head is the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return getattr(head, "weight", None) is embedding.weight


def _once(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every storage under its first name only."""
    found: dict[int, str] = {}
    state = model.state_dict()
    for key, tensor in state.items():
        found.setdefault(tensor.data_ptr(), key)
    return {key: state[key].contiguous() for key in found.values()}
