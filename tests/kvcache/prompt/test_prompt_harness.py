"""The harness of the prompt pruners: items, baselines, measurements."""

import numpy as np
import pytest
import torch

from refimpl.kvcache.prompt import harness
from refimpl.kvcache.prompt.harness import (
    Item,
    evaluate,
    gain,
    grid,
    qa_items,
    random_words,
    ranking_items,
    truncate,
)
from refimpl.world.documents import read_passage
from refimpl.world.memory_relations import FILLERS


def test_items_are_the_same_every_time_and_answered_by_their_context():
    items = qa_items(20)
    assert items == qa_items(20) and items != qa_items(20, key="other")
    for item in items:
        assert read_passage(item.context)[1] == "eval"
        assert item.question.endswith(("?", ".")) and item.answer
    padded = qa_items(20, fillers=1.0)
    assert all(any(f in item.context for f in FILLERS) for item in padded)
    for bad in ({"n": 0}, {"n": 1, "fillers": -0.1}, {"n": 1, "fillers": float("nan")}):
        with pytest.raises(ValueError, match="n, fillers"):
            qa_items(**bad)


def test_ranking_tasks_hold_one_gold_document():
    for n, documents in ((0, 12), (3, 1)):
        with pytest.raises(ValueError, match="n, documents"):
            ranking_items(n, documents)
    for documents, question, gold in ranking_items(10):
        assert len(documents) == 12 and 0 <= gold < 12
        name = max((w for w in question.replace("?", " ").split() if w in documents[gold]), key=len)
        assert name in documents[gold]


def test_baselines_keep_exactly_or_nearly_the_budget(bundled):
    _, tokenizer = bundled("llama-nano")
    ids = torch.tensor(tokenizer(qa_items(1)[0].context)["input_ids"])
    assert truncate(ids, 10).keep.tolist() == list(range(10))
    one = random_words(tokenizer, torch.Generator().manual_seed(0))(ids, 40).keep
    two = random_words(tokenizer, torch.Generator().manual_seed(0))(ids, 40).keep
    assert torch.equal(one, two) and 36 <= len(one) <= 40


def test_pruning_nothing_is_the_full_prompt_and_counts_are_right(bundled):
    model, tokenizer = bundled("llama-nano")
    items = qa_items(4)
    cells = grid(model, tokenizer, items, {"truncation": truncate}, ratios=(1.0, 0.5))
    full, same, half = cells["full", 1.0], cells["truncation", 1.0], cells["truncation", 0.5]
    np.testing.assert_allclose(full.nll, same.nll, atol=1e-5)
    assert (full.exact == same.exact).all() and (full.kept == same.kept).all()
    assert (half.kept == full.kept // 2).all()
    accuracy, loss = gain(full, full, np.random.default_rng(0))
    assert accuracy.value == loss.value == 0
    blank = lambda ids, budget, question: harness.Pruned(torch.arange(0), torch.zeros(len(ids)))
    assert evaluate(model, tokenizer, items, blank, 0.5).nll.mean() > full.nll.mean()  # the context matters


def test_bad_input(bundled):
    model, tokenizer = bundled("llama-nano")
    for items, ratio in (([], 0.5), ([Item("a", "b", "c")], 0), ([Item("a", "b", "c")], 1.5)):
        with pytest.raises(ValueError, match="items, ratio"):
            evaluate(model, tokenizer, items, truncate, ratio)
