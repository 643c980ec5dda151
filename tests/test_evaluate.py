"""The evaluation harness against brute force, scipy, transformers' generate and lm-evaluation-harness."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close

from refimpl import checks
from refimpl.checks.tiny import tiny
from refimpl.evaluate import (
    ChoiceItem,
    Scores,
    bits_per_byte,
    book_score,
    bootstrap,
    candidate_rank,
    choice_logps,
    evaluate,
    exact_match,
    greedy_answers,
    kl_to_reference,
    multiple_choice,
    normalise_answer,
    paired_bootstrap,
    perplexity,
    score_documents,
    token_f1,
    token_nll,
    weights_hash,
    wilson,
)

VOCAB, CONTEXT = 320, 64
TEXTS = [
    "Mara put the red kite on the shelf. The wind was strong.",
    "Once, a fox asked the owl: who keeps the bridge at night? Nobody, said the owl; nobody ever does. " * 3,
    "Grüße aus dem Tal — ça va?",
]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    return tiny(request.param, vocab_size=VOCAB, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def tokenizer():
    """Ids 0 and 1 are special, 2..257 the bytes, then three merges, so that tokens and bytes differ."""
    import transformers

    letters = ["<|endoftext|>", "<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    vocab = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


def random_text(n, seed=0):
    return torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def rng(seed=0):
    return np.random.default_rng(seed)


def uniform(vocab):
    return lambda ids: torch.zeros(*ids.shape, vocab, dtype=torch.float64)


# --- token_nll, perplexity, bits per byte


@pytest.mark.parametrize("name", ["token_nll", "corpus_perplexity"])
def test_the_checks_pass(name):
    checks.run(name)


def test_full_context_equals_scoring_token_by_token(model):
    ids, length = random_text(300), 16
    nll, seen = token_nll(model, ids, max_len=length, ctx=length)
    text = torch.cat([torch.zeros(1, dtype=torch.long), ids])
    with torch.no_grad():
        brute = [
            -model(text[None, max(0, i - length) : i]).logits[0, -1].log_softmax(-1)[text[i]]
            for i in range(1, 301)
        ]
    assert_close(nll, torch.stack(brute), atol=1e-5, rtol=0)
    assert seen.tolist() == [min(i, length) for i in range(1, 301)]
    est = perplexity(model, [ids], max_len=length, ctx=length, rng=rng())
    assert est.value == pytest.approx(float(torch.stack(brute).mean().exp()), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batching_does_not_change_scores(model, batch_size):
    ids = random_text(200)
    expected, _ = token_nll(model, ids, ctx=20, batch_size=8)
    assert_close(token_nll(model, ids, ctx=20, batch_size=batch_size)[0], expected, atol=1e-5, rtol=0)


def test_a_window_that_holds_the_text_is_the_loss_of_transformers(model):
    ids = random_text(50)
    row = torch.cat([torch.zeros(1, dtype=torch.long), ids])[None]
    loss = model(row, labels=row).loss.item()  # the mean over the 50 shifted labels
    assert token_nll(model, ids)[0].mean().item() == pytest.approx(loss, abs=1e-5)


def test_the_rolling_windows_are_those_of_lm_evaluation_harness(model):
    """Its rule, written out: the prefix token and the first L-1 tokens predict the first L; then each block
    of up to L tokens is predicted behind the tokens before it, always from L inputs."""
    ids, length = random_text(150).tolist(), 64
    expected, position = [], 0
    while position < len(ids):
        block = ids[position : position + length]
        end = position + len(block)
        inputs = ([0] + ids)[max(0, end - length) : end]
        with torch.no_grad():
            logits = model(torch.tensor([inputs])).logits[0].double().numpy()
        scores = logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)
        expected += [-scores[len(inputs) - len(block) + j, token] for j, token in enumerate(block)]
        position = end
    nll, seen = token_nll(model, ids, max_len=length, ctx=1)
    np.testing.assert_allclose(nll.numpy(), expected, atol=1e-5)
    assert int(seen[64]) == 1 and int(seen[128]) == 43  # the third block of 22 sees 42 tokens more


def test_more_context_gives_other_scores(model):
    ids = random_text(200)
    assert (token_nll(model, ids, ctx=1)[0] - token_nll(model, ids, ctx=60)[0]).abs().max() > 1e-3


def test_uniform_bytes_cost_eight_bits_per_byte_whatever_the_tokens():
    class Bytes:
        def __init__(self, width):
            self.width = width

        def __call__(self, text, add_special_tokens):
            data = text.encode()
            parts = [data[i : i + self.width] for i in range(0, len(data), self.width)]
            return {"input_ids": [int.from_bytes(part, "big") for part in parts]}

    texts = ["abcdef", "some words, 16 B"]
    for width in (1, 2):
        est = bits_per_byte(uniform(256**width), Bytes(width), texts, max_len=4, rng=rng())
        assert (est.value, est.lo, est.hi) == pytest.approx((8, 8, 8), abs=1e-12) and est.n == 2


def test_bits_per_byte_divides_sums(model, tokenizer):
    est = bits_per_byte(model, tokenizer, TEXTS, rng=rng())
    nats = sum(float(token_nll(model, tokenizer(t)["input_ids"])[0].sum()) for t in TEXTS)
    n_bytes = sum(len(t.encode()) for t in TEXTS)
    assert est.value == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    assert est.lo < est.value < est.hi


def test_book_score_averages_books_of_equal_tokens(model, tokenizer):
    books = [TEXTS[0] + TEXTS[1] * 3, TEXTS[1] * 4]
    est = book_score(model, tokenizer, books, n_tokens=128, max_len=64, rng=rng())
    heads = [tokenizer.decode(tokenizer(book)["input_ids"][:128]) for book in books]
    each = [bits_per_byte(model, tokenizer, [head], rng=rng()).value for head in heads]
    assert est.value == pytest.approx(np.mean(each), rel=1e-6)
    with pytest.raises(ValueError, match=r"books\[0\] has"):
        book_score(model, tokenizer, books, n_tokens=5000, max_len=64, rng=rng())


def test_a_model_in_training_mode_is_scored_without_dropout_and_left_in_training_mode():
    noisy = tiny("gpt2", vocab_size=VOCAB, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected, _ = token_nll(noisy, random_text(30))
    noisy.train()
    noisy.transformer.h[0].eval()
    assert torch.equal(token_nll(noisy, random_text(30))[0], expected)
    assert noisy.training and noisy.transformer.h[1].training and not noisy.transformer.h[0].training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": []}, "non-empty"),
        ({"ids": [[1, 2]]}, "shape"),
        ({"ids": [1.5]}, "integers"),
        ({"ids": [-1]}, "non-negative"),
        ({"ids": [5, VOCAB]}, "vocabulary"),
        ({"ids": [VOCAB, 5]}, "vocabulary"),
        ({"ctx": 0}, "ctx"),
        ({"ctx": 65}, "ctx"),
        ({"max_len": 0}, "max_len"),
        ({"max_len": CONTEXT + 1}, "exceeds"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        token_nll(model, **({"ids": [2, 3, 4, VOCAB - 1, 2]} | arguments))


def test_functions_and_texts_need_what_they_need(tokenizer):
    with pytest.raises(ValueError, match="max_len must be given"):
        token_nll(uniform(8), [1, 2])
    with pytest.raises(ValueError, match="logits must be"):
        token_nll(lambda ids: torch.zeros(ids.shape[0], 8), [1, 2], max_len=4)
    with pytest.raises(ValueError, match=r"texts\[1\] is empty"):
        bits_per_byte(uniform(300), tokenizer, ["a", ""], max_len=8, rng=rng())
    with pytest.raises(ValueError, match="no document"):
        perplexity(uniform(8), [], max_len=4, rng=rng())
    with pytest.raises(TypeError, match="rng"):
        perplexity(uniform(8), [[1]], max_len=4, rng=torch.Generator())


# --- KL


def test_kl_of_a_model_to_itself_is_zero(model):
    out = kl_to_reference(model, model, random_text(100))
    assert all((values == 0).all() for values in out.values())


def test_kl_equals_its_definition_and_bounds_total_variation(model):
    other = tiny(model.config.model_type, seed=1, vocab_size=VOCAB, max_position_embeddings=CONTEXT)
    ids = random_text(60)
    out = kl_to_reference(other, model, ids)
    row = torch.cat([torch.zeros(1, dtype=torch.long), ids])[None]
    with torch.no_grad():
        p, q = (m(row[:, :-1]).logits[0].double().softmax(-1).numpy() for m in (model, other))
    np.testing.assert_allclose(out["kl"], scipy.stats.entropy(p, q, axis=-1), atol=1e-5)
    np.testing.assert_allclose(out["reverse_kl"], scipy.stats.entropy(q, p, axis=-1), atol=1e-5)
    assert (np.abs(p - q).sum(-1) / 2 <= np.sqrt(out["kl"] / 2) + 1e-6).all()
    delta = token_nll(other, ids)[0] - token_nll(model, ids)[0]
    np.testing.assert_allclose(out["delta_nll"], delta, atol=1e-5)
    np.testing.assert_array_equal(out["flip"], p.argmax(-1) != q.argmax(-1))


def test_kl_ignores_a_constant_shift_and_survives_zero_probabilities(model):
    shifted = kl_to_reference(lambda ids: model(ids).logits + 3, model, random_text(40))
    assert np.abs(shifted["kl"]).max() < 1e-5 and shifted["flip"].max() == 0

    def never_two(ids):
        logits = torch.zeros(*ids.shape, 4)
        logits[..., 2] = -math.inf
        return logits

    out = kl_to_reference(uniform(4), never_two, [1, 3], max_len=4)
    np.testing.assert_allclose(out["kl"], math.log(4 / 3), rtol=1e-6)
    with pytest.raises(ValueError, match="vocabulary"):
        kl_to_reference(uniform(4), uniform(5), [1, 3], max_len=4)


# --- Multiple choice, ranks


ITEMS = [
    ChoiceItem("The fox lives in", (" the wood", " a hut", " Rome"), 1),
    ChoiceItem("Mara has a", (" kite", " k", " cat and a dog"), 0),
    ChoiceItem("Who sings?\nAnswer:", (" the owl", " owls"), 0),
]


def test_choice_scores_equal_one_forward_per_choice(model, tokenizer):
    logps, lengths = choice_logps(model, tokenizer, ITEMS, batch_size=4)
    for item, got, n_tokens in zip(ITEMS, logps, lengths, strict=True):
        for choice, value, n in zip(item.choices, got, n_tokens, strict=True):
            prompt, ending = (tokenizer(t)["input_ids"] for t in (item.prompt, choice))
            row = torch.tensor([[0, *prompt, *ending]])
            with torch.no_grad():
                logp = model(row).logits[0].log_softmax(-1)
            expected = sum(float(logp[len(prompt) + j, t]) for j, t in enumerate(ending))
            assert value == pytest.approx(expected, abs=1e-5) and n == len(ending)


def test_choices_of_one_token_share_one_forward_pass(tokenizer):
    rows = []

    def counting(ids):
        rows.append(ids.shape[0])
        return torch.zeros(*ids.shape, 300)

    item = ChoiceItem("It is the letter", tuple("abcdefgh"), 0)
    choice_logps(counting, tokenizer, [item], max_len=64)
    assert sum(rows) == 1


def test_accuracy_rules_divide_by_what_they_say(tokenizer):
    """Every token costs ln 300, so the sum prefers the fewest tokens (" the" is one token)."""
    out = multiple_choice(uniform(300), tokenizer, ITEMS, max_len=64, unconditional="Answer:")
    assert out["acc"].values.tolist() == [0.0, 0.0, 1.0]  # tokens 6 6 5, 5 2 14, 5 5; the first of equals
    assert out["acc_norm"].values.tolist() == [0.0, 0.0, 1.0]  # per character 6/8 is less than 6/5 and 5/4
    assert out["acc_pmi"].values.tolist() == [0.0, 1.0, 1.0]  # nothing gained by any: the first counts
    assert set(out) == {"acc", "acc_norm", "acc_bytes", "acc_pmi"}


def test_permuting_choices_changes_nothing(model, tokenizer):
    turned = [ChoiceItem(i.prompt, i.choices[::-1], len(i.choices) - 1 - i.answer) for i in ITEMS]
    a, b = (multiple_choice(model, tokenizer, items) for items in (ITEMS, turned))
    assert all((a[m].values == b[m].values).all() for m in a)
    np.testing.assert_array_equal(*(candidate_rank(model, tokenizer, items) for items in (ITEMS, turned)))


def test_candidate_rank_counts_better_candidates_per_token(model, tokenizer):
    logps, lengths = choice_logps(model, tokenizer, ITEMS)
    expected = [
        1 + sum(s > score[item.answer] for s in score)
        for item, score in zip(ITEMS, (a / b for a, b in zip(logps, lengths, strict=True)), strict=True)
    ]
    assert candidate_rank(model, tokenizer, ITEMS).tolist() == expected
    assert candidate_rank(uniform(300), tokenizer, ITEMS, max_len=64).tolist() == [2.0, 2.0, 1.5]


def test_bad_items_are_refused(model, tokenizer):
    for prompt, choices, answer in [("a ", (" b", " c"), 0), ("a", (" b",), 0), ("a", (" b", " c"), 2)]:
        with pytest.raises(ValueError):
            ChoiceItem(prompt, choices, answer)
    long = ChoiceItem("a" * 70, (" b", " c"), 0)
    with pytest.raises(ValueError, match=r"items\[0\] needs"):
        choice_logps(model, tokenizer, [long])
    with pytest.raises(ValueError, match="no token of its own"):
        choice_logps(model, tokenizer, [ChoiceItem(" t", ("he", "x"), 0)])
    with pytest.raises(ValueError, match="empty"):
        multiple_choice(model, tokenizer, [])


# --- Answers


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
def test_greedy_answers_equal_generate_on_left_padded_batches(family):
    model = tiny(family, vocab_size=VOCAB, max_position_embeddings=CONTEXT, attention="sdpa")
    prompts = [random_text(n, seed=n).tolist() for n in (9, 3, 30, 1, 17, 30)]
    rows = [[0, *p] for p in prompts]
    width = max(map(len, rows))
    padded = torch.tensor([[1] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    kwargs = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    out = model.generate(padded, attention_mask=mask, eos_token_id=VOCAB, **kwargs)[:, width:]
    free = greedy_answers(model, prompts, 12, stop_ids=())
    assert free == out.tolist()
    alone = [model.generate(torch.tensor([row]), eos_token_id=VOCAB, **kwargs)[0].tolist() for row in rows]
    alone = [out[len(row) :] for out, row in zip(alone, rows, strict=True)]
    assert greedy_answers(model, prompts, 12, stop_ids=(), batch_size=4) == alone
    stops = (free[0][3], free[2][5])
    expected = [row[: next((t for t, x in enumerate(row) if x in stops), 12)] for row in free]
    assert greedy_answers(model, prompts, 12, stop_ids=stops) == expected
    assert len({tuple(row) for row in free}) > 2, "the test needs answers that differ"


def test_greedy_answers_refuse_what_does_not_fit(model):
    with pytest.raises(ValueError, match=r"prompts\[1\]: 61 \+ 4 new tokens"):
        greedy_answers(model, [[2], [2] * 60], 4)
    with pytest.raises(ValueError, match="vocabulary"):
        greedy_answers(model, [[VOCAB]], 4)
    with pytest.raises(ValueError, match="max_new"):
        greedy_answers(model, [[2]], 0)
    assert greedy_answers(model, [], 4) == []


def test_answers_are_compared_as_squad_does():
    assert normalise_answer("An  apple, THE pear!") == "apple pear"
    assert exact_match("The Theatre", "theatre") and not exact_match("theatres", "theatre")
    assert token_f1("blue blue boat", ["red boat", "blue boat"]) == pytest.approx(0.8)
    assert token_f1("the", "") == 1.0 and token_f1("cat", "") == 0.0
    with pytest.raises(ValueError, match="gold"):
        exact_match("x", [])


# --- Statistics


def test_wilson_equals_scipy():
    for k, n in [(0, 20), (3, 20), (20, 20), (950, 1000)]:
        ci = scipy.stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        est = wilson(k, n)
        assert (est.lo, est.hi) == pytest.approx((ci.low, ci.high), abs=1e-12)
    with pytest.raises(ValueError, match="k=3, n=2"):
        wilson(3, 2)


def test_bootstrap_equals_scipy_for_the_same_indices():
    x, y = rng(1).normal(size=60), rng(2).normal(size=60)
    options = {"n_resamples": 500, "method": "percentile", "vectorized": True}
    ci = scipy.stats.bootstrap((x,), np.mean, rng=rng(5), **options).confidence_interval
    est = bootstrap(x, rng=rng(5), n_boot=500)
    assert (est.lo, est.hi) == pytest.approx((ci.low, ci.high), abs=1e-14)
    ci = scipy.stats.bootstrap(
        (x, y), lambda a, b, axis: (a - b).mean(axis), paired=True, rng=rng(5), **options
    ).confidence_interval
    est = paired_bootstrap(x, y, rng=rng(5), n_boot=500)
    assert (est.lo, est.hi) == pytest.approx((ci.low, ci.high), abs=1e-12)
    size = rng(3).uniform(1, 9, size=60)
    ci = scipy.stats.bootstrap(
        (x, size), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, rng=rng(5), **options
    ).confidence_interval
    est = bootstrap(x, size, rng=rng(5), n_boot=500)
    assert (est.lo, est.hi) == pytest.approx((ci.low, ci.high), abs=1e-12)


def test_intervals_cover_the_truth_about_95_times_in_100():
    draws, hits, ratio_hits = rng(0), 0, 0
    for _ in range(400):
        x, size = draws.exponential(size=200), draws.uniform(1, 3, size=200)
        est = bootstrap(x, rng=draws, n_boot=400)
        ratio = bootstrap(size * draws.exponential(size=200), size, rng=draws, n_boot=400)
        hits += est.lo <= 1 <= est.hi
        ratio_hits += ratio.lo <= 1 <= ratio.hi
    assert 0.92 <= hits / 400 <= 0.98 and 0.92 <= ratio_hits / 400 <= 0.98


def test_resampling_in_chunks_leaves_the_interval_as_it_is():
    x = rng(0).normal(size=30_000)  # 66 resamples to a chunk
    est = bootstrap(x, rng=rng(1), n_boot=100)
    means = x[rng(1).integers(0, 30_000, size=(100, 30_000))].mean(1)
    assert (est.lo, est.hi) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-14)


def test_seeds_widen_the_interval():
    items = rng(0).normal(size=50)
    seeds = items + np.array([[-1.0], [0.0], [1.0]])
    one, three = bootstrap(items, rng=rng(1)), bootstrap(seeds, rng=rng(1))
    assert three.hi - three.lo > 1.5 * (one.hi - one.lo)
    assert (three.n, three.seeds, one.seeds) == (50, 3, 1)


def test_identical_systems_differ_by_exactly_nothing_and_reruns_agree():
    x = rng(0).normal(size=40)
    est = paired_bootstrap(x, x, rng=rng(1))
    assert (est.value, est.lo, est.hi) == (0.0, 0.0, 0.0)
    assert bootstrap(x, rng=rng(1)) == bootstrap(x, rng=rng(1)) != bootstrap(x, rng=rng(2))


def test_pairing_narrows_the_interval():
    x = rng(0).normal(size=100)
    y = x - 0.1
    paired = paired_bootstrap(x, y, rng=rng(1))
    assert paired.lo > 0
    assert bootstrap(x, rng=rng(1)).lo < bootstrap(y, rng=rng(1)).hi


def test_one_item_gives_no_interval_and_bad_numbers_are_refused():
    assert math.isnan(bootstrap([3.0], rng=rng()).lo)
    for values, denominators, message in [
        ([], None, "non-empty"),
        ([1, math.nan], None, "finite, got nan"),
        ([1, 2], [1, 0], "positive"),
        ([1, 2], [1], "shape"),
        ([[[1]]], None, "dimensions"),
    ]:
        with pytest.raises(ValueError, match=message):
            bootstrap(values, denominators, rng=rng())
    with pytest.raises(ValueError, match="same items"):
        paired_bootstrap([1, 2], [1, 2, 3], rng=rng())
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence=95)


# --- evaluate


def test_reports_compare_models_item_by_item(model, tokenizer):
    other = tiny(model.config.model_type, seed=1, vocab_size=VOCAB, max_position_embeddings=CONTEXT)
    suite = [
        lambda m: {"bits_per_byte": score_documents(m, tokenizer, TEXTS)},
        lambda m: multiple_choice(m, tokenizer, ITEMS),
    ]
    a, b = evaluate(model, suite), evaluate(other, suite)
    assert [row.metric for row in a.rows] == ["bits_per_byte", "acc", "acc_norm", "acc_bytes"]
    assert a["bits_per_byte"].value == pytest.approx(bits_per_byte(model, tokenizer, TEXTS, rng=rng()).value)
    assert a.model_hash == weights_hash(model) != b.model_hash and a.dtype == "torch.float32"
    gap = a.diff(b)["bits_per_byte"]
    assert gap.value == pytest.approx(a["bits_per_byte"].value - b["bits_per_byte"].value)
    assert all((d.value, d.lo, d.hi) == (0, 0, 0) for d in a.diff(a).values())
    fewer = evaluate(other, [lambda m: {"bits_per_byte": score_documents(m, tokenizer, TEXTS[:2])}, suite[1]])
    with pytest.raises(ValueError, match="different items"):
        a.diff(fewer)
    with pytest.raises(ValueError, match="different metrics"):
        a.diff(evaluate(model, suite[:1]))
    with pytest.raises(KeyError, match="no metric 'bpb'"):
        a["bpb"]
    assert re.search(r"acc_norm +[\d.]+ \[", str(a))


def test_suites_with_repeated_names_are_refused():
    metric = lambda m: {"x": Scores(np.ones(2), ("a", "b"))}  # noqa: E731
    with pytest.raises(ValueError, match="two metrics"):
        evaluate(uniform(4), [metric, metric])
    with pytest.raises(ValueError, match="empty"):
        evaluate(uniform(4), [])
    with pytest.raises(ValueError, match="entries"):
        Scores(np.ones(3), ("a", "b"))


def test_importing_the_harness_does_not_import_transformers():
    rooms = "refimpl.evaluate, refimpl.ledger, refimpl.corpus"
    code = f"import sys, {rooms}; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Peer


def test_lm_evaluation_harness_gives_the_same_numbers(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def task(name, rows, body):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / name}.jsonl\n{body}"
        )

    metrics = "".join(f"  - metric: {m}\n" for m in ("bits_per_byte", "byte_perplexity", "word_perplexity"))
    task(
        "rolling",
        [{"text": t} for t in TEXTS],
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        f"metric_list:\n{metrics}",
    )
    task(
        "choice",
        [  # the prefix token is written out: the harness puts none before prompts
            {"q": "<|endoftext|>" + i.prompt, "c": [c.lstrip() for c in i.choices], "a": i.answer}
            for i in ITEMS
        ],
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: a\n'
        'target_delimiter: " "\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n',
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=CONTEXT, device="cpu")
    out = lm_eval.simple_evaluate(
        model=lm,
        tasks=["rolling", "choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        num_fewshot=0,
        bootstrap_iters=0,
        log_samples=True,
    )
    peer = out["results"]["rolling"]
    bpb = bits_per_byte(model, tokenizer, TEXTS, rng=rng()).value
    words = sum(len(re.split(r"\s+", t)) for t in TEXTS)
    n_bytes = sum(len(t.encode()) for t in TEXTS)
    assert bpb == pytest.approx(peer["bits_per_byte,none"], rel=1e-6)
    assert 2**bpb == pytest.approx(peer["byte_perplexity,none"], rel=1e-6)
    assert 2 ** (bpb * n_bytes / words) == pytest.approx(peer["word_perplexity,none"], rel=1e-5)

    ours = multiple_choice(model, tokenizer, ITEMS)
    for metric in ("acc", "acc_norm"):
        assert ours[metric].values.mean() == pytest.approx(out["results"]["choice"][f"{metric},none"])
    logps, _ = choice_logps(model, tokenizer, ITEMS)
    for sample in out["samples"]["choice"]:
        peer_logps = [r[0] for r in sample["filtered_resps"]]
        assert peer_logps == pytest.approx(logps[sample["doc_id"]].tolist(), abs=1e-5)
