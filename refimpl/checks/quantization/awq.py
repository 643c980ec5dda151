"""The check of AWQ (quantization spec, section 7; arXiv 2306.00978)."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {"awq": "refimpl.quantization.awq:awq"}
BITS, GROUP = 3, 8
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
Q, K, V, O, GATE, UP, DOWN = LINEARS


@check
def check_awq(awq: Callable) -> None:
    """`awq(model, ids, bits, group, clip=)` quantizes a model in place; scales are folded into what comes
    before."""
    ids = random_ids(4, 20)
    for heads in (4, 2):
        what = "llama" if heads == 4 else "llama whose query heads share value heads"
        expected = _expected(heads)
        for clip in (False, True):
            model = _model(heads)
            awq(model, ids, BITS, GROUP, clip=clip)
            for layer, (weights, norms, inputs) in enumerate(expected):
                block, where = model.model.layers[layer], f"{what}, block {layer}, clip={clip}"
                for name, gain in norms.items():
                    require_close(getattr(block, name).weight, gain, 1e-5, f"{where}: {name} after folding")
                for name, W in weights.items():
                    found, here = block.get_submodule(name).weight, f"{where}: {name}"
                    require(found.shape == W.shape, f"{here} has shape {list(found.shape)}")
                    if not clip or name in (Q, K):
                        # A group's scale that falls between two numbers of 16 bits may be either of them.
                        one_scale = ((found - _round(W)).abs() < 1e-5).float().mean() >= 0.99
                        close = 1e-3 * float(W.abs().max()) if one_scale else 1e-5
                        require_close(found, _round(W), close, f"{here}, the rounded scaled weights")
                        continue
                    cost, least = _cost(W, found, inputs[name]), _least_cost(W, inputs[name])
                    close = (cost - least).abs() <= 1e-4 * least + 1e-9
                    words = f"{int((~close).sum())} of {close.numel()} groups are clipped to something worse"
                    require(bool(close.all()), f"{here}: {words} (or better) than the best of ten")


@cache  # the same for every candidate
def _expected(heads: int) -> list[tuple[dict, dict, dict]]:
    plain = _model(heads)
    return [_search(plain, layer, random_ids(4, 20), fold_o=heads == 4) for layer in range(2)]


def _search(model: nn.Module, layer: int, ids: Tensor, fold_o: bool) -> tuple[dict, dict, dict]:
    """Scaled weights, norms and inputs of one block: every candidate put in place and run."""
    block, inputs, called, handles = model.model.layers[layer], {}, {}, []
    for name in LINEARS:
        keep = lambda _, x, name=name: inputs.__setitem__(name, x[0])
        handles.append(block.get_submodule(name).register_forward_pre_hook(keep))
    handles.append(
        block.self_attn.register_forward_pre_hook(lambda _, __, kw: called.update(kw), with_kwargs=True)
    )
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    runs = {
        Q: lambda: block.self_attn(**called)[0],
        O: lambda: block.self_attn.o_proj(inputs[O]),
        GATE: lambda: block.mlp(inputs[GATE]),
        DOWN: lambda: block.mlp.down_proj(inputs[DOWN]),
    }
    sites = {Q: (Q, K, V), **({O: (O,)} if fold_o else {}), GATE: (GATE, UP), DOWN: (DOWN,)}
    scales = {name: _best(block, names, inputs[name], runs[name]) for name, names in sites.items()}
    weights = {name: block.get_submodule(name).weight.detach().clone() for name in LINEARS}
    for first, names in sites.items():
        for name in names:
            weights[name] *= scales[first]
            inputs[name] = inputs[name] / scales[first]
    for producer, first in ((V, O), (UP, DOWN)):
        if first in scales:
            weights[producer] /= scales[first][:, None]
    norms = {
        "input_layernorm": block.input_layernorm.weight.detach() / scales[Q],
        "post_attention_layernorm": block.post_attention_layernorm.weight.detach() / scales[GATE],
    }
    return weights, norms, inputs


@torch.no_grad()
def _best(block: nn.Module, names: tuple[str, ...], x: Tensor, run: Callable[[], Tensor]) -> Tensor:
    layers = [block.get_submodule(name) for name in names]
    originals, target = [layer.weight.clone() for layer in layers], run()
    mean, least = x.abs().flatten(0, 1).mean(0), float("inf")
    for step in range(20):
        s = mean.pow(step / 20).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        for layer, W in zip(layers, originals, strict=True):
            layer.weight.copy_(_round(W * s) / s)
        if (loss := float((run() - target).square().mean())) < least:
            least, best = loss, s
    for layer, W in zip(layers, originals, strict=True):
        layer.weight.copy_(W)
    return best


def _round(W: Tensor) -> Tensor:
    """Asymmetric rounding in groups along the rows, scales of 16 bits."""
    groups = W.view(len(W), -1, GROUP)
    lo, hi = groups.amin(-1, True).clamp(max=0), groups.amax(-1, True).clamp(min=0)
    scale = ((hi - lo) / (2**BITS - 1)).half().float()
    zero = (-lo / scale).round()
    return ((((groups / scale).round() + zero).clamp(0, 2**BITS - 1) - zero) * scale).view_as(W)


def _cost(W: Tensor, found: Tensor, x: Tensor) -> Tensor:
    """Squared error of every group's share of the outputs, [d_out, groups]."""
    e = (found.detach() - W).view(len(W), -1, GROUP)
    share = torch.einsum("ogi,tgi->tog", e, x.flatten(0, 1).unflatten(-1, (-1, GROUP)))
    return share.square().mean(0)


def _least_cost(W: Tensor, x: Tensor) -> Tensor:
    groups = W.view(len(W), -1, GROUP)
    top = groups.abs().amax(-1, True)
    costs = [
        _cost(W, _round(groups.clamp(-top * (1 - i / 20), top * (1 - i / 20)).view_as(W)), x)
        for i in range(10)
    ]
    return torch.stack(costs).amin(0)


def _model(heads: int) -> nn.Module:
    return tiny("llama", num_hidden_layers=2, num_key_value_heads=heads)
