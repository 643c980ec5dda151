"""LLMLingua-2: annotation, filters, the student, and what ships."""

import json

import numpy as np
import pytest
import torch

from refimpl.checks.tiny import random_ids
from refimpl.kvcache.prompt import LLMLingua2, TokenClassifier, distill, load_classifier
from refimpl.kvcache.prompt.annotation import Annotation, annotate, lemma, split_words, trusted
from refimpl.kvcache.prompt.llmlingua2 import _chunks, save_classifier
from refimpl.models import tokenizer_from
from refimpl.paths import data_file
from refimpl.world.rng import Rng


class Letters:
    def decode(self, ids):
        return "." if ids[0] % 5 == 0 else f" w{ids[0]}"


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_from(data_file("models", "tokenizer.json"))


@pytest.fixture(scope="module")
def shipped():
    if not data_file("adapters", "llmlingua2.safetensors").exists():
        pytest.skip("data/adapters/llmlingua2.safetensors does not exist yet")
    return load_classifier()


def tiny_classifier(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TokenClassifier(**({"vocab": 48, "width": 16, "layers": 2, "context": 24} | changes)).eval()


# --- annotation and filters ---------------------------------------------------------------------------------


def test_every_label_has_its_own_word_in_the_compression():
    rng = Rng("labels")
    vocabulary = [f"w{i}" for i in range(9)]
    for _ in range(200):
        original = [rng.choice(vocabulary) for _ in range(rng.between(1, 40))]
        compressed = [rng.choice([*vocabulary, "new"]) for _ in range(rng.between(0, 40))]
        window = rng.between(1, 12)
        found = annotate(original, compressed, window=window)
        kept = [w for w, label in zip(original, found.labels, strict=True) if label]
        for word in set(kept):
            assert kept.count(word) <= compressed.count(word)
        if compressed:
            assert found.variation == pytest.approx(
                sum(w not in original for w in compressed) / len(compressed)
            )
        assert found.gap >= -1e-12


def test_a_compression_by_deletion_is_labelled_with_no_gap():
    rng = Rng("deletion")
    for _ in range(100):
        original = [f"w{rng.below(50)}" for _ in range(60)]
        kept = [w for w in original if rng.chance(0.5)]
        found = annotate(original, kept)
        assert found.variation == 0 and found.gap == pytest.approx(0) and sum(found.labels) == len(kept)


def test_filters_remove_exactly_the_corrupted_tenths():
    texts = [distill.make_text(Rng("filter", i), "train", longest=60) for i in range(100)]
    teacher = distill.WorldTeacher()
    pairs = []
    for i, text in enumerate(texts):
        kept = teacher(text).split()
        if i % 10 == 3:  # reworded
            kept = [f"{w}x" if j % 2 else w for j, w in enumerate(kept)]
        if i % 10 == 7 and i != 97:  # stuttered: 9 of the 90 that are left
            kept = [w for w in kept for _ in range(3)]
        pairs.append(annotate(split_words(text), kept))
    removed = sorted(set(range(100)) - set(trusted(pairs)))
    assert removed == sorted([i for i in range(100) if i % 10 == 3] + [i for i in range(97) if i % 10 == 7])


def test_filters_survive_ties_and_refuse_bad_shares():
    clean = [Annotation([True], 0.0, 1.0, 1.0)] * 20  # the 90th percentile is 0: a rule with >= drops all
    assert trusted(clean) == list(range(17)) and trusted(clean, 0.0) == list(range(20)) and trusted([]) == []
    for worst in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="worst"):
            trusted(clean, worst)


def test_annotate_refuses_nothing_and_no_window():
    with pytest.raises(ValueError, match="original: empty"):
        annotate([], ["a"])
    with pytest.raises(ValueError, match="window: 0"):
        annotate(["a"], ["a"], window=0)
    assert lemma("boss") == "boss" and lemma("Cities") == lemma("cities")


# --- the teacher --------------------------------------------------------------------------------------------


