"""Truncated SVD of the cache: Eckart-Young, the survey's Eq. 10, the codec in the cache."""

import warnings

import pytest
import torch
from cache_runs import draw, run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import KVCache, KVPolicy, Window
from refimpl.kvcache.kvsvd import KVSVD, compression_ratio, factor, low_rank_scores

LONG = {"max_position_embeddings": 256, "n_positions": 256}


def make_model(family):
    return tiny(family, **(LONG if family == "gpt2" else {"max_position_embeddings": 256}))


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


def test_eckart_young():
    x = draw(2, 60, 16, dtype=torch.float64)
    s = torch.linalg.svdvals(x)
    for rank in (1, 5, 16):
        a, b = factor(x, rank)
        error = (a @ b.transpose(-1, -2) - x).square().sum((-1, -2))
        dropped = s[:, rank:].square().sum(-1)
        assert (error - dropped).abs().max() <= 1e-6 * s.square().sum()
        assert a.shape == (2, 60, rank) and b.shape == (2, 16, rank)
        for seed in range(5):
            q = torch.linalg.qr(draw(2, 16, rank, seed=seed, dtype=torch.float64)).Q
            assert bool(((x @ q @ q.transpose(-1, -2) - x).square().sum((-1, -2)) >= error - 1e-9).all())


def test_scores_in_rank_r():
    k, q = draw(2, 40, 16), draw(2, 3, 16, seed=1)
    a, b = factor(k, 5)
    expected = q @ (a @ b.transpose(-1, -2)).transpose(-1, -2)
    assert (low_rank_scores(q, a, b) - expected).abs().max() < 1e-5


def test_half_precision_is_factored_in_float32():
    x = draw(30, 8).bfloat16()
    a, b = factor(x, 8)
    assert a.dtype == b.dtype == torch.bfloat16
    assert (a.float() @ b.float().T - x.float()).abs().max() < 0.05


