"""The study of chapter 4's trained systems: its glue, its script in small, and what is stored of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_scripts import load_script

from refimpl.models import load
from refimpl.quantization.harness import Probe, change, measure
from refimpl.quantization.study import (
    compare,
    drawn,
    fact_questions,
    fact_rows,
    measure_heads,
    mixed_ids,
    new_facts,
)
from refimpl.quantization.texts import evaluation_ids
from refimpl.results import changed_sources
from refimpl.world.names import names
from refimpl.world.relations import parse_question

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "data" / "results" / "quantization"


@pytest.fixture(scope="module")
def nano():
    return load("llama-nano")


@pytest.fixture(scope="module")
def script():
    return load_script("quantization_trained")


@pytest.fixture(scope="module", params=["trained", "trained-llama-mini", "trained-gpt2-mini"])
def stored(request):
    return json.loads((RESULTS / f"{request.param}.json").read_text())


def test_rows_are_of_both_kinds_and_differ_between_seeds(nano):
    _, tokenizer = nano
    rows = [mixed_ids(tokenizer, 4, 32, seed) for seed in range(3)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not any(torch.equal(x, y) for x in rows[a] for y in rows[b])
    stories = evaluation_ids(tokenizer, 4, 32)
    assert not any(torch.equal(x, y) for x in rows[0] for y in stories)
    batches = drawn(rows[0], 3, seed=1)
    assert torch.equal(batches(5), drawn(rows[0], 3, seed=1)(5))
    assert all(any(torch.equal(row, known) for known in rows[0]) for row in batches(0))
    with pytest.raises(ValueError, match="n must be even"):
        mixed_ids(tokenizer, 3, 32)


def test_facts_are_about_people_who_were_never_seen_and_asked_in_new_wording(nano):
    _, tokenizer = nano
    facts = new_facts(20)
    assert len(facts) == 60 and {person for person, _ in facts} <= set(names("eval")) - set(names("train"))
    asked = [tokenizer.decode(prompt[1:]) for prompt, _ in fact_questions(tokenizer, facts)]
    for text, (person, relation) in zip(asked, facts, strict=True):
        assert parse_question(text.split("Question: ")[1].split("\n")[0])[:2] == (relation, person)
    rows = fact_rows(tokenizer, facts, 40)
    learnt = "".join(tokenizer.decode(row[row > 1]) for row in rows["input_ids"])
    assert not any(text.split("\n")[0] in learnt for text in asked)
    right = (rows["labels"] == rows["input_ids"]) | (rows["labels"] == -100)
    assert right.all() and (rows["labels"] >= 0).any(1).all()
    with pytest.raises(ValueError, match="people must be"):
        new_facts(481)
    with pytest.raises(ValueError, match="length must hold"):
        fact_rows(tokenizer, facts, 1, length=4)


def test_several_heads_are_measured_as_one_model_is(nano):
    model, tokenizer = nano
    documents = {"stories": evaluation_ids(tokenizer, 3, 32)}
    probe = Probe(documents, {"facts": fact_questions(tokenizer, new_facts(3))})
    plain = measure(model, probe)
    heads = lambda ids: {"model": model(ids).logits.log_softmax(-1)}
    found = measure_heads(heads, probe, batch=2)["model"]
    assert np.allclose(found.nll["stories"], plain.nll["stories"], atol=1e-5)
    assert np.array_equal(found.exact["facts"], plain.exact["facts"])
    assert np.allclose(found.answer_nll["facts"], plain.answer_nll["facts"], atol=1e-4)


def test_an_ordering_holds_only_where_all_seeds_agree():
    rng = np.random.default_rng(0)
    old = rng.normal(size=(3, 50))
    assert compare(old - 1, old)["holds"] and compare(old + 1, old)["holds"]
    assert not compare(old, old)["holds"]
    one_differs = old - np.array([[3.0], [3.0], [-0.1]])
    found = compare(one_differs, old)
    assert found["hi"] < 0 and found["by_seed"][2] > 0 and not found["holds"]
    assert not compare(old[:2] - 1, old[:2])["holds"]  # two seeds are not three
    with pytest.raises(ValueError, match=r"\[S, n\]"):
        compare(old[0], old[0])


def test_a_small_cell_runs_and_is_recognised_until_its_settings_change(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    key = ("llama-nano", "head-sensitivity", 1)
    assert not script.made(key)
    row = script.cell(key, True, "cpu")
    assert set(row["arms"]) == {"uncompressed", "with norm, 2", "without norm, 2", "random, 2"}
    for arm in row["arms"].values():
        assert {kind: len(values) for kind, values in arm["nll"].items()} == {"stories": 2, "topics": 2}
    state = script.state_of(key[1])
    script.path_of(key).write_text(json.dumps({**row, "cell": key, **state}))
    assert script.made(key)
    changed = state | {"settings": {**state["settings"], "calibration": 1}}
    script.path_of(key).write_text(json.dumps({**row, "cell": key, **changed}))
    assert not script.made(key)


def test_a_systems_sources_hold_every_module_that_its_arms_call(script):
    def called(code):
        yield from code.co_names
        for constant in code.co_consts:
            if hasattr(constant, "co_names"):
                yield from called(constant)

    for name, system in script.SYSTEMS.items():
        files = set(script.sources_of(name))
        assert "refimpl/quantization/texts.py" in files and all((ROOT / file).is_file() for file in files)
        for what in called(system.arms.__code__):
            module = getattr(vars(script).get(what), "__module__", None) or ""
            if module.startswith(script.FOLLOWED):
                assert module.replace(".", "/") + ".py" in files, (name, what)
    assert "refimpl/quantization/nf4.py" not in script.sources_of("bonsai")


def test_what_is_stored_is_of_these_sources_and_settings(script, stored):
    assert changed_sources(stored, ROOT) == []
    for name, found in stored["systems"].items():
        assert found["settings"] == script.state_of(name, stored["model"])["settings"]
    assert len(stored["systems"]) == len(script.SYSTEMS) and not stored["missing"]


def test_what_is_stored_has_all_its_fields(script, stored):
    sizes = {"stories": stored["documents"]["n"], "topics": stored["documents"]["n"]}
    for name, found in stored["systems"].items():
        pairs = script.SYSTEMS[name].compared(found["settings"], found["arms"])
        assert set(found["pairs"]) == {f"{a} - {b}" for a, b in pairs}
        for arm in found["arms"].values():
            for row in arm["by_seed"].values():
                assert set(row) >= {"nll", "numbers", "items"}
                assert {kind: len(values) for kind, values in row["nll"].items()} == sizes
                assert all(set(answers) <= {0, 1} for answers in row["items"].values())


def test_pairs_follow_from_the_stored_values(stored):
    for found in stored["systems"].values():
        name, pair = next(iter(found["pairs"].items()))
        a, b = (
            np.array([row["nll"]["topics"] for row in found["arms"][arm]["by_seed"].values()])
            for arm in name.split(" - ")
        )
        moved, told = change(a.mean(0), b.mean(0)), pair["topics"]
        assert told["by_seed"] == pytest.approx((a - b).mean(1), abs=1e-3)
        assert (told["value"], told["lo"], told["hi"]) == pytest.approx(
            (moved.value, moved.lo, moved.hi), abs=1e-3
        )
        same_sign = len(a) >= 3 and len(set(np.sign(told["by_seed"]))) == 1
        assert told["holds"] == ((told["lo"] > 0 or told["hi"] < 0) and same_sign)
