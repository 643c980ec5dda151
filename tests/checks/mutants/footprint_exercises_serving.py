"""Mistakes that a reader of the notebook on serving may make, and the right answers."""

from math import ceil


def token_bytes(config, itemsize):
    layers = config["num_hidden_layers"]
    if "kv_lora_rank" in config:
        return layers * (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * itemsize
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return layers * 2 * (config.get("num_key_value_heads") or heads) * width * itemsize


def crossover_tokens(weights, token_bytes, batch):
    return weights // (batch * token_bytes) + 1


def paged_bytes(lengths, block, token_bytes):
    return sum(ceil(length / block) for length in lengths) * block * token_bytes


def max_users(budget, weights, token_bytes, layers, length):
    each = length * token_bytes + (length - 1) * token_bytes // layers // 2
    return max(0, (budget - weights) // each)


SOLUTIONS = {
    "token_bytes": token_bytes,
    "crossover_tokens": crossover_tokens,
    "paged_bytes": paged_bytes,
    "max_users": max_users,
}


def _every_head(config, itemsize):
    return token_bytes({**config, "num_key_value_heads": config["num_attention_heads"]}, itemsize)


def _keys_only(config, itemsize):
    return token_bytes(config, itemsize) // 2


def _one_layer(config, itemsize):
    return token_bytes({**config, "num_hidden_layers": 1}, itemsize)


def _head_dim_ignored(config, itemsize):
    return token_bytes({**config, "head_dim": None}, itemsize)


def _latent_twice(config, itemsize):
    return token_bytes(config, itemsize) * (2 if "kv_lora_rank" in config else 1)


def _latent_ignored(config, itemsize):
    return token_bytes({k: v for k, v in config.items() if k != "kv_lora_rank"}, itemsize)


def _copy_of_the_whole_layer(budget, weights, token_bytes, layers, length):
    each = length * token_bytes + (length - 1) * token_bytes // layers
    return max(0, (budget - weights) // each)


MUTANTS = [
    ("token_bytes", "keys per query head", _every_head),
    ("token_bytes", "keys without values", _keys_only),
    ("token_bytes", "one layer only", _one_layer),
    ("token_bytes", "head_dim is taken as hidden_size / heads", _head_dim_ignored),
    ("token_bytes", "the latent counted as key and as value", _latent_twice),
    ("token_bytes", "latent attention switched off", _latent_ignored),
    ("crossover_tokens", "batch ignored", lambda w, t, b: w // t + 1),
    ("crossover_tokens", "equal counts as outweighing", lambda w, t, b: ceil(w / (b * t))),
    ("crossover_tokens", "rounded down", lambda w, t, b: w // (b * t)),
    ("crossover_tokens", "one token too long", lambda w, t, b: w // (b * t) + 2),
    ("paged_bytes", "blocks switched off", lambda n, block, t: sum(n) * t),
    ("paged_bytes", "rounds the sum, not each", lambda n, block, t: ceil(sum(n) / block) * block * t),
    ("paged_bytes", "as long as the longest sequence", lambda n, block, t: max(n) * len(n) * t),
    ("paged_bytes", "always a further block", lambda n, block, t: sum(x // block + 1 for x in n) * block * t),
    ("max_users", "appending is free", lambda m, w, t, layers, n: max(0, (m - w) // (n * t))),
    ("max_users", "the weights are forgotten", lambda m, w, t, layers, n: max_users(m, 0, t, layers, n)),
    (
        "max_users",
        "negative where nothing fits",
        lambda m, w, t, layers, n: (m - w) // (n * t + (n - 1) * t // layers // 2),
    ),
    ("max_users", "keys and values copied at once", _copy_of_the_whole_layer),
]
