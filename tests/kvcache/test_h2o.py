"""H2O against a full-storage reference with dead slots, and against brute-force sums."""

import pytest
import torch
from cache_runs import LONG, close, run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import Dense, Full, KVCache, Window
from refimpl.kvcache import attention as attention_module
from refimpl.kvcache.h2o import H2O


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", **LONG)


@pytest.mark.parametrize("family", FAMILIES)
def test_enough_budget_equals_full_and_a_small_one_does_not(family):
    long = LONG | ({"n_positions": 512} if family == "gpt2" else {})
    model, ids, sizes = tiny(family, **long), random_ids(2, 40), [20, 5] + [1] * 15
    expected = run(model, KVCache(model), ids, sizes)
    close(run(model, KVCache(model, H2O(30, 10)), ids, sizes), expected)
    cache = KVCache(model, H2O(2, 2))
    out = run(model, cache, ids, sizes)
    close(out[:, :20], expected[:, :20])
    assert (out[:, 21:] - expected[:, 21:]).abs().max() > 0.03
    assert cache.held(2).unique().tolist() == [4]


@pytest.mark.parametrize(("heavy", "recent", "sink"), [(5, 4, 0), (6, 0, 2), (0, 7, 0), (4, 3, 2)])
def test_eviction_equals_full_storage_with_dead_slots(llama, heavy, recent, sink):
    """Everything stays stored; a slot that H2O would have dropped is masked, head by head, for ever."""
    n, new = 24, 20
    ids = random_ids(2, n + new)
    cache = KVCache(llama, H2O(heavy, recent, sink=sink))
    out = run(llama, cache, ids, [n] + [1] * new)

    class Dead(Full):
        """The sums and the choice written out, one head and one slot after the other."""

        def __init__(self):
            self.alive, self.acc = {}, {}

        needs = frozenset({"attn"})
        hidden = None

        def hide(self, v):
            hidden = torch.zeros(2, 2, v.T, v.S, dtype=torch.bool)
            for (l, b, g), alive in self.alive.items():
                if l == v.layer:
                    dead = set(range(v.S - v.T)) - alive
                    hidden[b, g, :, list(dead)] = True
            return hidden

        def observe(self, v):
            mass = v.attn.sum((2, 3))
            for b in range(2):
                for g in range(2):
                    key = v.layer, b, g
                    alive = self.alive.setdefault(key, set())
                    alive |= set(range(v.S - v.T, v.S))
                    for i in alive:
                        self.acc[*key, i] = self.acc.get((*key, i), 0.0) + float(mass[b, g, i])
                    while len(alive) > heavy + recent + sink:
                        order = sorted(alive)
                        free = set(order[: len(order) - recent]) - set(range(sink))
                        alive.remove(min(free, key=lambda i: self.acc[*key, i]))

    dead = Dead()
    close(run(llama, KVCache(llama, dead), ids, [n] + [1] * new), out)
    for layer in cache.layers:
        for b in range(2):
            for g in range(2):
                key = layer.index, b, g
                assert layer.pos.expand(2, 2, -1)[b, g].tolist() == sorted(dead.alive[key])
                expected = torch.tensor([dead.acc[*key, i] for i in sorted(dead.alive[key])])
                close(layer.states["acc"][b, g], expected, 1e-4)


def test_sums_are_column_sums_of_the_whole_matrix(llama):
    ids = random_ids(2, 40)
    cache = KVCache(llama, H2O(30, 10))
    run(llama, cache, ids, [22, 3] + [1] * 15)
    from refimpl.kvcache import release

    release(llama)
    with torch.no_grad():
        attentions = llama(ids, output_attentions=True).attentions
    for layer, weights in zip(cache.layers, attentions, strict=True):
        close(layer.states["acc"], weights.unflatten(1, (2, 2)).sum((2, 3)), 1e-4)


def test_old_tokens_have_the_larger_sums(llama):
    """Under even attention token i of n has received H_n - H_i: sums favour what has been there longest."""
    model = tiny("llama", **LONG)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    cache = KVCache(model, H2O(4, 2))
    run(model, cache, random_ids(1, 30), [10] + [1] * 20)
    assert cache.layers[0].pos[0, 0].tolist() == [0, 1, 2, 3, 28, 29]


