"""Gates on attention heads and MLP neurons: a factor on what `o_proj` and `down_proj` are fed.

A gate of 1 changes nothing, a gate of 0 removes the unit, and the loss has a gradient in between. All pruning
of whole units in this chapter is stated with these two tables of gates; `slice_model` makes zeros final.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from refimpl.backbone import Backbone

__all__ = ["gated"]


@contextmanager
def gated(bb: Backbone, heads: Tensor | None = None, neurons: Tensor | None = None) -> Iterator[None]:
    """Run a model with its heads and neurons multiplied by gates inside a `with` block.

    Implements xi_h Att_h(x) of arXiv 1905.10650, section 2.3, and the same for neurons. GPT-2 is gated in
    front of `attn.c_proj` and `mlp.c_proj`, the others in front of `o_proj` and `down_proj`. The biases of
    these layers are no part of a head or neuron and stay. It works for the model's own forward and `bb`'s.

    Parameters
    ----------
    bb : the model; it must not be sliced.
    heads : [L, H] floating point, of any value; or [B, L, H], one table for each row of a batch of B. None:
        all ones. Differentiable.
    neurons : [L, F] or [B, L, F]; as `heads`.

    Raises TypeError or ValueError for a sliced model or tables of another type or shape, before anything is
    hooked. The hooks are removed on every exit; blocks nest, and nested gates multiply.

    Examples
    --------
    >>> import torch
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> bb, ids = Backbone(tiny("gpt2")), random_ids(2, 8)
    >>> xi = torch.ones(bb.n_layers, bb.H, requires_grad=True)
    >>> with gated(bb, xi):
    ...     loss = bb.model(ids, labels=ids).loss
    >>> loss.backward()
    >>> xi.grad.shape
    torch.Size([3, 4])
    """
    if "kept" in vars(bb.model):
        raise ValueError("bb: the model is sliced; its layers differ in their heads and neurons")
    for name, gates, units in (("heads", heads, bb.H), ("neurons", neurons, bb.F)):
        if gates is not None:
            _check(name, gates, bb.n_layers, units)
    hooks = []
    try:
        for l in range(bb.n_layers):
            layer = bb.layer(l)
            for module, gates in ((layer.o, heads), (layer.down, neurons)):
                if gates is not None:
                    hooks.append(module.register_forward_pre_hook(partial(_multiply, gates[..., l, :])))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _multiply(gates: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs [B, T, units * n] of a linear layer, with n neighbours for each gate [units] or [B, units]."""
    x = inputs[0].unflatten(-1, (gates.shape[-1], -1))
    gated = x * gates[..., None, :, None].to(x)
    return gated.flatten(-2), *inputs[1:]


def _check(name: str, gates: Tensor, n_layers: int, units: int) -> None:
    if not isinstance(gates, Tensor) or not gates.is_floating_point():
        got = gates.dtype if isinstance(gates, Tensor) else type(gates).__name__
        raise TypeError(f"{name}: expected a floating point tensor, got {got}; a mask needs .float()")
    if gates.ndim not in (2, 3) or gates.shape[-2:] != (n_layers, units):
        raise ValueError(
            f"{name}: expected [{n_layers}, {units}] or [B, {n_layers}, {units}], got {list(gates.shape)}"
        )
