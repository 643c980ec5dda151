"""The cache: a policy (what stays), a codec (how it is stored) and a reader (what is read)."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.kvcache.attention import NAME, install
from refimpl.kvcache.codecs import Codec, Dense
from refimpl.kvcache.layer import KVLayer, Stage
from refimpl.kvcache.policies import NEEDS, POSITIONS, Full, KVPolicy
from refimpl.kvcache.readers import ReadAll, Reader
from refimpl.kvcache.rope import Rope
from refimpl.ledger import Ledger, of_tensors

__all__ = ["KVCache"]


class KVCache:
    """A key-value cache, passed to a model or to `model.generate` as `past_key_values`.

    Every method of the chapter is a choice of policy, codec and reader. Tokens *seen* are counted apart from
    slots *held*: transformers asks for the first (`get_seq_length`), memory is made of the second.

    Parameters
    - model: one of `refimpl.backbone.FAMILIES`, on any device and dtype. It gets this package's attention;
      `release(model)` gives its own back. A cache serves one sequence (or batch) at a time.
    - policy: a `KVPolicy`; default `Full()`.
    - codec, reader: prototypes of which every layer gets a copy; default `Dense()`, `ReadAll()`.

    Attributes: layers (`KVLayer`), policy. Raises TypeError for another model or something that is no policy,
    codec or reader; ValueError for compact positions without rotary embeddings, for an unknown need, and for
    a reader beside a policy that needs attention weights or compact positions.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import Window
    >>> model = tiny("llama")
    >>> cache = KVCache(model, Window(6))
    >>> out = model(random_ids(1, 10), past_key_values=cache)
    >>> cache.seen, cache.held(0).tolist(), cache.nbytes()  # 3 layers · 2 · 2 heads · 6 slots · 8 · 4 bytes
    (10, [[6, 6]], {'payload': 2304, 'meta': 72, 'state': 0})
    """

    is_compileable = False
    is_croppable = False
    is_initialized = True
    offloading = False

    def __init__(
        self, model: nn.Module, policy: KVPolicy | None = None, codec: Codec | None = None,
        reader: Reader | None = None,
    ) -> None:  # fmt: skip
        bb = Backbone(model)
        self.policy, self._codec, self._reader = policy or Full(), codec or Dense(), reader or ReadAll()
        _check(self.policy, self._codec, self._reader)
        self._rope = Rope(bb) if self.policy.positions == "compact" else None
        self._config, self._G, self._D, self.n_layers = model.config, bb.G, bb.D, bb.n_layers
        install(model)
        self.reset()
        if "hidden" in self.policy.needs:
            for l in range(self.n_layers):
                handle = bb.layer(l).block.register_forward_pre_hook(_remember_input(weakref.ref(self), l))
                weakref.finalize(self, handle.remove)

    # --- what readers of this book use ----------------------------------------------------------------------
    @property
    def seen(self) -> int:
        """Tokens seen, evicted ones included."""
        return self.layers[0].seen

    def held(self, layer: int) -> LongTensor:
        """Return the slots [B, G] that each head of a layer holds; ValueError for no such layer, no token."""
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layer: {layer}; allowed: 0..{self.n_layers - 1}")
        if not self.seen:
            raise ValueError("held: the cache has seen no token yet")
        return self.layers[layer].held()

    @contextmanager
    def prefill(self) -> Iterator[KVCache]:
        """Take all forwards inside as chunks of one prompt: nothing is evicted before the end of the block.

        Then each layer evicts as after one forward over the whole prompt. Raises ValueError if the cache is
        not empty.
        """
        if self.seen:
            raise ValueError(f"prefill: the cache has seen {self.seen} tokens; allowed: an empty cache")
        self._stage.chunking = True
        try:
            yield self
        finally:
            self._stage.chunking = False
        if self.seen:
            for layer in self.layers:
                layer.finish_prefill()

    def nbytes(self) -> dict[str, int]:
        """Return the bytes of all layers: entries, what belongs to them (positions, scales), slot states."""
        total = dict.fromkeys(("payload", "meta", "state"), 0)
        for layer in self.layers:
            for tier, named in layer.tensors().items():
                total[tier] = total.get(tier, 0) + sum(t.nbytes for t in named.values())
        return total

    def ledger(self) -> Ledger:
        """Account every tensor held; the resident view counts whole storages, so a kept view would show."""
        return of_tensors(self._named(), "kv")

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for layer in self.layers:
            for tier, named in layer.tensors().items():
                yield from ((f"{layer.index}.{tier}.{name}", t) for name, t in named.items())

    # --- what transformers 5.2 to 5.23 uses -----------------------------------------------------------------
    def update(
        self, k: Tensor, v: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values [B, G, T, D] through, the keys with their layer, which will store them.

        Raises RuntimeError if the model's attention is not this package's, ValueError for keys of another
        shape.
        """
        if self._config._attn_implementation != NAME:
            raise RuntimeError(
                f"the model's attention is {self._config._attn_implementation!r}, which cannot read this "
                "cache; make the KVCache after any release(model) or set_attn_implementation(...)"
            )
        if k.ndim != 4 or (k.shape[1], k.shape[3]) != (self._G, self._D):
            raise ValueError(f"keys: shape {list(k.shape)}; allowed: [B, {self._G}, T, {self._D}]")
        k = k.view(k.shape)  # a tensor object of our own to write the attribute on
        k._kv_layer = self.layers[layer_idx]
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen: transformers derives positions from it and cuts the inputs of `generate`."""
        return self.layers[layer_idx].seen

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """(tokens seen after the forward, 0); `query` is a length (5.23) or the new positions (5.2)."""
        return self.layers[layer_idx].seen + (len(query) if isinstance(query, Tensor) else query), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def is_sliding(self) -> list[bool]:
        """A model's own sliding window is a mask here; it evicts nothing."""
        return [False] * self.n_layers

    is_linear = is_dummy = is_sliding

    def lazy_initialization(self, *args: object) -> None:
        """Nothing to prepare."""

    def reset(self) -> None:
        """Forget everything."""
        self._stage = Stage()
        shared = (self.n_layers, self.policy, self._codec, self._reader, self._rope, self._stage)
        self.layers = [KVLayer(l, *shared) for l in range(self.n_layers)]

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Reorder the rows for beam search."""
        for layer in self.layers:
            layer.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.reorder_cache(torch.arange(self.layers[0].batch).repeat_interleave(repeats))

    batch_select_indices = reorder_cache

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: evicted tokens cannot come back."""
        raise ValueError("crop: an evicting cache cannot take tokens back (assisted generation needs that)")


def _remember_input(cache: weakref.ref[KVCache], l: int):
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if (alive := cache()) is not None:
            alive.layers[l].x = args[0]

    return hook


def _check(policy: KVPolicy, codec: Codec, reader: Reader) -> None:
    expected = (("policy", policy, KVPolicy), ("codec", codec, Codec), ("reader", reader, Reader))
    for name, value, kind in expected:
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected a {kind.__name__}, got {value!r}")
    if policy.positions not in POSITIONS:
        raise ValueError(f"positions: {policy.positions!r}; allowed: {', '.join(POSITIONS)}")
    if unknown := set(policy.needs) - set(NEEDS):
        raise ValueError(f"needs: {sorted(unknown)}; allowed: {', '.join(NEEDS)}")
    if not isinstance(reader, ReadAll):
        if policy.positions == "compact" or {"attn", "attn_lastw"} & set(policy.needs):
            raise ValueError(
                f"reader: {type(reader).__name__} reads some slots only; allowed beside it: policies with "
                "original positions that need no attention weights"
            )
