"""Compact positions: slots numbered 0..S-1 when they are read (StreamingLLM, 2309.17453).

Keys come from the model rotated to their position in the text. They are turned back once, on arrival, stored
without rotation, and at every read rotated to their number among the stored ones: rotating the stored keys
step after step would add up rounding errors. Queries are turned back likewise and rotated to the number of
their own slot.
"""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor

from refimpl.backbone import Backbone

__all__ = ["Rope"]


class Rope:
    """Rotate to, and back from, positions with a model's own frequencies.

    Pair (j, j + D/2) of a head turns by position · inv_freq[j]; YaRN also multiplies by `attention_scaling`,
    which turning back divides by.

    Parameters: bb, a `Backbone` of a rotary model; types whose frequencies depend on the length ("dynamic",
    "longrope") are refused by `Backbone` already. Raises ValueError for learned positions (GPT-2): they are
    part of the hidden state from which keys are made, so no key can be moved.

    >>> from refimpl.checks.tiny import tiny
    >>> rope = Rope(Backbone(tiny("llama")))
    >>> k, at = torch.ones(1, 2, 3, 8), torch.tensor([[7, 8, 9]])
    >>> torch.allclose(rope.turn(rope.back(k, at), at), k, atol=1e-6)
    True
    """

    def __init__(self, bb: Backbone) -> None:
        if bb.is_gpt2:
            raise ValueError(
                "positions: 'compact' needs rotary positions, GPT-2's learned positions are part of the "
                "hidden state; allowed for GPT-2: 'original'"
            )
        self.inv_freq = bb.inv_freq
        self.scale: float = bb.model.model.rotary_emb.attention_scaling
        self.table: tuple[Tensor, Tensor] | None = None  # cos and sin of positions 0, 1, 2, ...

    def back(self, t: Tensor, pos: LongTensor) -> Tensor:
        """Undo the model's rotation of t [B, N, T, D] to pos [1|B, T]."""
        cos, sin = self._angles(pos[:, None])
        return ((t * cos - _half_turn(t) * sin) / self.scale**2).to(t.dtype)

    def turn(self, t: Tensor, pos: LongTensor) -> Tensor:
        """Rotate t [B, N, T, D] to pos [T] or [B, 1|N, T]."""
        return self._turn(t, *self._angles(pos if pos.ndim != 2 else pos[:, None]))

    def turn_first(self, t: Tensor, start: int = 0) -> Tensor:
        """Rotate t [B, N, T, D] to start, start + 1, ..., from a table that is computed once."""
        stop = start + t.shape[2]
        if self.table is None or len(self.table[0]) < stop or self.table[0].device != t.device:
            # Half as much again: a growing cache asks for one more position at every step.
            self.table = self._angles(torch.arange(stop + stop // 2 + 64, device=t.device))
        return self._turn(t, *(table[start:stop] for table in self.table))

    def _angles(self, pos: LongTensor) -> tuple[Tensor, Tensor]:
        angle = pos[..., None].float() * self.inv_freq.float().to(pos.device)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.scale, angle.sin() * self.scale

    @staticmethod
    def _turn(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = t.shape[-1] // 2
        (a, b), c, s = t.split(half, -1), cos[..., :half], sin[..., :half]
        return torch.cat((torch.addcmul(a * c, b, s, value=-1), torch.addcmul(b * c, a, s)), -1).to(t.dtype)


def _half_turn(t: Tensor) -> Tensor:
    a, b = t.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)
