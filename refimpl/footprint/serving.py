"""Serving: what must be resident to hold B sequences of T tokens, and to compute the next one.

Multi-head attention caches a key and a value per layer, token and head. Multi-query attention (Shazeer,
1911.02150) shares one of each among all heads, grouped-query attention (Ainslie et al., 2305.13245) one among
H/G heads; multi-head latent attention (DeepSeek-V2, 2405.04434) caches a latent of rank r and one rotary key
instead, from which each head expands its own keys and values again. Elements per token and layer:

    MHA 2·H·D    GQA 2·G·D    MQA 2·D    MLA r + D_rope

Workspaces are derived from what `transformers` 5.2 to 5.23 keeps alive with `sdpa`, without gradients: the
embeddings, the layer's input, its norm, and the widest moment of the layer. Temporaries inside one operation
(a matmul's scratch space) and the rounding of an allocator are not included.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from math import prod
from typing import Any, Literal

from refimpl.footprint.arch import DTYPE_BYTES, Arch
from refimpl.footprint.published import Deepseek, LlamaVariant, Model, of_config
from refimpl.ledger import Item, Kind, Ledger

__all__ = ["crossover", "kv_bytes", "kv_width", "largest_batch", "serving", "serving_bytes", "weight_bytes",
           "window_of"]  # fmt: skip

Phase = Literal["prefill", "decode"]


def kv_width(arch: Model) -> int:
    """Return the elements that the cache holds per token and layer: 2·G·D, or r + D_rope with MLA.

    >>> from refimpl.footprint.published import arch
    >>> kv_width(arch("huggyllama/llama-7b")), kv_width(arch("meta-llama/Llama-3.1-8B"))
    (8192, 2048)
    >>> kv_width(arch("deepseek-ai/DeepSeek-V3"))
    576
    """
    if isinstance(arch, Deepseek):
        return arch.kv_rank + arch.rope_dim
    body = _body(arch)
    return 2 * body.kv_heads * body.head_dim


def kv_bytes(
    arch: Model, batch: int, length: int, dtype: str = "bfloat16", *,
    window: int | None = None, reserved: int | None = None,
) -> int:  # fmt: skip
    """Return the bytes of the key-value cache, L · B · T · width · bytes (spec A10).

    Parameters
    ----------
    arch : `Arch`, `LlamaVariant` or `Deepseek`.
    batch, length : B sequences of T tokens each.
    dtype : of the cache, "float32", "bfloat16" or "float16".
    window : W of sliding-window attention in every layer: a token sees itself and W - 1 earlier ones, so no
        more than W - 1 are kept (None: all).
    reserved : tokens for which a static cache has taken its memory in advance, at least `length`.

    Raises ValueError for sizes out of range.

    >>> from refimpl.footprint.published import arch
    >>> kv_bytes(arch("meta-llama/Meta-Llama-3-8B"), batch=1, length=8192) / 2**30
    1.0
    """
    _check(batch, length, dtype, window, reserved)
    return _kv(arch, batch * _kept(length, window, reserved), dtype)


def weight_bytes(arch: Model, dtype: str = "bfloat16") -> int:
    """Return the bytes of all parameters, experts that a token does not use included."""
    _check(1, 1, dtype)
    return sum(prod(shape) for _, shape in arch.tensors()) * DTYPE_BYTES[dtype]


def serving(
    arch: Model, batch: int, length: int, dtype: str = "bfloat16", *,
    phase: Phase = "decode", window: int | None = None, reserved: int | None = None,
) -> Ledger:  # fmt: skip
    """Account one forward pass at its peak: weights, cache, and the wider of one layer and the output head.

    The resident total is the peak, to the byte for GPT-2 and LLaMA-like decoders (dense, `sdpa`, a
    `DynamicCache`, logits of the last token only). A layer of a mixture or with MLA is not accounted: there
    the activations hold the head alone.

    Parameters
    ----------
    arch, batch, length, dtype, window, reserved : as in `kv_bytes`; weights have the cache's dtype.
    phase : "prefill", all T tokens at once into an empty cache; or "decode", the last of T tokens with the
        others cached. To append a token a growing cache copies each layer's keys, then its values: while the
        last layer copies its values, the old ones are resident too ("temp").

    Raises ValueError for sizes out of range or an unknown phase.

    Examples
    --------
    >>> from refimpl.footprint.published import arch
    >>> print(serving(arch("meta-llama/Llama-3.2-1B"), batch=8, length=8192))
    kind        tensors       elements      payload B     resident B
    weight            1  1,235,814,400  2,471,628,800  2,471,628,800
    buffer            1             64              0            256
    activation        1         73,892        147,784        147,784
    kv                1  1,073,741,824  2,147,483,648  2,147,483,648
    temp              1     33,550,336     67,100,672     67,100,672
    total             5  2,343,180,516  4,686,360,904  4,686,361,160
    """
    _check(batch, length, dtype, window, reserved)
    if phase not in ("prefill", "decode"):
        raise ValueError(f"phase must be 'prefill' or 'decode', got {phase!r}")
    size, weights = DTYPE_BYTES[dtype], weight_bytes(arch, dtype)
    kept = held = _kept(length, window, reserved)
    if window is not None and reserved is None:  # a slice keeps the storage alive that it was cut from
        held = length if phase == "prefill" else min(length, window)
    kv, storage = _kv(arch, batch * kept, dtype), _kv(arch, batch * held, dtype)
    items = [Item("parameters", "weight", weights // size, weights, weights, None)]
    if rotary := _rotary_dim(arch):
        # D/2 frequencies and the copy that transformers keeps; float32 in a model loaded in any dtype.
        items.append(Item("rotary frequencies", "buffer", rotary, 0, 4 * rotary, None))
    items.append(Item("keys and values", "kv", kv // size, kv, storage, None))
    old = 0
    if phase == "decode" and reserved is None and not isinstance(arch, Deepseek):
        layer = _kv(arch, batch, dtype) // _body(arch).layers
        # A growing cache replaces keys, then values; a sliding one both at once.
        old = (length - 1) * layer // 2 if window is None else min(length - 1, window) * layer
    name, activation, temp = _peak(arch, batch, length if phase == "prefill" else 1, size, old)
    items.append(Item(name, "activation", activation // size, activation, activation, None))
    if temp:
        items.append(Item("cache entries being replaced", "temp", temp // size, temp, temp, None))
    return Ledger(tuple(items))


def serving_bytes(
    config: Any, batch: int, length: int, dtype: str = "float32", *,
    phase: Phase = "decode", reserved: int | None = None,
) -> dict[Kind, int]:  # fmt: skip
    """Return the resident bytes by kind of `serving` for a configuration, its window included.

    >>> serving_bytes({"model_type": "gpt2"}, batch=1, length=1024)["kv"]
    75497472
    """
    fields = config if isinstance(config, Mapping) else config.to_dict()
    options = {"phase": phase, "window": window_of(fields), "reserved": reserved}
    return serving(of_config(fields), batch, length, dtype, **options).by_kind("resident")


def window_of(config: Mapping[str, Any]) -> int | None:
    """Return the window of sliding attention of a configuration, which Mistral alone uses."""
    return config.get("sliding_window") if config.get("model_type") == "mistral" else None


def crossover(arch: Model, batch: int = 1, dtype: str = "bfloat16") -> int:
    """Return the least length T at which the cache of B sequences outweighs the weights (same dtype).

    >>> from refimpl.footprint.published import arch
    >>> [crossover(arch(n), batch=16) for n in ("huggyllama/llama-7b", "meta-llama/Llama-3.1-8B")]
    [1607, 7659]
    """
    _check(batch, 1, dtype)
    return weight_bytes(arch, dtype) // _kv(arch, batch, dtype) + 1


def largest_batch(
    arch: Model, length: int, budget: int, dtype: str = "bfloat16", *,
    phase: Phase = "decode", window: int | None = None, reserved: int | None = None,
) -> int:  # fmt: skip
    """Return the largest B whose `serving` ledger is resident in `budget` bytes; 0 where not even one fits.

    Raises ValueError for a budget below 1, and as `serving`.

    >>> from refimpl.footprint.published import arch
    >>> largest_batch(arch("meta-llama/Meta-Llama-3-8B"), length=8192, budget=24 * 2**30)
    8
    """
    if budget < 1:
        raise ValueError(f"budget must be an integer >= 1 (bytes), got {budget!r}")

    def fits(batch: int) -> bool:
        ledger = serving(arch, batch, length, dtype, phase=phase, window=window, reserved=reserved)
        return ledger.total(view="resident") <= budget

    if not fits(1):
        return 0
    high = 2
    while fits(high):
        high *= 2
    return bisect_left(range(high), True, lo=high // 2, key=lambda batch: not fits(batch)) - 1


def _peak(arch: Model, batch: int, new: int, size: int, old: int) -> tuple[str, int, int]:
    """Return name, activation and temp bytes of the moment with the most, for `new` tokens a sequence."""
    n, body = batch * new, _body(arch)
    head = n * body.hidden * size + batch * body.vocab * size + 8 * n  # logits of the last token; ids
    moments = [("output head", head, 0)]
    if isinstance(body, Arch) and not (isinstance(arch, LlamaVariant) and arch.experts > 1):
        h, f, q, kv = body.hidden, body.ffn, body.heads * body.head_dim, body.kv_heads * body.head_dim
        ids = 8 * n + 8 * new  # of tokens and positions
        if body.kind == "gpt2":
            positions = new * h * size  # their embeddings
            # Embeddings, layer input, norm; then q, k, v in one tensor, or attention's output, the residual
            # and the four tensors of width f with which gelu_new computes.
            moments += [("one layer, caching", n * size * 6 * h + positions + ids, old)]
            moments += [("one layer, MLP", n * size * (5 * h + 4 * f) + positions + ids, 0)]
        else:
            angles = 2 * new * body.head_dim * size  # cosines and sines
            # Embeddings, layer input, norm: in the first layer the first two are one tensor.
            kept = 2 * h if body.layers == 1 else 3 * h
            moments += [("one layer, caching", n * size * (kept + q + 2 * kv) + angles + ids, old)]
            moments += [("one layer, MLP", n * size * (kept + h + 3 * f) + angles + ids, 0)]
            # k and v await caching. First q, q·cos, q rotated by a half, that times sin; then q, its result,
            # and the same three for k.
            rotating = n * size * (kept + max(4 * q, 2 * q + 3 * kv)) + angles + ids
            moments += [("one layer, rotating", rotating, 0)]
    return max(moments, key=lambda moment: moment[1] + moment[2])


def _body(arch: Model) -> Arch | Deepseek:
    return arch.base if isinstance(arch, LlamaVariant) else arch


def _rotary_dim(arch: Model) -> int:
    body = _body(arch)
    if isinstance(body, Deepseek):
        return body.rope_dim
    return 0 if body.kind == "gpt2" else body.head_dim


def _kv(arch: Model, tokens: int, dtype: str) -> int:
    return _body(arch).layers * tokens * kv_width(arch) * DTYPE_BYTES[dtype]


def _kept(length: int, window: int | None, reserved: int | None) -> int:
    """Tokens per sequence for which the cache has memory."""
    if reserved is not None:  # a static cache of a sliding layer reserves the window
        return reserved if window is None else min(reserved, window)
    return length if window is None else min(length, window - 1)


def _check(
    batch: int, length: int, dtype: str, window: int | None = None, reserved: int | None = None
) -> None:
    for name, value, least in (("batch", batch, 1), ("length", length, 1), ("window", window, 2)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    if reserved is not None and reserved < length:
        raise ValueError(f"reserved must be None or at least the length {length}, got {reserved!r}")
