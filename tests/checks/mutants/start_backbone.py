"""Backbones that run and are wrong."""

import torch

from refimpl.backbone import Backbone


class IgnoresPadding(Backbone):
    def mask(self, l, T, attention_mask=None):
        return super().mask(l, T)


class IgnoresWindow(Backbone):
    def window(self, l):
        return None


class WindowOneWider(Backbone):
    def window(self, l):
        window = super().window(l)
        return None if window is None else window + 1


class NotCausal(Backbone):
    def attention(self, l, q, k, v, mask):
        return super().attention(l, q, k, v, torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool))


class PairsNeighbours(Backbone):
    """RoPE as the paper writes it, on weights laid out for transformers."""

    def _shuffled(self, t):
        return torch.cat((t[..., 0::2], t[..., 1::2]), dim=-1)

    def _restored(self, t):
        return torch.stack(t.chunk(2, dim=-1), dim=-1).flatten(-2)

    def rot(self, t, pos):
        return t if self.is_gpt2 else self._restored(super().rot(self._shuffled(t), pos))

    def unrot(self, t, pos):
        return t if self.is_gpt2 else self._restored(super().unrot(self._shuffled(t), pos))


class TurnsBackwards(Backbone):
    """Queries and keys agree, but every relative position changes its sign."""

    def rot(self, t, pos):
        return super().unrot(t, pos)

    def unrot(self, t, pos):
        return super().rot(t, pos)


class NoRotation(Backbone):
    def rot(self, t, pos):
        return t

    def unrot(self, t, pos):
        return t


class RotatedInQkv(Backbone):
    def qkv(self, l, x):
        q, k, v = super().qkv(l, x)
        pos = torch.arange(q.shape[2])
        return super().rot(q, pos), super().rot(k, pos), v

    def rot(self, t, pos):
        return t


class ForgetsBias(Backbone):
    def qkv(self, l, x):
        bias = [ref.bias for ref in self.linears() if ref.layer == l and ref.role in "qkv"]
        parts = zip(super().qkv(l, x), bias, strict=True)
        return tuple(t if b is None else t - b.view(1, -1, 1, self.D) for t, b in parts)


class HeadsInterleaved(Backbone):
    """Query head h reads KV head h % G instead of h // (H / G)."""

    def attention(self, l, q, k, v, mask):
        order = torch.arange(self.H).view(self.H // self.G, self.G).T.flatten()
        z = super().attention(l, q[:, order], k, v, mask)
        return z[:, order.argsort()]


class NormedTwice(Backbone):
    def head(self, x):
        return super().head(self.final_norm(x))


class ScaledByWidth(Backbone):
    def scale(self, l):
        return super().scale(l) if self.is_gpt2 else (self.d / self.H) ** -0.5


class EmbedsWithoutPositions(Backbone):
    def add_positions(self, x, pos):
        return x


class PositionsFromSlots(Backbone):
    def forward(self, ids, attention_mask=None, position_ids=None):
        return super().forward(ids, attention_mask)


MUTANTS = [
    ("backbone", "padding switched off", IgnoresPadding),
    ("backbone", "sliding window switched off", IgnoresWindow),
    ("backbone", "sliding window off by one", WindowOneWider),
    ("backbone", "mask switched off", NotCausal),
    ("backbone", "RoPE pairs neighbouring dimensions", PairsNeighbours),
    ("backbone", "RoPE turns the other way", TurnsBackwards),
    ("backbone", "rotation switched off", NoRotation),
    ("backbone", "qkv returns rotated q and k", RotatedInQkv),
    ("backbone", "q/k/v bias forgotten", ForgetsBias),
    ("backbone", "KV heads shared in the wrong order", HeadsInterleaved),
    ("backbone", "final norm applied twice", NormedTwice),
    ("backbone", "scale from d/H instead of head_dim", ScaledByWidth),
    ("backbone", "GPT-2's learned positions left out", EmbedsWithoutPositions),
    ("backbone", "position_ids ignored", PositionsFromSlots),
]
