"""Plausible but wrong latent attention that `check_latent_attention` must reject."""

import torch

from refimpl.kvcache.mla import LatentAttention


class NoRotation(LatentAttention):
    """The rotary key carries no position."""

    def _rotate(self, t, pos):
        return t


class ScaledByNopeOnly(LatentAttention):
    """Scores are divided by sqrt(d_nope): the rotary part is forgotten in the scale."""

    def forward(self, x, cache, *, absorbed=True):
        factor = ((self.n + self.R) / self.n) ** 0.5
        weight = self.attention.q_proj if self.attention.q_lora_rank is None else self.attention.q_b_proj
        old = weight.weight.data
        weight.weight.data = old * factor
        try:
            return super().forward(x, cache, absorbed=absorbed)
        finally:
            weight.weight.data = old


class UnnormedLatent(LatentAttention):
    """The latent is cached before its norm."""

    def forward(self, x, cache, *, absorbed=True):
        norm, self.attention.kv_a_layernorm = self.attention.kv_a_layernorm, torch.nn.Identity()
        try:
            return super().forward(x, cache, absorbed=absorbed)
        finally:
            self.attention.kv_a_layernorm = norm


class RestartedPositions(LatentAttention):
    """Every piece is rotated from position 0."""

    def _rotate(self, t, pos):
        return super()._rotate(t, pos - pos[0])


class KeyPerHead(LatentAttention):
    """Caches the rotary key once for every head."""

    def forward(self, x, cache, *, absorbed=True):
        out = super().forward(x, cache, absorbed=absorbed)
        cache.rope_key = cache.rope_key.expand(-1, self.H, -1, -1)
        return out


MUTANTS = [
    ("latent_attention", "the rotary key is not rotated", NoRotation),
    ("latent_attention", "the scale forgets the rotary part", ScaledByNopeOnly),
    ("latent_attention", "the latent is not normed", UnnormedLatent),
    ("latent_attention", "positions start anew with every piece", RestartedPositions),
    ("latent_attention", "the shared rotary key is cached for every head", KeyPerHead),
]
