"""The checks of tiled attention and of its variant with token scores (kv-cache, FlashAttention)."""

from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {
    "flash_attention": "refimpl.kvcache.flash:flash_attention",
    "flash_scores": "refimpl.kvcache.flash:flash_scores",
}
# heads, KV heads, queries, keys, tile, causal
CASES = [
    (4, 2, 50, 50, (16, 16), True), (6, 1, 20, 45, (8, 7), True), (2, 2, 33, 33, (50, 4), False),
    (2, 1, 1, 30, (1, 8), True), (4, 4, 24, 24, (1, 1), True), (2, 1, 12, 9, (5, 4), False),
]  # fmt: skip


@check
def check_flash_attention(flash_attention: Callable) -> None:
    """`flash_attention(q, k, v, scale=, causal=, tile=)` -> output [B, H, T, D] and log-sum-exp [B, H, T]."""
    for H, G, T, S, tile, causal in CASES:
        what = f"{H} heads, {G} KV heads, {T} queries, {S} keys, tile {tile}, causal={causal}"
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            q, k, v = _drawn(H, G, T, S, dtype)
            out, lse = flash_attention(q, k, v, causal=causal, tile=tile)
            scores = _scores(q, k, causal)
            exact = scores.softmax(-1) @ v.double().repeat_interleave(H // G, 1)
            require_close(out, exact, tolerance, f"{what}, {dtype}: output")
            require_close(lse, scores.logsumexp(-1), 10 * tolerance, f"{what}, {dtype}: log-sum-exp")
    q, k, v = _drawn(2, 1, 20, 20, torch.float64)
    out, _ = flash_attention(40 * q, 40 * k, v, tile=(8, 8))
    exact = _scores(40 * q, 40 * k, True).softmax(-1) @ v.repeat_interleave(2, 1)
    require_close(out, exact, 1e-9, "scores above 1000, whose exponential is infinite")
    out, _ = flash_attention(q, k, v, scale=0.1, tile=(8, 8))
    exact = _scores(q * 0.1 * 8**0.5, k, True).softmax(-1) @ v.repeat_interleave(2, 1)
    require_close(out, exact, 1e-12, "scale 0.1")
    _watched(flash_attention)
    require_error(ValueError, lambda: flash_attention(q, k, v, tile=(0, 4)), "a tile of no queries")
    require_error(
        ValueError, lambda: flash_attention(q, k[:, :, :9], v[:, :, :9]), "20 queries, 9 keys, causal"
    )


@check
def check_flash_scores(flash_scores: Callable) -> None:
    """`flash_scores(q, k, v, scale=, causal=, tile=)` -> output and column sums of the weights [B, H, S]."""
    for H, G, T, S, tile, causal in CASES:
        what = f"{H} heads, {G} KV heads, {T} queries, {S} keys, tile {tile}, causal={causal}"
        q, k, v = _drawn(H, G, T, S, torch.float64)
        out, sums = flash_scores(q, k, v, causal=causal, tile=tile)
        weights = _scores(q, k, causal).softmax(-1)
        require_close(out, weights @ v.repeat_interleave(H // G, 1), 1e-12, f"{what}: output")
        require_close(sums, weights.sum(2), 1e-11, f"{what}: column sums")
    _watched(flash_scores)


def _watched(function: Callable) -> None:
    """Call function(q, k, v) on 50 tokens in tiles of 16; AssertionError if a matrix of 50 x 50 weights, or
    half of one, is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.is_floating_point():
                sizes.append(made.numel())
            return made

    q, k, v = _drawn(4, 2, 50, 50, torch.float64)
    with Watch():
        function(q, k, v, tile=(16, 16))
    whole = 2 * 4 * 50 * 50
    require(max(sizes) < whole / 2,
            f"makes a tensor of {max(sizes)} numbers, the whole matrix of weights has {whole}")  # fmt: skip


def _drawn(H: int, G: int, T: int, S: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(H + T)
    shapes = ((2, H, T, 8), (2, G, S, 8), (2, G, S, 8))
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Scores [B, H, T, S] in float64; the last query sees every key."""
    T, S = q.shape[2], k.shape[2]
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
    return scores.masked_fill(hidden, -torch.inf) if causal else scores
