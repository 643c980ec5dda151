"""MiniKV: a policy that evicts once and a codec that packs, composed."""

import pytest
import torch
from cache_runs import run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import Full, KVCache
from refimpl.kvcache.minikv import PrefillH2O, PromptKIVI, minikv, pyramid


def make_model(family):
    return tiny(family, max_position_embeddings=256, **({"n_positions": 256} if family == "gpt2" else {}))


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


class All(Full):
    """Full, with the attention computed in the same way as for a policy that looks at it."""

    needs = {"attn"}


def test_pyramid():
    shares = [pyramid(0.25, l, 12) for l in range(12)]
    assert sum(shares) / 12 == pytest.approx(0.25) and shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.25 / 7) and shares[0] == pytest.approx(0.5 - 0.25 / 7)
    assert [pyramid(0.3, l, 4, 1) for l in range(4)] == pytest.approx([0.3] * 4) and pyramid(0.3, 0, 1) == 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_16_bits_are_the_policy_alone_and_all_tokens_the_codec_alone(family):
    model = make_model(family)
    ids, sizes = random_ids(2, 60), [48] + [1] * 12
    dense = run(model, KVCache(model, PrefillH2O(0.2, 0.3)), ids, sizes)
    assert torch.equal(run(model, minikv(model, 0.2, 0.3, bits=16), ids, sizes), dense)
    D = KVCache(model)._D
    codec = KVCache(model, All(), PromptKIVI(value_group=D))
    both = minikv(model, 0.5, 0.5, depth=1, value_group=D)
    assert torch.equal(run(model, both, ids, sizes), run(model, codec, ids, sizes))
    full = run(model, KVCache(model), ids, sizes)
    assert (dense - full)[:, :48].abs().max() < 1e-5
    if family != "mistral":  # whose window of 5 lies within the last tokens that stay
        assert (dense - full)[:, 48:].abs().max() > 1e-3


def test_the_policy_keeps_the_heaviest_and_the_last(llama):
    from refimpl.kvcache import release

    ids, n = random_ids(2, 40), 40
    cache = KVCache(llama, PrefillH2O(0.25, 0.25))
    run(llama, cache, ids, [n])
    release(llama)
    with torch.no_grad():
        attention = llama(ids, output_attentions=True, use_cache=False).attentions
    for l, layer in enumerate(cache.layers):
        heavy = int([0.25 * 13 / 7, 0.25, 0.25 / 7][l] * n)
        mass = attention[l].sum(2).view(2, 2, 2, n).sum(2)[..., :30]
        for b in range(2):
            for g in range(2):
                expected = {*mass[b, g].topk(heavy).indices.tolist(), *range(30, 40)}
                assert set(layer.pos.expand(2, 2, -1)[b, g].tolist()) == expected


def test_the_arithmetic_of_the_paper():

    wide = tiny("llama", max_position_embeddings=256, head_dim=16).bfloat16()
    cache, full = minikv(wide, depth=1), KVCache(wide)
    for c in (cache, full):
        run(wide, c, random_ids(1, 128), [128])
    codec = [sum(layer.codec.nbytes().values()) for c in (cache, full) for layer in c.layers]
    # Half of the tokens, 2 + (16 + 16) / 16 = 4 bits for 16: one eighth.
    assert sum(codec[:3]) / sum(codec[3:]) == 0.125


def test_what_waits_for_residual_tokens():
    codec = PromptKIVI(2, group=8, residual=16)
    draw = lambda n: torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n))  # noqa: E731
    counts = []
    for n in [21] + [1] * 30:
        codec.append(draw(n), draw(n))
        codec.commit(None)
        counts.append((codec.keys.codes.shape[2] * 4, codec.values.codes.shape[2]))
    assert counts[:10] == [(16, 16)] * 10 and counts[11] == (32, 32) and counts[-1] == (48, 48)


def test_chunked_prefill_equals_one_forward(llama):
    ids = random_ids(2, 50)
    whole, chunked = (minikv(llama, value_group=8) for _ in range(2))
    expected = run(llama, whole, ids, [40, 5, 1, 1])
    with chunked.prefill():
        out = [run(llama, chunked, ids, [13, 27])]
    out.append(run(llama, chunked, ids[:, 40:], [5, 1, 1]))
    assert (torch.cat(out, 1) - expected).abs().max() < 1e-4
    assert torch.equal(whole.layers[1].pos, chunked.layers[1].pos)


def test_a_padded_prompt_is_refused(llama):
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    with pytest.raises(ValueError, match="PrefillH2O: a padded prompt; allowed: rows without padding"):
        llama(ids, attention_mask=mask, past_key_values=minikv(llama, value_group=8))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: PrefillH2O(0.0, 0.0), "heavy, recent: 0.0, 0.0; allowed: not both 0"),
    (lambda: PrefillH2O(1.2, 0.1), "heavy: 1.2; allowed: 0..1"),
    (lambda: PrefillH2O(0.2, float("nan")), "recent: nan; allowed"),
    (lambda: PrefillH2O(0.6, 0.5, depth=1), "heavy: 0.6; allowed with recent 0.5"),
    (lambda: PrefillH2O(depth=0.5), "depth: 0.5; allowed: 1 and more"),
    (lambda: pyramid(0.2, 3, 3), "layer: 3; allowed: 0..2"),
])  # fmt: skip
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shares_of_which_nothing_stays(llama):
    with pytest.raises(ValueError, match="nothing of 5 tokens stays in layer 0"):
        run(llama, KVCache(llama, PrefillH2O(0.05, 0.05)), random_ids(1, 5), [5])
