"""KCache (spec 21): identity, the error bound, exact traffic, padding."""

import pytest
import torch
from test_core import LONG, close, dynamic, run

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache import KVCache, Window
from refimpl.kvcache.kcache import KCache
from refimpl.kvcache.tiers import HostValues


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", **LONG)


def stored(B=2, G=2, R=3, S=40, D=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    codec = HostValues()
    k, v = (torch.randn(B, G, S, D, generator=draw) for _ in range(2))
    codec.append(k, v)
    return codec, 2 * torch.randn(B, G, R, 1, D, generator=draw), k, v


@pytest.mark.parametrize("renormalise", [False, True])
def test_all_slots_give_plain_attention(llama, renormalise):
    ids, sizes = random_ids(2, 40), [30] + [1] * 10
    expected = dynamic(llama, ids, sizes)
    cache = KVCache(llama, codec=HostValues(), reader=KCache(40, renormalise))
    close(run(llama, cache, ids, sizes), expected)


def test_the_error_bounds_hold_for_every_head():
    for seed in range(20):
        codec, q, k, v = stored(seed=seed)
        weights = (q @ k[:, :, None].mT * 0.5).softmax(-1)
        exact = weights @ v[:, :, None]
        longest = v.norm(dim=-1).amax(-1)[:, :, None]
        for n in (1, 4, 16, 39, 40):
            lost = 1 - weights.topk(n).values.sum(-1)[..., 0]
            for renormalise, factor in ((False, 1), (True, 2)):
                out = KCache(n, renormalise).read(q, codec, 0.5, None)
                error = (out - exact).norm(dim=-1)[..., 0]
                assert (error <= factor * lost * longest + 1e-5).all()


def test_renormalising_is_another_result():
    codec, q, k, v = stored()
    plain, whole = (KCache(5, r).read(q, codec, 0.5, None) for r in (False, True))
    mass = (q @ k[:, :, None].mT * 0.5).softmax(-1).topk(5).values.sum(-1, keepdim=True)
    close(plain, whole * mass)
    assert (plain - whole).abs().max() > 0.1


def test_bytes_moved_are_the_union_of_the_group():
    codec, q, k, v = stored()
    reader = KCache(6)
    reader.read(q, codec, 0.5, None)
    rows = 0
    for b in range(2):
        for g in range(2):
            scores = q[b, g, :, 0] @ k[b, g].T
            rows += len({slot for head in scores.topk(6).indices.tolist() for slot in head})
    assert rows < 2 * 2 * 3 * 6  # heads agree on some
    assert reader.read_bytes() == {
        "payload": k.nbytes,
        "meta": 0,
        "host": rows * 8 * 4,
        "moved": rows * 8 * 4,
    }


def test_padded_rows_equal_each_row_alone(llama):
    lengths, new = [20, 11, 3], 8
    rows = [random_ids(1, n + new, seed=n) for n in lengths]
    batch, mask = torch.ones(3, 20 + new, dtype=torch.long), torch.zeros(3, 20 + new, dtype=torch.long)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        batch[b, 20 - n :], mask[b, 20 - n :] = row[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = KVCache(llama, codec=HostValues(), reader=KCache(5))
    out = run(llama, cache, batch, [20] + [1] * new, mask, positions)
    moved = 0
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        alone = KVCache(llama, codec=HostValues(), reader=KCache(5))
        close(out[b, 20 - n :], run(llama, alone, row, [n] + [1] * new)[0], 2e-5)
        moved += alone.read_bytes()["moved"]
    assert cache.read_bytes()["moved"] == moved  # no padding crosses


def test_beside_eviction(llama):
    ids, sizes = random_ids(1, 30), [20] + [1] * 10
    expected = run(llama, KVCache(llama, Window(9)), ids, sizes)
    cache = KVCache(llama, Window(9), HostValues(), KCache(10))
    close(run(llama, cache, ids, sizes), expected)
    assert cache.nbytes()["host"] == 3 * 2 * 9 * 8 * 4


def test_half_precision():
    model, ids = tiny("llama").to(torch.bfloat16), random_ids(1, 20)
    cache = KVCache(model, codec=HostValues(), reader=KCache(20))
    expected = dynamic(model, ids, [15, 1, 1, 3])
    cache = KVCache(model, codec=HostValues(), reader=KCache(20))
    close(run(model, cache, ids, [15, 1, 1, 3]).float(), expected.float(), 0.1)
    assert cache.layers[0].codec.v.rows.dtype == torch.bfloat16


@pytest.mark.parametrize("n", [0, -1, 2.0, True, None])
def test_bad_input(n):
    with pytest.raises(ValueError, match="n: .*; allowed: integers from 1"):
        KCache(n)