def test_the_teacher_keeps_the_facts_and_drops_the_fillers():
    teacher = distill.WorldTeacher()
    for i in range(20):
        text = distill.make_text(Rng("teacher", i), "eval" if i % 2 else "train")
        short = teacher(text)
        assert 0 < len(short) < 0.8 * len(text)
        words = split_words(short)
        for sentence in text.removesuffix(".").split(". "):
            facts = distill.sentence_facts(sentence + ".")
            for fact in facts:
                assert set(split_words(fact[2])) - distill._EMPTY - {"The"} <= set(words), fact
        assert "quiet" not in words and "weather" not in words
        found = annotate(split_words(text), words)
        assert found.variation == 0 and found.gap == pytest.approx(0, abs=0.02)


def test_noise_gives_the_filters_work(tokenizer):
    texts = [distill.make_text(Rng("noise", i), "train", longest=60) for i in range(100)]
    pairs = distill.make_pairs(texts, distill.Noisy(distill.WorldTeacher(), Rng("n")), tokenizer)
    left = distill.keep_trusted(pairs)
    assert len(left) == 81
    assert max(p.annotation.variation for p in left) < 0.3 < max(p.annotation.variation for p in pairs)
    assert max(p.annotation.gap for p in left) < 0.3 < max(p.annotation.gap for p in pairs)


def test_labels_of_words_reach_all_their_tokens(tokenizer):
    pair = distill.make_pairs(["Marras lives in Redcar."], lambda text: "Marras Redcar", tokenizer)[0]
    kept = tokenizer.decode([i for i, label in zip(pair.ids, pair.labels, strict=True) if label])
    assert kept == "Marras Redcar"


# --- the student --------------------------------------------------------------------------------------------


def test_padding_changes_nothing_and_causal_means_causal():
    ids = random_ids(2, 12)
    for causal in (False, True):
        model = tiny_classifier(causal=causal)
        mask = torch.ones(2, 12)
        mask[1, 9:] = 0
        with torch.no_grad():
            both = model(ids, mask)
            torch.testing.assert_close(both[1, :9], model(ids[1:, :9])[0], atol=1e-5, rtol=0)
            changed = ids.clone()
            changed[0, 11] = 3 if ids[0, 11] != 3 else 4
            difference = (model(changed, mask) - both)[0, :11].abs().max()
        assert difference == 0 if causal else difference > 1e-4
    with pytest.raises(ValueError, match="ids: 25 tokens, but the classifier's context is 24"):
        model(random_ids(1, 25))


def test_the_student_learns_and_the_global_random_state_stays(tokenizer):
    texts = [distill.make_text(Rng("learn", i), "train", longest=30) for i in range(24)]
    pairs = distill.make_pairs(texts, distill.WorldTeacher(), tokenizer)
    state = torch.random.get_rng_state()
    runs = [
        distill.train(pairs, seed=1, steps=25, batch=8, layers=1, width=32, context=128) for _ in range(2)
    ]
    assert torch.equal(state, torch.random.get_rng_state())
    (model, losses), (_, again) = runs
    assert losses == again and losses[-1] < 0.8 * losses[0] and not model.training
    for bad in ({"pairs": [], "steps": 3}, {"pairs": pairs, "steps": 0}):
        with pytest.raises(ValueError, match="pairs, steps"):
            distill.train(seed=0, **bad)


def test_f1_at_equal_counts():
    pair = distill.Pair([1, 2, 3, 4], [1, 0, 1, 0], annotate(["a"], ["a"]))
    scores = [torch.tensor([0.9, 0.8, 0.1, 0.0]), torch.tensor([0.9, 0.1, 0.8, 0.0])]
    assert distill.f1(scores, [pair, pair]).tolist() == [0.5, 1.0]


