"""D2O: budgets from density, and what becomes of the victims."""

import pytest
import torch
import torch.nn.functional as F
from cache_runs import run

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import KVCache, KVPolicy, best
from refimpl.kvcache.d2o import D2O, attention_density, layer_ratios, merge_into_nearest
from refimpl.kvcache.rope import Rope

SOME = {"full": (0,)}  # of 3 layers


def make_model(family):
    return tiny(family, max_position_embeddings=256, **({"n_positions": 256} if family == "gpt2" else {}))


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


class H2OWithBudgets(KVPolicy):
    """Independent of D2O: given budgets, 4 pinned sinks, half of the others recent."""

    slots, needs = {"acc": torch.float32}, {"attn"}

    def __init__(self, budgets):
        self.budgets = budgets

    def observe(self, v):
        v.slot["acc"] += v.attn.float().sum((2, 3))

    def keep(self, v):
        n = self.budgets[v.layer]
        if n >= v.S:
            return None
        score = v.slot["acc"].clone()
        score[..., :4] = score[..., v.S - round(n / 2) :] = float("inf")
        return best(score, n)


def test_density_and_ratios():
    mass = torch.rand(2, 6, 30, generator=torch.Generator().manual_seed(0))
    f = attention_density(mass)
    for b in range(2):
        variances = [float(mass[b, h].var()) for h in range(6)]
        low, high = min(variances), max(variances)
        assert float(f[b]) == pytest.approx(sum((x - low) / (high - low) for x in variances) / 6, abs=1e-5)
    assert attention_density(torch.ones(1, 3, 5)).tolist() == [0]
    ratios = layer_ratios(torch.tensor([0.1, 0.5, 0.9]), 0.2)
    assert ratios.mean().item() == pytest.approx(0.2) and ratios[0] > ratios[1] > ratios[2]
    assert layer_ratios(torch.tensor([0.0, 1.0]), 0.9).max() == 1


