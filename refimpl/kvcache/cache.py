"""The cache: a policy (what stays), a codec (how it is stored) and a reader (what is read)."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
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
    - codec, reader: prototypes of which every layer gets a copy, or a sequence of them, one for each layer;
      default `Dense()`, `ReadAll()`.

    Attributes: layers (`KVLayer`), policy. Raises TypeError for another model or something that is no policy,
    codec or reader; ValueError for compact positions without rotary embeddings, for an unknown need, for a
    sequence of another length, and for a reader beside a codec or policy that it cannot read from.

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
        self, model: nn.Module, policy: KVPolicy | None = None,
        codec: Codec | Sequence[Codec] | None = None, reader: Reader | Sequence[Reader] | None = None,
    ) -> None:  # fmt: skip
        bb = Backbone(model)
        self._config, self._G, self._D, self.n_layers = model.config, bb.G, bb.D, bb.n_layers
        self.policy = policy or Full()
        self._codecs = _one_each("codec", Dense() if codec is None else codec, Codec, self.n_layers)
        self._readers = _one_each("reader", ReadAll() if reader is None else reader, Reader, self.n_layers)
        _check(self.policy)
        for codec, reader in zip(self._codecs, self._readers, strict=True):
            _check_reader(self.policy, codec, reader)
            reader.check(self._D)
        unrotated = self.policy.positions == "compact" or not all(codec.rotated for codec in self._codecs)
        self._rope = Rope(bb) if unrotated else None
        if self.policy.n_layers not in (None, self.n_layers):
            raise ValueError(
                f"policy: {type(self.policy).__name__} made for {self.policy.n_layers} layers; allowed: "
                f"{self.n_layers}, the model's"
            )
        install(model)
        self.reset()
        if "hidden" in self.policy.needs:
            for l in range(self.n_layers):
                handle = bb.layer(l).block.register_forward_pre_hook(_remember_input(weakref.ref(self), l))
                weakref.finalize(self, handle.remove)
        if "ids" in self.policy.needs:
            hook = _remember_ids(weakref.ref(self))
            weakref.finalize(self, model.get_input_embeddings().register_forward_pre_hook(hook).remove)

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
        """Return the bytes of all layers: entries, what belongs to them (positions, scales), slot states.

        A codec of two tiers adds "host": entries in the memory of the host; the others are the device's.

        Whoever looks sees exactly what stays. Between two generated tokens a policy with `replace` has one
        slot more in each head, free for the next token, until somebody looks.
        """
        total = dict.fromkeys(("payload", "meta", "state"), 0)
        for layer in self.layers:
            for tier, named in layer.tensors().items():
                total[tier] = total.get(tier, 0) + sum(t.nbytes for t in named.values())
        return total

    def read_bytes(self) -> dict[str, int]:
        """Return the bytes that the attention of all layers read in the last forward, by where they lay.

        - payload: entries on the device. Each counts once, however many query heads share it.
        - meta: what was read beside them to know them (scales) or to choose them (bounds of pages, channels,
          keys that an index visited).
        - host: entries in the memory of the host.
        - moved: bytes that crossed from host to device; part of those above, unless results crossed instead.

        Raises ValueError if the cache has seen no token.
        """
        if not self.seen:
            raise ValueError("read_bytes: the cache has seen no token yet")
        total = dict.fromkeys(("payload", "meta", "host", "moved"), 0)
        for layer in self.layers:
            for name, n in layer.read_bytes().items():
                total[name] += n
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
        if layer_idx == 0 and self._config._attn_implementation != NAME:
            raise RuntimeError(
                f"the model's attention is {self._config._attn_implementation!r}, which cannot read this "
                "cache; make the KVCache after any release(model) or set_attn_implementation(...)"
            )
        if k.ndim != 4 or (k.shape[1], k.shape[3]) != (self._G, self._D):
            raise ValueError(f"keys: shape {list(k.shape)}; allowed: [B, {self._G}, T, {self._D}]")
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
        self._stage = Stage(unpadded=[type(r).__name__ for r in self._readers if not r.padded][:1])
        self.layers = []
        for l, (codec, reader) in enumerate(zip(self._codecs, self._readers, strict=True)):
            rope = self._rope if self.policy.positions == "compact" or not codec.rotated else None
            self.layers.append(KVLayer(l, self.n_layers, self.policy, codec, reader, rope, self._stage))
        codecs = [layer.codec for layer in self.layers]
        for codec in codecs:
            codec.join(codecs)

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


def _remember_ids(cache: weakref.ref[KVCache]):
    def hook(module: nn.Module, args: tuple[LongTensor, ...]) -> None:
        if (alive := cache()) is not None:
            alive._stage.ids = args[0]

    return hook


def _one_each(name: str, value: object, kind: type, n_layers: int) -> list:
    """One prototype for each layer, of a single one or of a sequence."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) != n_layers:
        raise ValueError(f"{name}: {len(value)} of them; allowed: one, or {n_layers}, one for each layer")
    each = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * n_layers
    for one in each:
        if not isinstance(one, kind):
            raise TypeError(f"{name}: expected a {kind.__name__}, got {one!r}")
    return each


def _check(policy: KVPolicy) -> None:
    if not isinstance(policy, KVPolicy):
        raise TypeError(f"policy: expected a KVPolicy, got {policy!r}")
    if policy.positions not in POSITIONS:
        raise ValueError(f"positions: {policy.positions!r}; allowed: {', '.join(POSITIONS)}")
    if unknown := set(policy.needs) - set(NEEDS):
        raise ValueError(f"needs: {sorted(unknown)}; allowed: {', '.join(NEEDS)}")


def _check_reader(policy: KVPolicy, codec: Codec, reader: Reader) -> None:
    name = type(reader).__name__
    if not isinstance(codec, reader.codec):
        got = type(codec).__name__
        raise ValueError(f"reader: {name} and the codec {got}; allowed beside it: {reader.codec.__name__}")
    if not reader.evicts and type(policy) is not Full:
        raise ValueError(f"reader: {name} and the policy {type(policy).__name__}; allowed beside it: Full")
    if not isinstance(reader, ReadAll):
        hides = type(policy).hide is not KVPolicy.hide
        if policy.positions == "compact" or {"attn", "attn_lastw"} & set(policy.needs) or hides:
            raise ValueError(
                f"reader: {name} reads some slots only; allowed beside it: policies with original positions "
                "that need no attention weights and hide nothing"
            )
        if not codec.rotated:
            raise ValueError(f"reader: {name}; allowed beside un-rotated keys: ReadAll")
