"""How each method of the catalogue is made at a budget.

A recipe takes a `Setting` and returns what `KVCache` takes beside the model. The budget f is the share of the
prompt's n tokens that stays, or, where nothing is dropped, the share of bits, of the rank, or of the tokens
that a step reads; f = 1 is the method at its most generous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from refimpl.backbone import Backbone
from refimpl.kvcache.d2o import D2O
from refimpl.kvcache.dcp import ContextPruning
from refimpl.kvcache.dcp_policy import DynamicContextPruning
from refimpl.kvcache.dynamickv import DynamicKV
from refimpl.kvcache.fastgen import FastGen
from refimpl.kvcache.h2o import H2O
from refimpl.kvcache.indexes import Graph
from refimpl.kvcache.kcache import KCache
from refimpl.kvcache.kivi import KIVI
from refimpl.kvcache.kvsvd import KVSVD
from refimpl.kvcache.lacache import LaCache
from refimpl.kvcache.lorc import Latent
from refimpl.kvcache.minicache import MiniCache
from refimpl.kvcache.minikv import PrefillH2O, PromptKIVI
from refimpl.kvcache.policies import Full, Random, StreamingLLM, Window
from refimpl.kvcache.pyramidkv import PyramidKV
from refimpl.kvcache.quest import Quest
from refimpl.kvcache.readers import ReadAll
from refimpl.kvcache.retrieval import RetrievalAttention
from refimpl.kvcache.scissorhands import Scissorhands
from refimpl.kvcache.snapkv import AdaSnapKV, SnapKV
from refimpl.kvcache.tailorkv import tailor
from refimpl.kvcache.tiers import HostValues, Offloaded
from refimpl.kvcache.tova import TOVA

__all__ = ["Parts", "Setting"]

Parts = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What a recipe may know: the model, n tokens of the prompt, the budget f in (0, 1], a seed.

    And, for the methods that ask for them: ids of the punctuation, trained pruning heads, the layers'
    density P (`layer_density`). Raises ValueError for n < 1 and for f out of range.
    """

    model: nn.Module
    n: int
    f: float
    seed: int = 0
    punctuation: tuple[int, ...] = ()
    pruning: ContextPruning | None = None
    density: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n: {self.n}; allowed: 1 and more, the tokens of the prompt")
        if not 0 < self.f <= 1:
            raise ValueError(f"f: {self.f}; allowed: above 0 and at most 1, a share")

    @property
    def budget(self) -> int:
        """f · n, at least 8 tokens: 4 sinks and a little more."""
        return max(8, int(self.f * self.n))

    @property
    def bits(self) -> int:
        """f · 16, for codecs that store codes."""
        return max(1, int(16 * self.f))


def full(s: Setting) -> Parts:
    return {"policy": Full()}


def window(s: Setting) -> Parts:
    return {"policy": Window(s.budget)}


def random(s: Setting) -> Parts:
    return {"policy": Random(s.budget, torch.Generator().manual_seed(s.seed))}


def streaming_llm(s: Setting) -> Parts:
    return {"policy": StreamingLLM(s.budget - 4, sink=4)}


def h2o(s: Setting) -> Parts:
    return {"policy": H2O(s.budget // 2, s.budget - s.budget // 2)}


def vatp(s: Setting) -> Parts:
    rest = s.budget - 4
    return {"policy": H2O(rest // 2, rest - rest // 2, p=1, sink=4)}


def scissorhands(s: Setting) -> Parts:
    recent = min(10, s.budget // 4)
    return {"policy": Scissorhands(s.budget, recent=recent, history=64, drop=max(1, s.budget // 4))}


def tova(s: Setting) -> Parts:
    return {"policy": TOVA(s.budget)}


def _voting(s: Setting) -> dict[str, int]:
    return {"capacity": s.budget, "window": min(32, s.budget // 2)}


def snapkv(s: Setting) -> Parts:
    return {"policy": SnapKV(**_voting(s))}


def ada_snapkv(s: Setting) -> Parts:
    return {"policy": AdaSnapKV(**_voting(s))}


def pyramidkv(s: Setting) -> Parts:
    return {"policy": PyramidKV(**_voting(s))}


def dynamickv(s: Setting) -> Parts:
    return {"policy": DynamicKV(**_voting(s))}


def fastgen(s: Setting) -> Parts:
    # A share cannot be asked for: heads take what they need to recover T of their attention.
    recovery = 1.01 if s.f == 1 else min(0.99, 0.75 + 0.05 * math.log2(16 * s.f) + 0.05)
    special = [s.model.config.bos_token_id]
    return {"policy": FastGen(special, s.punctuation, recovery)}


def lacache(s: Setting) -> Parts:
    L = Backbone(s.model).n_layers
    return {"policy": LaCache(max(s.budget, 4 + 2 * L), L, span=max(1, L // 2))}


def dynamic_context_pruning(s: Setting) -> Parts:
    if s.pruning is None:
        raise ValueError("pruning: None; allowed: a trained ContextPruning of the model, see load_pruning")
    return {"policy": DynamicContextPruning(s.model, s.pruning)}


def d2o(s: Setting) -> Parts:
    return {"policy": D2O(s.f / 2, s.f / 2)}


def minicache(s: Setting) -> Parts:
    return {"codec": MiniCache(retain=1.0 if s.f == 1 else 0.05)}


def kivi(s: Setting) -> Parts:
    return {"codec": KIVI(s.bits, group=32, residual=32, value_group=_divisor(s.model, 32))}


def minikv(s: Setting) -> Parts:
    codec = PromptKIVI(2, value_group=_divisor(s.model, 16))
    return {"policy": PrefillH2O(s.f / 2, s.f / 2), "codec": codec}


def kv_svd(s: Setting) -> Parts:
    bb = Backbone(s.model)
    rank = max(1, int(s.f * bb.D))
    return {"codec": KVSVD(rank, value_rank=rank, rotated=bb.is_gpt2)}


def lorc(s: Setting) -> Parts:
    bb = Backbone(s.model)
    width = bb.D if bb.H == bb.G else min(bb.G * bb.D, bb.d)
    return {"codec": Latent(s.model, [max(1, int(s.f * width))] * bb.n_layers)}


def kcache(s: Setting) -> Parts:
    return {"codec": HostValues(), "reader": KCache(s.budget)}


def quest(s: Setting) -> Parts:
    dense = min(2, Backbone(s.model).n_layers)
    return {"reader": [ReadAll()] * dense + [Quest(s.budget)] * (Backbone(s.model).n_layers - dense)}


def tailorkv(s: Setting) -> Parts:
    bb = Backbone(s.model)
    # Not given: as in the paper's Llama-3.1-8B, where layer 0 alone is above the threshold.
    density = s.density or [1.0] + [0.0] * (bb.n_layers - 1)
    codecs, readers = tailor(
        density, budget=s.budget, channels=max(1, bb.D // 4), first=8, last=min(56, max(1, s.n // 8)),
        group=32, residual=32, value_group=_divisor(s.model, 32),
    )  # fmt: skip
    return {"codec": codecs, "reader": readers}


def retrieval_attention(s: Setting) -> Parts:
    first, last = 4, min(32, max(1, s.n // 8))
    return {"codec": Offloaded(first, last), "reader": RetrievalAttention(s.budget, Graph())}


def _divisor(model: nn.Module, size: int) -> int:
    """The largest group of channels up to `size` that divides the head dim."""
    D = Backbone(model).D
    return next(g for g in range(min(size, D), 0, -1) if D % g == 0)
