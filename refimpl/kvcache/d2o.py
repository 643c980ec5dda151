"""D2O (2406.13035): layer budgets from the density of attention, victims merged into similar survivors.

Density, budgets, choice of survivors and first threshold equal the released code's on random numbers; the
weights of merging are the paper's equation 11 as a third party's port quotes it, which takes its e for 0.1,
not for Euler's number as here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from refimpl.kvcache.policies import KVPolicy
from refimpl.kvcache.rope import Rope
from refimpl.kvcache.slots import best
from refimpl.kvcache.view import View

__all__ = ["D2O", "attention_density", "layer_ratios", "merge_into_nearest"]


def attention_density(mass: Tensor) -> Tensor:
    """Return f [B], how unevenly a layer's heads spread their attention over the keys, between 0 and 1.

    Each head's variance over the keys of its column sums, min-max normalised over the heads, averaged over
    them. Parameters: mass, the prefill's weights summed over queries, [B, H, n]. A layer whose heads all have
    the same variance has f = 0.

    >>> attention_density(torch.tensor([[[1., 1.], [0., 2.], [0., 2.]]]))  # variances 0, 2, 2
    tensor([0.6667])
    """
    variance = mass.var(-1)
    low, high = variance.aminmax(dim=-1, keepdim=True)
    span = high - low
    return ((variance - low) / torch.where(span > 0, span, 1)).mean(-1)


def layer_ratios(density: Tensor, ratio: float) -> Tensor:
    """Return the share of the prompt that each layer keeps: softmax(-f) · L · ratio, clamped to [0.01, 1].

    Without clamping their mean is `ratio`: even layers get more. Parameters: density f [L], ratio in (0, 1].

    >>> layer_ratios(torch.tensor([0., 0.]), 0.2)
    tensor([0.2000, 0.2000])
    """
    return (torch.softmax(-density, 0) * len(density) * ratio).clamp(0.01, 1)


def merge_into_nearest(
    k: Tensor, v: Tensor, victim_k: Tensor, victim_v: Tensor, nearest: LongTensor, similarity: Tensor,
    chosen: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return survivors k, v [..., C, D] as weighted means with the victims that chose them.

    Survivor c has weight e, victim j weight exp(u_j), over their sum: u is 1 for c itself, so an exact copy
    weighs as much as c. The same weights serve keys and values.
    Parameters: victim_k, victim_v [..., E, D]; nearest and similarity u [..., E], each victim's survivor and
    cosine; chosen, bool [..., E], whether it is merged at all.

    >>> one = torch.ones(1, 2)
    >>> merge_into_nearest(one, 3 * one, one, one, torch.tensor([0]), torch.ones(1), torch.tensor([True]))[1]
    tensor([[2., 2.]])
    """
    weight = similarity.exp() * chosen
    total = torch.full(k.shape[:-1], torch.e, dtype=weight.dtype, device=k.device)
    total = total.scatter_add(-1, nearest, weight)
    touched = torch.zeros_like(total).scatter_add(-1, nearest, chosen.to(total.dtype)) > 0
    at = nearest[..., None].expand_as(victim_k)
    merged = []
    for own, other in ((k, victim_k), (v, victim_v)):
        mean = (torch.e * own).scatter_add(-2, at, (weight[..., None] * other).to(own.dtype)) / total[
            ..., None
        ]
        merged.append(torch.where(touched[..., None], mean.to(own.dtype), own))  # the others bit by bit
    return tuple(merged)


