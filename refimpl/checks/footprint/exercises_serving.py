"""Checks for the exercises of the notebook on serving (footprint spec A10)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from refimpl.checks import check, require
from refimpl.checks.tiny import random_ids, tiny


def _equal(got: object, expected: int, diagnosis: str) -> None:
    require(isinstance(got, int) and not isinstance(got, bool),
            f"{diagnosis}: expected an int, got {type(got).__name__}")  # fmt: skip
    require(got == expected, f"{diagnosis}: got {got}, expected {expected}")


@check
def check_token_bytes(token_bytes: Callable[[Mapping[str, Any], int], int]) -> None:
    """`token_bytes(config, itemsize)`: what one token adds to the cache, in bytes, over all layers.

    config: the fields of a config.json of a LLaMA-like model or of a DeepSeek, which has `kv_lora_rank`.
    """
    for heads, what in ((4, "every head with its own keys (MHA)"), (2, "two KV heads (GQA)"),
                        (1, "one KV head (MQA)")):  # fmt: skip
        model = tiny("llama", attention="sdpa", num_key_value_heads=heads)
        expected = _grown_per_token(model)
        got = token_bytes(model.config.to_dict(), 4)
        require(got != 3 * 32 * 4 * 2 or expected == got,
                f"{what}: keys are cached per KV head, not per query head: got {got}, a real cache grows "
                f"by {expected} bytes")  # fmt: skip
        _equal(got, expected, f"{what}: bytes by which a real cache grows per token")
    wide = tiny("mistral", attention="sdpa", sliding_window=None)
    _equal(token_bytes(wide.config.to_dict(), 4), _grown_per_token(wide),
           "head_dim is given and is not hidden_size / num_attention_heads")  # fmt: skip
    bare = {"num_hidden_layers": 5, "hidden_size": 48, "num_attention_heads": 6}
    _equal(token_bytes(bare, 2), 5 * 2 * 48 * 2, "without num_key_value_heads and head_dim: MHA, h / H wide")
    latent = bare | {"num_key_value_heads": 6, "kv_lora_rank": 64, "qk_rope_head_dim": 16}
    got = token_bytes(latent, 2)
    require(got != 2 * 5 * (64 + 16) * 2, "the latent serves as key and as value: there is no factor 2")
    _equal(got, 5 * (64 + 16) * 2, "latent attention: one latent and one rotary key")


def _grown_per_token(model: torch.nn.Module) -> int:
    sizes = []
    for length in (7, 8):
        with torch.no_grad():
            cache = model(random_ids(1, length), use_cache=True).past_key_values
        sizes.append(sum(t.numel() * t.element_size() for x in cache.layers for t in (x.keys, x.values)))
    return sizes[1] - sizes[0]


@check
def check_crossover_tokens(crossover_tokens: Callable[[int, int, int], int]) -> None:
    """`crossover_tokens(weights, token_bytes, batch)`: the least T at which the cache outweighs the weights.

    weights: bytes; token_bytes: bytes per token of one sequence; batch: sequences, all of T tokens.
    "Outweighs" is strict: an equal weight is not enough.
    """
    for weights, per_token, batch in ((1000, 10, 1), (1000, 10, 4), (1001, 10, 1), (999, 7, 3), (5, 100, 1)):
        expected = next(t for t in range(1, 2000) if batch * t * per_token > weights)
        got = crossover_tokens(weights, per_token, batch)
        case = f"{weights} bytes of weights, {per_token} per token, batch {batch}"
        require(isinstance(got, int), f"{case}: expected an int, got {type(got).__name__}")
        alone = weights // per_token + 1
        require(got != alone or got == expected, f"{case}: {got} is the length for a single sequence")
        require(batch * got * per_token > weights,
                f"{case}: at {got} tokens the cache does not outweigh the weights yet")  # fmt: skip
        _equal(got, expected, f"{case}: not the least such length")


@check
def check_paged_bytes(paged_bytes: Callable[[Sequence[int], int, int], int]) -> None:
    """`paged_bytes(lengths, block, token_bytes)`: the cache of several sequences in blocks of `block` tokens.

    A block belongs to one sequence; the last one of each sequence may be partly empty.
    """
    for lengths, block in (((5, 9, 16), 4), ((1, 1, 1), 16), ((32, 64), 16), ((7,), 1)):
        blocks = 0
        for length in lengths:
            while length > 0:
                blocks, length = blocks + 1, length - block
        got, case = paged_bytes(lengths, block, 3), f"lengths {lengths} in blocks of {block}"
        require(got != sum(lengths) * 3 or got == blocks * block * 3,
                f"{case}: a partly filled block is taken as a whole")  # fmt: skip
        padded = max(lengths) * len(lengths) * 3
        require(got != padded or got == blocks * block * 3,
                f"{case}: that is a rectangle as long as the longest sequence, not pages")  # fmt: skip
        _equal(got, blocks * block * 3, f"{case}: each sequence rounds up to whole blocks of its own")


@check
def check_max_users(max_users: Callable[[int, int, int, int, int], int]) -> None:
    """`max_users(budget, weights, token_bytes, layers, length)`: the largest batch whose last step fits.

    While a growing cache appends the last token in the last layer, that layer's old values (length - 1
    tokens, half of the layer's share of `token_bytes`) are still there. Activations are left out. 0 if none
    fits.
    """
    for budget, weights, per_token, layers, length in (
        (10_000, 1_000, 16, 2, 10), (10_000, 1_000, 16, 4, 50), (100_000, 1_000, 24, 3, 64),
        (1_000, 1_000, 16, 2, 10), (500, 1_000, 16, 2, 10), (5_720, 1_000, 16, 2, 10),
    ):  # fmt: skip
        copy = (length - 1) * per_token // layers // 2
        users = 0
        while weights + (users + 1) * (length * per_token + copy) <= budget:
            users += 1
        got = max_users(budget, weights, per_token, layers, length)
        case = f"budget {budget}, weights {weights}, {length} tokens of {per_token} bytes, {layers} layers"
        require(isinstance(got, int), f"{case}: expected an int, got {type(got).__name__}")
        require(got >= 0, f"{case}: {got} sequences; where the weights alone do not fit, none is served")
        peak = weights + got * (length * per_token + copy)
        require(not got or peak <= budget,
                f"{case}: {got} sequences hold {peak} bytes while a layer's values are copied")  # fmt: skip
        _equal(got, users, f"{case}: more sequences would fit")
