"""FastGen: rules per head, bytes, classes of generated tokens, and what it refuses."""

import pytest
import torch
from cache_runs import check_padding_and_chunks, close, run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import KVCache
from refimpl.kvcache import attention as attention_module
from refimpl.kvcache import fastgen as fastgen_module
from refimpl.kvcache.fastgen import FastGen

SPECIAL, PUNCTUATION = [0, 2], [5, 6, 7, 8]


def make(recovery=0.85, **kwargs):
    return FastGen(SPECIAL, PUNCTUATION, recovery, **kwargs)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", max_position_embeddings=512)


@pytest.mark.parametrize("family", FAMILIES)
def test_recovery_above_one_equals_full_and_a_low_one_does_not(family):
    long = {"max_position_embeddings": 64} | ({"n_positions": 64} if family == "gpt2" else {})
    model, ids, sizes = tiny(family, **long), random_ids(2, 40), [30, 1, 1, 5, 1, 1, 1]
    expected = run(model, KVCache(model), ids, sizes)
    cache = KVCache(model, make(1.01))
    close(run(model, cache, ids, sizes), expected)
    assert cache.held(0).unique().tolist() == [40] and (cache.layers[0].notes["rule"] == 4).all()
    cache = KVCache(model, make(0.5))
    assert (run(model, cache, ids, sizes)[:, 30:] - expected[:, 30:]).abs().max() > 1e-3
    assert cache.held(0).max() < 40


def test_bytes_rise_with_recovery_and_are_the_sum_of_heads(llama):
    held = []
    for recovery in (0.2, 0.4, 0.6, 0.8, 0.9, 1.1):
        cache = KVCache(llama, make(recovery))
        run(llama, cache, random_ids(2, 80), [80])
        slots = sum(int(cache.held(l).sum()) for l in range(3))
        assert cache.nbytes()["payload"] == slots * 2 * 8 * 4
        assert cache.ledger().total(view="payload") == cache.ledger().total(view="resident")
        held.append(slots)
    assert held == sorted(held) and held[0] < held[-1] == 3 * 4 * 80


def test_the_rule_is_the_first_that_recovers_enough(llama):
    """Recovery of every rule from the prompt's whole attention map, row by row."""

    class Seen(FastGen):
        maps = []

        def observe(self, v):
            super().observe(v)
            self.maps.append((v.attn.mean(2), v.notes["rule"][..., 0], v.slot["kind"].clone()))

    ids, n = random_ids(2, 50), 50
    run(llama, KVCache(llama, Seen(SPECIAL, PUNCTUATION, 0.7, frequent=0.1, local=0.2)), ids, [n])
    rules = set()
    for weights, rule, kind in Seen.maps:
        for b, g in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
            a, distance = weights[b, g], torch.arange(n)[:, None] - torch.arange(n)
            special = kind[b, g] == fastgen_module.SPECIAL
            frequent = torch.zeros(n, dtype=torch.bool)
            frequent[a.sum(0).topk(5).indices] = True
            sets = [special, kind[b, g] > 0, (kind[b, g] > 0) | frequent]
            masks = [s.expand(n, n) for s in sets] + [sets[2] | (distance < 10)]
            enough = [(a * mask).sum(1).mean() >= 0.7 for mask in masks] + [True]
            assert int(rule[b, g]) == enough.index(True)
            rules.add(int(rule[b, g]))
    assert len(rules) > 1


def test_blocks_of_queries_give_the_same(llama, monkeypatch):
    ids = random_ids(2, 45)
    whole, blocks = KVCache(llama, make()), KVCache(llama, make())
    expected = run(llama, whole, ids, [40, 1, 4])
    monkeypatch.setattr(attention_module, "BLOCK", 2 * 4 * 40 * 7)
    close(run(llama, blocks, ids, [40, 1, 4]), expected)


def test_generated_tokens_keep_to_the_rule_of_their_head(llama):
    """Tokens of a kept class stay for ever; the local part slides, so that memory stops growing."""
    prompt = random_ids(1, 30)
    tokens = torch.tensor([[5, 9, 10, 0, 11, 12, 6, 13, 14, 15, 16, 17]])
    cache = KVCache(llama, make(0.6, local=0.2, frequent=0.1))
    run(llama, cache, prompt, [30])
    run(llama, cache, tokens, [1] * 12)
    seen = set()
    for l, layer in enumerate(cache.layers):
        counts, rules = cache.held(l)[0].tolist(), layer.notes["rule"].flatten().tolist()
        for pos, rule in zip(layer.pos.flatten().split(counts), rules, strict=True):
            held = set(pos.tolist()) & set(range(30, 42))
            seen.add(rule)
            assert 33 in held  # the special token
            assert {30, 36} <= held or rule == 0
            if rule == 3:
                assert set(range(36, 42)) <= held  # the last 6 = 0.2 of 30
    assert seen & {1, 2, 3}, seen


def test_the_frequent_tokens_are_a_share_of_the_tokens_so_far(llama):
    """Among heads with rule 2, and in a padded row too, where padding is no token."""
    ids, mask = random_ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    ids[ids <= 8], mask[1, :4] = 9, 0  # members of no class
    cache = KVCache(llama, make(0.7, frequent=0.5, local=0.0))
    run(llama, cache, ids, [20] + [1] * 40, mask)
    seen = 0
    for l, layer in enumerate(cache.layers):
        held, rule = cache.held(l), layer.notes["rule"][..., 0]
        for b, tokens in enumerate((60, 56)):
            assert (held[b][rule[b] == 2] == tokens // 2).all()
            seen += int((rule[b] == 2).sum())
    assert seen > 1


def test_padding_and_chunks(llama):
    check_padding_and_chunks(llama, lambda: make(0.7))


def test_a_question_and_beam_search(llama):
    ids = random_ids(2, 40)
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=2, do_sample=False)
    a = llama.generate(ids, past_key_values=KVCache(llama, make(1.1)), **kwargs)
    assert torch.equal(a, llama.generate(ids, past_key_values=KVCache(llama), **kwargs))
    assert llama.generate(ids, past_key_values=KVCache(llama, make(0.6)), **kwargs).shape == a.shape


def test_it_needs_the_ids(llama):
    cache = KVCache(llama, make())
    with pytest.raises(ValueError, match="input_ids: None; FastGen needs them"):
        llama(inputs_embeds=torch.zeros(1, 4, 32), past_key_values=cache)
    assert cache.seen == 0
    run(llama, cache, random_ids(1, 9), [8])
    with pytest.raises(ValueError, match="input_ids: None"):
        llama(inputs_embeds=torch.zeros(1, 1, 32), past_key_values=cache)
    assert cache.seen == 8
    del cache
    assert not llama.get_input_embeddings()._forward_pre_hooks


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"special": [], "punctuation": []}, "both empty"),
    ({"special": [-1]}, "special: .*; allowed: token ids"),
    ({"punctuation": [1.5]}, "punctuation"), ({"recovery": 0}, "recovery: 0"),
    ({"recovery": float("nan")}, "recovery"), ({"frequent": 1.2}, "frequent: 1.2"),
    ({"local": -0.1}, "local: -0.1"),
])  # fmt: skip
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FastGen(**({"special": [0], "punctuation": [5]} | kwargs))
