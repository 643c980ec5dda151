"""Dynamic Context Pruning while decoding: what a token lets go leaves the cache before it is attended to."""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.kvcache.cache import KVCache
from refimpl.kvcache.dcp import ContextPruning
from refimpl.kvcache.policies import KVPolicy
from refimpl.kvcache.view import View

__all__ = ["DynamicContextPruning", "decode"]


class DynamicContextPruning(KVPolicy):
    """Keep what no later token has let go (2305.15805): a learned choice without a fixed budget.

    Each new token n compares its small query with the small keys of all slots; those with z <= 0 are hidden
    from n already, and from everyone after it, because they are deleted. All heads of a layer keep the same
    tokens; layers and rows of a batch keep different numbers.

    Parameters: model, that the cache is made for; pruning, a `ContextPruning`, on the model's device.
    Raises ValueError unless the add-on fits and its r is a multiple of the number of KV heads: every head
    stores its share of the small key, so that no number is stored twice.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model, pruning = tiny("llama"), ContextPruning(32, 3, 4, torch.Generator().manual_seed(0), bias=0.5)
    >>> cache = KVCache(model, DynamicContextPruning(model, pruning))
    >>> out = model(random_ids(1, 12), past_key_values=cache)
    >>> cache.seen, all(cache.held(l).max() < 12 for l in range(3))
    (12, True)
    """

    needs = {"hidden"}

    def __init__(self, model: nn.Module, pruning: ContextPruning) -> None:
        self.bb, self.pruning = Backbone(model), pruning
        pruning.check(self.bb)
        if pruning.r % self.bb.G:
            raise ValueError(f"r: {pruning.r}; allowed: multiples of {self.bb.G}, the number of KV heads")
        dtype = pruning.layers[0].k.weight.dtype
        # What is let go inside a chunk of a prefill must stay hidden from the chunks that follow.
        self.slots = {"small_key": (dtype, pruning.r // self.bb.G), "dropped": torch.bool}

    def hide(self, v: View) -> Tensor:
        layer, (_, G, _) = self.pruning.layers[v.layer], v.shape
        h = self.bb.ln1(v.layer, v.x)
        v.slot["small_key"][:, :, -v.T :] = layer.k(h).unflatten(-1, (G, -1)).transpose(1, 2)
        small_keys = v.slot["small_key"].transpose(1, 2).flatten(2)  # [B, S, r]
        past = v.pos[:, 0, None] < v.pos[:, 0, -v.T :, None]  # [B, T, S]
        by_whom = past & v.ok[:, 0, -v.T :, None]  # padding lets nothing go
        lets_go = (layer.score(layer.q(h), small_keys) <= 0) & by_whom
        dropped = (lets_go.cumsum(1) > 0) | v.slot["dropped"][:, :1]
        v.slot["dropped"][:] = dropped[:, -1:]
        return dropped[:, None]

    def keep(self, v: View) -> Tensor:
        kept = ~v.slot["dropped"]
        return kept[0, 0] if len(kept) == 1 else kept


@torch.no_grad()
def decode(model: nn.Module, pruning: ContextPruning, ids: LongTensor) -> tuple[Tensor, LongTensor]:
    """Feed ids [B, T] token by token: logits [B, T, V], and slots held by layers after each, [L, B, T].

    They are what `pruning(model, ids, alpha=inf)` gives in one pass, here with tokens really deleted.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> model, pruning = tiny("llama"), ContextPruning(32, 3, 4, torch.Generator().manual_seed(0), bias=50.0)
    >>> decode(model, pruning, random_ids(1, 3))[1].tolist()  # b is large: nothing goes
    [[[1, 2, 3]], [[1, 2, 3]], [[1, 2, 3]]]
    """
    cache = KVCache(model, DynamicContextPruning(model, pruning))
    logits, held = [], []
    for t in range(ids.shape[1]):
        logits.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
        held.append(torch.stack([cache.held(l)[:, 0] for l in range(cache.n_layers)]))
    return torch.cat(logits, 1), torch.stack(held, -1)
