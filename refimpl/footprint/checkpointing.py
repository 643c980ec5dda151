"""Gradient checkpointing: keep the inputs of a block of layers and recompute the rest in the backward pass.

Chen et al. 2016 (arXiv 1604.06174) for blocks of layers, Korthikanti et al. 2022 (arXiv 2205.05198) for the
selective recomputation of the attention core. It shrinks the activation term of the survey's Eq. 1.

`checkpoint` does what `torch.utils.checkpoint.checkpoint(use_reentrant=False)` does, but recomputes the block
to its end, where torch stops at the last tensor that backward needs and so spares a block's last matmul.
Unlike the switch of `transformers`, which does nothing in eval mode, it does not depend on `model.train()`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import reduce
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = [
    "backward_bytes", "best_every", "block_sizes", "checkpoint", "checkpoint_attention", "checkpoint_layers",
    "kept_bytes",
]  # fmt: skip


def checkpoint(function: Callable, *inputs: Any) -> Any:
    """Return `function(*inputs)`, keeping only the input tensors: backward recomputes the rest (Chen et al.).

    Parameters
    ----------
    function : runs a second time with the random numbers and the autocast state of the first.
    inputs : its arguments, at least one of them a tensor. Tensors in containers and those that `function`
        closes over stay in memory too, but no saved-tensor hook sees them.

    Raises TypeError if `function` is not callable, ValueError without an input tensor, and in backward
    RuntimeError if the second run saves other shapes or dtypes than the first.

    >>> x = torch.ones(3, requires_grad=True)
    >>> checkpoint(lambda x: (x * x).exp().sum(), x).backward()
    >>> x.grad  # 2 e
    tensor([5.4366, 5.4366, 5.4366])
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    slots = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    if not slots:
        raise ValueError("inputs must hold at least one tensor, since tensors are what is kept; got none")
    if not torch.is_grad_enabled():
        return function(*inputs)

    first_run = _conditions(inputs)
    # The tensor itself is held: with its last tensor gone, torch before 2.13 frees what a node saved.
    boundary = _Boundary.apply(torch.empty(0, requires_grad=True), *(inputs[i] for i in slots))
    needs_grad = [inputs[i].requires_grad for i in slots]
    others = [None if isinstance(x, Tensor) else x for x in inputs]  # tensors are held by `boundary` alone
    saved: list[tuple] = []  # shape and dtype of each tensor that the block would have kept
    recomputed: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        saved.append((tensor.shape, tensor.dtype))
        return len(saved) - 1

    def unpack(index: int) -> Tensor:
        if index not in recomputed:
            recomputed.update(enumerate(recompute()))
        return recomputed.pop(index)  # backward asks once for each, so the memory goes as backward proceeds

    def recompute() -> list[Tensor]:
        again: list[Tensor] = []
        arguments = list(others)
        for slot, x, grad in zip(slots, boundary.grad_fn.saved_tensors, needs_grad, strict=True):
            arguments[slot] = x.detach().requires_grad_(grad)
        collect = saved_tensors_hooks(lambda tensor: again.append(tensor.detach()), lambda _: None)
        with first_run(), torch.enable_grad(), collect:
            function(*arguments)
        if [(x.shape, x.dtype) for x in again] != saved:
            raise RuntimeError("function saved other tensors in its second run than in its first")
        return again

    with saved_tensors_hooks(pack, unpack):
        return function(*inputs)


