"""TOVA: one list of slots for all heads, chosen by the last query alone."""

import pytest
import torch
from cache_runs import LONG, close, run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import KVCache
from refimpl.kvcache.tova import TOVA


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", **LONG)


@pytest.mark.parametrize("family", FAMILIES)
def test_enough_budget_equals_full_and_a_small_one_does_not(family):
    long = LONG | ({"n_positions": 512} if family == "gpt2" else {})
    model, ids, sizes = tiny(family, **long), random_ids(2, 40), [20, 5] + [1] * 15
    expected = run(model, KVCache(model), ids, sizes)
    close(run(model, KVCache(model, TOVA(40)), ids, sizes), expected)
    cache = KVCache(model, TOVA(4))
    out = run(model, cache, ids, sizes)
    close(out[:, :20], expected[:, :20])
    assert (out[:, 21:] - expected[:, 21:]).abs().max() > 0.03
    assert cache.held(2).unique().tolist() == [4]


class Recorded(TOVA):
    """Notes weights, values and positions that each choice was made from."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log = []

    def keep(self, v):
        self.log.append((v.layer, v.attn, v.v, v.pos.clone()))
        return super().keep(v)


@pytest.mark.parametrize("p", [None, 1, 2])
@pytest.mark.parametrize("newest", [False, True])
def test_the_choice_one_slot_after_the_other(llama, p, newest):
    policy = Recorded(6, p=p, newest=newest)
    cache = KVCache(llama, policy)
    ids = random_ids(2, 30)
    run(llama, cache, ids, [12])
    for step in range(12, 20):
        run(llama, cache, ids[:, step : step + 1], [1])
        for l, weights, values, pos in policy.log[-3:]:
            for b in range(2):
                score = {}
                for s in range(pos.shape[-1]):
                    norms = [1.0 if p is None else float((values[b, g, s].abs() ** p).sum() ** (1 / p))
                             for g in range(2)]  # fmt: skip
                    score[int(pos[b, 0, s])] = sum(
                        float(weights[b, g, r, -1, s]) * norms[g] for g in range(2) for r in range(2)
                    )
                if newest:
                    score[step] = torch.inf
                expected = sorted(sorted(score, key=score.get)[-6:])
                kept = cache.layers[l].pos.expand(2, 2, -1)[b]
                assert kept[0].tolist() == kept[1].tolist() == expected


def test_the_newest_token_is_dropped_unless_it_is_kept_by_force(llama):
    ids, dropped = random_ids(1, 60), {False: 0, True: 0}
    for newest in dropped:
        cache = KVCache(llama, TOVA(6, newest=newest))
        run(llama, cache, ids[:, :10], [10])
        for t in range(10, 60):
            run(llama, cache, ids[:, t : t + 1], [1])
            dropped[newest] += sum(t not in layer.pos.tolist() for layer in cache.layers)
    assert dropped[False] > 0 and dropped[True] == 0


def test_a_group_counts_query_heads_not_kv_heads(llama):
    """The mean over all H query heads; with G = 2 of H = 4 each KV head stands for two."""
    policy = Recorded(5)
    cache = KVCache(llama, policy)
    run(llama, cache, random_ids(1, 20), [20])
    _, weights, _, _ = policy.log[0]
    expected = weights[0].flatten(0, 1)[:, -1].mean(0).topk(5).indices.sort().values
    assert cache.layers[0].pos.tolist() == expected.tolist()


def test_memoryless(llama):
    """What is kept depends on the held slots and the query, not on how they came to be held."""
    ids = random_ids(1, 30)
    whole, chunked = KVCache(llama, TOVA(7)), KVCache(llama, TOVA(7))
    expected = run(llama, whole, ids, [20] + [1] * 10)
    with chunked.prefill():
        run(llama, chunked, ids[:, :20], [4, 1, 15])
    close(run(llama, chunked, ids[:, 20:], [1] * 10), expected[:, 20:])
    assert all(torch.equal(a.pos, b.pos) for a, b in zip(whole.layers, chunked.layers, strict=True))
    assert whole.layers[0].states == {}


def test_padded_rows_equal_each_row_alone(llama):
    lengths, new = [20, 11, 3], 12
    rows = [random_ids(1, n + new, seed=n) for n in lengths]
    batch, mask = torch.ones(3, 20 + new, dtype=torch.long), torch.zeros(3, 20 + new, dtype=torch.long)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        batch[b, 20 - n :], mask[b, 20 - n :] = row[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = run(llama, KVCache(llama, TOVA(6)), batch, [20] + [1] * new, mask, positions)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        close(out[b, 20 - n :], run(llama, KVCache(llama, TOVA(6)), row, [n] + [1] * new)[0])
    only = mask[1:2]  # a single padded row
    out = run(llama, KVCache(llama, TOVA(6)), batch[1:2], [20] + [1] * new, only, positions[1:2])
    close(out[0, 9:], run(llama, KVCache(llama, TOVA(6)), rows[1], [11] + [1] * new)[0])


def test_bytes_of_one_row_hold_positions_once(llama):
    for B, copies in ((1, 1), (2, 4)):
        cache = KVCache(llama, TOVA(16))
        run(llama, cache, random_ids(B, 40), [30] + [1] * 10)
        assert cache.nbytes() == {"payload": 3 * B * 2 * 16 * 64, "meta": 3 * 16 * 4 * copies, "state": 0}


@pytest.mark.parametrize(("args", "kwargs", "named"), [
    ((0,), {}, "budget"), ((2.0,), {}, "budget"), ((True,), {}, "budget"), ((4,), {"p": 0}, "p"),
    ((4,), {"newest": 1}, "newest"),
])  # fmt: skip
def test_bad_parameters(args, kwargs, named):
    with pytest.raises(ValueError, match=f"{named}: .*allowed"):
        TOVA(*args, **kwargs)
