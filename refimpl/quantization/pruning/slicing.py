"""Pruned heads and neurons, cut out of the matrices: the model is smaller, and computes what gates of 0 did.

A K/V head goes when all its query heads have gone. Where the query heads left are shared unevenly among the
K/V heads of a layer, transformers' attention, which wants the same number for each, is given its K/V heads
repeated: after the projection (`RepeatHeads`), so that parameters are not, but the layer's KV cache is.
"""

import copy
import json
import math
import os

import torch
from torch import BoolTensor, LongTensor, Tensor, nn

from refimpl.backbone import Backbone, Layer
from refimpl.quantization.linear import dense_weight

__all__ = ["NoHeads", "RepeatHeads", "load_sliced", "save_sliced", "slice_model"]


class NoHeads(nn.Module):
    """Attention of a layer without heads: nothing, or the output bias.

    The cache is told of the tokens by zeros [B, 1, T, 1]: transformers asks layer 0 how many there were.
    """

    def __init__(self, bias: Tensor | None, layer: int) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.layer_idx = layer

    def forward(
        self, hidden_states: Tensor, past_key_values: object = None, **_: object
    ) -> tuple[Tensor, None]:
        if past_key_values is not None:
            token = hidden_states.new_zeros(*hidden_states.shape[:2], 1)[:, None]
            past_key_values.update(token, token, self.layer_idx)
        out = torch.zeros_like(hidden_states)
        return (out if self.bias is None else out + self.bias), None


class RepeatHeads(nn.Module):
    """A K or V projection with heads that are given more than once: n heads of `linear` -> len(index) heads.

    >>> layer = RepeatHeads(nn.Linear(3, 2 * 4), torch.tensor([0, 0, 1]), head_dim=4)
    >>> layer(torch.ones(1, 5, 3)).shape
    torch.Size([1, 5, 12])
    """

    def __init__(self, linear: nn.Linear, index: LongTensor, head_dim: int) -> None:
        super().__init__()
        self.linear, self.head_dim = linear, head_dim
        self.register_buffer("index", index, persistent=False)  # the keep masks say it

    def forward(self, x: Tensor) -> Tensor:
        heads = self.linear(x).unflatten(-1, (-1, self.head_dim))
        return heads[..., self.index, :].flatten(-2)


def slice_model(model: nn.Module, heads: BoolTensor, neurons: BoolTensor) -> None:
    """Remove heads and neurons from a model, in place: its logits are those with gates of 0 in their place.

    Parameters saved, D head dim, d width: 2 D d for a query head, 2 D d for a K/V head (GPT-2: 4 D d for a
    head), 3 d for a neuron (GPT-2: 2 d), and the biases of what goes. Where K/V heads are repeated (see the
    module), the cache holds r heads for each that is left, r = its query heads / the greatest common divisor
    over the layer: at worst as many as query heads. Keep equally many queries of each K/V head, or none, to
    avoid it. A layer may lose all; its residual path and output biases stay.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, neither sliced nor compressed, without LoRA factors.
    heads : [L, H], True for a query head that stays.
    neurons : [L, F], True for a neuron that stays.

    Afterwards `model.kept` is (heads, neurons), on the CPU. `model.config` still tells the old sizes, so
    `save_pretrained` cannot be read again: use `save_sliced`. Optimizers made before hold the old parameters.
    `Backbone` works, with H, G and F as they were, on a LLaMA-like model with a head in every layer; on one
    with a layer without, it raises an AttributeError that names `NoHeads`. On a GPT-2 that lost heads its
    `forward` raises (it splits `c_attn` at the old width). `compress_model` and `add_lora` refuse repeated
    K/V heads, with a TypeError.

    Raises TypeError or ValueError for another model or other masks, before anything is changed.

    Examples
    --------
    >>> from refimpl.checks.tiny import tiny
    >>> model = tiny("llama")
    >>> heads, neurons = torch.ones(3, 4).bool(), torch.ones(3, 40).bool()
    >>> heads[0, :2] = neurons[2, 10:] = False
    >>> before = model.num_parameters()
    >>> slice_model(model, heads, neurons)
    >>> before - model.num_parameters() == 2 * (2 * 8 * 32) + 1 * (2 * 8 * 32) + 30 * 3 * 32
    True
    """
    bb = Backbone(model)
    if "kept" in vars(model):
        raise ValueError("model is sliced already; gate it while you search, and slice once at the end")
    for name, keep, units in (("heads", heads, bb.H), ("neurons", neurons, bb.F)):
        _check_mask(name, keep, [bb.n_layers, units])
    for ref in bb.linears():
        dense_weight(ref.module)  # refuses compressed layers
        if next(ref.module.children(), None) is not None:
            raise ValueError(f"model: {ref.name} has LoRA factors; merge or remove them first")
    heads, neurons = heads.cpu().clone(), neurons.cpu().clone()
    for l in range(bb.n_layers):
        layer = bb.layer(l)
        if not heads[l].any():
            setattr(layer.block, "attn" if bb.is_gpt2 else "self_attn", NoHeads(layer.o.bias, l))
        elif bb.is_gpt2:
            _slice_fused(layer, heads[l], bb.D)
        else:
            _slice_grouped(layer, heads[l], bb.G, bb.D)
        _slice_mlp(layer, neurons[l])
    model.kept = heads, neurons


