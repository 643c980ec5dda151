"""Attention over a cache that evicts, and its registration with transformers.

The usual attention functions take their mask from transformers, which builds one for all layers and assumes
that slot s holds token s. Here every layer may hold other tokens, so causality is read from the positions
stored with the slots: query t sees slot s if position(s) <= position(t). Queries are grouped by the KV head
that they share; keys and values are never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

__all__ = ["NAME", "Attention", "install", "release"]

NAME = "refimpl_kv"
# Scores that one block of queries may have: bounds the memory of a long prefill (64 MiB in float32).
BLOCK = 2**24
_replaced: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@dataclass
class Attention:
    """The attention of one layer in one forward: softmax(q k' · scale) v over the slots that q may see.

    Parameters
    - q: queries [B, G, R, T, D], R = H/G of them share a KV head; k, v: [B, G, S, D].
    - pos: position of each slot, [S] or [B, G, S]; at: position of each query, [T] or [B, G, T].
    - ok: [B, G, S], False at slots that hold nothing; None if all are filled.
    - window: a query sees only slots at positions > its own - window; None sees all before it.
    - hidden: [B, 1|G, T, S], True where a policy keeps a slot from a query; None hides nothing.

    >>> one, at = torch.ones(1, 1, 1, 2, 4), torch.tensor([0, 1])
    >>> Attention(one, one[0], torch.eye(4)[:2][None, None], 0.5, at, at).output()[0, 0, 0].tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    pos: LongTensor
    at: LongTensor
    ok: Tensor | None = None
    window: int | None = None
    hidden: Tensor | None = None

    def blocks(self) -> list[slice]:
        """Consecutive blocks of queries with at most `BLOCK` scores each."""
        B, G, R, T, _ = self.q.shape
        size = max(1, BLOCK // (B * G * R * self.k.shape[2]))
        return [slice(start, min(start + size, T)) for start in range(0, T, size)]

    def visible(self, part: slice) -> Tensor | None:
        """Mask [t, S] or [B, G, t, S] of what the queries `part` see; None if that is everything."""
        mask = None
        if self.q.shape[3] > 1 or self.window is not None:  # the newest token alone sees every slot
            at, pos = self.at[..., part, None], self.pos[..., None, :]
            mask = pos <= at
            if self.window is not None:
                mask &= pos > at - self.window
        if self.ok is not None:
            mask = self.ok[:, :, None] if mask is None else mask & self.ok[:, :, None]
        if self.hidden is not None:
            seen = ~self.hidden[:, :, part]
            mask = seen if mask is None else mask & seen
        return mask

    def weights(self, part: slice = slice(None), *, clean: bool = True) -> Tensor:
        """Softmax weights [B, G, R, t, S] of the queries `part`, in q's dtype.

        A query at padding sees nothing: its weights are zero if `clean`, else uniform over all slots.
        """
        scores = self._scores(part).mul_(self.scale)
        mask = self.visible(part)
        if mask is not None:
            hidden = ~(mask if mask.ndim == 2 else mask[:, :, None])
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.promote_types(self.q.dtype, torch.float32)).to(self.q.dtype)
        return weights if mask is None or not clean else weights.masked_fill(hidden, 0)

    def _scores(self, part: slice) -> Tensor:
        """q k' [B, G, R, t, S]."""
        scores = self.q[:, :, :, part].flatten(2, 3) @ self.k.transpose(-1, -2)
        return scores.view(*self.q.shape[:3], -1, scores.shape[-1])

    def output(self) -> Tensor:
        """The heads' outputs [B, G, R, T, D]."""
        # The fused kernel serves where no row of the mask is empty: every query sees itself, but at padding.
        T, size = self.q.shape[3], max(1, BLOCK // self.k.shape[2])
        if T == 1 and self.hidden is None:
            return self._fused(self.q, self.visible(slice(None)))
        if self.ok is None and self.hidden is None:
            parts = [slice(start, min(start + size, T)) for start in range(0, T, size)]
            parts = [self._fused(self.q[:, :, :, part], self.visible(part)) for part in parts]
        else:
            parts = [self._mix(self.weights(part, clean=False)) for part in self.blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 3)

    def _fused(self, q: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k' · scale) v without the weights: the R heads that share a KV head in one call."""
        if mask is not None and q.shape[3] > 1:
            mask = mask.repeat(*[1] * (mask.ndim - 2), q.shape[2], 1)
        out = F.scaled_dot_product_attention(q.flatten(2, 3), self.k, self.v, mask, scale=self.scale)
        return out.view(q.shape)

    def output_and_sums(self) -> tuple[Tensor, Tensor]:
        """The outputs, and each slot's weights summed over the queries, float32 [B, G, R, S]."""
        parts, sums = [], 0
        for part in self.blocks():
            weights = self.weights(part)
            parts.append(self._mix(weights))
            sums = sums + weights.sum(3, dtype=torch.float32)
        return torch.cat(parts, 3), sums

    def _mix(self, weights: Tensor) -> Tensor:
        return (weights.flatten(2, 3) @ self.v).view(*weights.shape[:4], -1)


def token_weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax weights [B, G, R, S], in q's dtype, of one token that sees all: q [B, G, R, D], k [B, G, S, D].

    >>> one = torch.ones(1, 1, 1, 4)
    >>> token_weights(one, one.expand(1, 1, 2, 4), 0.5).tolist()
    [[[[0.5, 0.5]]]]
    """
    scores = (q @ k.mT).mul_(scale)
    if q.dtype == torch.float32:
        return scores.softmax(-1)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: query [B, H, T, D], new key and value [B, G, T, D], 2-D mask -> [B, T, H, D].

    Raises RuntimeError if the key does not carry its cache layer, ValueError for dropout or a 4-D mask.
    """
    layer = getattr(key, "_kv_layer", None)
    if layer is None:
        raise RuntimeError(
            f"{type(module).__name__}: the keys carry no cache layer. Pass past_key_values=KVCache(model, "
            "...), or give the model its own attention back by release(model); a model that computes its "
            "keys anew after the cache's update is not supported"
        )
    if dropout:
        raise ValueError(f"dropout: {dropout}; the cache is for inference, call model.eval()")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask: shape {list(attention_mask.shape)}; allowed: [B, tokens seen], 0 at padding"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layer.attend(
        query, key, value, attention_mask, scaling, kwargs.get("sliding_window"), kwargs.get("position_ids")
    )
    return out, None


def mask_forward(
    attention_mask: Tensor | None = None, kv_length: int | None = None, **kwargs: object
) -> Tensor | None:
    """Hand the 2-D mask [B, tokens seen] through, or None if nothing is padded.

    Raises ValueError for a mask that does not cover all tokens seen.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape[-1] != kv_length:
        got = list(attention_mask.shape)
        raise ValueError(f"attention_mask: shape {got}; allowed: [B, {kv_length}], all tokens seen")
    return None if attention_mask.all() else attention_mask.bool()


def install(model: nn.Module) -> None:
    """Make a transformers model use this attention; `release` undoes it."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if model.config._attn_implementation == NAME:
        return
    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function of the same name transformers hands over None, and padding would be ignored.
    AttentionMaskInterface.register(NAME, mask_forward)
    _replaced[model] = model.config._attn_implementation
    model.set_attn_implementation(NAME)


def release(model: nn.Module) -> None:
    """Give a model the attention back that it had before its first `KVCache`; nothing to do for others.

    >>> from refimpl.checks.tiny import tiny
    >>> model = tiny("llama")
    >>> install(model); release(model); model.config._attn_implementation
    'eager'
    """
    if model in _replaced:
        model.set_attn_implementation(_replaced.pop(model))