class _Boundary(torch.autograd.Function):
    """Saves the inputs of a block as an op saves its operands, so that outer hooks see (or move) them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return anchor.new_empty(0)


def _conditions(inputs: Sequence) -> Callable[[], AbstractContextManager]:
    """Record the random and the autocast state; `with` the result re-enters them."""
    gpus = sorted({x.device.index for x in inputs if isinstance(x, Tensor) and x.is_cuda})
    state, gpu_states = torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in gpus]
    kinds = ("cpu", "cuda") if gpus else ("cpu",)
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(gpus))  # on leaving, the state is what backward found
            torch.set_rng_state(state)
            for gpu, gpu_state in zip(gpus, gpu_states, strict=True):
                torch.cuda.set_rng_state(gpu_state, gpu)
            for kind, dtype, enabled in casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield

    return again


@contextmanager
def checkpoint_layers(model: nn.Module, every: int = 1) -> Iterator[None]:
    """Checkpoint blocks of `every` decoder layers of a GPT-2 or LLaMA-like `transformers` model for a while.

    The first layers of a block pass their input on and the last runs them all: parameters, their names and
    what each layer is given stay as they are; hidden states that hooks collect inside a block do not.

    Parameters
    ----------
    model : GPT-2, LLaMA, Mistral or Qwen2, in train or eval mode; `config.use_cache` is off inside.
    every : layers per block, 1 to L; the last block may be shorter.

    Raises TypeError for another model, ValueError for `every` out of range, a model that is checkpointed
    already, and a KV cache (a layer that runs twice would append to it twice).

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> model, ids = tiny("llama"), random_ids(2, 8)
    >>> with checkpoint_layers(model, every=2):
    ...     model(ids, labels=ids).loss.backward()
    """
    layers = _decoder_layers(model)
    block_sizes(len(layers), every)
    if any(layer.gradient_checkpointing or "forward" in vars(layer) for layer in layers):
        raise ValueError("model: its layers are checkpointed already, and would be recomputed twice")
    use_cache, model.config.use_cache = model.config.use_cache, False
    # GPT-2's layer of transformers 5.2 returns a tuple, later ones the hidden state.
    in_tuple = model.config.model_type == "gpt2" and version("transformers").startswith("5.2.")
    stages: list[Callable] = []  # of the block that the forward pass is in
    for i, layer in enumerate(layers):
        ends = (i + 1) % every == 0 or i + 1 == len(layers)
        layer.forward = _staged(layer.forward, stages, i % every == 0, ends, in_tuple)
    try:
        yield
    finally:
        model.config.use_cache = use_cache
        for layer in layers:
            del layer.forward


def _staged(layer: Callable, stages: list[Callable], starts: bool, ends: bool, in_tuple: bool) -> Callable:
    from transformers import Cache

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        if any(isinstance(x, Cache) for x in (*args, *kwargs.values())):
            raise ValueError("use_cache must be False: a recomputed layer would append to the cache twice")
        if starts:
            stages.clear()
        stages.append(lambda h: layer(h, *args, **kwargs)[0] if in_tuple else layer(h, *args, **kwargs))
        if ends:
            block, stages[:] = tuple(stages), ()
            hidden = checkpoint(lambda h: reduce(lambda x, stage: stage(x), block, h), hidden)
        return (hidden,) if in_tuple else hidden

    return forward


@contextmanager
def checkpoint_attention(model: nn.Module) -> Iterator[None]:
    """Recompute only the attention core, from its saved queries, keys and values, for a while.

    Selective recomputation of Korthikanti et al.: what grows as a·S² per layer is recomputed, for the price
    of two matmuls of the forward pass, and everything linear in S is kept.

    Parameters
    ----------
    model : GPT-2, LLaMA, Mistral or Qwen2 with `attn_implementation="eager"`.

    Raises TypeError for another model, ValueError for another attention (sdpa keeps no S x S tensor).

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> model, ids = tiny("gpt2"), random_ids(2, 8)
    >>> with checkpoint_attention(model):
    ...     model(ids, labels=ids).loss.backward()
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layers = _decoder_layers(model)
    if (name := model.config._attn_implementation) != "eager":
        raise ValueError(f"model: its attention must be 'eager', got {name!r}")
    if "eager" in ALL_ATTENTION_FUNCTIONS:
        raise ValueError("model: another checkpoint_attention is active; leave it first")
    ours = {id(module) for layer in layers for module in layer.modules()}

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple:
        core = sys.modules[type(module).__module__].eager_attention_forward  # each family has one of its own
        if id(module) not in ours:
            return core(module, q, k, v, *args, **kwargs)
        return checkpoint(lambda q, k, v: core(module, q, k, v, *args, **kwargs)[0], q, k, v), None

    ALL_ATTENTION_FUNCTIONS["eager"] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    from transformers import PreTrainedModel

    names = {"gpt2": "h", "llama": "layers", "mistral": "layers", "qwen2": "layers"}
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in names:
        raise TypeError(f"model must be a {', '.join(names)} of transformers, got {type(model).__name__}")
    return getattr(model.base_model, names[model.config.model_type])


def block_sizes(layers: int, every: int) -> tuple[int, ...]:
    """Return the layers of each block when L layers are cut after each `every`; ValueError unless in 1..L.
    >>> block_sizes(8, 3)
    (3, 3, 2)
    """
    if not isinstance(every, int) or not 1 <= every <= layers:
        raise ValueError(f"every must be an integer in 1..{layers} (the number of layers), got {every!r}")
    return tuple(min(every, layers - i) for i in range(0, layers, every))


def kept_bytes(layers: int, every: int, boundary: int) -> int:
    """Return what the layers keep from forward to backward: one boundary (n·h·itemsize bytes) per block.
    >>> kept_bytes(layers=32, every=1, boundary=4096 * 4096 * 2)  # Llama-2-7B in bfloat16, 4096 tokens
    1073741824
    """
    return len(block_sizes(layers, every)) * boundary


def backward_bytes(layers: int, every: int, boundary: int, layer: int) -> int:
    """Return the most bytes that the boundaries and the recomputed block hold at once in backward.

    max_i (i·boundary + s_i·layer) - boundary: while block i of s_i layers is recomputed, the boundaries after
    it are free, and its own is the first tensor that its first layer saves. Gradients come on top.

    Parameters
    ----------
    boundary, layer : bytes of a layer's input, and of all that it saves, the input among them (ValueError).

    >>> backward_bytes(layers=4, every=2, boundary=10, layer=100)  # two boundaries, two layers, one shared
    210
    """
    if not 1 <= boundary <= layer:
        raise ValueError(f"boundary must be in 1..layer ({layer}): a layer saves its input; got {boundary}")
    return max(i * boundary + s * layer for i, s in enumerate(block_sizes(layers, every), 1)) - boundary


def best_every(layers: int, boundary: int, layer: int) -> int:
    """Return the layers per block that minimise `backward_bytes`; of several, the one that keeps least.

    m equal blocks cost m·boundary + (L/m)·layer, least at m = sqrt(L·layer/boundary): the sqrt(L) of Chen et
    al. is the case layer = boundary. With layer = 20 boundary, blocks of one layer are best up to L = 38.
    >>> [best_every(layers, boundary=1, layer=20) for layers in (12, 32, 80, 126)]
    [1, 1, 2, 3]
    """
    return min(range(layers, 0, -1), key=lambda every: backward_bytes(layers, every, boundary, layer))
