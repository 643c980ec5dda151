"""The check of LoRA (footprint spec, A8; arXiv 2106.09685, Eq. 3): against W + (alpha / r) B A by hand."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {"lora": "refimpl.lora:add_lora"}

RANK, ALPHA = 4, 12.0
# Projections of GPT-2 are stored [in, out]; c_attn fuses three of them, attn.c_proj is square.
CASES = {"gpt2": ("c_attn", "attn.c_proj"), "llama": ("q_proj", "v_proj", "down_proj")}


@check
def check_lora(add_lora: Callable) -> None:
    """`add_lora(model, targets, rank, alpha, generator)`, in place; the factors [r, in] and [out, r] are
    trainable parameters below each target layer."""
    ids = random_ids(2, 8)
    for family, targets in CASES.items():
        plain, model = tiny(family), tiny(family)
        layers = {n: m for n, m in plain.named_modules() if any(f".{n}".endswith(f".{t}") for t in targets)}
        old, state = list(model.parameters()), torch.get_rng_state()
        add_lora(model, targets, RANK, ALPHA, torch.Generator().manual_seed(0))
        require(torch.equal(torch.get_rng_state(), state), "add_lora drew from the global generator")
        with torch.no_grad():
            require_close(model(ids).logits, plain(ids).logits, 0.0,
                          f"{family}: new factors change the logits, so B A is not zero")  # fmt: skip

        thawed = sum(p.requires_grad for p in old)
        require(thawed == 0, f"{family}: {thawed} parameters of the model itself still require a gradient")
        numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
        expected = RANK * sum(sum(layer.weight.shape) for layer in layers.values())
        require(numel == expected, f"{family}: {numel} trainable numbers, not r (m + n) = {expected}")
        model(ids, labels=ids).loss.backward()
        moving = any(p.grad is not None and p.grad.any() for p in model.parameters())
        require(moving, f"{family}: every gradient is zero, so training never starts: A must be random")

        generator = torch.Generator().manual_seed(1)
        for name, layer in layers.items():
            _require_thin(model.get_submodule(name), layer, f"{family} {name}")
            A, B = _factors(model, name, layer)
            with torch.no_grad():
                A.normal_(std=0.3, generator=generator)
                B.normal_(std=0.3, generator=generator)
                update = ALPHA / RANK * B @ A
                layer.weight += update.T if _stored_transposed(layer) else update
        with torch.no_grad():
            require_close(model(ids).logits, plain(ids).logits, 1e-4,
                          f"{family}: logits differ from those of W + (alpha / r) B A")  # fmt: skip


def _factors(model: nn.Module, name: str, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A and B of a layer, told apart by their shapes."""
    n_out, n_in = layer.weight.shape[::-1] if _stored_transposed(layer) else layer.weight.shape
    below = [p for n, p in model.named_parameters() if n.startswith(f"{name}.") and p.requires_grad]
    shapes = sorted(tuple(p.shape) for p in below)
    expected = sorted([(RANK, n_in), (n_out, RANK)])
    require(shapes == expected, f"{name}: factors of shapes {shapes} instead of {expected}")
    return tuple(sorted(below, key=lambda p: p.shape[0] != RANK))


def _require_thin(layer: nn.Module, plain: nn.Module, where: str) -> None:
    """The backward pass needs x and A x, not a matrix as large as W."""
    numels = []
    own = {p.data_ptr() for p in layer.parameters()}
    n_in = plain.weight.shape[0 if _stored_transposed(plain) else 1]
    x = torch.ones(3, n_in, requires_grad=True)
    pack = lambda t: numels.append(0 if t.data_ptr() in own else t.numel())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        layer(x)
    most = max(numels)
    require(most < plain.weight.numel(), f"{where}: autograd keeps {most} elements, so B A was made")


def _stored_transposed(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Linear)
