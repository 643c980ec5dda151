"""Selective Context: identity, the published percentile rule, what it keeps."""

import pytest
import torch

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache.prompt import SelectiveContext, pieces, sentences, tokens, words
from refimpl.kvcache.prompt.harness import qa_items


class Stops:
    """Every fifth id is a full stop."""

    def decode(self, ids):
        return "." if ids[0] % 5 == 0 else f" w{ids[0]}"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen2"])
def test_sentences_are_scored_alone(family):
    pruner = SelectiveContext(tiny(family), Stops(), units=tokens)
    ids = random_ids(24, seed=1)
    parts = torch.tensor(sentences(pieces(Stops(), ids)))
    whole = pruner.self_information(ids)
    assert parts.max() == 1
    for k in range(int(parts.max()) + 1):
        torch.testing.assert_close(
            whole[parts == k], pruner.self_information(ids[parts == k]), atol=1e-5, rtol=0
        )
    document = SelectiveContext(tiny(family), Stops(), units=tokens, scope="document").self_information(ids)
    first = parts == 0
    torch.testing.assert_close(document[first], whole[first], atol=1e-5, rtol=0)
    assert (document - whole)[~first].abs().max() > 0.1


@pytest.mark.parametrize("units", [tokens, words, sentences])
def test_ratio_zero_is_the_identity_and_the_percentile_is_over_units(units):
    pruner = SelectiveContext(tiny("llama"), Stops(), units=units)
    ids = random_ids(30, seed=2)
    assert torch.equal(pruner.prune_ratio(ids, 0.0).keep, torch.arange(30))
    number, scores = pruner.unit_scores(ids)
    for ratio in (0.2, 0.35, 0.5, 0.8):
        keep = pruner.prune_ratio(ids, ratio).keep
        dropped = len(scores) - len(set(number[keep].tolist()))
        assert abs(dropped - ratio * len(scores)) <= 1
        assert scores[number[keep]].min() >= torch.quantile(scores, ratio)


def test_a_budget_is_met_within_one_unit():
    pruner = SelectiveContext(tiny("llama"), Stops(), units=lambda p: [i // 4 for i in range(len(p))])
    for budget in (1, 3, 4, 10, 17, 29, 30):
        kept = len(pruner.prune(random_ids(30), budget).keep)
        assert kept <= budget and (budget - kept < 4 or kept == 30)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_ratios(ratio):
    with pytest.raises(ValueError, match="reduce_ratio"):
        SelectiveContext(tiny("llama"), Stops()).prune_ratio(random_ids(8), ratio)


def test_bad_settings():
    with pytest.raises(ValueError, match="scope: 'paragraph'; allowed: sentence, document"):
        SelectiveContext(tiny("llama"), Stops(), scope="paragraph")
    with pytest.raises(ValueError, match="reduce: 'max'; allowed: mean, sum"):
        SelectiveContext(tiny("llama"), Stops(), reduce="max")


def test_names_and_numbers_are_kept_more_often_than_function_words(bundled):
    model, tokenizer = bundled("llama-nano")
    pruner = SelectiveContext(model, tokenizer, units=words)
    kept = {"names and numbers": [], "function words": []}
    for item in qa_items(6, key="selective"):
        ids = torch.tensor(tokenizer(item.context)["input_ids"])
        stays = torch.zeros(len(ids), dtype=torch.bool)
        stays[pruner.prune(ids, len(ids) // 2).keep] = True
        for piece, stay in zip(pieces(tokenizer, ids), stays.tolist(), strict=True):
            word = piece.strip()
            if word[:1].isupper() and len(word) > 3 or word.isdigit():
                kept["names and numbers"].append(stay)
            elif word in ("a", "the", "of", "is", "in", "and", "to", "by", "at", "for"):
                kept["function words"].append(stay)
    share = {name: sum(values) / len(values) for name, values in kept.items()}
    assert share["names and numbers"] > share["function words"] + 0.2, share
