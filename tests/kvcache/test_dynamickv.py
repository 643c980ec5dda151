"""DynamicKV: budgets by layer, what equal votes give, and the memory of the prefill."""

import pytest
import torch
from cache_runs import check_padding_and_chunks, close, run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import KVCache
from refimpl.kvcache.dynamickv import DynamicKV, layer_budgets
from refimpl.kvcache.snapkv import SnapKV


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", max_position_embeddings=512)


def sizes_of(cache, b=0):
    return [int(cache.held(l)[b, 0]) for l in range(cache.n_layers)]


@pytest.mark.parametrize("family", FAMILIES)
def test_enough_capacity_equals_full_and_a_small_one_does_not(family):
    long = {"max_position_embeddings": 64} | ({"n_positions": 64} if family == "gpt2" else {})
    model, ids, sizes = tiny(family, **long), random_ids(2, 40), [30, 1, 1, 5, 1, 1, 1]
    expected = run(model, KVCache(model), ids, sizes)
    close(run(model, KVCache(model, DynamicKV(30, 4)), ids, sizes), expected)
    capacity = 3 if family == "mistral" else 8  # its own window hides all but 4 tokens
    cache = KVCache(model, DynamicKV(capacity, 2, 3, every=2))
    out = run(model, cache, ids, sizes)
    assert (out[:, 30:] - expected[:, 30:]).abs().max() > 0.03
    assert sum(sizes_of(cache)) == sum(sizes_of(cache, 1)) == 3 * (capacity + 10)


@pytest.mark.parametrize("every", [1, 2, 3, 8])
@pytest.mark.parametrize("most", [1.0, 2.0, 10.0])
def test_budgets_sum_exactly(every, most):
    model = tiny("llama", num_hidden_layers=5, max_position_embeddings=128)
    cache = KVCache(model, DynamicKV(13, 4, 3, every=every, most=most))
    run(model, cache, random_ids(1, 100), [100])
    sizes = sizes_of(cache)
    assert sum(sizes) == 5 * 13 and max(sizes) <= 4 + most * 9
    assert cache.nbytes()["payload"] == 5 * 13 * 2 * 2 * 8 * 4
    if most > 1:
        assert len(set(sizes)) > 1


def test_plan_after_every_layer_group_ends_where_one_plan_does():
    """What is cut early is cut to shares of the whole model's budget, and the best come first."""
    model, ids = tiny("llama", num_hidden_layers=6, max_position_embeddings=128), random_ids(1, 100)
    at_once, stepwise = (KVCache(model, DynamicKV(14, 4, 3, every=m)) for m in (6, 2))
    for cache in (at_once, stepwise):
        run(model, cache, ids, [100])
    for a, b in zip(at_once.layers, stepwise.layers, strict=True):
        assert torch.equal(a.pos, b.pos)


def test_equal_votes_give_snapkv(llama):
    class Even(DynamicKV):
        def observe(self, v):
            if v.prefill:
                vote = torch.rand(v.shape, generator=torch.Generator().manual_seed(0))
                vote[..., -self.window :] = torch.inf
                v.slot["vote"].copy_(vote)

    class EvenSnap(SnapKV):
        def score(self, v):
            vote = torch.rand(v.shape, generator=torch.Generator().manual_seed(0))
            vote[..., -self.window :] = torch.inf
            return vote

    ids = random_ids(1, 50)
    a, b = KVCache(llama, Even(11, 4)), KVCache(llama, EvenSnap(11, 4))
    close(run(llama, a, ids, [45, 1, 4]), run(llama, b, ids, [45, 1, 4]), 0)
    assert sizes_of(a) == [16] * 3


def test_a_louder_layer_gets_more():
    draw = torch.Generator().manual_seed(1)
    votes = [torch.rand(2, 2, 60, generator=draw) for _ in range(4)]
    budgets = [layer_budgets([votes[0] * f, *votes[1:]], 9)[0] for f in (0.1, 0.5, 1.0, 2.0, 10.0)]
    got = torch.stack(budgets)
    assert (got.diff(dim=0) >= 0).all() and (got[-1] > got[0]).all()
    assert layer_budgets(votes, 9).sum(0).tolist() == [36, 36]


def test_the_prefill_holds_less_than_the_prompt(llama):
    """While the last layer runs, the others hold their provisional slots only."""
    n, held = 200, []

    class Watched(DynamicKV):
        def keep(self, v):
            if v.prefill and v.layer == v.n_layers - 1:
                held.append([layer.nbytes() for layer in codecs])
            return super().keep(v)

    cache = KVCache(llama, Watched(12, 4, 3, most=3.0, every=2))
    codecs = [layer.codec for layer in cache.layers]
    run(llama, cache, random_ids(1, n), [n])
    slot = 2 * 2 * 8 * 4
    first, second, last = (tiers["payload"] // slot for tiers in held[0])
    assert first + second <= 3 * 8 + 2 + 2 * 4 and last == n
    kept = [layer.codec.k.untyped_storage().nbytes() for layer in cache.layers]
    assert sum(kept) == 36 * slot // 2


def test_padding_and_chunks(llama):
    check_padding_and_chunks(llama, lambda: DynamicKV(9, 4, 3, every=2))
    check_padding_and_chunks(llama, lambda: DynamicKV(9, 4, 3, most=1.5, every=1), lengths=(40, 33, 10, 3))


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"most": 0.5}, "most: 0.5"), ({"most": float("nan")}, "most"), ({"every": 0}, "every: 0"),
    ({"capacity": 8}, "capacity: 8"), ({"pooling": None}, "pooling"),
])  # fmt: skip
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DynamicKV(**({"capacity": 40} | kwargs))
    with pytest.raises(ValueError, match="no layers"):
        layer_budgets([], 4)
    with pytest.raises(ValueError, match="base: 0"):
        layer_budgets([torch.ones(1, 1, 4)], 0)
