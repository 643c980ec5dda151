"""Quest (spec 22): the bound, identity, exact traffic, growing pages, padding."""

import pytest
import torch
from test_core import LONG, close, dynamic, run

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache import Dense, KVCache, ReadAll, Window
from refimpl.kvcache.quest import Quest


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", **LONG)


def built(S=37, page=4, budget=8, B=2, G=2, R=3, D=8, seed=0, **kwargs):
    draw = torch.Generator().manual_seed(seed)
    codec, quest = Dense(), Quest(budget, page, **kwargs)
    codec.append(torch.randn(B, G, S, D, generator=draw), torch.randn(B, G, S, D, generator=draw))
    q = torch.randn(B, G, R, 1, D, generator=draw)
    quest.build(codec, q, None)
    return quest, codec, q


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_is_never_below_the_best_logit_of_its_page(seed):
    quest, codec, q = built(seed=seed)
    bound = quest.bound(q[:, :, :, 0], quest.lo[:, :, None], quest.hi[:, :, None])
    logits = (q @ codec.k[:, :, None].mT)[:, :, :, 0]
    for p, part in enumerate(logits.split(4, -1)):
        assert (bound[..., p] >= part.amax(-1) - 1e-5).all()
    k = codec.k[:, :, 36:]  # the last page holds one key: its bound is exact
    close(bound[..., 9:], (q @ k[:, :, None].mT)[:, :, :, 0])


def test_growing_pages_keep_their_bounds_fresh():
    quest, codec, q = built(S=5)
    draw = torch.Generator().manual_seed(9)
    for t in (1, 1, 1, 6, 1, 1):
        new = torch.randn(2, 2, t, 8, generator=draw)
        codec.append(new, new)
        quest.append(new)
        again = Quest(8, 4)
        again.build(codec, q, None)
        assert torch.equal(quest.lo, again.lo) and torch.equal(quest.hi, again.hi)


@pytest.mark.parametrize("shared", [False, True])
def test_a_sufficient_budget_gives_plain_attention(llama, shared):
    ids, sizes = random_ids(2, 45), [30] + [1] * 15
    expected = dynamic(llama, ids, sizes)
    cache = KVCache(llama, reader=Quest(48, page=4, shared=shared))
    close(run(llama, cache, ids, sizes), expected)


def test_selection_equals_a_loop_over_heads():
    quest, codec, q = built(budget=12)
    index = quest.select(q)
    assert index.shape == (2, 2, 3, 12)
    for b in range(2):
        for g in range(2):
            for r in range(3):
                bounds = [
                    torch.maximum(q[b, g, r, 0] * page.amin(0), q[b, g, r, 0] * page.amax(0)).sum().item()
                    for page in codec.k[b, g].split(4)
                ]
                best = sorted(range(10), key=lambda p: -bounds[p])[:3]
                expected = sorted(slot for p in best for slot in range(4 * p, min(4 * p + 4, 37)))
                assert sorted(slot for slot in index[b, g, r].tolist() if slot >= 0) == expected


def test_at_least_three_pages():
    quest, codec, q = built(budget=1)
    assert quest.select(q).shape[-1] == 3 * 4
    assert built(S=5, budget=1)[0].select(q).shape[-1] == 2 * 4  # there are only two


@pytest.mark.parametrize("shared", [False, True])
def test_bytes_read_and_stored(shared):
    quest, codec, q = built(budget=12, shared=shared)
    quest.read(q, codec, 0.3, None)
    index = quest.select(q)
    rows = {(b, g, s) for b in range(2) for g in range(2) for s in index[b, g].flatten().tolist() if s >= 0}
    meta = 2 * 2 * 2 * 10 * 8 * 4
    assert quest.read_bytes() == {"payload": len(rows) * 2 * 8 * 4, "meta": meta, "host": 0, "moved": 0}
    if shared:
        assert len(rows) <= 2 * 2 * 12
    assert sum(t.nbytes for t in quest.tensors().values()) == meta


def test_nothing_is_compressed(llama):
    cache = KVCache(llama, reader=Quest(8, page=4))
    run(llama, cache, random_ids(1, 40), [40])
    full = 3 * 2 * 2 * 40 * 8 * 4
    assert cache.nbytes() == {"payload": full, "meta": 3 * 40 * 4 + full * 10 // 40, "state": 0}


@pytest.mark.parametrize("shared", [False, True])
def test_padded_rows_equal_each_row_alone(llama, shared):
    lengths, new = [30, 19, 6], 8
    rows = [random_ids(1, n + new, seed=n) for n in lengths]
    batch, mask = torch.ones(3, 30 + new, dtype=torch.long), torch.zeros(3, 30 + new, dtype=torch.long)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        batch[b, 30 - n :], mask[b, 30 - n :] = row[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = KVCache(llama, reader=Quest(12, page=4, shared=shared))
    out, read = run(llama, cache, batch, [30] + [1] * new, mask, positions), 0
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        alone = KVCache(llama, reader=Quest(12, page=4, shared=shared))
        close(out[b, 30 - n :], run(llama, alone, row, [n] + [1] * new)[0], 2e-5)
        read += alone.read_bytes()["payload"]
    assert cache.read_bytes()["payload"] == read


def test_evicted_pages_get_new_bounds(llama):
    ids, sizes = random_ids(1, 30), [20] + [1] * 10
    expected = run(llama, KVCache(llama, Window(9)), ids, sizes)
    cache = KVCache(llama, Window(9), reader=Quest(12, page=4))
    close(run(llama, cache, ids, sizes), expected)
    quest, k = cache.layers[1].reader, cache.layers[1].codec.k
    assert torch.equal(quest.lo[:, :, 0], k[:, :, :4].amin(2)) and quest.S == 9


def test_the_first_layers_may_read_everything(llama):
    ids, sizes = random_ids(1, 60), [50] + [1] * 10
    readers = [ReadAll(), ReadAll(), Quest(12, page=4)]
    cache = KVCache(llama, reader=readers)
    run(llama, cache, ids, sizes)
    read = [layer.read_bytes()["payload"] for layer in cache.layers]
    assert read[0] == read[1] == 2 * 2 * 60 * 8 * 4 > read[2]


@pytest.mark.parametrize("kwargs", [{"budget": 0}, {"budget": 8, "page": 0}, {"budget": 1.5}])
def test_bad_input(kwargs):
    with pytest.raises(ValueError, match="allowed: integers from 1"):
        Quest(**kwargs)
