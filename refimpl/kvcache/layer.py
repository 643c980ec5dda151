"""One layer of the cache: append, attend, observe, keep, merge, prune."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from refimpl.kvcache.attention import Attention
from refimpl.kvcache.codecs import Codec, Dense
from refimpl.kvcache.policies import KVPolicy
from refimpl.kvcache.readers import ReadAll, Reader
from refimpl.kvcache.rope import Rope
from refimpl.kvcache.slots import Padding, Selection, Stretches, as_mask
from refimpl.kvcache.steps import Steps
from refimpl.kvcache.view import View

__all__ = ["KVLayer", "Stage"]


@dataclass
class Stage:
    """What the layers of a cache share during a prefill."""

    chunking: bool = False
    views: list[tuple[KVLayer, View]] = field(default_factory=list)
    ids: LongTensor | None = None  # the new tokens, from a hook
    unpadded: list[str] = field(default_factory=list)  # names of readers that serve no padded rows


class KVLayer(Steps):
    """Storage of one layer, and the attention over it; made by `KVCache`.

    Attributes
    - seen: tokens that the layer has seen.
    - pos: original index of the token in each slot, int32: [S] while all heads hold the same slots, else
      [B, G, S], or [N] if ragged (padding counts as tokens).
    - counts: slots of each head [B, G] if they differ ("ragged"), else None.
    - states: the policy's slot states by name, stored like keys and values.
    - notes: what else the policy remembers of this layer, by name.
    - codec, reader: this layer's own; partly: whether the reader reads some entries only.
    """

    def __init__(
        self, index: int, n_layers: int, policy: KVPolicy, codec: Codec, reader: Reader, rope: Rope | None,
        stage: Stage,
    ) -> None:  # fmt: skip
        self.index, self.n_layers, self.policy, self.rope, self.stage = index, n_layers, policy, rope, stage
        self.codec, self.reader = codec.fresh(), reader.fresh()
        self.codec.layer = index
        self.partly = not isinstance(reader, ReadAll)
        self.stretches = Stretches() if rope and policy.stretches and isinstance(codec, Dense) else None
        self.seen = 0
        self._pos: Tensor | None = None
        self._known = 0  # tokens seen when _pos was last written
        self.counts: LongTensor | None = None
        self._states: dict[str, Tensor] = {}
        self.notes: dict[str, Tensor] = {}
        self.padded = False  # whether a mask has hidden a token
        self.x: Tensor | None = None  # the layer's input, from a hook
        self.ids: list[LongTensor] = []  # the new tokens, if the policy needs them
        self.chunks: list[tuple[Tensor, Tensor | None]] = []  # queries and inputs of a chunked prefill
        # Looked up once: no view of a whole prompt is kept for a policy that decides layer by layer.
        self.plans = type(policy).plan is not KVPolicy.plan
        self.merges = type(policy).merge is not KVPolicy.merge
        self.hides = type(policy).hide is not KVPolicy.hide
        self.scores = bool({"attn", "attn_lastw"} & set(policy.needs))
        # After the prompt a policy that decides once, or never, is not asked,
        silent = all(getattr(type(policy), name) is getattr(KVPolicy, name) for name in ("observe", "keep"))
        self.asks = not (policy.once or silent and not self.merges)
        # and mostly nothing is left to do but to append keys and values.
        self.plain = not (
            self.asks or rope or self.partly or self.hides or policy.slots or "ids" in policy.needs
        )
        # What the last forward read: None, the reader knows; True, all that is stored now.
        self._read_whole: tuple[dict[str, int], LongTensor | None, int] | bool | None = None
        self.swaps = "replace" in vars(type(policy)) and self.asks and isinstance(codec, Dense) and not (
            self.partly or self.merges or self.hides
        )  # fmt: skip

    @property
    def pos(self) -> Tensor | None:
        # Most steps of decoding have no use for positions: they are written when somebody looks.
        if self.beside:
            self._settle(self._unpack())
        self._tidy()
        if self._known < self.seen:
            T, device = self.seen - self._known, self.device
            if self._pos is None or T > 1:
                new = torch.arange(self._known, self.seen, dtype=torch.int32, device=device)
                if self._pos is not None:
                    new = torch.cat((self._pos, new.expand(*self._pos.shape[:-1], T)), -1)
            else:
                new = F.pad(self._pos, (0, 1), value=self._known)
            self._pos, self._known = new, self.seen
        return self._pos

    @pos.setter
    def pos(self, pos: Tensor) -> None:
        self._pos, self._known = pos, self.seen

    @property
    def states(self) -> dict[str, Tensor]:
        self._tidy()
        return self._states

    # --- one forward ----------------------------------------------------------------------------------------
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None,
        position_ids: LongTensor | None,
    ) -> Tensor:  # fmt: skip
        """Append new keys and values [B, G, T, D], attend with q [B, H, T, D], evict -> [B, T, H, D].

        Raises ValueError, before anything changes, for another batch size, a mask that does not fit, no mask
        after a padded prompt, and for padding or a sliding window that the reader cannot serve.
        """
        B, _, T, _ = q.shape
        one = T == 1 and self.seen and B == self.batch and not (
            mask is not None or self.padded or window or self.stage.chunking
        )  # fmt: skip
        if one and self.plain:
            return self._step(q, k, v, scale) if self.counts is None else self._step_ragged(q, k, v, scale)
        self._check(k, mask, window)
        if self.rope is not None and position_ids is None:
            raise ValueError("position_ids: None; compact positions need them from the model")
        if one and self.swaps and not k.requires_grad and (self.places or self._make_room()):
            return self._swap(q, k, v, scale, position_ids)
        if self.rope is not None:
            if self.stretches is None:
                q, k = self.rope.back(q, position_ids), self.rope.back(k, position_ids)
            else:
                q = self.rope.to_index(q, position_ids, self.seen)
                k = self.rope.to_index(k, position_ids, self.seen)
        prefill = self.seen == 0 or self.stage.chunking
        if "ids" in self.policy.needs:
            self.ids.append(self.stage.ids)
        ok = self._filled(self._append(k, v), mask)
        self.padded = self.padded or mask is not None
        q = q.view(k.shape[0], k.shape[1], -1, *q.shape[2:])
        if self.partly and not prefill:
            self.reader.append(k)
        partly = self.partly and not prefill and q.shape[3] == 1
        self._read_whole = None if partly else (self.codec.nbytes(), self.counts, k.shape[:3].numel())
        attention = self._attention(q, scale, window, ok, stored=not partly)
        asked = prefill or self.asks
        if self.hides:
            attention.hidden = self.policy.hide(self._view(attention, ok, prefill, self.x))
        weights = sums = None
        if asked and self.scores and (q.shape[3] == 1 or len(attention.blocks()) == 1):
            weights = attention.weights()
            out = attention._mix(weights)
        elif asked and "attn" in self.policy.needs and not self.stage.chunking:
            out, sums = attention.output_and_sums()  # a long prompt: its weights are computed only once
        else:
            out = self.reader.read(q, self.codec, scale, ok) if partly else attention.output()
        if self.stage.chunking:
            wanted = q if self.scores or self.reader.queries else q[:, :, :, -1:]
            self.chunks.append((wanted, self.x))
            self._last = (scale, window, ok)
        elif asked:
            self._evict(self._view(attention, ok, prefill, self.x, weights, sums))
            self.ids = []
        else:
            self._settle(ok)
            self.ids = []
        self.x = None
        if self.index == self.n_layers - 1:
            self.stage.ids = None
        return out.flatten(1, 2).transpose(1, 2)

    def finish_prefill(self) -> None:
        """Evict at the end of a chunked prefill, as after one forward over the whole prompt."""
        scale, window, ok = self._last
        q = torch.cat([q for q, _ in self.chunks], 3)
        inputs = [x for _, x in self.chunks if x is not None]
        self.chunks = []
        if not (self.scores or self.reader.queries):  # nobody looks at them: stand-ins, for their number
            q = q[:, :, :, -1:].expand(*q.shape[:3], self.seen, -1)
        x = torch.cat(inputs, 1) if inputs else None
        self._evict(self._view(self._attention(q, scale, window, ok), ok, True, x))
        self.ids = []

    def _check(self, k: Tensor, mask: Tensor | None, window: int | None) -> None:
        B, _, T, _ = k.shape
        if self.seen and B != self.batch:
            raise ValueError(f"input: {B} rows, but the cache holds {self.batch}")
        if "ids" in self.policy.needs and self.stage.ids is None:
            raise ValueError(f"input_ids: None; {type(self.policy).__name__} needs them, not inputs_embeds")
        if mask is None and self.padded:
            raise ValueError("attention_mask: None; the prompt was padded, pass the mask of all tokens seen")
        if mask is not None and mask.shape != (B, self.seen + T):
            raise ValueError(f"attention_mask: shape {list(mask.shape)}; allowed: [{B}, {self.seen + T}]")
        if self.partly and window is not None:
            name = type(self.reader).__name__
            raise ValueError(f"reader: {name} and a sliding window of {window}; allowed: models without one")
        if mask is not None and self.stage.unpadded:
            name = self.stage.unpadded[0]
            raise ValueError(f"attention_mask: padded rows; allowed for {name}: rows of equal length")

    def _append(self, k: Tensor, v: Tensor) -> Tensor | None:
        """Store; return which slots are filled [B, G, S] if heads are ragged, else None."""
        B, G, T, _ = k.shape
        if self.counts is not None and isinstance(self.codec, Dense):
            self.codec.append_beside(k, v)
            self.seen, self.beside = self.seen + T, self.beside + T
            return self._unpack()
        ok = self._unpack()
        self.codec.append(k, v)
        if self.stretches is not None:
            self.stretches.append(self.seen, T)
        if self._pos is None:
            for name, kind in self.policy.slots.items():
                dtype, *width = kind if isinstance(kind, tuple) else (kind,)
                self._states[name] = torch.zeros(B, G, T, *width, dtype=dtype, device=k.device)
        else:
            for name, state in self._states.items():
                self._states[name] = torch.cat((state, state.new_zeros(B, G, T, *state.shape[3:])), 2)
        self.seen += T
        self.device = k.device
        self.batch, self.shape = B, (B, G, self.pos.shape[-1])
        return None if ok is None else torch.cat((ok, ok.new_ones(B, G, T)), -1)

    def _filled(self, ok: Tensor | None, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return ok
        pos = self.pos.long().expand(self.shape)
        real = mask[:, None].expand(-1, self.shape[1], -1).gather(-1, pos)
        return real if ok is None else ok & real

    def _attention(
        self, q: Tensor, scale: float, window: int | None, ok: Tensor | None, stored: bool = True
    ) -> Attention:
        """Attention of q [B, G, R, T, D], of un-rotated queries if positions are compact."""
        k, v = self.codec.read() if stored else (None, None)  # a reader fetches what it wants
        T, S = q.shape[3], self.shape[2]
        pos = self.pos
        if self.stretches is not None:
            return self._compact(q, k, v, scale, window, ok)
        if self.rope is not None:
            flat, compact = q.flatten(1, 2), self.policy.positions == "compact"
            if compact and ok is None:
                pos = torch.arange(S, device=q.device)
                k, flat = self.rope.turn_first(k), self.rope.turn_first(flat, S - T)
            else:
                if compact:
                    pos = (ok.cumsum(-1) - 1).clamp(min=0)
                own = pos[..., -T:] if pos.ndim == 1 else pos[..., -T:].repeat_interleave(q.shape[2], 1)
                k, flat = self.rope.turn(k, pos), self.rope.turn(flat, own)
            q = flat.view(q.shape)
        at = pos[..., -T:]
        return Attention(q, k, v, scale, pos, at, ok, window)

    def _compact(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, ok: Tensor | None
    ) -> Attention:
        """The same for keys that are turned to their index in the text, and queries likewise."""
        T, S = q.shape[3], self.shape[2]
        if ok is None and self.counts is None and self.stretches.known:
            number = torch.arange(S, device=q.device)
            return Attention(q, self._turned_on(k), v, scale, number, number[-T:], window=window)
        number = torch.arange(S, device=q.device) if ok is None else (ok.cumsum(-1) - 1).clamp(min=0)
        steps = (number - self.pos).expand(self.shape)
        own = steps[..., -T:].repeat_interleave(q.shape[2], 1)
        k, q = self.rope.shift(k, steps), self.rope.shift(q.flatten(1, 2), own).view(q.shape)
        return Attention(q, k, v, scale, number, number[..., -T:], ok, window)

    def _turned_on(self, k: Tensor) -> Tensor:
        """Keys turned to their index in the text, those of earlier stretches on to where they are read."""
        *earlier, (here, last) = self.stretches
        if not earlier:
            return k
        parts = [self.rope.shift(k[:, :, slots], here - gap) for gap, slots in earlier]
        return torch.cat((*parts, k[:, :, last.start :]), 2)

    def _view(
        self, attention: Attention, ok: Tensor | None, prefill: bool, x: Tensor | None,
        weights: Tensor | None = None, sums: Tensor | None = None,
    ) -> View:  # fmt: skip
        return View(
            attention, read=self.codec.read, pos=self.pos, shape=self.shape, layer=self.index,
            n_layers=self.n_layers, prefill=prefill, seen=self.seen, ok=ok, slot=self._states, x=x,
            notes=self.notes, ids=torch.cat(self.ids, 1) if self.ids else None,
            weights=weights, sums=sums,
        )  # fmt: skip

    # --- eviction -------------------------------------------------------------------------------------------
    def _evict(self, view: View) -> None:
        self.policy.observe(view)
        if not (self.plans and view.prefill):
            self._prune(view, self.policy.keep(view))
            return
        last, every = self.index == self.n_layers - 1, self.policy.plan_every
        if every:
            self._thin(view, self.policy.keep(view))
            view = self._lighten(view)
        pending = self.stage.views
        pending.append((self, view))
        if not (last or every and (self.index + 1) % every == 0):
            return
        if every:
            pending = [(layer, layer._look_again(view)) for layer, view in pending]
        if last:
            self.stage.views = []
        keeps = self.policy.plan([view for _, view in pending])
        if len(keeps) != len(pending):
            raise ValueError(f"plan: {len(keeps)} selections for {len(pending)} layers")
        for (layer, view), keep in zip(pending, keeps, strict=True):
            layer._prune(view, keep) if last else layer._thin(view, keep)

    def _thin(self, view: View, keep: Tensor | None) -> None:
        """Prune for the time being: the prefill goes on, nothing is merged or compressed yet."""
        if keep is not None or self.counts is not None:
            self._pack(Selection(view.ok if keep is None else keep, self.shape, view._ok))

    def _lighten(self, view: View) -> View:
        """A view that keeps no whole prompt alive, for `_look_again`: of the queries only the last."""
        q = view.q[:, :, :, -1:].clone()
        return self._view(
            replace(view.attention, q=q, k=None, v=None, ok=None, hidden=None), None, True, None
        )

    def _look_again(self, view: View) -> View:
        ok = self._unpack()
        at = self.pos[..., -1:]
        return self._view(replace(view.attention, pos=self.pos, at=at, ok=ok), ok, True, None)

    def _prune(self, view: View, keep: Tensor | list[slice] | None) -> None:
        if keep is not None and self.merges:
            merged = self.policy.merge(view, as_mask(keep, self.shape, view.device) & view.ok)
            if merged is not None:
                self.codec.rewrite(*merged)
        if keep is None:
            self._settle(view._ok)
        else:
            selection = Selection(keep, self.shape, view._ok)
            if selection.ragged and self.partly:
                raise ValueError(
                    f"keep: heads or rows keep different numbers of slots; allowed for the reader "
                    f"{type(self.reader).__name__}: equally many"
                )
            self._pack(selection)
            self.codec.commit(None)
        if view.prefill or keep is not None:
            self.reader.build(self.codec, view.q, None if keep is not None else view._ok)

    def _settle(self, ok: Tensor | None) -> None:
        """Everything stays."""
        if self.counts is None:
            self.codec.commit(ok)
        else:  # laid out for this forward: make it flat again
            self._pack(Selection(ok, self.shape))
            self.codec.commit(None)

    def _pack(self, selection: Selection) -> None:
        if self.stretches is not None:
            self.stretches.keep(selection)
        self.codec.keep(selection)
        self._states = {name: selection.apply(state) for name, state in self._states.items()}
        if selection.shared and self.pos.ndim == 1:
            self.pos = selection.apply(self.pos)
        else:
            self.pos = selection.apply(self.pos.expand(self.shape))
        self.counts = selection.counts if selection.ragged else None
        if not selection.ragged:
            self.shape = (*self.shape[:2], selection.counts)

    def _unpack(self) -> Tensor | None:
        self._tidy()
        if self.counts is None:
            return None
        padding = Padding(self.counts, self.beside)
        self.codec.pad(padding)
        new = torch.arange(self.seen - self.beside, self.seen, dtype=torch.int32, device=self._pos.device)
        self.pos = padding.apply(self._pos, new)
        self._states = {name: padding.apply(state, 0) for name, state in self._states.items()}
        self.beside, self.shape = 0, tuple(padding.ok.shape)
        return padding.ok

    # --- outside a forward ----------------------------------------------------------------------------------
    def held(self) -> LongTensor:
        """Return the slots that each head holds, [B, G]."""
        return torch.full(self.shape[:2], self.shape[2]) if self.counts is None else self.counts + self.beside

    def take_rows(self, rows: LongTensor) -> None:
        """Reorder or repeat the rows of the batch."""
        self._read_whole = self._read_all() if self._read_whole is not None else None
        ok = self._unpack()
        self.codec.take_rows(rows)
        self.reader.take_rows(rows)
        self._states = {name: state.index_select(0, rows) for name, state in self._states.items()}
        self.notes.update({name: note.index_select(0, rows) for name, note in self.notes.items()})
        if self.pos.ndim == 3:
            self.pos = self.pos.index_select(0, rows)
        self.batch, self.shape = len(rows), (len(rows), *self.shape[1:])
        if ok is not None:
            self._pack(Selection(ok.index_select(0, rows), self.shape))

    def _read_all(self) -> tuple[dict[str, int], LongTensor | None, int]:
        # A forward that changes nothing afterwards leaves the counting to those who ask.
        return (self.codec.nbytes(), None, 0) if self._read_whole is True else self._read_whole

    def read_bytes(self) -> dict[str, int]:
        """Return the bytes that the attention of the last forward read (see `KVCache.read_bytes`)."""
        if self._read_whole is None:
            return self.reader.read_bytes()
        stored, counts, new = self._read_all()
        if counts is not None:  # laid out with padding for the forward, which is no entry
            real, slots = int(counts.sum()) + new, counts.numel() * int(counts.max()) + new
            stored = {tier: n * real // slots for tier, n in stored.items()}
        host = stored.get("host", 0)
        return {"payload": stored["payload"], "meta": stored["meta"], "host": host, "moved": host}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything held, by tier ("payload", "meta", "state") and name."""
        own = {"pos": self.pos, "counts": self.counts}
        named = self.codec.tensors()
        named["meta"] = named["meta"] | {name: t for name, t in own.items() if t is not None}
        named["meta"] |= self.reader.tensors()
        return named | {"state": self.states | self.notes}
