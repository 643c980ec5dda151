"""LLMLingua: one segment is one shot, the peer's kept ids, budgets, ranking."""

from pathlib import Path

import numpy as np
import pytest
import torch

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache.prompt import LLMLingua, context_budget
from refimpl.kvcache.prompt.harness import ranking_items
from refimpl.kvcache.prompt.units import token_losses

GOLDEN = Path(__file__).parents[1] / "golden" / "llmlingua.npz"
FAMILIES = ("llama", "gpt2", "mistral", "qwen2")


@pytest.mark.parametrize("family", FAMILIES)
def test_one_segment_is_one_shot_by_surprisal(family):
    model, ids = tiny(family), random_ids(20, seed=5)
    losses = token_losses(model, [ids])[0]
    for size in (20, 200):
        pruned = LLMLingua(model, iterative_size=size).prune(ids, 8)
        torch.testing.assert_close(pruned.scores, losses, atol=1e-5, rtol=0)
        assert pruned.keep.tolist() == losses.topk(8).indices.sort().values.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_are_read_behind_what_was_kept(family):
    model, ids = tiny(family), random_ids(24, seed=6)
    pruned = LLMLingua(model, iterative_size=8).prune(ids, 9)
    for start in (8, 16):  # by recomputing without a cache
        before = ids[pruned.keep[pruned.keep < start]]
        row = torch.cat([before, ids[start : start + 8]])
        alone = token_losses(model, [row])[0][len(before) :]
        torch.testing.assert_close(pruned.scores[start : start + 8], alone, atol=1e-4, rtol=0)
    one_shot = LLMLingua(model, iterative_size=24).prune(ids, 9)
    assert (pruned.scores[8:] - one_shot.scores[8:]).abs().max() > 0.1


def test_the_budget_is_met_exactly_and_spread_over_the_segments():
    model, ids = tiny("llama"), random_ids(30, seed=7)
    for size in (4, 7, 30):
        for budget in (1, 2, 9, 15, 22, 29, 30):
            keep = LLMLingua(model, iterative_size=size).prune(ids, budget).keep
            assert len(keep) == budget
            for start in range(0, 30, size):
                inside = int(((keep >= start) & (keep < start + size)).sum())
                assert abs(inside - budget / 30 * min(size, 30 - start)) <= 1


def test_a_segment_of_which_nothing_stays():
    keep = LLMLingua(tiny("llama"), iterative_size=2).prune(random_ids(24), 1).keep
    assert len(keep) == 1


