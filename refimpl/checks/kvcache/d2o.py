"""The check of D2O (kv-cache spec 15): the prompt of four layers and what comes after it."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {"d2o": "refimpl.kvcache.d2o:D2O"}
B, G, R, N, D, L, SINKS = 1, 2, 2, 40, 6, 4, 4


@check
def check_d2o(D2O: Callable) -> None:
    """`D2O(heavy, recent, full=, smoothing=)` with `observe`, `plan`, `keep`, `merge` on layers' views."""
    policy = D2O(0.2, 0.1, full=(0,), smoothing=0.7)
    views = [_view(l, N, N, l) for l in range(L)]
    for v in views:
        policy.observe(v)
    keeps = policy.plan(views)
    density = torch.tensor([_density(v.mass) for v in views])
    ratios = (torch.softmax(-density, 0) * L * 0.3).clamp(0.01, 1)
    require(keeps[0] is None, "layer 0, listed in `full`, evicts")
    for v, keep, ratio in zip(views[1:], keeps[1:], ratios[1:], strict=True):
        budget, acc = int(ratio * N), v.mass.sum(2)
        v, tau = _follow(policy, v, keep, budget, acc, None, f"layer {v.layer}, prompt")
        for step, T in enumerate((5, 1, 5)):
            new = _view(v.layer, budget + T, T, 50 + step)
            new.k[:, :, :budget], new.v[:, :, :budget] = v.k, v.v
            new.slot["acc"][..., :budget], new.notes = v.acc, v.notes
            policy.observe(new)
            acc = torch.cat((v.acc, torch.zeros(B, G, T)), -1) + new.mass.sum(2)
            what = f"layer {v.layer}, step {step} after the prompt"
            v, tau = _follow(policy, new, policy.keep(new), budget, acc, tau, what)
    require_error(ValueError, lambda: D2O(0.0, 0.1), "heavy = 0")


def _follow(policy: object, v: SimpleNamespace, keep: Tensor, budget: int, acc: Tensor, tau: Tensor | None,
            what: str) -> tuple[SimpleNamespace, Tensor]:  # fmt: skip
    """Compare selection and merging; return what is left of the layer, and its thresholds."""
    recent = round(budget / 3)
    mask = torch.zeros(B, G, v.S, dtype=torch.bool)
    mask = keep.expand(mask.shape) if keep.dtype == torch.bool else mask.scatter(-1, keep, True)
    merged_k, merged_v = policy.merge(v, mask) or (v.k, v.v)
    left = SimpleNamespace(layer=v.layer, notes=v.notes, acc=torch.zeros(B, G, budget),
                           k=torch.zeros(B, G, budget, D), v=torch.zeros(B, G, budget, D))  # fmt: skip
    taus = torch.zeros(G)
    for g in range(G):
        free = range(SINKS, v.S - recent)
        order = sorted(free, key=lambda i: -float(acc[0, g, i]))[: budget - recent - SINKS]
        stay = sorted([*range(SINKS), *order, *range(v.S - recent, v.S)])
        got = mask[0, g].nonzero().flatten().tolist()
        require(got == stay, f"{what}: head {g} keeps {got}, not {stay}")
        gone = [i for i in range(v.S) if i not in stay]
        k, u = v.k[0, g], {}
        for e in gone:
            cosines = [float(torch.cosine_similarity(k[e], k[c], dim=0)) for c in stay]
            u[e] = max(cosines), stay[cosines.index(max(cosines))]
        mean = sum(x for x, _ in u.values()) / len(u)
        taus[g] = mean if tau is None else 0.7 * float(tau[g]) + 0.3 * mean
        for c, slot in enumerate(stay):
            mine = [e for e in gone if u[e][1] == slot and u[e][0] >= float(taus[g]) - 1e-6]
            total = math.e + sum(math.exp(u[e][0]) for e in mine)
            both = ("key", v.k, merged_k, left.k), ("value", v.v, merged_v, left.v)
            for name, source, new, to in both:
                expected = math.e * source[0, g, slot]
                for e in mine:
                    expected = expected + math.exp(u[e][0]) * source[0, g, e]
                to[0, g, c] = expected / total
                told = f"{what}: {name} of slot {slot}, head {g}, into which {mine} merge"
                require_close(new[0, g, slot], to[0, g, c], 1e-4, told)
            left.acc[0, g, c] = acc[0, g, slot]
    return left, taus


def _view(layer: int, S: int, T: int, seed: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    # The more heads of a layer look at few keys, the higher its density.
    sharp = torch.where(torch.arange(G * R) < layer, 4.0, 0.5).view(G, R, 1, 1)
    scores = sharp * torch.randn(B, G, R, T, S, generator=generator)
    hidden = torch.arange(S) > torch.arange(S - T, S)[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    mass = weights.sum(3)
    k, v = torch.randn(2, B, G, S, D, generator=generator)
    return SimpleNamespace(
        layer=layer, n_layers=L, prefill=T == S, S=S, T=T, shape=(B, G, S), full=True, seen=S, k=k, v=v,
        mass=mass, attn=weights, attn_sum=mass.clone, slot={"acc": torch.zeros(B, G, S)}, notes={},
        pos=torch.arange(S).expand(B, G, S), rank=torch.arange(S), count=S, device=k.device,
        ok=torch.ones(B, G, S, dtype=torch.bool),
    )  # fmt: skip


def _density(mass: Tensor) -> float:
    variances = [float(mass[0, g, r].var()) for g in range(G) for r in range(R)]
    low, high = min(variances), max(variances)
    return sum((x - low) / (high - low) for x in variances) / len(variances)
