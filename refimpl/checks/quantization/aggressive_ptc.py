"""The check of aggressive post-training compression (quantization spec, section 19; arXiv 2409.20094)."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from refimpl.checks import check, require
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {"aggressive_ptc": "refimpl.quantization.pruning.aggressive:aggressive_ptc"}
SPARSITY, SPREAD, DAMP = 0.7, 0.15, 0.01


@check
def check_aggressive_ptc(aggressive_ptc: Callable) -> None:
    """`aggressive_ptc(model, ids, sparsity=, bits=, group=, spread=)` changes a model's linear layers."""
    ids = random_ids(8, 32)
    plain, inputs, errors = _prepared()
    for spread in (SPREAD, 0.02):
        expected = _shares(errors, spread)
        model = tiny("llama")
        model.load_state_dict(plain.state_dict())
        aggressive_ptc(model, ids, sparsity=SPARSITY, bits=None, spread=spread)
        zeros = {name: int((model.get_submodule(name).weight == 0).sum()) for name in inputs}
        sizes = {name: e.numel() for name, e in errors.items()}
        total = sum(zeros.values()) / sum(sizes.values())
        require(abs(total - SPARSITY) < 0.001, f"{total:.4f} of the weights are 0 where {SPARSITY} should be")
        for name in inputs:
            found = zeros[name] / sizes[name]
            require(
                abs(found - expected[name]) < 0.005,
                f"spread {spread}: {name} has sparsity {found:.3f} where one threshold for the whole model "
                f"gives {expected[name]:.3f}",
            )
    # On a grid: the first layer, whose inputs no other changes.
    name = "model.layers.0.self_attn.q_proj"
    model = tiny("llama")
    model.load_state_dict(plain.state_dict())
    aggressive_ptc(model, ids, sparsity=SPARSITY, bits=3, group="row", spread=SPREAD)
    W, Q = plain.get_submodule(name).weight.detach(), model.get_submodule(name).weight.double()
    _check_grid(W, Q, inputs[name], _shares(errors, SPREAD)[name])


@cache  # the same for every candidate, which gets a copy of the model
def _prepared() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    plain = tiny("llama")
    with torch.no_grad():
        # Correlated inputs, so that errors can be made up for.
        E = plain.model.embed_tokens.weight
        E.copy_(E[:, :8] @ E[:8] * 2 + 0.2 * E)
        # Blocks of different importance, so that one threshold is not one sparsity.
        for i, layer in enumerate(plain.model.layers):
            layer.mlp.up_proj.weight *= 0.4 + 0.8 * i
    inputs = _inputs(plain, random_ids(8, 32))
    return plain, inputs, {n: _errors(plain.get_submodule(n).weight, x) for n, x in inputs.items()}


def _check_grid(W: Tensor, Q: Tensor, x: Tensor, sparsity: float) -> None:
    """Mask and grid must come from one pass."""
    lo, hi = W.amin(1, keepdim=True).clamp(max=0), W.amax(1, keepdim=True).clamp(min=0)
    scale = ((hi - lo) / 7).half().double()
    steps = Q / scale
    on_grid = bool(((steps - steps.round()).abs() < 1e-3).all())
    require(on_grid, "bits=3: the weights are not whole steps of the grid of their rows")
    H = 2 / len(x) * x.T @ x
    expected = _reference(W.double(), H, sparsity, scale, (-lo / scale).round())
    same = float(((Q - expected).abs() < 1e-3).double().mean())
    found, wanted = (float((((W - q) @ H) * (W - q)).sum()) for q in (Q, expected))
    require(
        same > 0.99,
        f"bits=3: {same:.1%} of the first layer's weights are those of mask and grid in one pass; its output "
        f"error is {found:.4g} where {wanted:.4g} is possible",
    )


def _reference(W: Tensor, H: Tensor, sparsity: float, scale: Tensor, zero: Tensor) -> Tensor:
    """SparseGPT on a grid without a Cholesky factor; all columns are one block."""
    W, Q, columns = W.clone(), torch.zeros_like(W), W.shape[1]
    H = H + DAMP * H.diagonal().mean() * torch.eye(columns)
    inverses = [torch.linalg.inv(H[j:, j:])[0] for j in range(columns)]
    score = W.square() / torch.stack([row[0] for row in inverses])
    keep = torch.ones(W.numel(), dtype=torch.bool)
    keep[score.flatten().argsort()[: int(W.numel() * sparsity)]] = False
    keep = keep.view(W.shape)
    for j in range(columns):
        codes = ((W[:, [j]] / scale).round() + zero).clamp(0, 7)
        Q[:, [j]] = (codes - zero) * scale * keep[:, [j]]
        W[:, j:] -= ((W[:, j] - Q[:, j]) / inverses[j][0])[:, None] * inverses[j]
    return Q


def _shares(errors: dict[str, Tensor], spread: float = SPREAD) -> dict[str, float]:
    """One threshold for all layers, by bisection over all errors, no buckets."""
    low, high = 0.0, max(float(e.max()) for e in errors.values())
    sizes = {name: e.numel() for name, e in errors.items()}
    for _ in range(80):
        middle = (low + high) / 2
        shares = {
            name: min(max(float((e < middle).double().mean()), SPARSITY - spread), SPARSITY + spread)
            for name, e in errors.items()
        }
        total = sum(shares[name] * sizes[name] for name in errors) / sum(sizes.values())
        low, high = (middle, high) if total < SPARSITY else (low, middle)
    return shares


def _errors(W: Tensor, x: Tensor) -> Tensor:
    """w^2 [inverse of what is left of H]_jj^-1 for every column j, those before it settled."""
    H = 2 / len(x) * x.T @ x
    H += DAMP * H.diagonal().mean() * torch.eye(len(H))
    price = torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(len(H))])
    return W.detach().double().square() / price


def _inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What every linear layer of the blocks is fed, [tokens, d_in], float64."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            keep = lambda _, args, name=name: found.__setitem__(name, args[0].flatten(0, 1).double())
            hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found
