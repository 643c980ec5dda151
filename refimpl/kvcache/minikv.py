"""MiniKV (2411.18077): the heavy hitters of the prompt, with pyramid budgets, in two bits.

Budgets, choice and codes equal the released code's, with one KV head per query head; where heads share keys
it copies these for every query head, which then chooses by itself and is stored by itself. Its fused kernels
and its other selector, SnapKV's, are not here.
"""

from __future__ import annotations

import torch
from torch import LongTensor, nn

from refimpl.kvcache.cache import KVCache
from refimpl.kvcache.kivi import KIVI
from refimpl.kvcache.policies import KVPolicy
from refimpl.kvcache.slots import best
from refimpl.kvcache.view import View

__all__ = ["PrefillH2O", "PromptKIVI", "minikv", "pyramid"]


def pyramid(share: float, layer: int, n_layers: int, depth: float = 7.0) -> float:
    """Return layer's share of the prompt: from (2 - 1/depth) share in layer 0 linearly to share/depth in the
    last; the mean over layers is `share`. depth = 1 gives every layer the same.

    Raises ValueError for depth < 1 and for a layer that the model lacks.

    >>> [round(pyramid(0.25, layer, 3), 3) for layer in range(3)]
    [0.464, 0.25, 0.036]
    """
    if not depth >= 1:
        raise ValueError(f"depth: {depth!r}; allowed: 1 and more")
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer: {layer}; allowed: 0..{n_layers - 1}")
    last = share / depth
    first = 2 * share - last
    return share if n_layers == 1 else first + (last - first) * layer / (n_layers - 1)


class PrefillH2O(KVPolicy):
    """Evict once, at the end of the prefill: what stays is the last tokens and the heaviest of the others.

    Of n tokens stay, in each KV head, the last int(recent n) and the int(h n) others whose column of the
    attention matrix, summed over all queries of the prompt and over the heads of the group, is largest; h is
    `pyramid(heavy, layer, L, depth)`. The paper calls the pyramid layer-discriminative; only the heavy share
    follows it. Decoding evicts nothing.

    Parameters
    - heavy, recent: shares of the prompt, 0..1, at most 1 together (the released code: 0.25 and 0.25).
    - depth: 1 and more; 1 is H2O's uniform budget (the released code: 7, or uniform budgets by default).

    Raises ValueError for others, for shares that give a layer more than the prompt, for a layer left with
    nothing, and for padded prompts (shares of one length).

    >>> PrefillH2O(0.6, 0.25)
    Traceback (most recent call last):
    ValueError: heavy: 0.6; allowed with recent 0.25 and depth 7.0: at most 0.4038, or layer 0 needs more ...
    """

    needs, once = {"attn"}, True

    def __init__(self, heavy: float = 0.25, recent: float = 0.25, *, depth: float = 7.0) -> None:
        for name, share in (("heavy", heavy), ("recent", recent)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: {share!r}; allowed: 0..1, a share of the prompt")
        if not heavy + recent > 0:
            raise ValueError(f"heavy, recent: {heavy}, {recent}; allowed: not both 0")
        most = (1 - recent) / (pyramid(1.0, 0, 2, depth))
        if heavy > most + 1e-9:
            raise ValueError(
                f"heavy: {heavy}; allowed with recent {recent} and depth {depth}: at most {most:.4f}, or "
                "layer 0 needs more than the prompt"
            )
        self.heavy, self.recent, self.depth = heavy, recent, depth

    def keep(self, v: View) -> LongTensor | None:
        if not v.full:
            raise ValueError(f"{type(self).__name__}: a padded prompt; allowed: rows without padding")
        heavy = int(pyramid(self.heavy, v.layer, v.n_layers, self.depth) * v.S + 1e-9)
        recent = int(self.recent * v.S + 1e-9)
        if heavy + recent == 0:
            raise ValueError(f"heavy, recent: nothing of {v.S} tokens stays in layer {v.layer}")
        score = v.attn_sum().sum(2)
        score[..., v.S - recent :] = torch.inf
        return best(score, heavy + recent)


class PromptKIVI(KIVI):
    """KIVI as MiniKV (2411.18077) uses it: the prompt is quantised at once but for its last n mod group.

    Later tokens wait until `residual` of them are dense, and are then quantised together, values as well as
    keys (KIVI's values leave their window one by one). Groups span tokens that were not neighbours in the
    prompt. Parameters: as `KIVI`, with MiniKV's defaults.

    >>> codec = PromptKIVI()
    >>> codec.due(75, 75), codec.group, codec.residual
    ((64, 64), 16, 128)
    """

    prompt = True  # until the first commit

    def __init__(
        self, bits: int = 2, *, group: int = 16, residual: int = 128, value_group: int | None = None
    ) -> None:
        super().__init__(bits, group=group, residual=residual, value_group=value_group)

    def due(self, keys: int, values: int) -> tuple[int, int]:
        least = 1 if self.prompt else self.residual
        return tuple(n - n % self.group if n >= least else 0 for n in (keys, values))

    def commit(self, ok: torch.Tensor | None) -> None:
        super().commit(ok)
        self.prompt = False


def minikv(
    model: nn.Module, heavy: float = 0.25, recent: float = 0.25, *, depth: float = 7.0, bits: int = 2,
    group: int = 16, residual: int = 128, value_group: int | None = None,
) -> KVCache:  # fmt: skip
    """Return MiniKV's cache for `model`: `PrefillH2O` with `PromptKIVI`, two choices that need not know of
    each other.

    In 16-bit numbers with groups of 16, 2 bits and a scale and zero point of 16 make 4 bits a number: half of
    the tokens cost an eighth of the full cache. Parameters and errors: see the two classes.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> model = tiny("llama").bfloat16()
    >>> cache = minikv(model, depth=1, group=16, value_group=8)
    >>> out = model(random_ids(1, 64), past_key_values=cache)
    >>> cache.held(0).tolist(), cache.nbytes()["payload"]  # 3 layers · 2 · 2 heads · 32 · 8 / 4
    ([[32, 32]], 768)
    """
    policy = PrefillH2O(heavy, recent, depth=depth)
    codec = PromptKIVI(bits, group=group, residual=residual, value_group=value_group)
    return KVCache(model, policy, codec)
