"""The check of MixLLM (quantization spec, section 14; arXiv 2412.14590)."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {"mixllm": "refimpl.quantization.mixllm:mixllm"}
SHARE, LOW, HIGH, GROUP, DAMP = 0.2, 2, 8, 8, 0.01


@check
def check_mixllm(mixllm: Callable) -> None:
    """`mixllm(model, ids, share, low=, high=, group=, sequential=)` -> object with `salience` and `rows`, by
    module name; the model's linear layers are replaced by layers with `weight` [d_out, d_in]."""
    model, ids = tiny("llama", num_hidden_layers=2), random_ids(6, 24)
    W, salience, H = _expected()
    rows = _top(salience)
    done = mixllm(model, ids, SHARE, low=LOW, high=HIGH, group=GROUP, sequential=False)
    require(
        set(done.salience) == set(W) and set(done.rows) == set(W), "salience and rows: names of the layers"
    )
    for name, expected in salience.items():
        found = done.salience[name].double()
        require(found.shape == expected.shape, f"salience of {name}: one number for each output row")
        error = float(((found - expected).abs() / expected.clamp_min(1e-9)).max())
        require(
            error < 0.02, f"salience of {name}: |a + a^2/2| per sequence, then summed; off by {error:.2g}"
        )
    count = sum(int(r.sum()) for r in done.rows.values())
    require(count == sum(int(r.sum()) for r in rows.values()), f"{count} rows have high bits of {SHARE:.0%}")
    for name, expected in rows.items():
        agree = float((done.rows[name] == expected).float().mean())
        require(agree > 0.95, f"rows of {name} are not those that rank first among the rows of all layers")
    for name in list(W)[2], list(W)[6]:  # v_proj, down_proj of the first block
        weight = model.get_submodule(name).weight
        expected = torch.empty_like(W[name], dtype=torch.float64)
        for which, bits, symmetric in ((done.rows[name], HIGH, True), (~done.rows[name], LOW, False)):
            if bool(which.any()):
                expected[which] = _gptq(W[name][which].double(), H[name], bits, symmetric)
        # A value in the middle of two steps may fall to either side.
        near = float(((weight - expected).abs() < 1e-4).float().mean())
        message = (
            "rows of both sets by GPTQ, groups in the order of their sum of H_jj, clipped for least error"
        )
        require(near > 0.97, f"{name}: {message}; {1 - near:.0%} of the weights are others")
    layer, x = model.get_submodule(name), torch.randn(5, W[name].shape[1], generator=_generator())
    groups = x.view(5, -1, GROUP)
    step = groups.abs().amax(-1, keepdim=True) / 127
    expected = ((groups / step).round() * step).view(5, -1) @ layer.weight.T
    require_close(layer(x), expected, 1e-4, "inputs in 8 bits, symmetric, per token and group: the product")


@cache  # the same for every candidate
def _expected() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Weights, salience and H of every linear layer of the blocks."""
    model, ids = tiny("llama", num_hidden_layers=2), random_ids(6, 24)
    linears = {
        name: module for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }  # fmt: skip
    W = {name: module.weight.detach().clone() for name, module in linears.items()}
    return W, _salience(model, linears, ids), _hessians(model, linears, ids)


def _salience(model: nn.Module, linears: dict[str, nn.Linear], ids: Tensor) -> dict[str, Tensor]:
    total = {name: torch.zeros(module.out_features).double() for name, module in linears.items()}
    for sequence in ids:
        model.zero_grad()
        F.cross_entropy(model(sequence[None]).logits[0, :-1], sequence[1:]).backward()
        for name, module in linears.items():
            delta = _round(module.weight.detach().double(), LOW, False) - module.weight.detach()
            a = (module.weight.grad.double() * delta).sum(1)
            total[name] += (a + a * a / 2).abs()
    model.zero_grad()
    return total


def _hessians(model: nn.Module, linears: dict[str, nn.Linear], ids: Tensor) -> dict[str, Tensor]:
    found, hooks = {}, []
    for name, module in linears.items():

        def hook(_: nn.Module, x: tuple, name: str = name) -> None:
            flat = x[0].detach().flatten(0, -2).double()
            found[name] = 2 / len(flat) * flat.T @ flat

        hooks.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def _top(salience: dict[str, Tensor]) -> dict[str, Tensor]:
    everything = torch.cat(list(salience.values())).sort(descending=True).values
    least = everything[int(len(everything) * SHARE) - 1]
    return {name: scores >= least for name, scores in salience.items()}


def _gptq(W: Tensor, H: Tensor, bits: int, symmetric: bool) -> Tensor:
    """By the inverse of what is left of H, at every column."""
    W, Q = W.clone(), torch.zeros_like(W)
    groups = H.diagonal().view(-1, GROUP).sum(1).argsort(descending=True).tolist()
    order = [group * GROUP + j for group in groups for j in range(GROUP)]
    damped = H + DAMP * H.diagonal().mean() * torch.eye(len(H))
    for i, j in enumerate(order):
        if i % GROUP == 0:
            own = order[i : i + GROUP]
            scale, zero = _best_range(W[:, own], H[own][:, own], bits, symmetric)
        left = order[i:]
        inverse = torch.linalg.inv(damped[left][:, left])
        Q[:, j] = _on_grid(W[:, [j]], scale, zero, bits, symmetric)[:, 0]
        W[:, left] -= ((W[:, j] - Q[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return Q


def _best_range(w: Tensor, H: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    tried = [_grid(w * percent / 100, bits, symmetric) for percent in range(80, 101, 2)]
    deltas = [_on_grid(w, *grid, bits, symmetric) - w for grid in tried]
    best = torch.stack([((d @ H) * d).sum(1) for d in deltas]).argmin(0)
    rows = torch.arange(len(w))
    return tuple(torch.stack(parts)[best, rows] for parts in zip(*tried, strict=True))


def _grid(w: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale, of 16 bits, and zero point of each row."""
    lo, hi = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        scale = (torch.maximum(-lo, hi) / (2 ** (bits - 1) - 1)).half().double()
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = ((hi - lo) / (2**bits - 1)).half().double()
    return scale, (-lo / scale).round()


def _on_grid(w: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> Tensor:
    return (((w / scale).round() + zero).clamp(int(symmetric), 2**bits - 1) - zero) * scale


def _round(W: Tensor, bits: int, symmetric: bool) -> Tensor:
    groups = W.reshape(-1, GROUP)
    return _on_grid(groups, *_grid(groups, bits, symmetric), bits, symmetric).view(W.shape)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
