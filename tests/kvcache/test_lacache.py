"""LaCache: ladders, equal slot counts, reach, and independence of how the stream is cut."""

from collections import Counter

import pytest
import torch
from cache_runs import check_padding_and_chunks, close, run

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache import KVCache, StreamingLLM
from refimpl.kvcache.lacache import LaCache

L = 6


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", num_hidden_layers=L, max_position_embeddings=512)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_enough_budget_equals_full_and_a_small_one_does_not(family):
    model, ids, sizes = tiny(family, max_position_embeddings=64), random_ids(2, 40), [30, 1, 1, 5, 1, 1, 1]
    expected = run(model, KVCache(model), ids, sizes)
    close(run(model, KVCache(model, LaCache(40, 3, 2)), ids, sizes), expected)
    cache = KVCache(model, LaCache(12, 3, 1))
    assert (run(model, cache, ids, sizes)[:, 30:] - expected[:, 30:]).abs().max() > 1e-4
    assert cache.held(0).max() <= 13


def test_gpt2_is_refused():
    with pytest.raises(ValueError, match="learned positions"):
        KVCache(tiny("gpt2"), LaCache(12, 3, 1))


@pytest.mark.parametrize("ladder", ["interleaved", "contiguous"])
@pytest.mark.parametrize(("span", "overlap"), [(3, 0), (2, 0), (3, 1)])
def test_first_compaction_covers_every_token(llama, ladder, span, overlap):
    policy = LaCache(40, L, span, overlap, ladder)
    cache = KVCache(llama, policy)
    n = 54  # the first round is not over
    run(llama, cache, random_ids(1, n), [policy.limit + 1] + [1] * (n - 1 - policy.limit))
    held = [set(layer.pos.tolist()) for layer in cache.layers]
    assert len({len(h) for h in held}) == 1
    thinned = n - len(held[0])
    blocks = thinned // policy.dropped
    end = 4 + blocks * policy.block
    assert set.union(*held) == set(range(n))
    holders = Counter(t for h in held for t in h if 4 <= t < end)
    assert sum(holders.values()) == blocks * policy.kept * L  # L a / b layers for a token on average
    if overlap == 0:
        assert set(holders.values()) == {L // policy.block}
        if ladder == "contiguous":
            for t in range(4, end):
                layers = [l for l in range(L) if t in held[l]]
                assert layers == list(range(layers[0], layers[0] + len(layers)))


def test_slots_and_bytes_stay_constant_and_reach_further_than_streaming(llama):
    policy = LaCache(24, L, 3)
    ladder, stream = KVCache(llama, policy), KVCache(llama, StreamingLLM(20, 4))
    ids, sizes = random_ids(1, 120), set()
    for cache in (ladder, stream):
        run(llama, cache, ids[:, :40], [40])
    for step in range(40, 120):
        for cache in (ladder, stream):
            run(llama, cache, ids[:, step : step + 1], [1])
        assert len({layer.shape[2] for layer in ladder.layers}) == 1
        sizes.add(ladder.ledger().total(view="resident"))
    assert sizes == {stream.ledger().total(view="resident")}
    age = [max(119 - int(layer.pos[4]) for layer in cache.layers) for cache in (ladder, stream)]
    assert age[0] > 1.5 * age[1]


def test_one_forward_equals_token_by_token(llama):
    ids = random_ids(1, 90)
    a, b = (KVCache(llama, LaCache(20, L, 2)) for _ in range(2))
    run(llama, a, ids, [90])
    run(llama, b, ids, [1] * 90)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert torch.equal(x.pos, y.pos)


def test_layers_without_a_ladder_hold_the_same(llama):
    class Strided(LaCache):
        def offset(self, layer):
            return 0

    ids = random_ids(1, 90)
    spans = []
    for kind in (Strided, LaCache):
        cache = KVCache(llama, kind(24, L, 2))
        run(llama, cache, ids, [90])
        spans.append(len(set.union(*(set(layer.pos.tolist()) for layer in cache.layers))))
    assert spans[0] == cache.layers[0].shape[2] < spans[1]


def test_outputs_do_not_depend_on_absolute_positions():
    model = tiny("llama", num_hidden_layers=2, max_position_embeddings=64)
    policy = LaCache(9, 2, 1)
    cache, ids = KVCache(model, policy), random_ids(1, 31)
    run(model, cache, ids[:, :30], [30])
    out = run(model, cache, ids[:, 30:], [1])
    first = cache.layers[0].pos.tolist()
    assert first[:4] == [0, 1, 2, 3] and first[-1] == 30 and len(first) <= policy.limit
    shifted = KVCache(model, policy)
    at = torch.arange(31)[None] + 500
    run(model, shifted, ids[:, :30], [30], positions=at)
    close(run(model, shifted, ids[:, 30:], [1], positions=at[:, 30:]), out, 2e-4)


def test_padding_and_chunks(llama):
    for ladder in ("interleaved", "contiguous"):
        check_padding_and_chunks(llama, lambda ladder=ladder: LaCache(14, L, 2, 0, ladder))


def test_a_question_equals_its_tokens_one_by_one_while_nothing_is_thinned(llama):
    ids = random_ids(2, 45)
    a, b = (KVCache(llama, LaCache(30, L, 1)) for _ in range(2))
    x, y = run(llama, a, ids, [38, 3]), run(llama, b, ids, [38, 1, 1, 1])
    assert a.held(0).max() <= a.policy.limit
    close(x, y)


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"budget": 10}, "budget: 10; allowed: integers from 11"), ({"budget": 0}, "budget: 0"),
    ({"span": 0}, "span: 0"), ({"span": 7}, "overlap < span <= 6"), ({"overlap": 3}, "overlap < span"),
    ({"span": 4, "overlap": 2}, "keep whole blocks of 2"), ({"span": 6}, "whole blocks"),
    ({"sink": 0}, "sink: 0"), ({"ladder": "stairs"}, "ladder: 'stairs'"), ({"n_layers": 1}, "n_layers: 1"),
])  # fmt: skip
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LaCache(**({"budget": 24, "n_layers": L, "span": 3} | kwargs))


def test_another_depth_is_refused_before_the_first_token():
    with pytest.raises(ValueError, match="LaCache made for 6 layers; allowed: 3"):
        KVCache(tiny("llama"), LaCache(24, L, 3))
