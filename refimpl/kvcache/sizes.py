"""Bytes that the methods of the catalogue hold, in closed form: what `KVCache.nbytes` measures equals it.

A closed form is a function of one layer (`KVLayer`), its slots m of each row and head, the head dim D and the
bytes e of a number. Not in it: the position of each slot, 4 bytes, once per layer while all heads hold the
same slots, else for each head, whose counts then take 8 bytes each; and what a policy notes of a layer (a
rule or a threshold for each head). `held_bytes` adds them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from refimpl.backbone import Backbone
from refimpl.kvcache.cache import KVCache
from refimpl.kvcache.kivi import KIVI
from refimpl.kvcache.layer import KVLayer
from refimpl.kvcache.minikv import PromptKIVI
from refimpl.kvcache.quest import Quest

__all__ = ["Size", "dense", "held_bytes", "kivi", "latent", "mini", "quest", "svd", "tailor"]

Size = Callable[[KVLayer, list[int], int, int], int]


def held_bytes(cache: KVCache, model: nn.Module, size: Size) -> int:
    """Return the closed form `size` summed over the layers of a cache, and the positions."""
    D, e, total = Backbone(model).D, model.dtype.itemsize, 0
    for layer in cache.layers:
        total += size(layer, layer.held().flatten().tolist(), D, e)
        beside = (layer.pos, layer.counts, *layer.notes.values())
        total += sum(t.nbytes for t in beside if t is not None)
    return total


def dense(layer: KVLayer, m: list[int], D: int, e: int) -> int:
    """sum m · (2 D e + bytes of the policy's states)."""
    states = [kind if isinstance(kind, tuple) else (kind, 1) for kind in layer.policy.slots.values()]
    return sum(m) * (2 * D * e + sum(dtype.itemsize * width for dtype, width in states))


def kivi(layer: KVLayer, m: list[int], D: int, e: int) -> int:
    """Of each head's m tokens, quantised ones cost D b/8 + 2 D e/g a key or value, the others D e."""
    c, n = layer.codec, m[0]
    if isinstance(c, PromptKIVI):
        keys = values = n - n % c.group
    else:
        keys, values = (0, 0) if c.bits == 16 else c.due(n, n)
    codes = (keys + values) * D * c.bits // 8
    scales = 2 * D * e * keys // c.group + 2 * D * e * values // c.value_group
    return len(m) * (codes + scales + (2 * n - keys - values) * D * e)


def svd(layer: KVLayer, m: list[int], D: int, e: int) -> int:
    """r (n + D) e for each head's keys, and for its values."""
    return len(m) * sum(layer.codec.ranks.values()) * (m[0] + D) * e


def latent(layer: KVLayer, m: list[int], D: int, e: int) -> int:
    """2 N r_l e for each token of a layer."""
    c = layer.codec
    return 2 * c.N * c.bases[layer.index][0].shape[-1] * layer.batch * m[0] * e


def mini(layer: KVLayer, m: list[int], D: int, e: int) -> int:
    """In a pair (D + 2) e for a merged entry, 2 D e for a whole one, 4 for where it is; else 2 D e a token.

    2 e more remember each head's nearest and farthest. A pair is counted in its lower layer.
    """
    c = layer.codec
    if c.lower is not None:
        return 0
    if not c.shared:
        return sum(m) * 2 * D * e
    total = 0
    for pair in c.shared.values():  # keys, values
        total += len(pair.direction) * (D + 2) * e + pair.whole.shape[1] * 2 * D * e + 4 * sum(m)
        total += 0 if c.retain is None else 2 * e * len(m)
    return total


def quest(layer: KVLayer, m: list[int], D: int, e: int) -> int:
    """2 D e for each token, and for each page where there are pages."""
    paged = isinstance(layer.reader, Quest)
    return dense(layer, m, D, e) + (2 * D * e * sum(-(-n // layer.reader.page) for n in m) if paged else 0)


def tailor(layer: KVLayer, m: list[int], D: int, e: int) -> int:
    """KIVI's where quantised; else 2 D e for each token, near or far, and D e for each head."""
    if isinstance(layer.codec, KIVI):
        return kivi(layer, m, D, e)
    return dense(layer, m, D, e) + len(m) * D * e