def test_the_sum_of_a_dropped_token_is_not_inherited(llama):
    cache = KVCache(llama, H2O(3, 3))
    run(llama, cache, random_ids(1, 12), [12])
    before = {int(p): float(a) for p, a in zip(cache.layers[0].pos[0, 0], cache.layers[0].states["acc"][0, 0],
                                               strict=True)}  # fmt: skip
    run(llama, cache, random_ids(1, 1, seed=5), [1])
    for p, a in zip(cache.layers[0].pos[0, 0], cache.layers[0].states["acc"][0, 0], strict=True):
        old = before.get(int(p), 0.0)
        assert old <= float(a) <= old + 2 + 1e-5  # one new query of each of the two heads


@pytest.mark.parametrize("p", [None, 1])
def test_padded_rows_equal_each_row_alone(llama, p):
    lengths, new = [20, 11, 5], 12
    rows = [random_ids(1, n + new, seed=n) for n in lengths]
    batch, mask = torch.ones(3, 20 + new, dtype=torch.long), torch.zeros(3, 20 + new, dtype=torch.long)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        batch[b, 20 - n :], mask[b, 20 - n :] = row[0], 1
    make = lambda: H2O(4, 3, p=p, sink=1)  # noqa: E731
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = KVCache(llama, make())
    out = run(llama, cache, batch, [20] + [1] * new, mask, positions)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        alone = KVCache(llama, make())
        close(out[b, 20 - n :], run(llama, alone, row, [n] + [1] * new)[0])
        for padded, single in zip(cache.layers, alone.layers, strict=True):
            assert torch.equal(padded.pos[b] - (20 - n), single.pos[0])
    assert cache.held(0).unique().tolist() == [8]


def test_chunked_prefill_and_query_blocks_equal_one_forward(llama, monkeypatch):
    ids = random_ids(2, 40)
    whole, chunked, blocks = (KVCache(llama, H2O(5, 4)) for _ in range(3))
    expected = run(llama, whole, ids, [30] + [1] * 10)
    with chunked.prefill():
        run(llama, chunked, ids[:, :30], [11, 1, 18])
    close(run(llama, chunked, ids[:, 30:], [1] * 10), expected[:, 30:])
    monkeypatch.setattr(attention_module, "BLOCK", 2 * 4 * 30 * 7)  # 7 queries at a time
    close(run(llama, blocks, ids, [30] + [1] * 10), expected)
    for a, b, c in zip(whole.layers, chunked.layers, blocks.layers, strict=True):
        assert torch.equal(a.pos, b.pos) and torch.equal(a.pos, c.pos)


def test_bytes(llama):
    cache, resident = KVCache(llama, H2O(8, 8)), set()
    run(llama, cache, random_ids(2, 60), [60])
    for step in range(50):
        run(llama, cache, random_ids(2, 1, seed=step), [1])
        resident.add(cache.ledger().total(view="resident"))
    heads = 3 * 2 * 2  # layers, rows, KV heads; a slot: 2 · 8 numbers, a position and a sum of 4 bytes each
    expected = {"payload": heads * 16 * 64, "meta": heads * 16 * 4, "state": heads * 16 * 4}
    assert cache.nbytes() == expected and resident == {sum(expected.values())}


def test_generate(llama):
    ids = random_ids(2, 20)
    cache = KVCache(llama, H2O(4, 4), codec=Dense())
    out = llama.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=15, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert out.shape == (2, 35) and cache.seen == 34 and cache.held(1).unique().tolist() == [8]


def test_no_heavy_hitters_is_a_window(llama):
    ids = random_ids(2, 40)
    a = run(llama, KVCache(llama, H2O(0, 6)), ids, [20] + [1] * 20)
    close(a, run(llama, KVCache(llama, Window(6)), ids, [20] + [1] * 20))


@pytest.mark.parametrize(("args", "kwargs", "named"), [
    ((0, 0), {}, "heavy, recent"), ((-1, 4), {}, "heavy"), ((4, 2.0), {}, "recent"), ((True, 4), {}, "heavy"),
    ((4, 4), {"sink": -1}, "sink"), ((4, 4), {"p": 3}, "p"), ((0, 0), {"sink": 4}, "heavy, recent"),
])  # fmt: skip
def test_bad_sizes(args, kwargs, named):
    with pytest.raises(ValueError, match=f"{named}: .*allowed"):
        H2O(*args, **kwargs)
