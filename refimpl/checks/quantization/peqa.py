"""The check of PEQA (quantization spec, section 9; arXiv 2305.14152)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import WIDTH, random_ids, tiny

IMPLEMENTATION = {"peqa": "refimpl.quantization.peqa:peqa"}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
          "c_attn", "c_proj", "c_fc")  # fmt: skip


@check
def check_peqa(peqa: Callable) -> None:
    """`peqa(model, bits, group)` changes a model in place: linear layers with `weight` W^, one parameter that
    trains [d_out, groups], and buffers that never change."""
    for family, bits, group in (("llama", 3, "row"), ("llama", 4, 8), ("gpt2", 2, "row")):
        what = f"{family}, {bits} bits, group {group}"
        plain, model = _dense(family), tiny(family, num_hidden_layers=1)
        peqa(model, bits, group)
        layers = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in LINEAR}
        require(layers.keys() == plain.keys(), f"{what}: other linear layers than before")
        _require_only_scales_train(model, layers, group, what)
        scales = {name: _scale(layer) for name, layer in layers.items()}
        integers = {name: _integers(layer, scales[name], bits, what) for name, layer in layers.items()}
        for name, layer in layers.items():
            error = float((layer.weight.detach() - plain[name]).square().sum())
            least = _least_error(plain[name], bits, group)
            require(error < 1.02 * least,
                    f"{what}: {name} begins with ||W - W^||^2 = {error:.4g}; the best of the ranges [lo, hi] "
                    f"shrunk on both sides has {least:.4g}")  # fmt: skip
        _require_gradients(model, layers, integers, what)
        stored = {key: t.clone() for key, t in model.state_dict().items() if not key.endswith(".scale")}
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.sub_(0.1 * p.sign() * p.abs().mean() * torch.linspace(-1, 1, p.numel()).view(p.shape))
        for name, layer in layers.items():
            groups = integers[name].view(*scales[name].shape, -1)
            moved = (_scale(layer)[..., None] * groups).view(integers[name].shape)
            told = f"{what}: {name} with other scales is not scale times the same integers"
            require_close(layer.weight.detach(), moved, 1e-5, told)
        now = model.state_dict()
        changed = [key for key, t in stored.items() if not torch.equal(t, now[key])]
        require(not changed, f"{what}: {', '.join(changed[:2])} changed with the scales")


def _require_only_scales_train(model: nn.Module, layers: dict, group: int | str, what: str) -> None:
    expected = {}
    for name, layer in layers.items():
        groups = 1 if group == "row" else layer.in_features // group
        expected[name] = layer.out_features * groups
    found = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    others = [name for name in found if name.rpartition(".")[0] not in layers]
    require(not others, f"{what}: {', '.join(others[:2])} would train; only scales may")
    require(sum(found.values()) == sum(expected.values()),
            f"{what}: {sum(found.values())} numbers train, not {sum(expected.values())}, one for each row or "
            "group")  # fmt: skip


def _scale(layer: nn.Module) -> Tensor:
    """The one parameter of a layer that trains."""
    (scale,) = [p.detach().clone() for p in layer.parameters() if p.requires_grad]
    return scale.view(layer.out_features, -1)


def _integers(layer: nn.Module, scale: Tensor, bits: int, what: str) -> Tensor:
    """W^ / s, which must be integers of b bits, zero among them."""
    steps = (layer.weight.detach().view(*scale.shape, -1) / scale[..., None]).view(layer.weight.shape)
    require_close(steps, steps.round(), 1e-3, f"{what}: W^ over its scale must be integers")
    groups = steps.round().view(*scale.shape, -1)
    span = int((groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)).max())
    require(span < 2**bits, f"{what}: the integers of a group span {span}, more than {bits} bits")
    return steps.round()


def _require_gradients(model: nn.Module, layers: dict, integers: dict, what: str) -> None:
    """dL/ds is the sum over the group of dL/dW^ times the integer, by autograd through dense weights."""
    ids = random_ids(2, 9)
    kept: list[tuple[int, ...]] = []
    pack = lambda tensor: kept.append(tuple(tensor.shape)) or tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(model, ids)
    shapes = {tuple(w.shape) for w in integers.values()} | {tuple(w.T.shape) for w in integers.values()}
    require(not shapes & set(kept) - {(WIDTH, WIDTH)}, f"{what}: autograd keeps a matrix the size of W^")
    require(loss.requires_grad, f"{what}: the loss does not depend on anything that trains")
    loss.backward()
    dense = {name: layer.weight.detach().clone().requires_grad_() for name, layer in layers.items()}
    hooks = [
        layer.register_forward_hook(lambda m, x, y, W=dense[name]: F.linear(x[0], W, m.bias))
        for name, layer in layers.items()
    ]
    grads = torch.autograd.grad(_loss(model, ids), list(dense.values()))
    for hook in hooks:
        hook.remove()
    for (name, layer), dW in zip(layers.items(), grads, strict=True):
        (scale,) = [p for p in layer.parameters() if p.requires_grad]
        expected = (dW * integers[name]).view(*scale.shape, -1).sum(-1)
        require(scale.grad is not None, f"{what}: no gradient reaches the scale of {name}")
        told = f"{what}: the gradient of {name}'s scale is not rowsum(dL/dW^ * integers)"
        require_close(scale.grad, expected, 1e-4 * float(expected.abs().max()), told)
        scale.grad = None


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _least_error(W: Tensor, bits: int, group: int | str) -> float:
    """The least squared error of asymmetric rounding over 100 shrunk ranges of every group."""
    groups = W.reshape(len(W), 1 if group == "row" else W.shape[1] // group, -1)
    lo, hi = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    errors = []
    for shrink in torch.linspace(0.2, 1, 100):
        scale = shrink * (hi - lo) / (2**bits - 1)
        zero = (-shrink * lo / scale).round()
        Q = (((groups / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale
        errors.append((groups - Q).square().sum(-1))
    return float(torch.stack(errors).amin(0).sum())


def _dense(family: str) -> dict[str, Tensor]:
    """The weights [d_out, d_in] of the blocks' linear layers by module name."""
    found = {}
    for name, module in tiny(family, num_hidden_layers=1).named_modules():
        if name.rpartition(".")[2] in LINEAR:
            found[name] = module.weight.detach().T if family == "gpt2" else module.weight.detach()
    return found
