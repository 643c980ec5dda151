"""Compact positions: slots numbered 0..S-1 when they are read (StreamingLLM, 2309.17453).

Keys come from the model rotated to their position in the text. Rotating stored keys step after step would add
up rounding errors, so a key is turned once on arrival and never again in the store. There are two ways to
read it at its number:

- Any policy: the key is stored without rotation and turned at every read, the query as well. Every slot is
  turned in every step.
- Policies that keep few stretches of the text (with the codec `Dense`): the key is stored turned to the index
  t of its token. Rotations enter the scores by their difference only, so the slots of the last stretch, the
  query's, are read as they are. In an earlier stretch t - slot is smaller by one number, and by that many
  positions its keys are turned on when they are read: of sinks and a window, the sinks.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import LongTensor, Tensor

from refimpl.backbone import Backbone

__all__ = ["Rope"]

# cos [..., D], both halves, and sin [..., D/2]; or a matrix [D, D] that turns by one angle for each pair
Rotation: TypeAlias = "tuple[Tensor, Tensor] | Tensor"


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
    >>> torch.allclose(rope.shift(rope.shift(k, 4), -4), k, atol=1e-6)
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
        # The layers of a model ask one after another for the same angles.
        self.model_angles: tuple[LongTensor, Rotation] | None = None
        self.paired_back: tuple[LongTensor, Rotation] | None = None
        self.paired_place: tuple[LongTensor, int, Rotation] | None = None
        self.circle: Tensor | None = None  # cos + i sin of positions 0, 1, 2, ...
        self.from_model: tuple[LongTensor, int, Rotation] | None = None
        self.shifts: dict[int, Rotation] = {}

    # --- keys stored without rotation -----------------------------------------------------------------------
    def back(self, t: Tensor, pos: LongTensor) -> Tensor:
        """Undo the model's rotation of t [B, N, T, D] to pos [1|B, T]."""
        if self.model_angles is None or self.model_angles[0] is not pos:
            self.model_angles = pos, _rotation(-self._angle(pos[:, None]), 1 / self.scale)
        return _turn(t, self.model_angles[1])

    def turn(self, t: Tensor, pos: LongTensor) -> Tensor:
        """Rotate t [B, N, T, D] to pos [T] or [B, 1|N, T]."""
        return _turn(t, _rotation(self._angle(pos if pos.ndim != 2 else pos[:, None]), self.scale))

    def turn_first(self, t: Tensor, start: int = 0) -> Tensor:
        """Rotate t [B, N, T, D] to start, start + 1, ..., from a table that is computed once."""
        stop = start + t.shape[2]
        return _turn(t, tuple(part[start:stop] for part in self._table(stop, t.device)))

    def _table(self, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.table is None or len(self.table[0]) < stop or self.table[0].device != device:
            # Half as much again: a growing cache asks for one more position at every step.
            first = torch.arange(stop + stop // 2 + 64, device=device)
            self.table = _cos_sin(self._angle(first), self.scale)
        return self.table

    def _angle(self, pos: LongTensor) -> Tensor:
        return pos[..., None].float() * self.inv_freq.float().to(pos.device)  # as the model computes it

    # --- the same with pairs (j, j + D/2) side by side: as complex numbers they turn by one product ---------
    def pair(self, t: Tensor) -> Tensor:
        """Lay the pairs of t [..., D] side by side.

        >>> from refimpl.checks.tiny import tiny
        >>> rope, t = Rope(Backbone(tiny("llama"))), torch.arange(8)
        >>> rope.pair(t).tolist(), rope.unpair(rope.pair(t)).tolist()
        ([0, 4, 1, 5, 2, 6, 3, 7], [0, 1, 2, 3, 4, 5, 6, 7])
        """
        return t.unflatten(-1, (2, -1)).mT.flatten(-2)

    def unpair(self, t: Tensor) -> Tensor:
        """Undo `pair`."""
        return t.unflatten(-1, (-1, 2)).mT.flatten(-2)

    def back_paired(self, t: Tensor, pos: LongTensor) -> Tensor:
        """Undo the model's rotation of t [B, N, 1, D] to pos [1|B, 1], and pair."""
        if self.paired_back is None or self.paired_back[0] is not pos:
            self.paired_back = pos, self._paired(-self._angle(pos[:, None]), 1 / self.scale)
        return self._turn_paired(t, self.paired_back[1])

    def place_paired(self, t: Tensor, pos: LongTensor, place: int) -> Tensor:
        """Turn t [B, N, 1, D] from the model's positions pos [1|B, 1] to one place, and pair."""
        known = self.paired_place
        if known is None or known[0] is not pos or known[1] != place:
            angle = self._angle(torch.full_like(pos, place)[:, None]) - self._angle(pos[:, None])
            self.paired_place = known = pos, place, self._paired(angle)
        return self._turn_paired(t, known[2])

    def turn_paired(self, t: Tensor, rank: LongTensor) -> Tensor:
        """Rotate paired t [B, N, T, D] to `rank` [1|B, 1|N, T], a permutation of 0..T-1 for each head."""
        T = rank.shape[-1]
        if self.circle is None or len(self.circle) < T or self.circle.device != t.device:
            cos, sin = self._table(T, t.device)
            self.circle = torch.complex(cos[:, : sin.shape[1]].contiguous(), sin)
        turns = self.circle.index_select(0, rank.flatten()).view(*rank.shape, -1)
        wide = torch.view_as_complex(t.float().view(*t.shape[:-1], -1, 2))
        return torch.view_as_real(wide * turns).flatten(-2).to(t.dtype)

    def _paired(self, angle: Tensor, scale: float = 1.0) -> Rotation:
        rotation = _rotation(angle, scale)
        return self.pair(rotation) if isinstance(rotation, Tensor) else rotation

    def _turn_paired(self, t: Tensor, rotation: Rotation) -> Tensor:
        turned = _turn(t, rotation)  # a matrix has paired columns
        return turned if isinstance(rotation, Tensor) else self.pair(turned)

    # --- keys stored turned to their index in the text ------------------------------------------------------
    def to_index(self, t: Tensor, pos: LongTensor, start: int) -> Tensor:
        """Turn t [B, N, T, D] from the model's positions pos [1|B, T] to start, start + 1, ...

        Mostly these are the same numbers, and what changes is the rounding: the model multiplies in float32,
        which at position 10^5 is off by 0.004 radian.
        """
        known = self.from_model
        if known is None or known[0] is not pos or known[1] != start:
            index = torch.arange(start, start + pos.shape[-1], device=pos.device)
            angle = index[:, None] * self._frequencies(pos) - self._angle(pos[:, None])
            self.from_model = known = pos, start, _rotation(angle)
        return _turn(t, known[2])

    def shift(self, t: Tensor, steps: int | LongTensor) -> Tensor:
        """Turn t [B, N, T, D] on by `steps` positions, one number or [B, N, T]."""
        if isinstance(steps, Tensor):
            return _turn(t, _rotation(steps[..., None] * self._frequencies(steps)))
        if steps == 0:
            return t
        if steps not in self.shifts:
            if len(self.shifts) > 64:  # those of earlier steps
                self.shifts.clear()
            self.shifts[steps] = _rotation(steps * self._frequencies(t))
        return _turn(t, self.shifts[steps])

    def _frequencies(self, like: Tensor) -> Tensor:
        # Far positions need float64: 2 · 10^5 radian in float32 are known to 0.008 only.
        return self.inv_freq.to(like.device, torch.float32).double()


def _rotation(angle: Tensor, scale: float = 1.0) -> Rotation:
    """Rotation by angles [..., D/2]: cos and sin or, by the same for all, a matrix: one product is faster."""
    cos, sin = _cos_sin(angle, scale)
    if angle.numel() > angle.shape[-1]:
        return cos, sin
    cos, sin = (part.flatten()[: angle.shape[-1]].diag() for part in (cos, sin))
    return torch.cat((torch.cat((cos, sin), 1), torch.cat((-sin, cos), 1)))


def _cos_sin(angle: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos [..., D], both halves, and sin [..., D/2] of angles [..., D/2], in float32."""
    cos, sin = (angle.cos() * scale).float(), (angle.sin() * scale).float()
    return torch.cat((cos, cos), -1), sin


def _turn(t: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (j, j + D/2) of t [..., D]."""
    half, wide = t.shape[-1] // 2, t.float()
    if isinstance(rotation, Tensor):
        return wide @ rotation if t.dtype == torch.float32 else (wide @ rotation).to(t.dtype)
    cos, sin = rotation
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin, value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin)
    return out.to(t.dtype)
