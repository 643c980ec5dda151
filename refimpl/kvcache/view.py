"""What a policy sees: one layer after one forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.attention import Attention
from refimpl.kvcache.places import Places

__all__ = ["View"]


class View:
    """A window on one layer after one forward (or after all chunks of a prefill), for policies.

    Shapes: B rows, G KV heads, R = H/G query heads that share one, T new tokens, S slots (the new ones last,
    in order of arrival; in no order when a policy is asked what to `replace`), D head dim, d model width.

    Attributes
    - shape: (B, G, S); layer, n_layers: index of the layer, number of layers.
    - prefill: whether the T tokens are the prompt; seen: tokens seen so far, these included.
    - slot: state [B, G, S] of each slot by name, which `observe` may change in place.
    - notes: tensors [B, ...] by name that the policy may put here to find them after the next forward.
    - x: input [B, T, d] of the layer, if the policy needs "hidden"; else None.
    - ids: the new tokens [B, T], if the policy needs "ids"; else None.
    - attention: queries, keys as read, and masks of this forward.

    >>> at = torch.arange(3)
    >>> q, k = torch.zeros(1, 1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
    >>> v = View(Attention(q, k, k, 0.5, at, at), read=lambda: (k, k), pos=at, shape=(1, 1, 3),
    ...     layer=0, n_layers=1, prefill=True, seen=3)
    >>> v.attn_sum()[0, 0, 0].tolist()  # 1 + 1/2 + 1/3, 1/2 + 1/3, 1/3
    [1.833..., 0.833..., 0.333...]
    """

    def __init__(
        self, attention: Attention, *, read: Callable[[], tuple[Tensor, Tensor]], pos: LongTensor,
        shape: tuple[int, int, int], layer: int, n_layers: int, prefill: bool, seen: int,
        ok: Tensor | None = None, slot: dict[str, Tensor] | None = None, x: Tensor | None = None,
        weights: Tensor | None = None, sums: Tensor | None = None, notes: dict[str, Tensor] | None = None,
        ids: LongTensor | None = None, places: Places | None = None, new_v: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.attention, self.layer, self.n_layers = attention, layer, n_layers
        self.prefill, self.seen, self.x, self.ids = prefill, seen, x, ids
        self.shape, self.slot = shape, slot or {}
        self.notes = {} if notes is None else notes
        self._read, self._pos, self._ok = read, pos, ok
        self._weights, self._sums, self._places, self._new_v = weights, sums, places, new_v
        self.device = attention.q.device

    @property
    def q(self) -> Tensor:
        """Queries [B, G, R, T, D], rotated."""
        return self.attention.q

    @property
    def T(self) -> int:
        """New tokens."""
        return self.attention.q.shape[3]

    @property
    def S(self) -> int:
        """Slots; rows and heads that hold fewer have slots that are not `ok`."""
        return self.shape[2]

    @cached_property
    def k(self) -> Tensor:
        """Keys [B, G, S, D] as they are stored: without rotation if positions are compact."""
        return self._read()[0]

    @cached_property
    def v(self) -> Tensor:
        """Values [B, G, S, D] as they are stored."""
        return self._read()[1]

    @cached_property
    def pos(self) -> LongTensor:
        """Original index [B, G, S] of the token in each slot, padding counted."""
        return self._pos.expand(self.shape)

    @property
    def full(self) -> bool:
        """Whether every slot is filled: no padding, no ragged heads."""
        return self._ok is None

    @cached_property
    def ok(self) -> Tensor:
        """Filled slots, bool [B, G, S]."""
        if not self.full:
            return self._ok
        return torch.ones(1, dtype=torch.bool, device=self.device).expand(self.shape)

    @cached_property
    def rank(self) -> LongTensor:
        """Age of each slot among the filled ones, from 0: [S], or [B, G, S] (-1: not filled)."""
        if self._places is not None:
            rank = self._places.rank
            return self.pos.argsort(-1).argsort(-1) if rank is None else rank
        if self.full:
            return torch.arange(self.S, device=self.device)
        return (self.ok.cumsum(-1) - 1).masked_fill(~self.ok, -1)

    @cached_property
    def count(self) -> int | LongTensor:
        """Filled slots: S if all are, else [B, G, 1]."""
        return self.S if self.full else self.ok.sum(-1, keepdim=True)

    @property
    def new_v(self) -> Tensor:
        """Values [B, G, T, D] of the new tokens."""
        return self.attention.v[:, :, -self.T :] if self._new_v is None else self._new_v

    def write(self, name: str, values: Tensor) -> None:
        """Set the state `name` of the new tokens to values [B, G, T]."""
        if self._places is None:
            self.slot[name][..., -self.T :] = values
        else:
            self._places.put(self.slot[name], values)

    def oldest(self, after: int = 0) -> LongTensor:
        """Index of the oldest token behind the first `after` slots, [1, 1] if all heads hold the same."""
        return self._pos[..., after:].argmin(-1) + after

    # --- attention, computed when asked for -----------------------------------------------------------------
    @cached_property
    def attn(self) -> Tensor:
        """Softmax weights [B, G, R, T, S]; for a long prompt prefer `attn_sum` and `attn_lastw`."""
        if self._places is not None and self._sums is not None:
            return self._sums[:, :, :, None]
        return self.attention.weights() if self._weights is None else self._weights

    def attn_rows(self, part: slice) -> Tensor:
        """Weights [B, G, R, t, S] of the new queries `part`."""
        if self._places is not None:
            return self.attn
        return self.attention.weights(part) if self._weights is None else self._weights[:, :, :, part]

    def attn_sum(self) -> Tensor:
        """Weights summed over the new queries, float32 [B, G, R, S]; never more than a block of queries."""
        if self._sums is not None:
            return self._sums.float()
        if self._weights is not None:
            one = self.T == 1
            return self._weights[:, :, :, 0].float() if one else self._weights.sum(3, dtype=torch.float32)
        return sum(self.attention.weights(p).sum(3, dtype=torch.float32) for p in self.attention.blocks())

    def attn_lastw(self, w: int) -> Tensor:
        """Weights [B, G, R, min(w, T), S] of the last w queries; ValueError unless w >= 1."""
        if w < 1:
            raise ValueError(f"w: {w}; allowed: 1 and more, a number of queries")
        return self.attn_rows(slice(max(0, self.T - w), None))
