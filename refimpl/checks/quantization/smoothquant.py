"""The check of SmoothQuant (quantization spec, section 5; arXiv 2211.10438)."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require_close
from refimpl.checks.tiny import LAYERS, random_ids, tiny

IMPLEMENTATION = {"smoothquant": "refimpl.quantization.smoothquant:smoothquant"}
# Of one block: its name; each norm with the layers that read it; the other layers.
BLOCKS = {
    "gpt2": (
        "transformer.h.{}.",
        {"ln_1": ["attn.c_attn"], "ln_2": ["mlp.c_fc"]},
        ["attn.c_proj", "mlp.c_proj"],
    ),
    "llama": (
        "model.layers.{}.",
        {
            "input_layernorm": [f"self_attn.{role}_proj" for role in "qkv"],
            "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        },
        ["self_attn.o_proj", "mlp.down_proj"],
    ),
}


@check
def check_smoothquant(smoothquant: Callable) -> None:
    """`smoothquant(model, ids, alpha)` smooths and compresses a model in place, with weights per row and
    activations per token in eight bits."""
    ids, test = random_ids(4, 24), random_ids(2, 16, seed=1)
    for family in ("gpt2", "llama"):
        for alpha in (0.5, 0.8):
            model = tiny(family).double()
            _widen(model, family)
            expected = copy.deepcopy(model)
            _reference(expected, family, ids, alpha)
            smoothquant(model, ids, alpha)
            for layer in range(LAYERS):
                block, norms, _ = BLOCKS[family]
                for norm in norms:
                    a, b = (m.get_submodule(block.format(layer) + norm) for m in (model, expected))
                    what = f"{family}, alpha {alpha}, block {layer}: the gain of {norm}"
                    require_close(a.weight / b.weight, torch.ones_like(b.weight), 1e-4, what)
            with torch.no_grad():
                found, reference = model(test).logits, expected(test).logits
            # 1e-4 leaves room for one code of thousands that falls on the other side of a half.
            require_close(found, reference, 1e-4, f"{family}, alpha {alpha}: the logits")


def _widen(model: nn.Module, family: str) -> None:
    """Some channels of every norm become large, so that smoothing has something to do."""
    block, norms, _ = BLOCKS[family]
    for layer in range(LAYERS):
        for norm in norms:
            for p in model.get_submodule(block.format(layer) + norm).parameters():
                p.data[layer : layer + 2] *= 30


@torch.no_grad()
def _reference(model: nn.Module, family: str, ids: Tensor, alpha: float) -> None:
    """Smooth, then make every layer round its inputs and its weight to eight bits."""
    inputs: dict[str, Tensor] = {}
    hooks = []
    name_of, norms, others = BLOCKS[family]
    for layer in range(LAYERS):
        for readers in norms.values():
            name = name_of.format(layer) + readers[0]
            keep = lambda _, x, name=name: inputs.__setitem__(name, x[0].flatten(0, 1).abs().amax(0))
            hooks.append(model.get_submodule(name).register_forward_pre_hook(keep))
    model(ids)
    for hook in hooks:
        hook.remove()
    for layer in range(LAYERS):
        block = name_of.format(layer)
        for norm, readers in norms.items():
            weights = [_weight(model.get_submodule(block + name)) for name in readers]
            w = torch.cat(weights).abs().amax(0)
            s = inputs[block + readers[0]] ** alpha / w ** (1 - alpha)
            for W in weights:
                W *= s
            for p in model.get_submodule(block + norm).parameters():
                p /= s
        for name in (*[name for readers in norms.values() for name in readers], *others):
            module = model.get_submodule(block + name)
            W = _weight(module)
            rounded = _rounded(W, (W.abs().amax(1, keepdim=True) / 127).float().double())
            module.forward = lambda x, W=rounded, b=module.bias: nn.functional.linear(
                _rounded(x, x.abs().amax(-1, keepdim=True) / 127), W, b
            )


def _weight(module: nn.Module) -> Tensor:
    """A view [d_out, d_in]."""
    return module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-127, 127) * scale
