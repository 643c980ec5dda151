"""Tiled attention against torch's own and against whole matrices; what it moves and holds."""

import pytest
import torch
import torch.nn.functional as F

from refimpl.checks.tiny import random_ids, tiny
from refimpl.footprint.tracker import LiveTracker
from refimpl.kvcache import KVCache
from refimpl.kvcache.flash import Traffic, flash_attention, flash_scores, naive_attention
from refimpl.kvcache.h2o import H2O


def drawn(B, H, G, T, S, D, dtype=torch.float32, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    make = lambda heads, n: (scale * torch.randn(B, heads, n, D, generator=draw, dtype=torch.float64)).to(
        dtype
    )  # noqa: E731
    return make(H, T), make(G, S), make(G, S)


def sdpa(q, k, v, causal=True, scale=None):
    T, S = q.shape[2], k.shape[2]
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if causal else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True, scale=scale)


def column_sums(q, k, causal=True):
    T, S = q.shape[2], k.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(S - T), -torch.inf)
    return scores.softmax(-1).sum(2), scores.logsumexp(-1)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "shape", "tile"), [
    ((4, 2), (50, 50), (16, 16)), ((4, 4), (33, 33), (7, 5)), ((6, 1), (20, 45), (8, 16)),
    ((2, 2), (1, 70), (4, 64)), ((2, 1), (64, 64), (64, 64)), ((2, 1), (40, 40), (1, 1)),
    ((2, 2), (31, 31), (100, 3)), ((2, 2), (1, 1), (9, 9)),
])  # fmt: skip
def test_equal_to_torch(heads, shape, tile, causal, dtype, atol):
    q, k, v = drawn(2, *heads, *shape, 8, dtype)
    out, lse = flash_attention(q, k, v, causal=causal, tile=tile)
    sums, normaliser = column_sums(q, k, causal)
    assert out.dtype == dtype and (out - sdpa(q, k, v, causal)).abs().max() < atol
    assert (lse - normaliser).abs().max() < 10 * atol
    again, got = flash_scores(q, k, v, causal=causal, tile=tile)
    assert torch.equal(out, again) and (got - sums).abs().max() < 10 * atol
    whole, naive = naive_attention(q, k, v, causal=causal)
    assert (whole - out).abs().max() < atol and (naive - sums).abs().max() < 10 * atol


def test_more_queries_than_keys_without_causality():
    q, k, v = drawn(1, 2, 1, 30, 12, 4, torch.float64)
    assert (flash_attention(q, k, v, causal=False, tile=(8, 5))[0] - sdpa(q, k, v, False)).abs().max() < 1e-12
    assert flash_scores(q, k, v, causal=False)[1].sum(-1).tolist() == [pytest.approx([30.0, 30.0])]


def test_large_scores_do_not_overflow():
    """exp(800) is infinite even in float64: only the running maximum keeps the sums finite."""
    q, k, v = drawn(1, 2, 2, 40, 40, 8, torch.float64, scale=30.0)
    assert (q @ k.transpose(-1, -2) / 8**0.5).max() > 800
    out, sums = flash_scores(q, k, v, tile=(8, 8))
    assert (out - sdpa(q, k, v)).abs().max() < 1e-9
    assert (sums - column_sums(q, k)[0]).abs().max() < 1e-9


def test_half_precision_accumulates_in_float32():
    q, k, v = drawn(1, 4, 2, 90, 90, 16)
    exact = sdpa(q, k, v)
    out, sums = flash_scores(*(t.to(torch.bfloat16) for t in (q, k, v)), tile=(16, 16))
    assert out.dtype == torch.bfloat16 and sums.dtype == torch.float32
    assert (out.float() - exact).abs().max() < 0.05
    assert sums.sum(-1).tolist() == [pytest.approx([90.0] * 4, abs=1e-2)]


def test_scale():
    q, k, v = drawn(1, 2, 1, 20, 20, 4)
    assert (flash_attention(q, k, v, scale=0.1)[0] - sdpa(q, k, v, scale=0.1)).abs().max() < 1e-6
    assert (flash_attention(q, k, v, scale=0.1)[0] - flash_attention(q, k, v)[0]).abs().max() > 1e-2


def test_sums_are_what_h2o_accumulates():
    """On a model's own queries and keys: the policy's state after a prompt is the sum over the group."""
    model, seen = tiny("llama", max_position_embeddings=128), []

    class Recorded(H2O):
        def observe(self, v):
            super().observe(v)
            q = v.q.flatten(1, 2)
            seen.append((v.slot["acc"].clone(), flash_scores(q, v.k, v.v, tile=(16, 16))[1], v.attn_sum()))

    with torch.no_grad():
        model(random_ids(2, 60), past_key_values=KVCache(model, Recorded(60, 60)))
    for acc, sums, of_view in seen:
        sums = sums.unflatten(1, (2, 2))
        assert (sums - of_view).abs().max() < 1e-4 and (sums.sum(2) - acc).abs().max() < 1e-4