def test_merging_weights():
    draw = lambda *shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    k, v, gone_k, gone_v = draw(5, 8, seed=0), draw(5, 8, seed=1), draw(4, 8, seed=2), draw(4, 8, seed=3)
    nearest, chosen = torch.tensor([2, 2, 0, 4]), torch.tensor([True, True, True, False])
    u = torch.tensor([0.9, 0.1, -0.3, 0.8])
    new_k, new_v = merge_into_nearest(k, v, gone_k, gone_v, nearest, u, chosen)
    total = torch.e + u[:2].exp().sum()
    assert torch.allclose(
        new_k[2], (torch.e * k[2] + u[0].exp() * gone_k[0] + u[1].exp() * gone_k[1]) / total
    )
    assert torch.allclose(new_v[0], (torch.e * v[0] + u[2].exp() * gone_v[2]) / (torch.e + u[2].exp()))
    for i in (1, 3, 4):
        assert torch.equal(new_k[i], k[i]) and torch.equal(new_v[i], v[i])
    low, high = torch.minimum(k[0], gone_k[2]), torch.maximum(k[0], gone_k[2])
    assert ((new_k[0] >= low - 1e-6) & (new_k[0] <= high + 1e-6)).all()  # in the convex hull
    same = merge_into_nearest(k, v, k[1:2], v[1:2], torch.tensor([1]), torch.ones(1), torch.tensor([True]))
    assert torch.allclose(same[0], k, atol=1e-6) and torch.allclose(same[1], v, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_merging_it_is_h2o_with_sinks_and_budgets(family):
    model, ids, sizes = make_model(family), random_ids(2, 50), [40] + [1] * 8 + [2]
    cache = KVCache(model, D2O(0.2, 0.2, merging=False, **SOME))
    out = run(model, cache, ids, sizes)
    budgets = [1000] + [int(cache.held(l)[0, 0]) for l in (1, 2)]
    assert int(cache.held(0)[0, 0]) == 50 and all(5 <= n < 40 for n in budgets[1:])
    other = KVCache(model, H2OWithBudgets(budgets))
    assert torch.equal(out, run(model, other, ids, sizes))
    merged = run(model, KVCache(model, D2O(0.2, 0.2, **SOME)), ids, sizes)
    assert torch.equal(merged[:, :40], out[:, :40])
    if family != "mistral":  # whose window of 5 hides what merging changes
        assert (merged - out)[:, 40:].abs().max() > 1e-4
    full = run(model, KVCache(model), ids, sizes)
    assert (run(model, KVCache(model, D2O(full=(0, 1, -1))), ids, sizes) - full).abs().max() < 1e-5


def test_what_merging_does_to_a_layer(llama):
    """Entries of layer 1, whose input no eviction has touched, after the prompt and one token."""
    ids, policy = random_ids(1, 40), D2O(0.2, 0.2, full=(0,))
    full, cache = KVCache(llama), KVCache(llama, policy)
    run(llama, full, ids, [40])
    run(llama, cache, ids, [40])
    layer, dense = cache.layers[1], full.layers[1].codec
    for g in range(2):
        kept = layer.pos.expand(1, 2, -1)[0, g].long()
        gone = torch.tensor([i for i in range(40) if i not in kept])
        k, v = dense.k[0, g], dense.v[0, g]
        cosine = F.normalize(k[gone], dim=-1) @ F.normalize(k[kept], dim=-1).T
        u, to = cosine.max(1)
        tau = u.mean()
        assert float(layer.notes["tau"][0, g]) == pytest.approx(float(tau), abs=1e-5)
        for c, slot in enumerate(kept):
            mine = [j for j in range(len(gone)) if to[j] == c and u[j] >= tau]
            weights = torch.tensor([torch.e] + [float(u[j].exp()) for j in mine])
            for stored, source in ((layer.codec.k, k), (layer.codec.v, v)):
                rows = torch.stack([source[slot]] + [source[gone[j]] for j in mine])
                expected = (weights[:, None] * rows).sum(0) / weights.sum()
                assert torch.allclose(stored[0, g, c], expected, atol=1e-5)
    before = layer.notes["tau"].clone()
    run(llama, cache, ids[:, :1], [1])
    assert (layer.notes["tau"] - before).abs().max() > 0
    state = cache.nbytes()["state"]
    assert state == sum(4 * 2 * int(cache.held(l)[0, 0]) for l in range(3)) + 3 * 4 + 2 * 2 * 4


def test_merging_without_rotations(llama):
    ids, rope = random_ids(1, 40), Rope(Backbone(llama))
    full, cache = KVCache(llama), KVCache(llama, D2O(0.2, 0.2, full=(0,), rope=rope))
    for c in (full, cache):
        run(llama, c, ids, [40])
    layer, k = cache.layers[1], full.layers[1].codec.k
    plain = rope.back(k, torch.arange(40)[None])
    for g in range(2):
        kept = layer.pos.expand(1, 2, -1)[0, g].long()
        gone = torch.tensor([i for i in range(40) if i not in kept])
        u, to = (F.normalize(plain[0, g, gone], dim=-1) @ F.normalize(plain[0, g, kept], dim=-1).T).max(1)
        mine = u >= u.mean()
        c = int(to[mine][0])
        into = [j for j in range(len(gone)) if mine[j] and to[j] == c]
        weights = torch.tensor([torch.e] + [float(u[j].exp()) for j in into])
        rows = torch.stack([plain[0, g, kept[c]]] + [plain[0, g, gone[j]] for j in into])
        mean = ((weights[:, None] * rows).sum(0) / weights.sum())[None, None, None]
        assert torch.allclose(layer.codec.k[0, g, c], rope.turn(mean, kept[c : c + 1])[0, 0, 0], atol=1e-4)


def test_chunked_prefill_and_constant_bytes(llama):
    ids = random_ids(2, 60)
    whole, chunked = (KVCache(llama, D2O(0.2, 0.2, full=())) for _ in range(2))
    expected = run(llama, whole, ids, [40] + [1] * 10)
    with chunked.prefill():
        out = [run(llama, chunked, ids, [11, 29])]
    out.append(run(llama, chunked, ids[:, 40:], [1] * 10))
    assert (torch.cat(out, 1) - expected).abs().max() < 1e-3
    size = whole.nbytes()
    run(llama, whole, ids[:, 50:], [1] * 10)
    assert whole.nbytes() == size and whole.ledger().total(view="resident") == sum(size.values())


def test_beam_search_reorders_the_notes(llama):
    ids = random_ids(2, 20)
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3, do_sample=False)
    cache = KVCache(llama, D2O(0.2, 0.2, full=()))
    llama.generate(ids, past_key_values=cache, **kwargs)
    assert cache.layers[0].notes["tau"].shape == (6, 2)


def test_a_padded_prompt_is_refused(llama):
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    with pytest.raises(ValueError, match="D2O: a padded prompt; allowed: rows without padding"):
        llama(ids, attention_mask=mask, past_key_values=KVCache(llama, D2O(**SOME)))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: D2O(0.0, 0.2), "heavy: 0.0; allowed: between 0 and 1"),
    (lambda: D2O(0.2, float("nan")), "recent: nan; allowed"),
    (lambda: D2O(0.7, 0.7), "heavy . recent: 1.4; allowed: at most 1"),
    (lambda: D2O(sinks=-1), "sinks: -1; allowed: integers from 0"),
    (lambda: D2O(smoothing=2), "smoothing: 2; allowed: 0..1"),
])  # fmt: skip
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_layer_that_the_model_lacks(llama):
    with pytest.raises(ValueError, match="full: 7; allowed: -3..2, layers"):
        run(llama, KVCache(llama, D2O(full=(7,))), random_ids(1, 20), [20])
