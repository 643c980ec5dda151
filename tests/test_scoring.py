"""Scores of short texts and samples, against the slow way of getting them."""

import numpy as np
import pytest
import torch

from refimpl.checks.tiny import tiny
from refimpl.scoring import PAD, head_scores, repeated_ids, sample, score_completions

FAMILIES = ("gpt2", "llama")


@pytest.fixture(params=FAMILIES)
def model(request):
    model = tiny(request.param)
    with torch.no_grad():  # sharper than at initialization: greedy choices far from ties
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 3
    return model


def some_ids(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[0, *torch.randint(2, 30, (n - 1,), generator=generator).tolist()] for n in lengths]


@torch.no_grad()
def test_scores_equal_one_forward_per_item(model):
    items = list(zip(some_ids(3, 9, 1, 5), ([7], [8, 9, 2], [4, 4], [11]), strict=True))
    # Also an answer that greedy decoding does give.
    greedy = sample(model, [items[1][0]], 3, torch.Generator(), temperature=1e-6, stop=-1)[0]
    items.append((items[1][0], greedy))
    expected = []
    for prompt, completion in items:
        logps = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        picked = logps[range(len(completion)), completion]
        expected.append((-picked.sum().item(), logps.argmax(-1).tolist() == completion))
    for max_tokens in (1, 16, 1000):
        scores = score_completions(model, items, max_tokens)
        assert scores.nll == pytest.approx([nll for nll, _ in expected], abs=1e-4)
        assert scores.exact.tolist() == [exact for _, exact in expected]
        assert scores.tokens.tolist() == [1, 3, 2, 1, 3]
    assert scores.exact[-1]


@pytest.mark.parametrize("max_rows", [1, 2, 250])
def test_a_prompt_gets_the_same_continuation_alone_and_in_a_batch(model, max_rows):
    """Greedily: with padding on the left, rows that end early, and rows that leave the batch."""
    prompts = some_ids(4, 8, 5, 2, 8, 3, seed=1)
    options = {"temperature": 1e-6, "stop": -1}
    free = [sample(model, [p], 12, torch.Generator(), **options)[0] for p in prompts]
    options["stop"] = free[2][3]
    alone = [row[: row.index(options["stop"])] if options["stop"] in row else row for row in free]
    assert len({len(row) for row in alone}) > 1, "every row ends at the same step: the test shows nothing"
    assert sample(model, prompts, 12, torch.Generator(), max_rows=max_rows, **options) == alone


def test_samples_follow_the_models_distribution(model):
    prompt = some_ids(4)[0]
    with torch.no_grad():
        probability = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).numpy()
    n = 4000
    found = sample(model, [prompt] * n, 1, torch.Generator().manual_seed(0), stop=-1, max_rows=1000)
    share = np.bincount([row[0] for row in found], minlength=len(probability)) / n
    assert np.abs(share - probability).max() < 4 * np.sqrt(0.25 / n)
    again = sample(model, [prompt] * n, 1, torch.Generator().manual_seed(0), stop=-1, max_rows=1000)
    other = sample(model, [prompt] * n, 1, torch.Generator().manual_seed(1), stop=-1, max_rows=1000)
    assert found == again != other


def test_repeated_ids_hold_the_same_tokens_twice():
    ids = repeated_ids(3, 10, 400, torch.Generator().manual_seed(0))
    assert ids.shape == (3, 21) and (ids[:, 0] == 0).all() and (ids[:, 1:] != PAD).all()
    assert torch.equal(ids[:, 1:11], ids[:, 11:]) and ids[:, 1:].min() >= 300


@torch.no_grad()
def test_head_scores_are_means_of_attention_patterns():
    model = tiny("llama", attention="eager")
    ids = torch.tensor([[0, 7, 8, 9, 7, 8, 9]])
    scores = head_scores(model, ids)
    attention = torch.stack([a[0] for a in model(ids, output_attentions=True).attentions])  # [L, H, T, T]
    # Position 4 repeats position 1: what came after it is position 2; so 5 -> 3 and 6 -> 4.
    induction = (attention[:, :, 4, 2] + attention[:, :, 5, 3] + attention[:, :, 6, 4]) / 3
    np.testing.assert_allclose(scores.induction, induction, atol=1e-6)
    previous = sum(attention[:, :, t, t - 1] for t in range(2, 7)) / 5
    np.testing.assert_allclose(scores.previous, previous, atol=1e-6)
    with pytest.raises(ValueError, match="eager"):
        head_scores(tiny("llama", attention="sdpa"), ids)
