"""Plausible but wrong serving accounts that `check_serving_bytes` must reject."""

from dataclasses import replace

from refimpl.footprint.arch import Arch
from refimpl.footprint.published import Deepseek, of_config
from refimpl.footprint.serving import serving_bytes


def _fields(config):
    return config if isinstance(config, dict) else config.to_dict()


def every_head_has_its_own_keys(config, batch, length, dtype="float32", **options):
    got = serving_bytes(config, batch, length, dtype, **options)
    arch = of_config(_fields(config))
    if isinstance(arch, Arch):
        got["kv"] = got["kv"] * arch.heads // arch.kv_heads
    return got


def latent_attention_caches_expanded_keys_and_values(config, batch, length, dtype="float32", **options):
    got = serving_bytes(config, batch, length, dtype, **options)
    arch = of_config(_fields(config))
    if isinstance(arch, Deepseek):
        per_head = arch.nope_dim + arch.rope_dim + arch.value_dim
        got["kv"] = got["kv"] // (arch.kv_rank + arch.rope_dim) * arch.heads * per_head
    return got


def latent_is_counted_twice(config, batch, length, dtype="float32", **options):
    got = serving_bytes(config, batch, length, dtype, **options)
    if isinstance(of_config(_fields(config)), Deepseek):
        got["kv"] *= 2
    return got


def appending_is_free(config, batch, length, dtype="float32", **options):
    got = serving_bytes(config, batch, length, dtype, **options)
    return {kind: size for kind, size in got.items() if kind != "temp"}


def static_cache_holds_what_was_written(config, batch, length, dtype="float32", *, reserved=None, **options):
    got = serving_bytes(config, batch, length, dtype, reserved=reserved, **options)
    return got if reserved is None else got | {"kv": got["kv"] // reserved * length}


def cache_is_always_float32(config, batch, length, dtype="float32", **options):
    got = serving_bytes(config, batch, length, dtype, **options)
    return got | {"kv": serving_bytes(config, batch, length, "float32", **options)["kv"]}


def prefill_works_token_by_token(config, batch, length, dtype="float32", *, phase="decode", **options):
    got = serving_bytes(config, batch, length, dtype, phase=phase, **options)
    if phase == "prefill":
        got["activation"] = serving_bytes(config, batch, 1, dtype, phase="prefill")["activation"]
    return got


def tied_head_counted_again(config, batch, length, dtype="float32", **options):
    got = serving_bytes(config, batch, length, dtype, **options)
    arch = of_config(_fields(config))
    if isinstance(arch, Arch) and arch.tied:
        untied = replace(arch, tied=False)
        got["weight"] = got["weight"] // arch.parameters() * untied.parameters()
    return got


MUTANTS = [
    ("serving_bytes", "grouped heads are switched off", every_head_has_its_own_keys),
    (
        "serving_bytes",
        "MLA caches expanded keys and values",
        latent_attention_caches_expanded_keys_and_values,
    ),
    ("serving_bytes", "MLA's latent is counted as keys and again as values", latent_is_counted_twice),
    ("serving_bytes", "appending to the cache copies nothing", appending_is_free),
    ("serving_bytes", "a static cache holds what was written", static_cache_holds_what_was_written),
    ("serving_bytes", "the cache is float32 whatever the dtype", cache_is_always_float32),
    ("serving_bytes", "prefill works token by token", prefill_works_token_by_token),
    ("serving_bytes", "a tied output head is counted again", tied_head_counted_again),
]
