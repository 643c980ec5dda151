"""One layer of the cache: append, attend, observe, keep, merge, prune."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.attention import Attention
from refimpl.kvcache.codecs import Codec
from refimpl.kvcache.policies import KVPolicy
from refimpl.kvcache.readers import Reader
from refimpl.kvcache.rope import Rope
from refimpl.kvcache.slots import Padding, Selection, as_mask
from refimpl.kvcache.view import View

__all__ = ["KVLayer", "Stage"]


@dataclass
class Stage:
    """What the layers of a cache share during a prefill."""

    chunking: bool = False
    views: list[tuple[KVLayer, View]] = field(default_factory=list)


class KVLayer:
    """Storage of one layer, and the attention over it; made by `KVCache`.

    Attributes
    - seen: tokens that the layer has seen.
    - pos: original index of the token in each slot, int32: [S] while all heads hold the same slots, else
      [B, G, S], or [N] if ragged (padding counts as tokens).
    - counts: slots of each head [B, G] if they differ ("ragged"), else None.
    - states: the policy's slot states by name, stored like keys and values.
    - codec, reader: this layer's own.
    """

    def __init__(
        self, index: int, n_layers: int, policy: KVPolicy, codec: Codec, reader: Reader, rope: Rope | None,
        stage: Stage,
    ) -> None:  # fmt: skip
        self.index, self.n_layers, self.policy, self.rope, self.stage = index, n_layers, policy, rope, stage
        self.codec, self.reader = codec.fresh(), reader.fresh()
        self.seen = 0
        self.pos: Tensor | None = None
        self.counts: LongTensor | None = None
        self.states: dict[str, Tensor] = {}
        self.padded = False  # whether a mask has hidden a token
        self.x: Tensor | None = None  # the layer's input, from a hook
        self.chunks: list[tuple[Tensor, Tensor | None]] = []  # queries and inputs of a chunked prefill
        # Looked up once: no view of a whole prompt is kept for a policy that decides layer by layer.
        self.plans = type(policy).plan is not KVPolicy.plan
        self.merges = type(policy).merge is not KVPolicy.merge
        self.scores = bool({"attn", "attn_lastw"} & set(policy.needs))

    # --- one forward ----------------------------------------------------------------------------------------
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None,
        position_ids: LongTensor | None,
    ) -> Tensor:  # fmt: skip
        """Append new keys and values [B, G, T, D], attend with q [B, H, T, D], evict -> [B, H, T, D].

        Raises ValueError, before anything changes, for another batch size, a mask that does not fit, and for
        no mask after a padded prompt.
        """
        self._check(k, mask)
        if self.rope is not None:
            if position_ids is None:
                raise ValueError("position_ids: None; compact positions need them from the model")
            q, k = self.rope.back(q, position_ids), self.rope.back(k, position_ids)
        prefill = self.seen == 0 or self.stage.chunking
        ok = self._filled(self._append(k, v), mask)
        self.padded = self.padded or mask is not None
        q = q.unflatten(1, (k.shape[1], -1))
        index = None if prefill else self.reader.select(q)
        attention = self._attention(q, scale, window, ok, index)
        weights = None
        if self.scores and len(attention.blocks()) == 1:
            weights = attention.weights()
            out = attention._mix(weights)
        else:
            out = attention.output()
        if self.stage.chunking:
            wanted = q if self.scores else q[:, :, :, -1:]
            self.chunks.append((wanted, self.x))
            self._last = (scale, window, ok)
        else:
            self._evict(self._view(attention, ok, prefill, self.x, weights))
        self.x = None
        return out.flatten(1, 2)

    def finish_prefill(self) -> None:
        """Evict at the end of a chunked prefill, as after one forward over the whole prompt."""
        scale, window, ok = self._last
        q = torch.cat([q for q, _ in self.chunks], 3)
        inputs = [x for _, x in self.chunks if x is not None]
        self.chunks = []
        if not self.scores:  # nobody looks at the weights: stand-in queries, for their number
            q = q[:, :, :, -1:].expand(*q.shape[:3], self.seen, -1)
        x = torch.cat(inputs, 1) if inputs else None
        self._evict(self._view(self._attention(q, scale, window, ok), ok, True, x))

    def _check(self, k: Tensor, mask: Tensor | None) -> None:
        B, _, T, _ = k.shape
        if self.seen and B != self.batch:
            raise ValueError(f"input: {B} rows, but the cache holds {self.batch}")
        if mask is None and self.padded:
            raise ValueError("attention_mask: None; the prompt was padded, pass the mask of all tokens seen")
        if mask is not None and mask.shape != (B, self.seen + T):
            raise ValueError(f"attention_mask: shape {list(mask.shape)}; allowed: [{B}, {self.seen + T}]")

    def _append(self, k: Tensor, v: Tensor) -> Tensor | None:
        """Store; return which slots are filled [B, G, S] if heads are ragged, else None."""
        ok = self._unpack()
        B, G, T, _ = k.shape
        self.codec.append(k, v)
        new = torch.arange(self.seen, self.seen + T, dtype=torch.int32, device=k.device)
        if self.pos is None:
            self.pos = new
            for name, dtype in self.policy.slots.items():
                self.states[name] = torch.zeros(B, G, T, dtype=dtype, device=k.device)
        else:
            self.pos = torch.cat((self.pos, new.expand(*self.pos.shape[:-1], T)), -1)
            for name, state in self.states.items():
                self.states[name] = torch.cat((state, state.new_zeros(B, G, T)), -1)
        self.seen += T
        self.batch, self.shape = B, (B, G, self.pos.shape[-1])
        return None if ok is None else torch.cat((ok, ok.new_ones(B, G, T)), -1)

    def _filled(self, ok: Tensor | None, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return ok
        pos = self.pos.long().expand(self.shape)
        real = mask[:, None].expand(-1, self.shape[1], -1).gather(-1, pos)
        return real if ok is None else ok & real

    def _attention(
        self, q: Tensor, scale: float, window: int | None, ok: Tensor | None, index: LongTensor | None = None
    ) -> Attention:
        """Attention of q [B, G, R, T, D], of un-rotated queries if positions are compact."""
        k, v = self.codec.read(index)
        T, S = q.shape[3], self.shape[2]
        pos = self.pos
        if self.rope is not None:
            flat = q.flatten(1, 2)
            if ok is None:
                pos = torch.arange(S, device=q.device)
                k, flat = self.rope.turn_first(k), self.rope.turn_first(flat, S - T)
            else:
                pos = (ok.cumsum(-1) - 1).clamp(min=0)
                own = pos[..., -T:].repeat_interleave(q.shape[2], 1)
                k, flat = self.rope.turn(k, pos), self.rope.turn(flat, own)
            q = flat.view(q.shape)
        at = pos[..., -T:]
        if index is not None:
            pos = pos.expand(self.shape).gather(-1, index)
            ok = None if ok is None else ok.gather(-1, index)
        return Attention(q, k, v, scale, pos, at, ok, window)

    def _view(
        self, attention: Attention, ok: Tensor | None, prefill: bool, x: Tensor | None,
        weights: Tensor | None = None,
    ) -> View:  # fmt: skip
        return View(
            attention, read=self.codec.read, pos=self.pos, shape=self.shape, layer=self.index,
            n_layers=self.n_layers, prefill=prefill, seen=self.seen, ok=ok, slot=self.states, x=x,
            weights=weights,
        )  # fmt: skip

    # --- eviction -------------------------------------------------------------------------------------------
    def _evict(self, view: View) -> None:
        self.policy.observe(view)
        if not (self.plans and view.prefill):
            self._prune(view, self.policy.keep(view))
            return
        self.stage.views.append((self, view))
        if self.index == self.n_layers - 1:
            pending, self.stage.views = self.stage.views, []
            keeps = self.policy.plan([view for _, view in pending])
            if len(keeps) != len(pending):
                raise ValueError(f"plan: {len(keeps)} selections for {len(pending)} layers")
            for (layer, view), keep in zip(pending, keeps, strict=True):
                layer._prune(view, keep)

    def _prune(self, view: View, keep: Tensor | None) -> None:
        if keep is not None and self.merges:
            merged = self.policy.merge(view, as_mask(keep, self.shape) & view.ok)
            if merged is not None:
                self.codec.rewrite(*merged)
        ragged = self.counts is not None  # laid out for this forward, to be made flat again
        if keep is not None or ragged:
            self._pack(Selection(view.ok if keep is None else keep, self.shape, view._ok))
        if view.prefill:
            self.reader.build(*self.codec.read())

    def _pack(self, selection: Selection) -> None:
        self.codec.keep(selection)
        self.states = {name: selection.apply(state) for name, state in self.states.items()}
        if selection.shared and self.pos.ndim == 1:
            self.pos = self.pos.index_select(0, selection.index)
        else:
            self.pos = selection.apply(self.pos.expand(self.shape))
        self.counts = selection.counts if selection.ragged else None
        if not selection.ragged:
            self.shape = (*self.shape[:2], selection.counts)

    def _unpack(self) -> Tensor | None:
        if self.counts is None:
            return None
        padding = Padding(self.counts)
        self.codec.pad(padding)
        self.pos = padding.apply(self.pos)
        self.states = {name: padding.apply(state) for name, state in self.states.items()}
        self.shape = tuple(padding.ok.shape)
        return padding.ok

    # --- outside a forward ----------------------------------------------------------------------------------
    def held(self) -> LongTensor:
        """Return the slots that each head holds, [B, G]."""
        return torch.full(self.shape[:2], self.shape[2]) if self.counts is None else self.counts

    def take_rows(self, rows: LongTensor) -> None:
        """Reorder or repeat the rows of the batch."""
        ok = self._unpack()
        self.codec.take_rows(rows)
        self.states = {name: state.index_select(0, rows) for name, state in self.states.items()}
        if self.pos.ndim == 3:
            self.pos = self.pos.index_select(0, rows)
        self.batch, self.shape = len(rows), (len(rows), *self.shape[1:])
        if ok is not None:
            self._pack(Selection(ok.index_select(0, rows), self.shape))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything held, by tier ("payload", "meta", "state") and name."""
        named = self.codec.tensors()
        own = {"pos": self.pos, "counts": self.counts}
        named["meta"] = named["meta"] | {name: t for name, t in own.items() if t is not None}
        return named | {"state": self.states}
