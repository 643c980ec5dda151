"""SnapKV and AdaKV's split over heads: identity, padding, chunks, bytes, what pooling and the question do."""

import pytest
import torch
from cache_runs import check_padding_and_chunks, close, run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import KVCache
from refimpl.kvcache.snapkv import AdaSnapKV, SnapKV, votes


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", max_position_embeddings=512)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [SnapKV, AdaSnapKV])
def test_enough_capacity_equals_full_and_a_small_one_does_not(family, make):
    long = {"max_position_embeddings": 64} | ({"n_positions": 64} if family == "gpt2" else {})
    model, ids, sizes = tiny(family, **long), random_ids(2, 40), [30, 1, 1, 5, 1, 1, 1]
    expected = run(model, KVCache(model), ids, sizes)
    close(run(model, KVCache(model, make(30, 4)), ids, sizes), expected)
    capacity = 3 if family == "mistral" else 7  # its own window hides all but 4 tokens
    cache = KVCache(model, make(capacity, 2, 3))
    out = run(model, cache, ids, sizes)
    close(out[:, :30], expected[:, :30])  # the prompt's own outputs come before the eviction
    difference = (out[:, 30:] - expected[:, 30:]).abs().max()
    assert difference > 0.03
    assert cache.held(1).sum() == 2 * cache._G * (capacity + 10)  # nothing is evicted while decoding


@pytest.mark.parametrize("make", [
    lambda: SnapKV(9, 4, 3), lambda: SnapKV(9, 4, 5, "max"), lambda: AdaSnapKV(9, 4, 3),
])  # fmt: skip
def test_padding_and_chunks(llama, make):
    check_padding_and_chunks(llama, make)


def test_window_stays_and_bytes_are_the_formula(llama):
    cache = KVCache(llama, SnapKV(12, 5, 3))
    run(llama, cache, random_ids(2, 100), [100])
    for layer in cache.layers:
        assert torch.equal(layer.pos[..., -5:], torch.arange(95, 100, dtype=torch.int32).expand(2, 2, 5))
    assert cache.nbytes()["payload"] == 3 * 2 * 2 * 2 * 12 * 8 * 4
    assert cache.ledger().total(view="resident") == cache.ledger().total(view="payload")


def test_ragged_heads_hold_the_sum_and_free_the_rest(llama):
    cache = KVCache(llama, AdaSnapKV(12, 4, 3))
    run(llama, cache, random_ids(2, 60), [60])
    counts = torch.stack([cache.held(l) for l in range(3)])
    assert (counts.sum(-1) == 24).all() and counts.unique().numel() > 1
    assert cache.nbytes()["payload"] == 3 * 2 * 24 * 2 * 8 * 4
    assert cache.ledger().total(view="resident") == cache.ledger().total(view="payload")


def test_a_floor_of_one_is_snapkv(llama):
    ids = random_ids(2, 50)
    a, b = KVCache(llama, SnapKV(12, 4, 3)), KVCache(llama, AdaSnapKV(12, 4, 3, floor=1.0))
    close(run(llama, a, ids, [45, 1, 4]), run(llama, b, ids, [45, 1, 4]), 0)


def test_pooling_keeps_neighbours(llama):
    """Mean length of runs of kept tokens before the window."""
    lengths = []
    for kernel in (1, 5):
        cache = KVCache(llama, SnapKV(40, 8, kernel))
        run(llama, cache, random_ids(2, 200), [200])
        runs = slots = 0
        for layer in cache.layers:
            past = layer.pos[..., :32]
            runs += (past.diff(dim=-1) > 1).sum().item() + past[..., 0].numel()
            slots += past.numel()
        lengths.append(slots / runs)
    assert lengths[1] > 1.5 * lengths[0]


def test_votes_of_a_query_that_looks_at_one_token():
    """Head by head: the token that the window attends to stays, and without it in the window it goes."""

    class View:
        S, T, full, shape, q = 10, 10, True, (1, 1, 10), torch.zeros(1, 1, 1, 10, 1)

        def __init__(self, target, at):
            self.weights = torch.zeros(1, 1, 1, 10, 10)
            self.weights[..., at, target] = 1.0

        def attn_lastw(self, w):
            return self.weights[:, :, :, -w:]

    assert votes(View(2, 9), 2, 1, "avg")[0, 0].argsort()[-3:].sort().values.tolist() == [2, 8, 9]
    assert votes(View(2, 5), 2, 1, "avg")[0, 0, 2] == 0


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"capacity": 0}, "capacity: 0; allowed: integers from 33"), ({"capacity": 32}, "capacity: 32"),
    ({"capacity": 40.0}, "capacity: 40.0"), ({"capacity": 40, "window": 0}, "window: 0"),
    ({"capacity": 40, "kernel": 4}, "kernel: 4; allowed: odd"),
    ({"capacity": 40, "kernel": -1}, "kernel: -1"),
    ({"capacity": 40, "pooling": "mean"}, "pooling: 'mean'; allowed: avg, max"),
])  # fmt: skip
def test_bad_settings(kwargs, message):
    for make in (SnapKV, AdaSnapKV):
        with pytest.raises(ValueError, match=message):
            make(**kwargs)
    for floor in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="floor"):
            AdaSnapKV(40, floor=floor)
