"""Masks on heads, neurons and the residual stream's dimensions: run a model under them, or cut them out."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import BoolTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.quantization.pruning.gating import gated
from refimpl.quantization.pruning.slicing import slice_model

__all__ = ["Masks", "cut_masks", "masked", "slice_hidden"]


@dataclass(frozen=True)
class Masks:
    """Gates in [0, 1]: `heads` [L, H], `neurons` [L, F] and `hidden` [d], None where no dimension may go."""

    heads: Tensor
    neurons: Tensor
    hidden: Tensor | None = None


@contextmanager
def masked(bb: Backbone, masks: Masks) -> Iterator[None]:
    """Run a model under masks inside a `with` block, differentiable in them.

    A hidden dimension's gate multiplies it in the embedding and in what every o and down adds to the residual
    stream, so that a dimension with gate 0 is 0 throughout, and norms see a 0 there. Raises as `gated`, and
    ValueError for hidden dimensions of a GPT-2 or of another shape, before anything is hooked.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> bb, dims = Backbone(tiny("llama")), torch.ones(32)
    >>> dims[5] = 0
    >>> with masked(bb, Masks(torch.ones(3, 4), torch.ones(3, 40), dims)):
    ...     states = bb.model(random_ids(1, 4), output_hidden_states=True).hidden_states
    >>> [bool(x[..., 5].any()) for x in states]
    [False, False, False, False]
    """
    hidden = masks.hidden
    if hidden is not None:
        check_hidden(bb)
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.shape != (bb.d,):
            got = f"{hidden.dtype} {list(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden)
            raise ValueError(f"hidden: expected a floating point tensor [{bb.d}], got {got}")
    with gated(bb, masks.heads, masks.neurons):
        writers = [] if hidden is None else _writers(bb)
        hooks = [
            module.register_forward_hook(lambda *call: call[2] * hidden.to(call[2])) for module in writers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def cut_masks(model: nn.Module, masks: Masks) -> None:
    """Make masks part of a model, in place: what has gate 0 is cut out, other gates are multiplied into the
    weights. The logits are those under `masked`, and the config still tells the old sizes (`slice_model`).

    Gates go into the columns of o and down, hidden ones into the embedding and the rows of o and down. Where
    the head is tied to the embedding, the last norm's gain is divided by them.
    """
    bb, hidden = Backbone(model), masks.hidden
    for l in range(bb.n_layers):
        layer = bb.layer(l)
        _scale(layer.o, columns=masks.heads[l].repeat_interleave(bb.D))
        _scale(layer.down, columns=masks.neurons[l])
    if hidden is not None:
        check_hidden(bb)
        embedding = model.get_input_embeddings()
        if model.lm_head.weight is embedding.weight:
            bb.final_norm.weight.div_(torch.where(hidden > 0, hidden, 1.0).to(bb.final_norm.weight))
        embedding.weight.mul_(hidden.to(embedding.weight))
        for module in _writers(bb)[1:]:
            _scale(module, rows=hidden)
        slice_hidden(model, hidden > 0)
    slice_model(model, masks.heads > 0, masks.neurons > 0)


@torch.no_grad()
def slice_hidden(model: nn.Module, keep: BoolTensor) -> None:
    """Remove dimensions of the residual stream from a whole LLaMA-like model, in place.

    RMSNorm divides by the root of the mean of squares over all d dimensions, zeros included. Over the d' that
    stay the mean is d / d' as large; the gain is multiplied by sqrt(d / d') and eps by d / d', and the
    logits are those with gates of 0. A file of `save_sliced` is read by `load_sliced` into a new model that
    went through `slice_hidden` with the same mask.

    Parameters: `model`, not sliced; `keep` [d], True for what stays, at least one. Raises TypeError or
    ValueError for others, GPT-2 among them, before anything is changed.

    >>> from refimpl.checks.tiny import tiny
    >>> model = tiny("llama")
    >>> slice_hidden(model, torch.arange(32) < 24)
    >>> model.lm_head.weight.shape, model.model.layers[0].self_attn.o_proj.weight.shape
    (torch.Size([48, 24]), torch.Size([24, 32]))
    """
    bb = Backbone(model)
    check_hidden(bb)
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != (bb.d,) or not keep.any():
        got = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise ValueError(f"keep must be a BoolTensor [{bb.d}] with at least one True, got {got}")
    embedding, head = model.get_input_embeddings(), model.lm_head
    if "kept" in vars(model) or embedding.weight.shape[1] != bb.d:
        raise ValueError("model is sliced already; take its hidden dimensions first, and once")
    index = keep.nonzero()[:, 0].to(embedding.weight.device)
    tied, grow = head.weight is embedding.weight, bb.d / len(index)
    embedding.weight = _taken(embedding.weight, 1, index)
    embedding.embedding_dim = len(index)
    head.weight = embedding.weight if tied else _taken(head.weight, 1, index)
    head.in_features = len(index)
    norms = [bb.final_norm]
    for l in range(bb.n_layers):
        layer = bb.layer(l)
        norms += [layer.ln1, layer.ln2]
        for module in (layer.q, layer.k, layer.v, layer.gate, layer.up):
            module.weight, module.in_features = _taken(module.weight, 1, index), len(index)
        for module in (layer.o, layer.down):
            module.weight, module.out_features = _taken(module.weight, 0, index), len(index)
            if module.bias is not None:
                module.bias = _taken(module.bias, 0, index)
    for norm in norms:
        norm.weight = _taken(norm.weight * math.sqrt(grow), 0, index, norm.weight.requires_grad)
        norm.variance_epsilon *= grow


def check_hidden(bb: Backbone) -> None:
    """ValueError for a GPT-2."""
    if bb.is_gpt2:
        raise ValueError(
            "hidden: not for a GPT-2, whose LayerNorm subtracts a mean over all dimensions, so that one with "
            "gate 0 is not 0 behind it; use hidden=False, or a LLaMA-like model"
        )


def _writers(bb: Backbone) -> list[nn.Module]:
    """The modules whose outputs make up the residual stream, the embedding first."""
    layers = [bb.layer(l) for l in range(bb.n_layers)]
    return [bb.model.get_input_embeddings(), *(m for layer in layers for m in (layer.o, layer.down))]


def _scale(module: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Multiply the outputs (rows, the bias as well) or inputs (columns) of an nn.Linear or a Conv1D."""
    W = module.weight if isinstance(module, nn.Linear) else module.weight.T
    if rows is not None:
        W.mul_(rows[:, None].to(W))
        if module.bias is not None:
            module.bias.mul_(rows.to(W))
    if columns is not None:
        W.mul_(columns.to(W))


def _taken(t: Tensor, dim: int, index: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
    grad = t.requires_grad if requires_grad is None else requires_grad
    return nn.Parameter(t.detach().index_select(dim, index).contiguous(), requires_grad=grad)
