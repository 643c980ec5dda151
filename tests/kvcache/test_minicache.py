"""MiniCache: interpolated directions, what is retained, and two layers with one storage."""

import pytest
import torch
import torch.nn.functional as F
from cache_runs import run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import KVCache, Window
from refimpl.kvcache.minicache import MiniCache, angle, slerp


def make_model(family):
    context = {"max_position_embeddings": 128} | ({"n_positions": 128} if family == "gpt2" else {})
    return tiny(family, num_hidden_layers=5, **context)  # layers 2 and 3 are a pair, 4 has no partner


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def test_slerp():
    a, b = unit(50, 8), unit(50, 8, seed=1)
    for t in (0.0, 0.3, 0.6, 1.0):
        e = slerp(a, b, t)
        assert (e.norm(dim=-1) - 1).abs().max() < 1e-12
        assert (angle(a, e) - t * angle(a, b)).abs().max() < 1e-7
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-15)
    rotation = torch.linalg.qr(unit(8, 8, seed=2)).Q
    assert (slerp(a @ rotation, b @ rotation, 0.6) - slerp(a, b, 0.6) @ rotation).abs().max() < 1e-12


def test_parallel_and_opposite_directions_take_the_straight_line():
    a = unit(4, 8)
    for b, expected in ((a, a), (-a, -a), (F.normalize(a + 1e-6 * unit(4, 8, seed=3), dim=-1), a)):
        e = slerp(a.float(), b.float(), 0.6)
        assert e.isfinite().all() and (e - expected.float()).abs().max() < 1e-5
    assert (angle(a.float(), a.float()) < 1e-6).all() and torch.allclose(
        angle(a, -a), torch.tensor(torch.pi).double()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_retaining_everything_is_the_full_cache(family):
    model = make_model(family)
    ids, sizes = random_ids(2, 40), [26] + [1] * 9 + [5]
    full = run(model, KVCache(model), ids, sizes)
    gaps = [
        (run(model, KVCache(model, codec=MiniCache(retain=retain)), ids, sizes) - full).abs()
        for retain in (1, 0.7, None)
    ]
    assert gaps[0].max() < 1e-5
    assert gaps[2][:, :26].max() < 1e-5  # the prompt itself sees what is not merged
    assert gaps[2][:, 26:].mean() > gaps[1][:, 26:].mean() > 1e-4


def test_norms_survive_and_directions_are_shared(llama):
    ids = random_ids(2, 30)
    full, cache = KVCache(llama), KVCache(llama, codec=MiniCache(0.6, retain=None))
    for c in (full, cache):
        run(llama, c, ids, [30])
    for j in (0, 1):
        x = [full.layers[l].codec.read()[j] for l in (2, 3)]
        y = [cache.layers[l].codec.read()[j] for l in (2, 3)]
        for a, b in zip(x, y, strict=True):
            assert (a.norm(dim=-1) - b.norm(dim=-1)).abs().max() < 1e-5
        assert (F.normalize(y[0], dim=-1) - F.normalize(y[1], dim=-1)).abs().max() < 1e-5
        w = angle(*(F.normalize(t.double(), dim=-1) for t in x))
        got = angle(F.normalize(x[0].double(), dim=-1), F.normalize(y[0].double(), dim=-1))
        assert (got - 0.6 * w).abs().max() < 1e-4


def test_what_is_retained(llama):
    ids = random_ids(2, 30)
    full, cache = KVCache(llama), KVCache(llama, codec=MiniCache(retain=0.3))
    for c in (full, cache):
        run(llama, c, ids, [30])
    x = [full.layers[l].codec.k for l in (2, 3)]
    d = torch.arccos((F.normalize(x[0], dim=-1) * F.normalize(x[1], dim=-1)).sum(-1)) / torch.pi
    low, high = d.amin(-1, keepdim=True), d.amax(-1, keepdim=True)
    kept = d >= high - 0.3 * (high - low)
    shared = cache.layers[2].codec.shared["k"]
    assert torch.equal(shared.row < 0, kept) and 0 < kept.sum() < kept.numel()
    for l in (2, 3):
        read = cache.layers[l].codec.read()[0]
        assert torch.equal(read[kept], x[l - 2][kept])
        assert (read[~kept] - x[l - 2][~kept]).abs().max() > 0.01


def test_bytes_of_one_storage_for_two_layers(llama):
    cache, B, G, D = KVCache(llama, codec=MiniCache(retain=0.3)), 2, 2, 8
    run(llama, cache, random_ids(2, 40), [30] + [1] * 10)
    pair = cache.layers[2].codec.shared
    assert pair is cache.layers[3].codec.shared
    n = B * G * 40
    payload = 4 * 3 * 2 * n * D  # three layers stay dense
    for s in pair.values():
        merged = int((s.row >= 0).sum())
        payload += 4 * (merged * (D + 2) + (n - merged) * 2 * D)
    assert cache.nbytes()["payload"] == payload
    assert cache.nbytes()["meta"] == 5 * 4 * 40 + 2 * 4 * (n + 2 * B * G)
    assert cache.ledger().total(view="resident") == sum(cache.nbytes().values())
    none = KVCache(llama, codec=MiniCache(retain=None, start=0))
    run(llama, none, random_ids(2, 40), [40])
    assert none.nbytes()["payload"] == 4 * n * (2 * 2 * (D + 2) + 2 * D)  # two pairs, one single layer


def test_each_cache_has_storage_of_its_own(llama):
    codec = MiniCache()
    one, two = KVCache(llama, codec=codec), KVCache(llama, codec=codec)
    run(llama, one, random_ids(1, 20), [20])
    assert not two.layers[2].codec.shared and not codec.shared
    one.reset()
    assert not one.layers[2].codec.shared


def test_a_padded_row_equals_the_row_alone(llama):
    row, other = random_ids(1, 30, seed=1), random_ids(1, 36, seed=2)
    ids, mask = torch.ones(2, 36, dtype=torch.long), torch.ones(2, 36, dtype=torch.long)
    ids[0, 6:], ids[1], mask[0, :6] = row[0], other[0], 0
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    out = run(llama, KVCache(llama, codec=MiniCache(retain=0.2)), ids, [26] + [1] * 10, mask, at)
    alone = run(llama, KVCache(llama, codec=MiniCache(retain=0.2)), row, [20] + [1] * 10)
    assert (out[0, 6:] - alone[0]).abs().max() < 1e-4


def test_chunks_a_question_and_beams(llama):
    ids = random_ids(2, 40)
    whole, chunked = (KVCache(llama, codec=MiniCache(retain=0.2)) for _ in range(2))
    expected = run(llama, whole, ids, [30, 5, 5])
    with chunked.prefill():
        out = [run(llama, chunked, ids[:, :30], [11, 19])]
    out.append(run(llama, chunked, ids[:, 30:], [5, 5]))
    assert (torch.cat(out, 1) - expected).abs().max() < 1e-4
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=3, do_sample=False)
    beams = llama.generate(ids, past_key_values=KVCache(llama), **kwargs)
    cache = KVCache(llama, codec=MiniCache(retain=1))
    assert torch.equal(llama.generate(ids, past_key_values=cache, **kwargs), beams)
    rows = whole.layers[2].codec.read()[0]
    whole.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(whole.layers[2].codec.read()[0], rows[[1, 1]])
    assert whole.layers[2].codec.shared["k"].direction.shape[0] <= 2 * 2 * 40


def test_eviction_is_refused(llama):
    with pytest.raises(ValueError, match="two layers share their entries; allowed: policies that keep every"):
        run(llama, KVCache(llama, Window(10), MiniCache()), random_ids(1, 20), [20])


@pytest.mark.parametrize(("make", "message"), [
    (lambda: MiniCache(1.5), "t: 1.5; allowed: 0..1"),
    (lambda: MiniCache(retain=-0.1), "retain: -0.1; allowed: 0..1"),
    (lambda: MiniCache(float("nan")), "t: nan; allowed"),
    (lambda: MiniCache(start=-1), "start: -1; allowed: integers from 0"),
])  # fmt: skip
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
