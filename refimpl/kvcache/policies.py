"""Policies: which tokens stay in the cache. Here the base and those that look at no attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.slots import best
from refimpl.kvcache.view import View

__all__ = ["Full", "KVPolicy", "Random", "StreamingLLM", "Window"]

NEEDS = ("attn", "attn_lastw", "hidden", "ids")
POSITIONS = ("original", "compact")


class KVPolicy:
    """Decide which slots stay: subclass it and override what the method needs. It has no state of its own.

    Class attributes
    - positions: "original": keys keep the rotation of their place in the text; "compact": slots are numbered
      0..S-1 when they are read, in order of arrival (rotary models only).
    - slots: per-slot state that the cache keeps aligned with keys and values: name -> dtype or, of vectors,
      (dtype, width); new slots are 0.
    - needs: of "attn", "attn_lastw" (whose queries are then kept through a chunked prefill), "hidden" (the
      layer's input) and "ids" (the new tokens' ids).
    - plan_every: m: in the prefill each layer is pruned by `keep` first, and `plan` is called after every
      m-th layer and the last with the layers so far, whose states it sees but no attention; None: `plan` is
      called once, after the last layer, with whole prompts.
    - n_layers: layers of the models that it was made for; None: any number.
    - once: it decides at the end of the prompt only, and what is generated afterwards all stays: nothing is
      computed for it then.
    - stretches: `keep` returns slices, of few stretches of the text. With compact positions only the keys
      of stretches before the last are then turned at every step.

    - steady: the slots held by a policy that drops one token for every new one and says which by `replace`;
      None: it has no such state. A subclass that shall use `replace` has to define it anew: what it does
      elsewhere may differ.
    """

    positions: ClassVar[str] = "original"
    once: ClassVar[bool] = False
    stretches: ClassVar[bool] = False
    slots: ClassVar[Mapping[str, torch.dtype | tuple[torch.dtype, int]]] = {}
    needs: ClassVar[frozenset[str] | set[str]] = frozenset()
    plan_every: int | None = None
    n_layers: int | None = None
    steady: int | None = None

    def hide(self, v: View) -> Tensor | None:
        """Before the attention: return True where a query must not see a slot, [B, 1|G, T, S]; None: nowhere.

        The only method that is also called for every chunk of a prefill; it may write the states of slots.
        """
        return None

    def observe(self, v: View) -> None:
        """Update the states `v.slot[name]` [B, G, S] in place, after every forward."""

    def keep(self, v: View) -> Tensor | LongTensor | list[slice] | None:
        """Return what stays: a mask [S] or [B, G, S], indices [n] or [B, G, n], or slices; None: all."""
        return None

    def replace(self, v: View) -> LongTensor:
        """Of `steady` + 1 slots, return the one that leaves, [B, G] or, one for all, [1, 1].

        Asked in place of `keep` after a generated token: the next one is written to that slot, and nothing
        else moves. So here, and in the `observe` before, slots are in no order: `v.pos` tells how old they
        are, `v.write` finds the new one. With `stretches`, the slot is one of the last stretch.
        """
        raise NotImplementedError

    def merge(self, v: View, keep: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return new keys and values [B, G, S, D], of which those in keep [B, G, S] stay; None: unchanged."""
        return None

    def plan(self, views: list[View]) -> list[Tensor | LongTensor | None]:
        """Decide for all layers at once, at the end of prefill: what `keep` returns, for each layer."""
        return [self.keep(v) for v in views]


class Full(KVPolicy):
    """Keep everything: 2 · L · G · D numbers for each token (the reference for quality and memory).

    >>> Full().keep(None) is None
    True
    """


class Window(KVPolicy):
    """Keep the last `recent` tokens (the window attention that StreamingLLM, 2309.17453, compares with).

    Tokens keep their effect on later layers' states, so this is not the model run on the last tokens alone.
    Raises ValueError unless recent >= 1.

    >>> Window(0)
    Traceback (most recent call last):
    ValueError: recent: 0; allowed: integers from 1
    """

    def __init__(self, recent: int) -> None:
        self.recent = self.steady = _size("recent", recent, 1)

    def replace(self, v: View) -> LongTensor:
        return v.oldest()

    def keep(self, v: View) -> Tensor | list[slice] | None:
        if v.S <= self.recent:
            return None
        return [slice(v.S - self.recent, v.S)] if v.full else v.rank >= v.count - self.recent


class StreamingLLM(KVPolicy):
    """Keep the first `sink` and the last `recent` tokens, at positions inside the cache (2309.17453).

    Parameters: sink >= 0 (the paper: 4) and recent >= 1, in tokens. Raises ValueError for others.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model = tiny("llama")
    >>> cache = KVCache(model, StreamingLLM(sink=2, recent=4))
    >>> out = model(random_ids(1, 10), past_key_values=cache)
    >>> cache.seen, cache.layers[0].pos.tolist()
    (10, [0, 1, 6, 7, 8, 9])
    """

    positions = "compact"
    stretches = True

    def __init__(self, recent: int, sink: int = 4) -> None:
        self.recent, self.sink = _size("recent", recent, 1), _size("sink", sink, 0)
        self.steady = self.sink + self.recent

    def replace(self, v: View) -> LongTensor:
        return v.oldest(self.sink)

    def keep(self, v: View) -> Tensor | list[slice] | None:
        if v.S <= self.sink + self.recent:
            return None
        if v.full:
            window = slice(v.S - self.recent, v.S)
            return [slice(0, self.sink), window] if self.sink else [window]
        return (v.rank < self.sink) | (v.rank >= v.count - self.recent)


class Random(KVPolicy):
    """Keep the newest token and a uniform sample of `budget` - 1 others, for each head its own.

    Each token draws its priority in (0, 1) once, on arrival, and the highest stay: reservoir sampling. A new
    draw at every step would let old tokens die out geometrically.

    Parameters: budget >= 1 in tokens; generator, a CPU `torch.Generator`. Raises ValueError, TypeError.

    >>> Random(8, torch.Generator().manual_seed(0)).budget
    8
    """

    slots = {"priority": torch.float32}

    def __init__(self, budget: int, generator: torch.Generator) -> None:
        self.budget = self.steady = _size("budget", budget, 1)
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        self.generator = generator

    def observe(self, v: View) -> None:
        B, G, _ = v.shape
        v.write("priority", torch.rand(B, G, v.T, generator=self.generator).to(v.device))

    def replace(self, v: View) -> LongTensor:
        return v.slot["priority"].masked_fill(v.pos == v.seen - 1, 2).argmin(-1)  # the newest stays

    def keep(self, v: View) -> LongTensor | None:
        if v.S <= self.budget:
            return None
        priority = v.slot["priority"].clone()
        priority[..., -1] = 2  # above every draw: the newest stays
        return best(priority if v.full else priority.masked_fill(~v.ok, -1), self.budget)


def _size(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {value!r}; allowed: integers from {least}")
    return value
