"""Units and what all pruners share."""

import pytest
import torch

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache.prompt import (
    LLMLingua,
    LLMLingua2,
    Pruned,
    SelectiveContext,
    TokenClassifier,
    harness,
    phrases,
    pieces,
    sentences,
    tokens,
    words,
)
from refimpl.kvcache.prompt.annotation import split_words
from refimpl.kvcache.prompt.units import (
    best_units,
    check_prompt,
    token_losses,
    unit_mean,
    unit_numbers,
    unit_sum,
)
from refimpl.models import tokenizer_from
from refimpl.paths import data_file
from refimpl.world.formats import BY_NAME
from refimpl.world.rng import Rng


class Letters:
    def decode(self, ids):
        return f" w{ids[0]}"


def _written(parts, units):
    """The text of each unit."""
    out = [""] * (units[-1] + 1)
    for part, unit in zip(parts, units, strict=True):
        out[unit] += part
    return out


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_from(data_file("models", "tokenizer.json"))


def _methods():
    model, classifier = tiny("llama"), TokenClassifier(vocab=48, width=16, layers=1)
    blind = [
        SelectiveContext(model, Letters()).prune,
        LLMLingua(model, iterative_size=8).prune,
        LLMLingua2(classifier, Letters()).prune,
        harness.truncate,
        harness.random_words(Letters(), torch.Generator().manual_seed(0)),
        harness.random_tokens(torch.Generator().manual_seed(0)),
    ]
    return blind


@pytest.mark.parametrize("number", range(6))
def test_every_method_gives_a_subsequence_within_the_budget_and_everything_at_full_budget(number):
    prune, ids = _methods()[number], random_ids(20, seed=4)
    for budget in (1, 7, 13, 20):
        pruned = prune(ids, budget)
        assert pruned.keep.dtype == torch.long and pruned.scores.shape == ids.shape
        assert (pruned.keep.diff() > 0).all() and len(pruned.keep) == budget  # units are single tokens here
        assert torch.equal(pruned.ids(ids), ids[pruned.keep])
        assert torch.equal(prune(ids, 20).keep, torch.arange(20))


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(
    ("ids", "budget", "error", "message"),
    [
        (torch.tensor([], dtype=torch.long), 1, ValueError, "non-empty LongTensor"),
        (torch.zeros(2, 3, dtype=torch.long), 1, ValueError, r"\[2, 3\]"),
        (torch.zeros(5), 1, ValueError, "float32"),
        ([1, 2, 3], 1, ValueError, "got list"),
        (random_ids(5), 0, ValueError, "budget: 0 tokens; the prompt has 5, allowed: 1 to 5"),
        (random_ids(5), 6, ValueError, "budget: 6 tokens"),
        (random_ids(5), -1, ValueError, "budget: -1"),
        (random_ids(5), 2.5, TypeError, "budget: .*int.*2.5"),
        (random_ids(5), float("nan"), TypeError, "nan"),
        (random_ids(5), True, TypeError, "True"),
    ],
)
def test_bad_prompts_and_budgets_are_refused(number, ids, budget, error, message):
    with pytest.raises(error, match=message):
        _methods()[number](ids, budget)


def test_words_are_those_of_the_text(tokenizer):
    for i in range(30):
        text = BY_NAME["biography"].document(Rng("units", i), "eval" if i % 2 else "train").strip()
        parts = pieces(tokenizer, torch.tensor(tokenizer(text)["input_ids"]))
        assert "".join(parts) == text
        units = words(parts)
        assert [w.strip() for w in _written(parts, units)] == split_words(text)


def test_lines_and_leading_spaces(tokenizer):
    text = "Context:\n[1] He isn't here.\n\nWhy?"
    parts = pieces(tokenizer, torch.tensor(tokenizer(text)["input_ids"]))
    units = words(parts)
    assert [w.strip(" ") for w in _written(parts, units)] == [
        "Context", ":", "\n", "[", "1", "]", "He", "isn't", "here", ".", "\n\n", "Why", "?",
    ]  # fmt: skip


def test_sentences_end_with_marks_and_lines_but_not_with_abbreviations():
    parts = [" Mr", ".", " Fox", " left", ".", " Why", "?", " e", ".g", ".", " so", ".", "\n", "New"]
    assert sentences(parts) == [0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The old baker of Ripon left .", ["The old baker", "of", "Ripon", "left", "."]),
        ("He got a strange tent in May 1974 .", ["He", "got", "a strange tent", "in", "May 1974", "."]),
        ("Korrin plays the piano", ["Korrin", "plays", "the piano"]),
        ("The the green", ["The", "the green"]),
    ],
)
def test_phrases(text, expected):
    parts = [(" " if i else "") + word for i, word in enumerate(text.split())]
    units = phrases(parts)
    assert [w.strip() for w in _written(parts, units)] == expected


def test_units_of_nothing_and_bad_unit_functions():
    assert tokens([]) == words([]) == phrases([]) == sentences([]) == []
    for bad in (lambda p: [1] * len(p), lambda p: [0], lambda p: [0, 2, 2], lambda p: [0, 1, 0]):
        with pytest.raises(ValueError, match="units: expected 3 numbers"):
            unit_numbers(["a", "b", "c"], bad)


def test_unit_sums_means_and_ties():
    units = torch.tensor([0, 0, 1, 2, 2, 2])
    values = torch.tensor([1.0, 3.0, 5.0, 0.0, 3.0, 6.0])
    assert unit_sum(values, units).tolist() == [4, 5, 9] and unit_mean(values, units).tolist() == [2, 5, 3]
    assert best_units(torch.ones(3), units, 3).tolist() == [0, 1, 2]  # of equal scores the earlier
    assert best_units(torch.tensor([1.0, 0.0, 2.0]), units, 4).tolist() == [3, 4, 5]  # unit 0 no longer fits
    assert best_units(torch.tensor([1.0, 0.0, 2.0]), units, 2).tolist() == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen2"])
def test_token_losses_sum_to_the_loss_of_the_sequence(family):
    model = tiny(family)
    rows = [random_ids(n, seed=n) for n in (9, 3, 1, 17)]
    for row, losses in zip(rows, token_losses(model, rows), strict=True):
        ids = torch.cat([torch.tensor([0]), row])[None]
        with torch.no_grad():
            whole = model(input_ids=ids, labels=ids).loss * len(row)
        assert losses.sum().item() == pytest.approx(whole.item(), abs=1e-4)
    with pytest.raises(ValueError, match="rows\\[1\\]: 32 tokens and bos, but the model's context is 32"):
        token_losses(model, [rows[0], random_ids(32)])


def test_pruned_refuses_another_prompt():
    with pytest.raises(ValueError, match="ids: \\[2\\]"):
        Pruned(torch.tensor([0]), torch.zeros(3)).ids(torch.tensor([1, 2]))
    check_prompt(torch.tensor([4]), 1)
