"""KIVI: the quantiser against a plain loop and optimum-quanto, the codec in the cache."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cache_runs import draw, run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import Full, KVCache, KVPolicy, StreamingLLM, Window
from refimpl.kvcache.kivi import KIVI, dequantise, quantise

LONG = {"max_position_embeddings": 256}
GOLDEN = Path(__file__).parent / "golden" / "quanto.npz"


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", **LONG)


class LastOfPrompt(KVPolicy):
    """After the prompt its last `n` tokens stay, and everything that follows."""

    def __init__(self, n):
        self.n = n

    def keep(self, v):
        return v.rank >= v.count - self.n if v.prefill else None


class Uneven(KVPolicy):
    """Head g keeps the last 10 + g tokens of the prompt."""

    def keep(self, v):
        least = v.count - 10 - torch.arange(v.shape[1])[:, None]
        return (v.rank >= least).expand(v.shape) if v.prefill else None


# --- the quantiser --------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("axis", [-2, -1])
def test_codes_equal_a_loop_over_groups(bits, axis):
    x = draw(3, 16, 24)
    q = quantise(x, bits, 8, axis)
    rows = x if axis == -1 else x.transpose(-1, -2)
    expected = torch.empty_like(rows)
    for i in range(3):
        for r, row in enumerate(rows[i]):
            for start in range(0, len(row), 8):
                part = row[start : start + 8]
                scale = (part.max() - part.min()) / (2**bits - 1)
                expected[i, r, start : start + 8] = ((part - part.min()) / scale).round() * scale + part.min()
    restored = dequantise(q) if axis == -1 else dequantise(q).transpose(-1, -2)
    assert (restored - expected).abs().max() < 1e-5
    assert q.codes.dtype == torch.uint8 and q.codes.numel() == x.numel() * bits // 8
    assert q.scale.numel() == q.zero.numel() == x.numel() // 8
    step = q.scale.repeat_interleave(8, axis)
    assert bool(((dequantise(q) - x).abs() <= step / 2 + 1e-6).all())


@pytest.mark.parametrize("axis", [-2, -1])
def test_bits_lie_in_the_byte_from_the_highest(axis):
    x = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    q = quantise(x if axis == -1 else x.T, 2, 4, axis)
    assert q.codes.flatten().tolist() == [0b00_11_01_10]


def test_equal_numbers_and_numbers_that_are_not_finite():
    x = torch.full((4, 4), 0.3)
    assert torch.equal(dequantise(quantise(x, 2, 4, -1)), x)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    restored = dequantise(quantise(x, 2, 4, -1))
    assert not restored[:2].isfinite().any() and torch.equal(restored[2:], x[2:])


def test_half_precision_counts_steps_of_the_stored_scale():
    x = draw(64, 32).bfloat16()
    q = quantise(x, 4, 32, -2)
    assert q.scale.dtype == q.zero.dtype == dequantise(q).dtype == torch.bfloat16
    step = q.scale.float().repeat_interleave(32, -2)
    assert bool(((dequantise(q).float() - x.float()).abs() <= 0.6 * step + 0.02).all())


def test_equals_optimum_quanto():
    with np.load(GOLDEN) as stored:
        assert "optimum-quanto 0.2.7" in str(stored["about"])
        x = torch.tensor(stored["x"])
        names = [name for name in stored.files if name not in ("about", "x")]
        assert len(names) == 8
        for name in names:
            kind, bits, group = name.split("_")
            ours = dequantise(quantise(x, int(bits), int(group), -2 if kind == "channel" else -1))
            assert (ours - torch.tensor(stored[name])).abs().max() < 1e-5, name


def test_a_large_channel_of_the_keys_wants_groups_along_tokens():
    x = draw(128, 32)
    x[:, 3] = 5 * x[:, 3] + 20
    error = {axis: (dequantise(quantise(x, 2, 32, axis)) - x).square().mean() for axis in (-2, -1)}
    assert error[-2] < 0.7 * error[-1]


# --- the codec ------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_16_bits_are_the_full_cache_and_8_are_close(family):
    model = tiny(family, **(LONG | ({"n_positions": 256} if family == "gpt2" else {})))
    ids, sizes = random_ids(2, 40), [26] + [1] * 9 + [5]
    full = run(model, KVCache(model), ids, sizes)
    assert torch.equal(run(model, KVCache(model, codec=KIVI(16)), ids, sizes), full)
    gaps = [
        (run(model, KVCache(model, codec=KIVI(b, group=8, residual=8)), ids, sizes) - full).abs()
        for b in (8, 2)
    ]
    assert gaps[0][:, :26].max() < 1e-5  # the prompt itself sees what is not quantised
    assert gaps[0].max() < 0.05 < gaps[1][:, 26:].max()


def test_bytes_what_waits_and_what_never_changes(llama):
    codec, B, G, D = KIVI(2, group=8, residual=16, value_group=4), 2, 2, 8
    cache, ids = KVCache(llama, codec=codec), random_ids(2, 100)
    run(llama, cache, ids[:, :37], [37])
    before = None
    for n in range(37, 90):
        if n > 37:
            run(llama, cache, ids[:, n - 1 : n], [1])
        keys, values = n - n % 16, n - 16
        payload = B * G * D * ((keys + values) * 2 / 8 + (2 * n - keys - values) * 4)
        meta = B * G * D * 2 * 4 * (keys / 8 + values / 4)
        assert cache.nbytes() == {"payload": 3 * payload, "meta": 3 * (meta + 4 * n), "state": 0}
        assert cache.ledger().total(view="resident") == 3 * (payload + meta + 4 * n)
        stored = cache.layers[1].codec
        if before is not None:
            assert torch.equal(stored.keys.codes[:, :, : before[0].shape[2]], before[0])
            assert torch.equal(stored.values.codes[:, :, : before[1].shape[2]], before[1])
            assert torch.equal(stored.values.scale[:, :, : before[2].shape[2]], before[2])
        before = stored.keys.codes.clone(), stored.values.codes.clone(), stored.values.scale.clone()


def test_what_is_read_is_what_was_quantised(llama):
    ids = random_ids(2, 40)
    full, cache = KVCache(llama), KVCache(llama, codec=KIVI(2, group=8, residual=8))
    for c in (full, cache):
        run(llama, c, ids, [40])
    k, v = full.layers[0].codec.read()
    read_k, read_v = cache.layers[0].codec.read()
    assert torch.allclose(read_k, dequantise(quantise(k, 2, 8, -2)))
    assert torch.equal(read_v[:, :, 32:], v[:, :, 32:])  # the window of 8
    assert torch.allclose(read_v[:, :, :32], dequantise(quantise(v[:, :, :32], 2, 8, -1)))
    index = torch.tensor([3, 39]).expand(2, 2, 2)
    assert torch.equal(cache.layers[0].codec.read(index)[0], read_k[:, :, [3, 39]])


def test_pieces_of_a_prompt_and_a_question(llama):
    ids = random_ids(2, 60)
    make = lambda: KVCache(llama, codec=KIVI(2, group=8, residual=8))  # noqa: E731
    whole, chunked, by_token = make(), make(), make()
    expected = run(llama, whole, ids, [43, 5])
    with chunked.prefill():
        first = run(llama, chunked, ids[:, :43], [20, 23])
    assert torch.allclose(torch.cat((first, run(llama, chunked, ids[:, 43:48], [5])), 1), expected, atol=1e-5)
    run(llama, by_token, ids, [43] + [1] * 5)
    assert torch.equal(by_token.layers[0].codec.keys.codes, whole.layers[0].codec.keys.codes)


def test_a_policy_selects_before_the_codec_quantises(llama):
    ids = random_ids(2, 40)
    dense = KVCache(llama, LastOfPrompt(19))
    cache = KVCache(llama, LastOfPrompt(19), KIVI(8, group=8, residual=8))
    assert (
        run(llama, cache, ids, [30] + [1] * 10) - run(llama, dense, ids, [30] + [1] * 10)
    ).abs().max() < 0.05
    assert cache.held(0).unique().tolist() == [29]
    assert cache.layers[0].codec.keys.codes.shape[2] == 24
    assert cache.ledger().total(view="payload") == cache.ledger().total(view="resident")


def test_compact_positions_quantise_keys_without_rotation(llama):
    class Compact(Full):
        positions = "compact"

    ids, sizes = random_ids(1, 40), [26] + [1] * 14
    cache = KVCache(llama, Compact(), KIVI(8, group=8, residual=8))
    assert (run(llama, cache, ids, sizes) - run(llama, KVCache(llama), ids, sizes)).abs().max() < 0.05
    dense = KVCache(llama, Compact())
    run(llama, dense, ids, sizes)
    k = dense.layers[0].codec.k[:, :, :24]
    assert torch.allclose(
        cache.layers[0].codec.read()[0][:, :, :24], dequantise(quantise(k, 8, 8, -2)), atol=1e-5
    )


def test_a_padded_row_equals_the_row_alone_where_groups_coincide(llama):
    row, other = random_ids(1, 34, seed=1), random_ids(1, 50, seed=2)
    ids, mask = torch.ones(2, 50, dtype=torch.long), torch.ones(2, 50, dtype=torch.long)
    ids[0, 16:], ids[1], mask[0, :16] = row[0], other[0], 0
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    make = lambda: KIVI(2, group=8, residual=16)  # noqa: E731
    out = run(llama, KVCache(llama, codec=make()), ids, [40] + [1] * 10, mask, at)
    alone = run(llama, KVCache(llama, codec=make()), row, [24] + [1] * 10)
    assert (out[0, 16:] - alone[0]).abs().max() < 1e-4


def test_padding_widens_no_group():
    codec, k = KIVI(2, group=8, residual=8), draw(1, 2, 16, 8)
    ok = torch.ones(1, 2, 16, dtype=torch.bool)
    ok[..., :5] = False
    k[:, :, :5] = 1000
    codec.append(k, k)
    codec.commit(ok)
    read = codec.read()[0]
    assert (read[:, :, 5:] - k[:, :, 5:]).abs().max() < 1.5


def test_beam_search(llama):
    ids = random_ids(2, 20)
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=3, do_sample=False)
    expected = llama.generate(ids, past_key_values=KVCache(llama), **kwargs)
    codec = KIVI(8, group=8, residual=8)
    assert torch.equal(llama.generate(ids, past_key_values=KVCache(llama, codec=codec), **kwargs), expected)


# --- what is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", [Window(20), StreamingLLM(16, 4)])
def test_eviction_at_every_step_is_refused(llama, policy):
    cache = KVCache(llama, policy, KIVI(2, group=8, residual=8))
    run(llama, cache, random_ids(1, 30), [30])
    with pytest.raises(
        ValueError, match="compressed entries cannot be evicted; allowed: policies that decide"
    ):
        run(llama, cache, random_ids(1, 1), [1])


def test_ragged_heads_and_merging_afterwards_are_refused(llama):
    with pytest.raises(ValueError, match="different numbers of slots; allowed for KIVI: equally many"):
        run(llama, KVCache(llama, Uneven(), KIVI(2, group=8, residual=8)), random_ids(1, 30), [30])
    codec = KIVI(2, group=8, residual=8)
    codec.append(draw(1, 2, 16, 8), draw(1, 2, 16, 8))
    codec.rewrite(draw(1, 2, 16, 8), draw(1, 2, 16, 8))
    codec.commit(None)
    with pytest.raises(ValueError, match="cannot be merged"):
        codec.rewrite(*codec.read())


@pytest.mark.parametrize(("make", "message"), [
    (lambda: KIVI(3), "bits: 3; allowed: 1, 2, 4, 8, 16"),
    (lambda: KIVI(2, group=6), "group: 6; allowed: multiples of 4"),
    (lambda: KIVI(2, group=0), "group: 0; allowed"),
    (lambda: KIVI(2, group=32, residual=48), "residual: 48; allowed: multiples of 32"),
    (lambda: KIVI(2, value_group=2.0), "value_group: 2.0; allowed"),
    (lambda: quantise(torch.zeros(4, 4), 2, 4, 0), "axis: 0; allowed"),
    (lambda: quantise(torch.zeros(6, 4), 2, 4, -2), r"x: shape \[6, 4\]; allowed"),
    (lambda: quantise(torch.zeros(0, 4), 2, 4, -1), r"x: shape \[0, 4\]; allowed"),
    (lambda: quantise(torch.zeros(4, 4), 16, 4, -1), "bits: 16; allowed: 1, 2, 4, 8"),
])  # fmt: skip
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types_and_head_dims(llama):
    with pytest.raises(TypeError, match="floating-point"):
        quantise(torch.zeros(4, 4, dtype=torch.long), 2, 4, -1)
    cache = KVCache(llama, codec=KIVI(2))
    with pytest.raises(ValueError, match="value_group: 32; allowed: divisors of 8, the head dim"):
        run(llama, cache, random_ids(1, 4), [4])
    assert cache.layers[0].codec.k is None
