"""One generated token in a layer of the cache, where less has to be done than in general."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from refimpl.kvcache.attention import Attention, token_weights
from refimpl.kvcache.codecs import Codec, Dense
from refimpl.kvcache.places import Places
from refimpl.kvcache.policies import KVPolicy
from refimpl.kvcache.rope import Rope
from refimpl.kvcache.slots import Padding, Selection, Stretches
from refimpl.kvcache.view import View

__all__ = ["Steps"]


class Steps:
    """The steps of `KVLayer`, which owns all attributes, for a token without padding and sliding window.

    `_step` and `_step_ragged`: nothing leaves. `_swap`: one token leaves for each that comes.
    """

    policy: KVPolicy
    codec: Codec
    rope: Rope | None
    stretches: Stretches | None
    counts: LongTensor | None
    shape: tuple[int, int, int]
    seen: int
    index: int
    n_layers: int
    scores: bool
    places: Places | None = None  # of the free slots, while tokens are swapped
    beside = 0  # tokens that wait beside flat entries

    def _step(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append one token and attend, where everything stays and every slot is seen."""
        self.codec.append(k, v)
        self.seen += 1
        B, G, S = self.shape
        self.shape = B, G, S + 1
        # Before `commit`, which may compress: only of plain entries as many bytes are stored afterwards.
        self._read_whole = True if isinstance(self.codec, Dense) else (self.codec.nbytes(), None, 0)
        k, v = self.codec.read()
        out = F.scaled_dot_product_attention(q.view(B, G, -1, q.shape[3]), k, v, scale=scale)
        self.codec.commit(None)
        self.x = None
        return out.view(B, 1, -1, q.shape[3])

    def _step_ragged(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The same where heads hold different numbers of slots: nothing is made flat again."""
        B, G = self.counts.shape
        self.codec.append_beside(k, v)
        self.seen, self.beside = self.seen + 1, self.beside + 1
        self._read_whole = True
        padding = Padding(self.counts, self.beside)
        k, v = self.codec.laid_out(padding)
        mask = padding.ok[:, :, None]
        out = F.scaled_dot_product_attention(q.view(B, G, -1, q.shape[3]), k, v, mask, scale=scale)
        self.x = None
        return out.view(B, 1, -1, q.shape[3])

    def _swap(self, q: Tensor, k: Tensor, v: Tensor, scale: float, position_ids: LongTensor | None) -> Tensor:
        """Put one token where another has left, attend, and let the policy say who leaves next."""
        (B, G, S), places, rope = self.shape, self.places, self.rope
        if self.stretches is not None:
            q, k = (rope.to_index(t, position_ids, self.seen) for t in (q, k))
        elif rope is not None:
            q, k = rope.place_paired(q, position_ids, S), rope.back_paired(k, position_ids)
        self.codec.put(places, k, v)
        self.seen += 1
        self._read_whole = self.codec.nbytes(), None, 0
        q = q.view(B, G, -1, q.shape[3])
        new_v, (k, v) = v, self.codec.read()
        if self.stretches is not None:
            k = self._turned_on(k)
        elif rope is not None:
            k = rope.turn_paired(k, places.rank)
        weights = None
        if self.scores:
            weights = token_weights(q, k, scale)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        view = View(
            Attention(q.unsqueeze(3), k, v, scale, self._pos, None), read=self._read, pos=self._pos,
            shape=(B, G, S + 1), layer=self.index, n_layers=self.n_layers, prefill=False, seen=self.seen,
            slot=self._states, x=self.x, notes=self.notes, ids=self.stage.ids, sums=weights, places=places,
            new_v=new_v,
        )  # fmt: skip
        self.policy.observe(view)
        dropped = self.policy.replace(view)
        if self._pos.shape[:2] != dropped.shape:
            self._pos, dropped = self._pos.expand(B, G, -1).contiguous(), dropped.expand(B, G)
        places.free(dropped)  # and make the slot ready for the next token
        for state in self._states.values():
            places.put(state, 0)
        places.put(self._pos, self.seen)
        if self.stretches is not None:
            self.stretches.slide()
        self.x = None
        if self.index == self.n_layers - 1:
            self.stage.ids = None
        return out.view(B, 1, -1, q.shape[3])

    def _make_room(self) -> Places | None:
        """Start to swap, if a token leaves for each that comes: one more slot in each head for the next."""
        if self.counts is not None or not self.shape[2] == self.policy.steady < self.seen:
            return None
        if self.stretches is not None and not self.stretches.slides(self.seen):
            return None
        pos = self.pos if self.pos.ndim == 3 else self.pos[None, None]
        ranked = self.rope is not None and self.stretches is None
        self.places = Places(self.shape, pos.device, ranked=ranked)
        if ranked:  # keys without rotation are turned at every step
            self.codec.k = self.rope.pair(self.codec.k)
        self.codec.widen()
        self._states = {name: _wider(state) for name, state in self._states.items()}
        self._pos = F.pad(pos, (0, 1), value=self.seen)
        return self.places

    def _read(self) -> tuple[Tensor, Tensor]:
        k, v = self.codec.read()
        return (k if self.places.rank is None else self.rope.unpair(k)), v

    def _tidy(self) -> None:
        """Stop swapping: slots in order of arrival again, and none that is free."""
        if self.places is None:
            return
        if self.places.rank is not None:
            self.codec.k = self.rope.unpair(self.codec.k)
        self.places, pos = None, self._pos
        B, G, S = self.shape
        order = pos.argsort(-1)[..., :S]  # the free slot is the newest
        if pos.shape[:2] == (1, 1):
            pos, order = pos[0, 0], order[0, 0]
        selection = Selection(order, (B, G, S + 1))
        self.codec.keep(selection)
        self._states = {name: selection.apply(state) for name, state in self._states.items()}
        self.pos = selection.apply(pos)


def _wider(state: Tensor) -> Tensor:
    return torch.cat((state, state.new_zeros(*state.shape[:2], 1, *state.shape[3:])), 2)