def test_equation_10_warns_where_nothing_is_saved():
    n, d = 512, 32
    for rank in range(1, d + 1):
        saves = rank < n * d / (n + d + 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert (compression_ratio(n, d, rank) > 1) == saves
        assert bool(caught) == (not saves)
    assert compression_ratio(512, 32, 8) == pytest.approx(512 * 32 / (8 * 545))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_the_full_cache_and_error_falls_with_the_rank(family):
    model = make_model(family)
    ids, sizes = random_ids(2, 48), [30] + [1] * 13 + [5]
    full = run(model, KVCache(model), ids, sizes)
    D = KVCache(model)._D
    gaps = []
    for rank in (1, D // 2, D):
        cache = KVCache(model, codec=KVSVD(rank, value_rank=rank, residual=4))
        gaps.append((run(model, cache, ids, sizes) - full).abs())
    assert gaps[2].max() < 2e-4 and gaps[0][:, :30].max() < 1e-5
    assert gaps[0].mean() > gaps[1].mean() > 1e-3


@pytest.mark.parametrize("update", ["project", "refactor"])
def test_bytes_and_updates(llama, update):
    B, G, D, r = 2, 2, 8, 3
    ids = random_ids(2, 60)
    cache = KVCache(llama, codec=KVSVD(r, residual=8, update=update))
    run(llama, cache, ids[:, :30], [30])
    _, first = cache.layers[1].codec.factors["k"]
    for n in range(30, 60):
        if n > 30:
            run(llama, cache, ids[:, n - 1 : n], [1])
        waiting = (n - 30) % 8
        keys = r * (n - waiting + D) + waiting * D
        assert cache.nbytes()["payload"] == 3 * B * G * 4 * (keys + n * D)
        assert cache.ledger().total(view="payload") == cache.ledger().total(view="resident")
    _, last = cache.layers[1].codec.factors["k"]
    assert torch.equal(first, last) == (update == "project")
    # The numbers of Eq. 10, less the r singular values, which sit in A.
    codec = KVSVD(r)
    codec.append(draw(1, 1, 40, D), draw(1, 1, 40, D))
    codec.commit(None)
    stored = (codec.nbytes()["payload"] - 4 * 40 * D) // 4
    assert stored + r == pytest.approx(40 * D / compression_ratio(40, D, r))


def test_what_is_projected_on_the_frozen_basis():
    k, later = draw(1, 1, 20, 8), draw(1, 1, 4, 8, seed=1)
    codec = KVSVD(3, residual=4)
    codec.append(k, k)
    codec.commit(None)
    basis = torch.linalg.svd(k[0, 0]).Vh[:3]
    codec.append(later[:, :, :3], later[:, :, :3])
    codec.commit(None)
    assert torch.equal(codec.read()[0][:, :, 20:], later[:, :, :3])
    codec.append(later[:, :, 3:], later[:, :, 3:])
    codec.commit(None)
    assert torch.allclose(codec.read()[0][0, 0, 20:], later[0, 0] @ basis.T @ basis, atol=1e-5)
    assert codec.k is None and codec.factors["k"][0].shape[2] == 24
    assert torch.equal(codec.read()[1][:, :, 20:], later)  # values stay dense


def test_keys_before_rope(llama):
    ids, sizes = random_ids(1, 40), [30] + [1] * 10
    full = KVCache(llama)
    expected = run(llama, full, ids, sizes)
    cache = KVCache(llama, codec=KVSVD(8, residual=4, rotated=False))
    assert (run(llama, cache, ids, sizes) - expected).abs().max() < 2e-4
    lossy = [KVCache(llama, codec=KVSVD(3, rotated=rotated)) for rotated in (True, False)]
    out = [run(llama, c, ids, sizes) for c in lossy]
    assert (out[0] - out[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="learned positions"):
        KVCache(make_model("gpt2"), codec=KVSVD(3, rotated=False))


def test_a_padded_row_equals_the_row_alone(llama):
    row, other = random_ids(1, 34, seed=1), random_ids(1, 41, seed=2)
    ids, mask = torch.ones(2, 41, dtype=torch.long), torch.ones(2, 41, dtype=torch.long)
    ids[0, 7:], ids[1], mask[0, :7] = row[0], other[0], 0
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    make = lambda: KVSVD(3, value_rank=4, residual=4)  # noqa: E731
    out = run(llama, KVCache(llama, codec=make()), ids, [31] + [1] * 10, mask, at)
    alone = run(llama, KVCache(llama, codec=make()), row, [24] + [1] * 10)
    assert (out[0, 7:] - alone[0]).abs().max() < 1e-4


def test_beam_search_a_short_prompt_and_chunks(llama):
    ids = random_ids(2, 20)
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=3, do_sample=False)
    expected = llama.generate(ids, past_key_values=KVCache(llama), **kwargs)
    codec = KVSVD(8, value_rank=8, residual=4)
    assert torch.equal(llama.generate(ids, past_key_values=KVCache(llama, codec=codec), **kwargs), expected)
    short = KVCache(llama, codec=KVSVD(6))
    run(llama, short, ids, [4])
    assert not short.layers[0].codec.factors
    run(llama, short, ids[:, 4:], [1, 1])
    assert short.layers[0].codec.factors["k"][0].shape == (2, 2, 6, 6)
    chunked, whole = (KVCache(llama, codec=KVSVD(4)) for _ in range(2))
    with chunked.prefill():
        run(llama, chunked, ids, [7, 13])
    run(llama, whole, ids, [20])
    assert torch.allclose(chunked.layers[2].codec.read()[0], whole.layers[2].codec.read()[0], atol=1e-4)


def test_selection_at_the_prefill_only(llama):
    class Last(KVPolicy):
        def keep(self, v):
            return v.rank >= v.count - 12 if v.prefill else None

    cache = KVCache(llama, Last(), KVSVD(3))
    run(llama, cache, random_ids(1, 30), [28, 1, 1])
    assert cache.held(0).tolist() == [[14, 14]]
    cache = KVCache(llama, Window(12), KVSVD(3))
    run(llama, cache, random_ids(1, 28), [28])
    with pytest.raises(ValueError, match="KVSVD: compressed entries cannot be evicted"):
        run(llama, cache, random_ids(1, 1), [1])


@pytest.mark.parametrize(("make", "message"), [
    (lambda: KVSVD(0), "rank: 0; allowed: integers from 1"),
    (lambda: KVSVD(2, value_rank=True), "value_rank: True; allowed"),
    (lambda: KVSVD(2, residual=0), "residual: 0; allowed"),
    (lambda: KVSVD(2, update="freeze"), "update: 'freeze'; allowed: project, refactor"),
    (lambda: factor(torch.zeros(3, 8), 4), "rank: 4; allowed: 1..3 for 3 tokens of 8 channels"),
    (lambda: compression_ratio(0, 4, 1), "n: 0; allowed"),
])  # fmt: skip
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rank_above_the_head_dim(llama):
    cache = KVCache(llama, codec=KVSVD(4, value_rank=9))
    with pytest.raises(ValueError, match="value_rank: 9; allowed: 1..8, the head dim"):
        run(llama, cache, random_ids(1, 4), [4])
    assert cache.layers[0].codec.k is None