class D2O(KVPolicy):
    """Heavy hitters with budgets by layer; a victim is merged into its most similar survivor (2406.13035).

    At the end of the prefill a layer of density f keeps clamp(softmax(-f) L · (heavy + recent), 0.01, 1) of
    the n tokens, divided between the last ones and the heaviest of the others by accumulated attention in
    that proportion; the first `sinks` are pinned. In decode each layer keeps as many as before the forward.
    Layers in `full` evict nothing.

    Merging, for each KV head: victim e has u_e = max over survivors of the cosine of their keys. With
    tau = mean u_e at first, later tau <- a tau + (1 - a) mean u_e, victims with u_e >= tau go into their
    survivor (`merge_into_nearest`); the others are dropped.

    The released code differs: it starts to evict at the first decoding step, averages a survivor c and its
    u_j x_j plainly, and decides to merge by the victims' rank averaged over heads, though the j-th victim is
    another token in each head. The tau here is each head's own. The paper is quoted with max u_e in place of
    mean u_e after the first time, and 1 - a = 0.7; with one victim a step, max and mean are the same.

    Parameters
    - heavy, recent: shares of the prompt, positive, at most 1 together (the released example: 0.1 and 0.1).
    - sinks: pinned first tokens, 0 and more (4). full: layers that keep all (0, 1 and the last).
    - merging: False evicts only. smoothing: a, 0..1 (0.5, as released).
    - rope: a `Rope` of the model lets keys be compared and averaged without their rotations, each survivor
      being rotated to its own position again; None: as they are stored.

    At least sinks + 1 tokens stay, whatever the shares. Raises ValueError for others, for a layer that the
    model lacks, and for padded prompts (shares of one length).

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model = tiny("llama")
    >>> cache = KVCache(model, D2O(0.2, 0.2, full=(0,)))
    >>> out = model(random_ids(1, 30), past_key_values=cache)
    >>> cache.held(0).tolist(), int(cache.held(1)[0, 0]) < 30
    ([[30, 30]], True)
    """

    slots = {"acc": torch.float32}
    needs = {"attn"}

    def __init__(
        self, heavy: float = 0.1, recent: float = 0.1, *, sinks: int = 4, full: tuple[int, ...] = (0, 1, -1),
        merging: bool = True, smoothing: float = 0.5, rope: Rope | None = None,
    ) -> None:  # fmt: skip
        for name, share in (("heavy", heavy), ("recent", recent)):
            if not 0 < share < 1:
                raise ValueError(f"{name}: {share!r}; allowed: between 0 and 1, a share of the prompt")
        if heavy + recent > 1:
            raise ValueError(f"heavy + recent: {heavy + recent}; allowed: at most 1")
        if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
            raise ValueError(f"sinks: {sinks!r}; allowed: integers from 0")
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing: {smoothing!r}; allowed: 0..1")
        self.heavy, self.recent, self.sinks, self.full = heavy, recent, sinks, tuple(full)
        self.merging, self.smoothing, self.rope = merging, smoothing, rope

    def observe(self, v: View) -> None:
        if v.prefill and not v.full:
            raise ValueError("D2O: a padded prompt; allowed: rows without padding, budgets are shares of one")
        mass = v.attn_sum()
        v.slot["acc"] += mass.sum(2)
        if v.prefill:
            v.notes["density"] = attention_density(mass.flatten(1, 2))

    def plan(self, views: list[View]) -> list[LongTensor | None]:
        # The rows of a batch share the budgets: a layer is one tensor.
        density = torch.stack([v.notes.pop("density").mean() for v in views]).detach()
        for v, ratio in zip(views, layer_ratios(density, self.heavy + self.recent), strict=True):
            v.notes["ratio"] = ratio.repeat(v.shape[0])
        return [self.keep(v) for v in views]

    def keep(self, v: View) -> LongTensor | None:
        budget = self._budget(v)
        if budget >= v.S:
            return None
        recent = round(budget * self.recent / (self.heavy + self.recent))
        recent = min(max(recent, 1), budget - self.sinks)
        score = v.slot["acc"].clone()
        score[..., : self.sinks] = score[..., v.S - recent :] = torch.inf
        return best(score, budget)

    def merge(self, v: View, keep: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.merging:
            return None
        order = keep.byte().argsort(dim=-1, descending=True, stable=True)
        stay, gone = order.split((self._budget(v), v.S - self._budget(v)), -1)
        keys = v.k if self.rope is None else self.rope.turn(v.k, -v.pos)
        unit = F.normalize(keys.float(), dim=-1)
        u, nearest = (_take(unit, gone) @ _take(unit, stay).transpose(-1, -2)).max(-1)
        tau = u.mean(-1)
        if "tau" in v.notes:
            tau = self.smoothing * v.notes["tau"] + (1 - self.smoothing) * tau
        v.notes["tau"] = tau
        victims = _take(v.k, gone)
        if self.rope is not None:  # to the position of the survivor
            pos = v.pos.long()
            way = pos.gather(-1, stay.gather(-1, nearest)) - pos.gather(-1, gone)
            victims = self.rope.turn(victims, way) / self.rope.scale
        merged = merge_into_nearest(
            _take(v.k, stay), _take(v.v, stay), victims, _take(v.v, gone), nearest, u, u >= tau[..., None]
        )  # fmt: skip
        at = stay[..., None].expand(*stay.shape, v.k.shape[-1])
        return v.k.scatter(2, at, merged[0]), v.v.scatter(2, at, merged[1])

    def _budget(self, v: View) -> int:
        """Slots that the layer keeps: after the prefill as many as it had before the forward."""
        for layer in self.full:
            if not -v.n_layers <= layer < v.n_layers:
                raise ValueError(f"full: {layer}; allowed: -{v.n_layers}..{v.n_layers - 1}, layers")
        if v.layer in (layer % v.n_layers for layer in self.full):
            return v.S
        least = int(float(v.notes["ratio"][0]) * v.S) if v.prefill else v.S - v.T
        return min(v.S, max(least, self.sinks + 1))


def _take(t: Tensor, index: LongTensor) -> Tensor:
    return t.take_along_dim(index[..., None], 2)
