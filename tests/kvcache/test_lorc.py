"""LoRC: ranks, latents in the cache against weights of low rank, absorbed against rebuilt."""

import copy

import pytest
import torch
from cache_runs import close, generator, run

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import KVCache, KVPolicy, Random, Reader, StreamingLLM, Window, release
from refimpl.kvcache.lorc import Latent, condition_numbers, progressive_ranks, right_singular_vectors

RANKS = [4, 3, 2]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def low_rank(model, ranks, per_head):
    """A copy whose W_k and W_v are A B."""
    release(model)
    model = copy.deepcopy(model)
    bb = Backbone(model)
    groups = bb.G if per_head else 1
    with torch.no_grad():
        for ref in bb.linears():
            if ref.role in "kv":
                V = right_singular_vectors(ref.weight.T, groups, ranks[ref.layer])
                ref.weight.copy_(torch.block_diag(*(v @ v.T for v in V)) @ ref.weight)
    return model


def top_rank(model, per_head):
    bb = Backbone(model)
    return bb.D if per_head else min(bb.d, bb.G * bb.D)


# --- the cache ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("per_head", [True, False])
def test_latents_equal_weights_of_low_rank(model, per_head):
    ids = random_ids(2, 18)
    with torch.no_grad():
        expected = low_rank(model, RANKS, per_head)(ids).logits
    cache = KVCache(model, codec=Latent(model, RANKS, per_head=per_head))
    close(run(model, cache, ids, [9, 1, 1, 7]), expected, 2e-5)
    groups = Backbone(model).G if per_head else 1
    assert cache.nbytes()["payload"] == 2 * 18 * groups * 2 * sum(RANKS) * 4
    assert cache.layers[0].codec.c_k.shape == (2, groups, 18, RANKS[0])
    release(model)
    assert (model(ids).logits - expected).abs().max() > 0.1  # something was compressed


@pytest.mark.parametrize("per_head", [True, False])
def test_full_rank_equals_the_model(model, per_head):
    ids = random_ids(2, 18)
    release(model)
    expected = model(ids).logits
    codec = Latent(model, [top_rank(model, per_head)] * 3, per_head=per_head)
    close(run(model, KVCache(model, codec=codec), ids, [9, 1, 8]), expected)


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("policy", [Window(6), StreamingLLM(recent=4, sink=2)])
def test_works_with_eviction_and_compact_positions(llama, per_head, policy):
    ids = random_ids(2, 20)
    codec = Latent(llama, RANKS, per_head=per_head)
    got = run(llama, cache := KVCache(llama, policy, codec), ids, [9] + [1] * 11)
    small = low_rank(llama, RANKS, per_head)
    close(got, run(small, KVCache(small, policy), ids, [9] + [1] * 11), 2e-5)
    assert cache.nbytes()["payload"] == 2 * 6 * (2 if per_head else 1) * 2 * sum(RANKS) * 4
    assert cache.ledger().total(view="resident") < 4 * cache.nbytes()["payload"]  # no view of the prompt


def test_ragged_heads_need_latents_of_their_own(llama):
    class PerHead(KVPolicy):
        def keep(self, v):
            return (
                (v.pos % (torch.arange(2)[:, None] + 2) == 0) | (v.pos == v.seen - 1) if v.prefill else None
            )

    ids = random_ids(2, 16)
    small = low_rank(llama, RANKS, True)
    expected = run(small, KVCache(small, PerHead()), ids, [12, 1, 1, 2])
    cache = KVCache(llama, PerHead(), Latent(llama, RANKS, per_head=True))
    close(run(llama, cache, ids, [12, 1, 1, 2]), expected, 2e-5)
    with pytest.raises(ValueError, match="per_head=True"):
        run(llama, KVCache(llama, PerHead(), Latent(llama, RANKS, per_head=False)), ids, [12])
    with pytest.raises(ValueError, match="per_head=True"):
        run(llama, KVCache(llama, Random(5, generator()), Latent(llama, RANKS, per_head=False)), ids, [12])


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_left_padding(family, per_head):
    model, ids = tiny(family), random_ids(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    codec = Latent(model, RANKS, per_head=per_head)
    got = run(model, KVCache(model, Window(8), codec), ids, [12, 1, 1, 2], mask)
    small = low_rank(model, RANKS, per_head)
    expected = run(small, KVCache(small, Window(8)), ids, [12, 1, 1, 2], mask)
    close(got[0, 5:], expected[0, 5:], 2e-5)
    close(got[1], expected[1], 2e-5)


def test_generate_with_beams(llama):
    ids = random_ids(2, 8)
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3, do_sample=False,
                  eos_token_id=None)  # fmt: skip
    small = low_rank(llama, [16] * 3, False)
    expected = small.generate(ids, **kwargs)
    cache = KVCache(llama, codec=Latent(llama, [16] * 3, per_head=False))
    assert torch.equal(llama.generate(ids, past_key_values=cache, **kwargs), expected)


