"""Caches that the published methods are compared with, ready made: window, random, sinks and window."""

from __future__ import annotations

import torch
from torch import nn

from refimpl.kvcache.cache import KVCache
from refimpl.kvcache.policies import Random, StreamingLLM, Window

__all__ = ["random_cache", "streaming_cache", "window_cache"]


def window_cache(model: nn.Module, recent: int) -> KVCache:
    """Return an empty cache that keeps the last `recent` >= 1 tokens; ValueError for others.

    >>> from refimpl.checks.tiny import tiny
    >>> window_cache(tiny("llama"), 8).seen
    0
    """
    return KVCache(model, Window(recent))


def random_cache(model: nn.Module, budget: int, generator: torch.Generator) -> KVCache:
    """Return an empty cache that keeps `budget` >= 1 tokens, the newest and a uniform sample of others."""
    return KVCache(model, Random(budget, generator))


def streaming_cache(model: nn.Module, recent: int, sink: int = 4) -> KVCache:
    """Return an empty StreamingLLM cache (2309.17453): `sink` first and `recent` last tokens, compact."""
    return KVCache(model, StreamingLLM(recent, sink))