def save_sliced(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Write a sliced model's tensors and masks to a safetensors file; ValueError unless it is sliced."""
    from safetensors.torch import save_model

    if "kept" not in vars(model):
        raise ValueError("model is not sliced; slice_model does it")
    masks = {name: json.dumps(mask.int().tolist()) for name, mask in zip(_MASKS, model.kept, strict=True)}
    save_model(model, str(file), metadata=masks)


def load_sliced(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Make a whole model of the same geometry (`refimpl.models.new`) the one in a file, in place.

    Raises ValueError, before anything is changed, for a file of another origin or of another geometry.
    """
    from safetensors import safe_open
    from safetensors.torch import load_model

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    if not set(_MASKS) <= metadata.keys():
        raise ValueError(f"file: {file} was not written by save_sliced")
    masks = [torch.tensor(json.loads(metadata[name])).bool() for name in _MASKS]
    trial = copy.deepcopy(model)
    slice_model(trial, *masks)
    try:
        load_model(trial, file)
    except RuntimeError as error:
        raise ValueError(f"file: {file} does not fit the model: {error}") from error
    slice_model(model, *masks)
    load_model(model, file)


_MASKS = ("heads", "neurons")


def _check_mask(name: str, keep: Tensor, shape: list[int]) -> None:
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"{name}: expected a BoolTensor, True for what stays, got {got}")
    if list(keep.shape) != shape:
        raise ValueError(f"{name}: expected {shape}, got {list(keep.shape)}")


def _slice_grouped(layer: Layer, keep: BoolTensor, G: int, D: int) -> None:
    """LLaMA and its like: query heads that stay, the K/V heads that any of them reads, in step."""
    queries = keep.view(G, -1).sum(1)  # left of each K/V head
    _keep(layer.q, rows=_units(keep, D))
    _keep(layer.o, columns=_units(keep, D))
    left = queries[queries > 0]
    share = math.gcd(*left.tolist())
    repeated = torch.arange(len(left)).repeat_interleave(left // share).to(layer.k.weight.device)
    for name, module in (("k_proj", layer.k), ("v_proj", layer.v)):
        _keep(module, rows=_units(queries > 0, D))
        if len(repeated) > len(left):
            setattr(layer.attn, name, RepeatHeads(module, repeated, D))
    layer.attn.num_key_value_groups = share


def _slice_fused(layer: Layer, keep: BoolTensor, D: int) -> None:
    """GPT-2: q, k and v are thirds of the outputs of one matrix."""
    _keep(layer.q, rows=_units(keep.repeat(3), D))
    _keep(layer.o, columns=_units(keep, D))
    layer.attn.num_heads = int(keep.sum())
    layer.attn.split_size = layer.attn.num_heads * D


def _slice_mlp(layer: Layer, keep: BoolTensor) -> None:
    index = _units(keep, 1)
    for module in (layer.up, layer.gate):
        if module is not None:
            _keep(module, rows=index)
    _keep(layer.down, columns=index)
    if layer.gate is None and len(index) == 0:
        # A Conv1D cannot have an empty side (it views its input as [-1, 0]); an nn.Linear can.
        layer.mlp.c_fc, layer.mlp.c_proj = _as_linear(layer.up), _as_linear(layer.down)


def _units(keep: BoolTensor, size: int) -> LongTensor:
    """Positions of what stays, where every unit is `size` neighbours."""
    return keep.repeat_interleave(size).nonzero()[:, 0]


def _keep(layer: nn.Module, rows: LongTensor | None = None, columns: LongTensor | None = None) -> None:
    """Keep these outputs (rows) or inputs (columns) of an nn.Linear or a Conv1D, which stores [in, out]."""
    W = dense_weight(layer)
    if rows is not None:
        W = W[rows.to(W.device)]
        if layer.bias is not None:
            layer.bias = _parameter(layer.bias.detach()[rows.to(W.device)], layer.bias)
    if columns is not None:
        W = W[:, columns.to(W.device)]
    transposed = not isinstance(layer, nn.Linear)
    layer.weight = _parameter(W.T if transposed else W, layer.weight)
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    for name, size in zip(names, W.shape, strict=True):
        setattr(layer, name, size)


def _parameter(value: Tensor, old: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=old.requires_grad)


def _as_linear(layer: nn.Module) -> nn.Linear:
    d_out, d_in = dense_weight(layer).shape
    linear = nn.Linear(1, 1, device="meta")  # nothing is drawn, and no warning of empty tensors
    linear.in_features, linear.out_features = d_in, d_out
    linear.weight, linear.bias = _parameter(dense_weight(layer), layer.weight), layer.bias
    return linear