def test_error_falls_with_rank(llama):
    ids = random_ids(4, 24)
    release(llama)
    full = llama(ids).logits.log_softmax(-1)
    divergence = []
    for rank in (2, 6, 10, 16):
        logits = run(llama, KVCache(llama, codec=Latent(llama, [rank] * 3)), ids, [24])
        divergence.append(((full.exp() * (full - logits.log_softmax(-1))).sum(-1)).mean().item())
    assert divergence == sorted(divergence, reverse=True) and divergence[-1] < 1e-6


# --- absorbed ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("per_head", [True, False])
def test_absorbed_equals_rebuilt(model, per_head):
    bb, x = Backbone(model), torch.randn(2, 9, 32, generator=generator())
    small = Backbone(low_rank(model, RANKS, per_head))
    pos = torch.arange(9)
    with torch.no_grad():
        for l in range(3):
            codec = Latent(model, RANKS, per_head=per_head).fresh()
            codec.layer = l
            q, k, v = bb.qkv(l, x)
            c_k, c_v = codec.encode(k, 0), codec.encode(v, 1)
            rebuilt = codec.attend(bb, q, c_k, c_v, absorbed=False)
            close(codec.attend(bb, q, c_k, c_v, absorbed=True), rebuilt)
            q, k, v = small.qkv(l, x)
            z = small.attention(l, small.rot(q, pos), small.rot(k, pos), v, small.mask(l, 9))
            close(rebuilt, small.o_proj(l, z))


def test_absorbing_keys_under_rotation_would_be_wrong(llama):
    bb, x = Backbone(llama), torch.randn(1, 9, 32, generator=generator())
    codec = Latent(llama, RANKS, per_head=True)
    q, k, _ = bb.qkv(0, x)
    pos = torch.arange(9)
    V = codec.bases[0][0].repeat_interleave(2, 0)
    absorbed = (bb.rot(q, pos) @ V) @ codec.encode(k, 0).repeat_interleave(2, 1).transpose(-1, -2)
    k = bb.rot(codec.decode(codec.encode(k, 0), 0), pos).repeat_interleave(2, 1)
    assert ((bb.rot(q, pos) @ k.transpose(-1, -2)) - absorbed).abs().max() > 0.1


# --- ranks -------------------------------------------------------------------------------------------------
def test_condition_numbers_and_ranks(model):
    kappa = condition_numbers(model)
    bb = Backbone(model)
    weight = next(r for r in bb.linears() if (r.layer, r.role) == (1, "v")).weight.detach()
    assert kappa[1, 1].item() == pytest.approx(torch.linalg.cond(weight.double()).item())
    ranks = progressive_ranks(kappa, 8, 2)
    assert ranks[0] == 8 and ranks[-1] == 2 and ranks == sorted(ranks, reverse=True)
    assert progressive_ranks(torch.ones(3, 2), 8, 2) == [8, 8, 8]  # no error grows: nothing to protect


# --- bad input ---------------------------------------------------------------------------------------------
class Some(Reader):
    pass


@pytest.mark.parametrize(("call", "match"), [
    (lambda m: Latent(m, [2, 2]), "ranks: 2 of them"),
    (lambda m: Latent(m, [2, 0, 2]), "rank: 0; allowed: 1..16"),
    (lambda m: Latent(m, [2, 17, 2]), "rank: 17"),
    (lambda m: Latent(m, [9, 2, 2], per_head=True), "rank: 9; allowed: 1..8"),
    (lambda m: KVCache(m, codec=Latent(m, RANKS), reader=Some()), "reader: Some"),
    (lambda m: progressive_ranks(torch.ones(3), 4, 2), "kappa: shape"),
    (lambda m: progressive_ranks(torch.full((3, 2), torch.nan), 4, 2), "kappa"),
    (lambda m: progressive_ranks(torch.ones(3, 2), 2, 4), "r_min"),
    (lambda m: progressive_ranks(torch.ones(3, 2), 2, 0), "r_min"),
    (lambda m: right_singular_vectors(torch.ones(4, 6), 4, 1), "groups"),
])  # fmt: skip
def test_bad_input(llama, call, match):
    with pytest.raises(ValueError, match=match):
        call(llama)


def test_another_kind_of_model_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        Latent(torch.nn.Linear(2, 2), [1])
