"""Multi-head latent attention: low-rank keys and values that were trained so (DeepSeek-V2, 2405.04434).

What LoRC makes of a finished model, this attention is from the start: one latent per token for all heads.
Since no rotation may stand between the latent and a head's key, the position lives in a second, small key
that all heads share. Shapes: B batch, T new tokens, S cached ones, H heads, d model width, r latent rank, n
(d_nope), R (d_R) and D_v numbers of a head's key without rotation, its rotary key, and its value.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

__all__ = ["LatentCache", "LatentAttention"]


@dataclass
class LatentCache:
    """What one layer caches: r + d_R numbers per token, however many heads there are.

    Attributes: latent [B, 1, S, r], normed; rope_key [B, 1, S, d_R], rotated. None before the first token.

    >>> cache = LatentCache()
    >>> cache.append(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 2)); cache.seen, cache.nbytes()
    (3, 120)
    """

    latent: Tensor | None = field(default=None)
    rope_key: Tensor | None = field(default=None)

    @property
    def seen(self) -> int:
        """Tokens cached."""
        return 0 if self.latent is None else self.latent.shape[2]

    def append(self, latent: Tensor, rope_key: Tensor) -> None:
        """Add new entries [B, 1, T, r] and [B, 1, T, d_R]; ValueError for another number of rows."""
        if self.latent is None:
            self.latent, self.rope_key = (t.clone(memory_format=torch.contiguous_format)
                                          for t in (latent, rope_key))  # fmt: skip
            return
        if len(latent) != len(self.latent):
            raise ValueError(f"latent: {len(latent)} rows, but the cache holds {len(self.latent)}")
        self.latent = torch.cat((self.latent, latent), 2)
        self.rope_key = torch.cat((self.rope_key, rope_key), 2)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.latent, self.rope_key) if t is not None)


class LatentAttention(nn.Module):
    """Causal multi-head latent attention (2405.04434, section 2.1), with the weights of a DeepSeek layer.

    c = norm(x W_DKV); per head k = [c W_UK ; RoPE(x W_KR)], v = c W_UV, score = q · k / sqrt(n + d_R).
    Expanded: keys and values of all heads are made from the cache. Absorbed: (q W_UK') c is the same score
    and (weights c) W_UV the same output, so nothing larger than the latent is ever made; the rotary part
    stays beside it.

    Parameters: attention, a `DeepseekV3Attention` of transformers, whose tensors are shared, not copied;
    inv_freq [d_R / 2], its rotary frequencies. Raises TypeError for other modules, and ValueError where yarn
    changes the scale of the scores or frequencies do not fit. Rows have equal length: there is no mask.

    >>> from transformers import DeepseekV3Config
    >>> from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
    >>> config = DeepseekV3Config(hidden_size=8, num_attention_heads=2, kv_lora_rank=4, q_lora_rank=None,
    ...     qk_rope_head_dim=2, qk_nope_head_dim=2, v_head_dim=2)
    >>> attention, cache = LatentAttention(DeepseekV3Attention(config, 0), torch.ones(1)), LatentCache()
    >>> attention(torch.zeros(1, 5, 8), cache).shape, cache.nbytes()  # 5 tokens · (4 + 2) · 4 bytes
    (torch.Size([1, 5, 8]), 120)
    """

    def __init__(self, attention: nn.Module, inv_freq: Tensor) -> None:
        super().__init__()
        if type(attention).__name__ != "DeepseekV3Attention":
            raise TypeError(f"attention: {type(attention).__name__}; allowed: DeepseekV3Attention")
        self.n, self.R = attention.qk_nope_head_dim, attention.qk_rope_head_dim
        self.r, self.D_v, self.H = attention.kv_lora_rank, attention.v_head_dim, attention.num_heads
        if 2 * len(inv_freq) != self.R:
            raise ValueError(f"inv_freq: {len(inv_freq)} frequencies; allowed: {self.R // 2}")
        if abs(attention.scaling - (self.n + self.R) ** -0.5) > 1e-9:
            raise ValueError(
                f"scaling: {attention.scaling}; allowed: 1/sqrt({self.n + self.R}), without yarn"
            )
        self.attention, self.inv_freq = attention, inv_freq
        self.neighbours = attention.config.rope_interleave  # pairs (2j, 2j+1), not (j, j + d_R/2)

    def forward(self, x: Tensor, cache: LatentCache, *, absorbed: bool = True) -> Tensor:
        """Append the new tokens x [B, T, d] to the cache and attend -> [B, T, d].

        Raises ValueError for x of another shape.
        """
        a = self.attention
        if x.ndim != 3 or x.shape[2] != a.o_proj.out_features:
            raise ValueError(f"x: shape {list(x.shape)}; allowed: [B, T, {a.o_proj.out_features}]")
        pos = torch.arange(cache.seen, cache.seen + x.shape[1], device=x.device)
        q = a.q_proj(x) if a.q_lora_rank is None else a.q_b_proj(a.q_a_layernorm(a.q_a_proj(x)))
        q, q_rope = q.unflatten(-1, (self.H, -1)).transpose(1, 2).split((self.n, self.R), -1)
        latent, rope_key = a.kv_a_proj_with_mqa(x)[:, None].split((self.r, self.R), -1)
        cache.append(a.kv_a_layernorm(latent), self._rotate(rope_key, pos))

        c = cache.latent
        W_UK, W_UV = a.kv_b_proj.weight.view(self.H, -1, self.r).split((self.n, self.D_v), 1)  # [H, n|D_v, r]
        scores = self._rotate(q_rope, pos) @ cache.rope_key.transpose(-1, -2)
        if absorbed:
            scores = scores + (q @ W_UK) @ c.transpose(-1, -2)
        else:
            scores = scores + q @ (c @ W_UK.transpose(1, 2)).transpose(-1, -2)
        future = torch.arange(cache.seen, device=x.device) > pos[:, None]
        weights = (scores * (self.n + self.R) ** -0.5).masked_fill(future, -torch.inf).softmax(-1)
        out = (weights @ c) @ W_UV.transpose(1, 2) if absorbed else weights @ (c @ W_UV.transpose(1, 2))
        return F.linear(out.transpose(1, 2).flatten(2), a.o_proj.weight, a.o_proj.bias)

    def _rotate(self, t: Tensor, pos: LongTensor) -> Tensor:
        angle = pos[:, None].float() * self.inv_freq.float().to(t.device)
        cos, sin = angle.cos().to(t.dtype), angle.sin().to(t.dtype)
        x, y = (t[..., 0::2], t[..., 1::2]) if self.neighbours else t.chunk(2, -1)
        # Neighbours come out as halves: queries and keys alike, so their products are the same.
        return torch.cat((x * cos - y * sin, y * cos + x * sin), -1)