def test_saving_rounds_to_float16_and_nothing_else(tmp_path):
    model = tiny_classifier(causal=True)
    save_classifier(model, tmp_path / "c.safetensors")
    again = load_classifier(tmp_path / "c.safetensors")
    assert again.geometry == model.geometry and again.causal and not again.training
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.half().float())
    with pytest.raises(FileNotFoundError, match="train one with data/kvcache_llmlingua2.py"):
        load_classifier(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no geometry"):
        load_classifier(tmp_path / "other.safetensors")


# --- pruning ------------------------------------------------------------------------------------------------


def test_long_texts_are_read_in_chunks_that_end_with_a_sentence():
    texts = ([" a"] * 5 + ["."]) * 4
    assert _chunks(texts, 24) == [(0, 24)] and _chunks(texts, 23) == [(0, 18), (18, 24)]
    assert _chunks(texts, 13) == [(0, 12), (12, 24)]
    assert _chunks([" a"] * 10, 4) == [(0, 4), (4, 8), (8, 10)]
    ids = random_ids(60, seed=3)
    pruner = LLMLingua2(tiny_classifier(), Letters())
    p = pruner.keep_probability(ids)
    first, last = _chunks([Letters().decode([i]) for i in ids.tolist()], 24)[1]
    torch.testing.assert_close(p[first:last], pruner.keep_probability(ids[first:last]), atol=1e-5, rtol=0)
    assert len(pruner.prune(ids, 30).keep) <= 30


def test_forced_words_stay_and_too_many_are_refused():
    ids = random_ids(30, seed=4)
    ids[20] = 6  # else two full stops in a row, which are one word ".."
    stops = (ids % 5 == 0).nonzero()[:, 0].tolist()
    pruner = LLMLingua2(tiny_classifier(context=64), Letters(), force={"."})
    assert set(stops) <= set(pruner.prune(ids, len(stops) + 2).keep.tolist())
    with pytest.raises(ValueError, match=f"force and force_digits keep take {len(stops)}"):
        pruner.prune(ids, len(stops) - 1)
    with pytest.raises(ValueError, match="take"):
        LLMLingua2(tiny_classifier(context=64), Letters(), force_digits=True).prune(ids, 10)
    with pytest.raises(TypeError, match="force: expected a collection"):
        LLMLingua2(tiny_classifier(), Letters(), force=".")


def test_what_ships_is_small_logged_and_better_than_surprisal(shipped):
    path = data_file("adapters", "llmlingua2.safetensors")
    assert path.stat().st_size <= 3 * 2**20 and not shipped.causal
    log = json.loads(path.with_suffix(".json").read_text())
    assert {"command", "date", "hardware", "seed", "texts", "steps"} <= set(log)
    for split in ("train", "eval"):
        assert log["f1"][f"{split}: surprisal of llama-mini"]["gap"][1] > 0  # the paired interval excludes 0
        assert f"{split}: causal student" in log["f1"]  # the ablation, whichever way it went


def test_the_shipped_classifier_reaches_its_logged_f1(shipped, tokenizer):
    log = json.loads(data_file("adapters", "llmlingua2.json").read_text())
    for split in ("train", "eval"):
        n = min(20, len(log["f1_items"][split]["student"]))
        texts = [distill.make_text(Rng("llmlingua2 test", i), split) for i in range(n)]
        gold = distill.make_pairs(texts, distill.WorldTeacher(), tokenizer)
        pruner = LLMLingua2(shipped, tokenizer)
        scores = [pruner.keep_probability(torch.tensor(p.ids)) for p in gold]
        stored = np.array(log["f1_items"][split]["student"][:n])
        assert np.abs(distill.f1(scores, gold) - stored).mean() < 0.005


def test_the_shipped_classifier_keeps_names_and_drops_fillers(shipped, tokenizer):
    ids = torch.tensor(
        tokenizer("Marras lives in Ripon. It was a quiet day. Marras works as a baker.")["input_ids"]
    )
    text = tokenizer.decode(LLMLingua2(shipped, tokenizer).prune(ids, len(ids) // 2).ids(ids))
    assert "Marras" in text and "Ripon" in text and "quiet" not in text
