"""Instructions: answers against independent computations, held-out combinations."""

from __future__ import annotations

import json

import pytest

from refimpl.world.instruction_tasks import COMBINATIONS, KINDS, TASKS, held_out, plural
from refimpl.world.instructions import FORMATS
from refimpl.world.rng import Rng

FMT = FORMATS[0]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_parse_inverts_render(split):
    for i in range(1500):
        facts = FMT.sample(Rng("instruction test", split, i), split)
        assert json.loads(json.dumps(facts)) == facts
        text = FMT.render(facts, Rng("surface", i))
        assert FMT.parse(text) == facts, text
        assert FMT.prompt(text)[1].startswith(" ")
        assert held_out(facts["task"], facts["kind_of_input"]) == (split == "eval")


def test_answers_by_other_means():
    seen = set()
    for i in range(4000):
        facts = FMT.sample(Rng("means", i), "train")
        answer = FMT.prompt(FMT.render(facts, Rng("x")))[1][1:]
        words, task = facts["words"], facts["task"]
        seen.add(task)
        got = answer.split()
        if task == "reverse":
            assert list(reversed(got)) == words
        elif task == "sort":
            assert all(a <= b for a, b in zip(got, got[1:], strict=False)) and set(got) == set(words)
        elif task == "count":
            assert "zero one two three four five six seven eight".split().index(answer) == len(words)
        elif task == "member":
            assert answer == ("yes" if f" {facts['a']} " in f" {' '.join(words)} " else "no")
        elif task in ("select", "drop"):
            pool = KINDS[facts["kind"]]
            assert all((w in pool) == (task == "select") for w in got) and 0 < len(got) < len(words)
        elif task == "odd":
            assert answer not in KINDS[facts["main"]] and answer in words
        elif task == "longest":
            assert sum(len(w) == len(answer) for w in words) == 1 and all(
                len(w) <= len(answer) for w in words
            )
        elif task == "take":
            assert words[: len(got)] == got and len(got) == {"two": 2, "three": 3, "four": 4}[facts["n"]]
    assert seen == set(TASKS)


def test_there_are_thirty_tasks_with_held_out_combinations():
    assert len(TASKS) >= 30 and all(len(t.forms.templates) == 3 for t in TASKS.values())
    assert not set(COMBINATIONS["train"]) & set(COMBINATIONS["eval"])
    share = len(COMBINATIONS["eval"]) / sum(map(len, COMBINATIONS.values()))
    assert 0.1 < share < 0.2
    for task in TASKS:  # every task is learnt, on some types of input
        assert any(t == task for t, _ in COMBINATIONS["train"])


def test_kinds_are_disjoint():
    words = [w for k in KINDS.values() for w in k]
    assert len(words) == len(set(words))


def test_yes_and_no_are_balanced():
    answers = [
        FMT.prompt(FMT.render(f, Rng("x")))[1]
        for f in (FMT.sample(Rng("yn", i), "train") for i in range(8000))
        if f["task"] in ("member", "absent")
    ]
    assert 0.4 < answers.count(" yes") / len(answers) < 0.6


def test_plural_and_wrong_answers():
    assert [plural(w) for w in ("wolf", "bus", "brush", "donkey")] == [
        "wolves",
        "buses",
        "brushes",
        "donkeys",
    ]
    for text in (
        "<|user|> Sort these words: b a\n<|assistant|> b a\n",
        "Sort these words: b a\n",
        "<|user|> Sing.\n",
    ):
        with pytest.raises(ValueError):
            FMT.parse(text)