def test_golden_kept_ids_losses_and_ranking_of_the_peer():
    from transformers import GPT2Config, GPT2LMHeadModel

    golden = np.load(GOLDEN)
    config = GPT2Config(vocab_size=120, n_positions=128, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
                        eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    weights = {k.removeprefix("weight "): torch.tensor(golden[k]) for k in golden.files if "weight " in k}
    assert model.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
    model.tie_weights()
    ids = torch.tensor(golden["ids"])  # begins with id 0, our bos
    lingua = LLMLingua(model, iterative_size=len(ids))
    torch.testing.assert_close(
        token_losses(model, [ids[1:]])[0], torch.tensor(golden["losses"]), atol=2e-5, rtol=0
    )
    for ratio in golden["ratios"].tolist():
        peer = torch.isin(ids, torch.tensor(golden[f"kept {ratio}"]))
        count = int(len(ids[1:]) * ratio) - 1  # the peer keeps what lies strictly above its threshold,
        ours = lingua.prune(ids[1:], count).keep
        # ... and says of token i what the loss of token i + 1 says; the last token always stays.
        assert peer[:-1].nonzero()[:, 0].tolist() == ours.tolist() and peer[-1]
    documents = [torch.tensor(d[1:]) for d in golden["documents"]]
    plain = lingua.rank(documents).double()
    asked = lingua.rank(documents, torch.tensor(golden["question"])).double()
    torch.testing.assert_close(plain, torch.tensor(golden["perplexity"]), atol=2e-5, rtol=0)
    torch.testing.assert_close(-asked, torch.tensor(golden["conditional"]), atol=2e-5, rtol=0)


def test_compress_takes_documents_by_rank_until_the_budget_and_the_slack_are_spent():
    model = tiny("llama")
    documents = [random_ids(6, seed=i) for i in range(5)]
    lingua, question = LLMLingua(model, iterative_size=8), random_ids(3, seed=9)
    order = lingua.rank(documents, question).sort(descending=True).indices.tolist()
    for slack, number in ((0, 2), (5, 3), (100, 5)):
        out = lingua.compress(documents, 8, question, slack=slack)
        assert out.documents == sorted(order[:number])
        assert sum(len(p.keep) for p in out.pruned) == 8
        assert all(len(p.scores) == 6 for p in out.pruned)
    everything = lingua.compress(documents, 30, slack=0)
    assert everything.documents == list(range(5)) and all(len(p.keep) == 6 for p in everything.pruned)


def test_spread_leaves_more_of_the_better_documents():
    documents = [random_ids(8, seed=i) for i in range(3)]
    lingua = LLMLingua(tiny("llama"), iterative_size=8)
    order = lingua.rank(documents).sort(descending=True).indices.tolist()
    out = lingua.compress(documents, 12, spread=0.25, slack=100)
    kept = {i: len(p.keep) for i, p in zip(out.documents, out.pruned, strict=True)}
    assert [kept[i] for i in order] == [6, 4, 2]


def test_context_budget():
    assert context_budget(0.5, 10, [60, 50], 20) == 40
    assert context_budget(1.0, 10, [60, 50], 20) == 110
    for rate in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rate"):
            context_budget(rate, 1, [9], 1)
    with pytest.raises(ValueError, match="leaves -15 tokens"):
        context_budget(0.1, 10, [20], 10 - 1)


def test_bad_input():
    model, ids = tiny("llama"), random_ids(10)
    for size in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match="iterative_size"):
            LLMLingua(model, iterative_size=size)
    lingua = LLMLingua(model)
    with pytest.raises(ValueError, match="documents: at least one"):
        lingua.rank([])
    with pytest.raises(ValueError, match="documents: at least one"):
        lingua.compress([], 3)
    with pytest.raises(ValueError, match="budget: 11"):
        lingua.compress([ids], 11)
    for slack, spread in ((-1, 0), (0, -0.1), (0, 1.5), (0, float("nan"))):
        with pytest.raises(ValueError, match="slack, spread"):
            lingua.compress([ids], 5, slack=slack, spread=spread)
    with pytest.raises(ValueError, match="non-empty LongTensor"):
        lingua.prune(ids, 5, torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="take 41 places, the model's context is 32"):
        lingua.prune(random_ids(40), 10)
    with pytest.raises(ValueError, match="lower budget or iterative_size"):
        LLMLingua(model, iterative_size=10).prune(random_ids(60), 50)


def test_a_prompt_longer_than_the_context_is_pruned_if_what_stays_fits():
    assert len(LLMLingua(tiny("gpt2"), iterative_size=8).prune(random_ids(90), 20).keep) == 20


def test_the_question_finds_its_document_better_than_perplexity_does(bundled):
    model, tokenizer = bundled("llama-nano")
    lingua, places = LLMLingua(model), {"plain": [], "asked": []}
    encode = lambda text: torch.tensor(tokenizer(text)["input_ids"])
    for texts, question, gold in ranking_items(3):
        documents = [encode(text) for text in texts]
        for name, asked in (("plain", None), ("asked", encode(f"\nQuestion: {question}\n"))):
            scores = lingua.rank(documents, asked)
            places[name].append(int((scores > scores[gold]).sum()))
    assert np.mean(places["asked"]) + 1 < np.mean(places["plain"])
