"""PyramidKV: sizes of layers, identity, and a question after layers of different length."""

import pytest
from cache_runs import check_padding_and_chunks, close, run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import KVCache
from refimpl.kvcache.pyramidkv import PyramidKV
from refimpl.kvcache.snapkv import SnapKV


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", max_position_embeddings=512)


@pytest.mark.parametrize("family", FAMILIES)
def test_enough_capacity_equals_full_and_a_small_one_does_not(family):
    long = {"max_position_embeddings": 64} | ({"n_positions": 64} if family == "gpt2" else {})
    model, ids, sizes = tiny(family, **long), random_ids(2, 40), [30, 1, 1, 5, 1, 1, 1]
    expected = run(model, KVCache(model), ids, sizes)
    close(run(model, KVCache(model, PyramidKV(30, 4)), ids, sizes), expected)
    cache = KVCache(model, PyramidKV(8, 3, 3))
    out = run(model, cache, ids, sizes)
    assert (out[:, 30:] - expected[:, 30:]).abs().max() > (1e-4 if family == "mistral" else 0.03)
    assert [int(cache.held(l)[0, 0]) - 10 for l in range(3)] == [13, 8, 3]


def test_beta_one_is_snapkv(llama):
    ids = random_ids(2, 50)
    a, b = KVCache(llama, SnapKV(12, 4, 3)), KVCache(llama, PyramidKV(12, 4, 3, beta=1))
    close(run(llama, a, ids, [45, 1, 4]), run(llama, b, ids, [45, 1, 4]), 0)


@pytest.mark.parametrize("capacity", [10, 20, 33, 48])
def test_sizes_sum_to_the_average_also_where_the_first_layer_is_cut(llama, capacity):
    cache = KVCache(llama, PyramidKV(capacity, 4, 3))
    run(llama, cache, random_ids(1, 50), [50])
    sizes = [int(cache.held(l)[0, 0]) for l in range(3)]
    assert abs(sum(sizes) - 3 * capacity) <= 1 and sizes == sorted(sizes, reverse=True)
    assert cache.nbytes()["payload"] == sum(sizes) * 2 * 2 * 8 * 4


def test_padding_and_chunks(llama):
    check_padding_and_chunks(llama, lambda: PyramidKV(9, 4, 3))
    check_padding_and_chunks(llama, lambda: PyramidKV(22, 4, 3), lengths=(40, 25, 23, 6))


def test_a_question_after_layers_of_different_length(llama):
    ids = random_ids(2, 45)
    a, b = KVCache(llama, PyramidKV(12, 4, 3)), KVCache(llama, PyramidKV(12, 4, 3))
    close(run(llama, a, ids, [40, 5]), run(llama, b, ids, [40, 1, 1, 1, 1, 1]))


@pytest.mark.parametrize("beta", [0.5, 0, float("nan")])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="beta"):
        PyramidKV(40, beta=beta)
