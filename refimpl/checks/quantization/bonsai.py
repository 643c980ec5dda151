"""The check of Bonsai (quantization spec, section 20; arXiv 2402.05406)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import HEADS, LAYERS, WIDTH, random_ids, tiny

IMPLEMENTATION = {"bonsai": "refimpl.quantization.pruning.bonsai:bonsai"}
NEURONS, DIM, PLANTED = 40, WIDTH // HEADS, (2, 7)
TOTAL = LAYERS * WIDTH * (2 * DIM * HEADS + 2 * DIM * 2 + 3 * NEURONS)  # 2 K/V heads


@check
def check_bonsai(bonsai: Callable) -> None:
    """`bonsai(model, ids, sparsity=, generator=, step=, masks=, regression="l1" | "ridge" | None)` prunes in
    place; returns heads [L, H], neurons [L, F] (True: kept) and sparsity, a share of the blocks' weights."""
    ids = random_ids(4, 16)
    # By the prior alone, in one round.
    found = bonsai(tiny("llama"), ids, sparsity=0.1, generator=_seeded(), step=0.1, regression=None)
    heads, neurons = _by_prior(tiny("llama"), ids, 0.1)
    for what, mine, theirs in (("heads", heads, found.heads), ("neurons", neurons, found.neurons)):
        differs = int((mine != theirs.cpu()).sum())
        require(differs == 0, f"by the prior alone {differs} {what} differ from the lowest |W| rms(x)")
    # A neuron of the lowest prior on which all predictions hang.
    repeated = torch.full((2, 12), 9)
    by_prior = _planted()
    kept = bonsai(by_prior, repeated, sparsity=0.1, generator=_seeded(), step=0.1, regression=None)
    require(not kept.neurons[PLANTED], "by the prior alone the neuron of lowest prior stayed")
    for regression in ("l1", "ridge"):
        model = _planted()
        seen = _watch(model)
        settings = {"sparsity": 0.1, "generator": _seeded(), "step": 0.1, "masks": 40}
        found = bonsai(model, repeated, regression=regression, **settings)
        require(not any(grad for grad, _ in seen), f"{regression}: the model was run with gradients enabled")
        _check_masks([mask for _, mask in seen])
        require(found.neurons[PLANTED], f"{regression}: the neuron that all predictions need was removed")
        ours, theirs = _nll(model, repeated), _nll(by_prior, repeated)
        better = ours < theirs
        require(better, f"{regression}: {ours:.2f} nats per token, by the prior alone {theirs:.2f}")
        left = _weights(model)
        require(TOTAL * 0.9 <= left < TOTAL * 0.9 + 3 * WIDTH, f"{left} weights left of {TOTAL} at 0.1")
        right = math.isclose(found.sparsity, 1 - left / TOTAL, abs_tol=1e-9)
        require(right, f"sparsity is said to be {found.sparsity:.4f}, and is {1 - left / TOTAL:.4f}")
        with torch.no_grad():
            expected = _zeroed(_planted(), found.heads, found.neurons)(ids).logits
            require_close(model(ids).logits, expected, 1e-3, "sliced and masked logits")


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _by_prior(model: nn.Module, ids: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """The lowest of each module, the same share of all modules, as long as they fit."""
    keep = torch.ones(LAYERS, HEADS).bool(), torch.ones(LAYERS, NEURONS).bool()
    queue = []
    for l, layer in enumerate(model.model.layers):
        for kind, module in ((0, layer.self_attn.o_proj), (1, layer.mlp.down_proj)):
            x = _input(model, module, ids)
            score = (module.weight.detach().abs() * x.pow(2).mean((0, 1)).sqrt()).mean(0)
            if kind == 0:
                score = score.view(HEADS, DIM).mean(1)
            order = score.argsort()[: max(2, len(score) - math.floor(len(score) * (1 - 2 * sparsity) + 1e-9))]
            for i, unit in enumerate(order.tolist()):
                queue.append(((i + 1) / len(score), float(score[unit]), kind, l, unit))
    for _, _, kind, l, unit in sorted(queue):
        keep[kind][l, unit] = False
        if _count(*keep) < TOTAL * (1 - sparsity):
            keep[kind][l, unit] = True
    return keep


def _input(model: nn.Module, module: nn.Module, ids: Tensor) -> Tensor:
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return inputs[0]


def _planted() -> nn.Module:
    """Neuron 7 of the last layer raises the logit of token 9, and has the lowest prior of its layer. Heads
    and other layers matter little."""
    model = tiny("llama")
    l, unit = PLANTED
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.02
            layer.mlp.down_proj.weight *= 0.1
    module, repeated = model.model.layers[l].mlp.down_proj, torch.full((2, 12), 9)
    x = _input(model, module, repeated)[0, 0]  # the same at all positions
    with torch.no_grad():
        logit = model.model.embed_tokens.weight[9] * model.model.norm.weight  # what a dimension adds to it
        column = torch.zeros(WIDTH)
        column[logit.abs().argmax()] = logit[logit.abs().argmax()].sign() * x[unit].sign()
        module.weight[:, unit] = column
        prior = module.weight.abs().mean(0) * x.abs()
        wanted = torch.linspace(0.31, 0.4, NEURONS)
        wanted[unit] = 0.3
        module.weight *= wanted / prior
    return model


def _watch(model: nn.Module) -> list[tuple[bool, Tensor]]:
    """Of every run: whether gradients are enabled, and which neurons of layer 2 were 0 throughout."""
    seen: list[tuple[bool, Tensor]] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        seen.append((torch.is_grad_enabled(), inputs[0].flatten(0, 1).abs().amax(0) > 0))

    model.model.layers[2].mlp.down_proj.register_forward_hook(look)
    return seen


def _check_masks(zeros: list[Tensor]) -> None:
    """Runs of masks: the first half of each pair leaves out what the second keeps, among the candidates."""
    runs = [alive for alive in zeros if not bool(alive.all())]
    require(len(runs) >= 20, f"only {len(runs)} sub-models left out neurons of the last layer")
    candidates = ~torch.stack(runs).all(0)
    share = int(candidates.sum()) / NEURONS
    require(share <= 0.21, f"{share:.2f} of the last layer's neurons were left out at times, at p = 0.1")
    pairs = [runs[i : i + 2] for i in range(0, len(runs) - 1, 2)]
    matching = sum(bool((a[candidates] ^ b[candidates]).all()) for a, b in pairs if len(runs) % 2 == 0)
    require(matching == len(pairs), f"{matching} of {len(pairs)} pairs of masks are complements")


def _nll(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def _count(heads: Tensor, neurons: Tensor) -> int:
    shared = heads.view(LAYERS, 2, -1).any(-1).sum()
    return int(WIDTH * (2 * DIM * heads.sum() + 2 * DIM * shared + 3 * neurons.sum()))


def _weights(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)


def _zeroed(model: nn.Module, heads: Tensor, neurons: Tensor) -> nn.Module:
    for l, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight.mul_(heads[l].repeat_interleave(DIM))
        layer.mlp.down_proj.weight.mul_(neurons[l])
    return model
