"""The check of structured slicing (quantization spec, sections 20 and 22)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import HEADS, LAYERS, WIDTH, random_ids, tiny

IMPLEMENTATION = {"slicing": "refimpl.quantization.pruning.slicing:slice_model"}
SIZE = WIDTH // HEADS
# Layer 0: a K/V head loses all its queries; 1: two and one query are left; 2: nothing is.
HEADS_LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]]).bool()


@check
def check_slicing(slice_model: Callable) -> None:
    """`slice_model(model, heads [L, H], neurons [L, F])`, in place; True stays. Logits are those with zeros
    in front of the output matrices, and exactly the parameters of what goes are gone."""
    ids = random_ids(2, 10)
    for family, width in (("gpt2", 4 * WIDTH), ("llama", 40), ("qwen2", 40)):
        neurons = torch.rand(LAYERS, width, generator=torch.Generator().manual_seed(0)) > 0.4
        neurons[1] = False
        for what, heads in (("even", HEADS_LEFT[[0, 0, 0]]), ("uneven and empty", HEADS_LEFT)):
            model = tiny(family)
            expected = _masked(model, ids, heads, neurons)
            before = _count(model)
            slice_model(model, heads.clone(), neurons.clone())
            with torch.no_grad():
                require_close(model(ids).logits, expected, 1e-4, f"{family}, {what} heads: logits")
            gone = before - _count(model)
            should = _parameters(family, heads, neurons)
            require(gone == should, f"{family}, {what} heads: {gone} parameters went instead of {should}")
    whole = tiny("gpt2")
    with torch.no_grad():
        expected = whole(ids).logits
        slice_model(whole, torch.ones(LAYERS, HEADS).bool(), torch.ones(LAYERS, 4 * WIDTH).bool())
        require_close(whole(ids).logits, expected, 1e-5, "everything stays: logits")


def _masked(model: nn.Module, ids: Tensor, heads: Tensor, neurons: Tensor) -> Tensor:
    """Logits with the inputs of the output matrices set to zero."""
    hooks = []
    for l in range(LAYERS):
        gpt2 = hasattr(model, "transformer")
        block = model.transformer.h[l] if gpt2 else model.model.layers[l]
        outputs = (
            (block.attn.c_proj, block.mlp.c_proj) if gpt2 else (block.self_attn.o_proj, block.mlp.down_proj)
        )
        masks = heads[l].repeat_interleave(SIZE), neurons[l]
        for module, mask in zip(outputs, masks, strict=True):
            hooks.append(module.register_forward_pre_hook(lambda _, x, mask=mask: (x[0] * mask,)))
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _parameters(family: str, heads: Tensor, neurons: Tensor) -> int:
    """Parameters of the heads and neurons that go: rows with their biases, and columns."""
    lost, dead = int((~heads).sum()), int((~neurons).sum())
    if family == "gpt2":
        return lost * SIZE * (4 * WIDTH + 3) + dead * (2 * WIDTH + 1)
    shared = int((~heads.view(LAYERS, 2, 2).any(-1)).sum())  # K/V heads without a query
    biases = (lost + 2 * shared) * SIZE if family == "qwen2" else 0
    return 2 * (lost + shared) * SIZE * WIDTH + 3 * dead * WIDTH + biases
