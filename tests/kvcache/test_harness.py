"""The harness: what it measures, against the plain model and by hand."""

import numpy as np
import pytest
import torch

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache import Full, KVCache, Window, release
from refimpl.kvcache.harness import difference, recall, reference, stream
from refimpl.kvcache.texts import Fact, documents, facts, text_of
from refimpl.models import load

LONG = {"max_position_embeddings": 128}


@pytest.fixture(scope="module")
def model():
    return tiny("llama", **LONG)


@pytest.fixture(scope="module")
def tokenizer():
    return load("llama-nano")[1]


def test_the_full_cache_gives_the_models_own_nll(model):
    ids = random_ids(2, 30)
    found = stream(model, KVCache(model), ids, 12, reference(model, ids, 12))
    release(model)
    with torch.no_grad():
        log_p = model(ids, use_cache=False).logits.log_softmax(-1)
    nll = -log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(found.nll, nll[:, 12:], atol=1e-4)
    assert found.kl.abs().max() < 1e-5 and found.error.max() < 1e-5
    token = 2 * 3 * 2 * 2 * 8 * 4  # rows, layers, K and V, heads, D, float32
    assert found.held == pytest.approx(np.mean([n * (token + 3 * 4) for n in range(13, 30)]))
    assert found.peak == 29 * (token + 3 * 4) and found.moved == 0
    assert found.read == pytest.approx(np.mean([n * token for n in range(13, 30)]))


def test_an_evicting_cache_differs_and_peaks_at_its_prompt(model):
    ids = random_ids(2, 30)
    against = reference(model, ids, 20)
    found = stream(model, KVCache(model, Window(4)), ids, 20, against)
    assert found.kl.mean() > 0.01 and bool((found.error.mean(0) > 0.01).all())
    token = 2 * 2 * 2 * 8 * 4 + 4  # of one layer
    assert found.held == 3 * 4 * token
    assert found.peak == (4 + 4 + 20) * token  # layers evict one after another: only one holds the prompt
    assert found.nll.shape == found.kl.shape == (2, 9) and found.error.shape == (2, 3)


def test_recall_is_that_of_greedy_decoding(model):
    items = [Fact(random_ids(1, 12, seed=i), random_ids(1, 3, seed=9 + i), random_ids(1, 2, seed=20 + i))
             for i in range(3)]  # fmt: skip
    greedy = []
    for item in items:
        release(model)
        prompt = torch.cat((item.context, item.question), 1)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2,
                             do_sample=False, eos_token_id=None)  # fmt: skip
        greedy.append(Fact(item.context, item.question, out[:, -2:]))
    for question in ("inside", "after"):
        full = recall(model, lambda n: KVCache(model), greedy, question)
        assert full.exact.tolist() == [1, 1, 1] and full.nll.shape == (3,)
        assert recall(model, lambda n: KVCache(model), items, question).exact.sum() < 3
    seen = []
    recall(model, lambda n: seen.append(n) or KVCache(model, Window(n // 2)), greedy, "after")
    assert seen == [12, 12, 12]
    inside, after = (
        recall(model, lambda n: KVCache(model, Window(4)), greedy, q) for q in ("inside", "after")
    )
    assert (inside.nll != after.nll).any()


def test_texts(tokenizer):
    ids = documents(tokenizer, "stories", 3, 64)
    assert ids.shape == (3, 64) and ids[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    assert len({tuple(row.tolist()) for row in ids}) == 3
    assert torch.equal(ids, documents(tokenizer, "stories", 3, 64))
    assert not torch.equal(ids, documents(tokenizer, "stories", 3, 64, seed=1))
    assert len(text_of(tokenizer, "topics", 500)) == 500
    item = facts(tokenizer, 2, words=60, n_facts=3)[1]
    text = tokenizer.decode(item.context[0])
    name = tokenizer.decode(item.question[0]).removeprefix("Question: What is the code of ").split("?")[0]
    assert f"The code of {name} is{tokenizer.decode(item.answer[0])}." in text
    assert text.count("The code of") == 3 and item.context[0, 0] == tokenizer.bos_token_id


def test_differences_are_paired():
    a, b = torch.randn(40, generator=torch.Generator().manual_seed(0)), torch.full((40,), 0.5)
    found = difference(a + b, a)
    assert found.value == pytest.approx(0.5) and found.lo > 0.49 and found.hi < 0.51 and found.n == 40


def test_what_is_refused(model, tokenizer):
    ids = random_ids(1, 10)
    for prompt in (0, 9, -1):
        with pytest.raises(ValueError, match=r"prompt: .*; allowed: 1\.\.8"):
            stream(model, KVCache(model), ids, prompt)
    cache = KVCache(model)
    stream(model, cache, ids, 4)
    with pytest.raises(ValueError, match="allowed: an empty one"):
        stream(model, cache, ids, 4)
    with pytest.raises(ValueError, match=r"against: of \[1, 5\] tokens; allowed: \[1, 4\]"):
        stream(model, KVCache(model, Full()), ids, 5, reference(model, ids, 4))
    with pytest.raises(ValueError, match="items: none"):
        recall(model, lambda n: KVCache(model), [])
    with pytest.raises(ValueError, match="question: 'before'; allowed: inside, after"):
        recall(model, lambda n: KVCache(model), [Fact(ids, ids, ids)], "before")
    with pytest.raises(ValueError, match="kind: 'books'; allowed: stories, topics"):
        text_of(tokenizer, "books", 5)
    with pytest.raises(ValueError, match="n: 0"):
        text_of(tokenizer, "stories", 0)