def test_floats_moved_as_counted_by_hand():
    B, H, G, T, D, a, b = 2, 4, 2, 100, 8, 16, 20
    q, k, v = drawn(B, H, G, T, T, D)
    tiled, scored, naive = Traffic(), Traffic(), Traffic()
    flash_attention(q, k, v, tile=(a, b), traffic=tiled)
    flash_scores(q, k, v, tile=(a, b), traffic=scored)
    naive_attention(q, k, v, traffic=naive)
    visible = sum(min(start + a, T) for start in range(0, T, a))  # of the last tile only what can be seen
    assert tiled.read == B * H * T * D + 2 * B * G * visible * D
    assert tiled.written == B * H * T * (D + 1) and tiled.tile == B * H * a * b
    queries = sum(T - (start // a) * a for start in range(0, T, b))
    assert scored.read == tiled.read + B * G * T * D + B * H * queries * (D + 1)
    assert scored.written == tiled.written + B * H * T and scored.tile == tiled.tile
    matrix = B * H * T * T
    assert naive.read == B * T * D * (H + 2 * G) + 3 * matrix and naive.tile == matrix
    assert naive.written == B * H * T * (D + 1) + 2 * matrix


def test_traffic_falls_with_the_tile_and_is_below_the_naive():
    q, k, v = drawn(1, 2, 2, 512, 512, 32)
    moved = []
    for n in (16, 64, 256):
        traffic = Traffic()
        flash_attention(q, k, v, tile=(n, n), traffic=traffic)
        moved.append(traffic.moved)
    naive = Traffic()
    naive_attention(q, k, v, traffic=naive)
    assert moved == sorted(moved, reverse=True) and moved[-1] < moved[-2] < naive.moved / 2


def test_peak_memory_is_measured_and_grows_linearly():
    """Live bytes above the inputs, seen by a dispatch mode that follows every storage."""

    def peak(function, T, **kwargs):
        q, k, v = drawn(1, 2, 1, T, T, 16)
        with LiveTracker() as tracker:
            function(q, k, v, **kwargs)
        return tracker.peak

    for function in (flash_attention, flash_scores):
        small, large = (peak(function, T, tile=(32, 32)) for T in (128, 512))
        assert large < 4.4 * small and large < peak(naive_attention, 512) / 10
    assert peak(naive_attention, 512) > 12 * peak(naive_attention, 128)
    assert peak(naive_attention, 512) >= 2 * 512 * 512 * 4 * 2  # scores and weights of two heads


GOOD = {"q": (1, 4, 6, 8), "k": (1, 2, 6, 8), "v": (1, 2, 6, 8)}


@pytest.mark.parametrize(("shapes", "named"), [
    ({"q": (4, 6, 8)}, "q"), ({"k": (1, 2, 0, 8)}, "k"), ({"q": (1, 3, 6, 8)}, "k"),
    ({"v": (1, 2, 5, 8)}, "k, v"), ({"k": (2, 2, 6, 8), "v": (2, 2, 6, 8)}, "k, v"),
    ({"k": (1, 2, 6, 4), "v": (1, 2, 6, 4)}, "k, v"),
    ({"q": (1, 4, 7, 8)}, "q"),
])  # fmt: skip
def test_shapes_that_do_not_fit(shapes, named):
    q, k, v = (torch.zeros((GOOD | shapes)[name]) for name in "qkv")
    for function in (flash_attention, flash_scores, naive_attention):
        with pytest.raises(ValueError, match=f"^{named}: .*allowed"):
            function(q, k, v)


@pytest.mark.parametrize(("change", "named"), [
    (lambda q, k, v: (q, k.double(), v), "k"), (lambda q, k, v: (q.long(), k, v), "q"),
    (lambda q, k, v: (q, k, v / 0), "v"), (lambda q, k, v: (q, k, None), "v"),
    (lambda q, k, v: (q * torch.inf, k, v), "q"),
])  # fmt: skip
def test_values_that_do_not_fit(change, named):
    tensors = change(*(torch.ones(shape) for shape in GOOD.values()))
    for function in (flash_attention, flash_scores, naive_attention):
        with pytest.raises(ValueError, match=f"^{named}: .*allowed"):
            function(*tensors)


@pytest.mark.parametrize("kwargs", [
    {"tile": (0, 4)}, {"tile": (4, 2.0)}, {"tile": 16}, {"tile": (4,)}, {"scale": 0}, {"scale": float("nan")},
])  # fmt: skip
def test_bad_parameters(kwargs):
    q, k, v = (torch.ones(shape) for shape in GOOD.values())
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}: .*allowed"):
        flash_attention(q, k, v, **kwargs)
