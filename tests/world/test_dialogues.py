"""Dialogues: round trips, gold labels, questions by brute force, long dialogues."""

from __future__ import annotations

import json

import pytest

from refimpl.world.dialogue_events import EVENT_IMPORTANCE
from refimpl.world.dialogue_phrases import ACTS
from refimpl.world.dialogue_questions import QUESTIONS, UNKNOWN, Log
from refimpl.world.dialogue_sessions import sample_dialogue, turns_of
from refimpl.world.dialogue_turns import say, understand
from refimpl.world.dialogues import FORMATS
from refimpl.world.long_dialogues import QUESTION_TYPES, long_dialogue
from refimpl.world.names import names
from refimpl.world.rng import Rng
from refimpl.world.session_dates import FUTURE_OFFSETS, PAST_OFFSETS, long_date, relative, resolve, shift
from refimpl.world.streams import DISTANCES, fact_injection, stream

BY_NAME = {f.name: f for f in FORMATS}


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_parse_inverts_render(fmt, split):
    for i in range(120):
        facts = fmt.sample(Rng("dialogue test", fmt.name, split, i), split)
        assert json.loads(json.dumps(facts)) == facts
        texts = {fmt.render(facts, Rng("surface", i, j)) for j in range(3)}
        for text in texts:
            assert fmt.parse(text) == facts, text
            if fmt.boundary:
                prompt, completion = fmt.prompt(text)
                assert completion.startswith(" ") and completion[1] not in " \n" and not prompt.endswith(" ")


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.boundary], ids=lambda f: f.name)
def test_a_wrong_completion_is_refused(fmt):
    text = fmt.document(Rng("wrong", fmt.name))
    prompt, completion = fmt.prompt(text)
    for wrong in (prompt + " nonsense\n", prompt + completion + " and more\n", "nothing of the kind\n"):
        with pytest.raises(ValueError):
            fmt.parse(wrong)


def test_every_act_reads_back_in_every_form():
    values = {
        "town": "Ripon",
        "job": "actor",
        "company": "Falcon",
        "animal": "ox",
        "pet": "Tor",
        "food": "jam",
        "hobby": "chess",
        "color": "red",
        "object": "axe",
        "weather": "windy",
        "kin": "aunt",
        "name": "Balbert",
    }
    for act, spec in ACTS.items():
        for template in spec.phrases.templates:
            fields = {k for k in values if f"{{{k}}}" in template or f"{{a_{k}}}" in template}
            fields |= {"kin", "name"} if "ho}" in template else set()
            turn = {"by": "user", "act": act, "mood": "sad", **{k: values[k] for k in fields}}
            if "hen}" in template:
                turn["when"] = "1987-03-06" if act == "plan_trip" else "1987-02-25"
            form = ACTS[act].phrases.templates.index(template)
            seen = {
                say(turn, "1987-03-02", _Fixed(form, len(spec.phrases.templates)), known=k)
                for k in (False, True)
            }
            for text in seen:
                assert understand(text, "1987-03-02", ("aunt", "Balbert")) == turn, text


class _Fixed:
    """An Rng whose draws all point at one template, so that every form is seen."""

    def __init__(self, form: int, n: int) -> None:
        self.value = (form + 0.5) / n

    def random(self) -> float:
        return self.value

    def choice(self, seq):
        return seq[int(self.value * len(seq))]


def test_relative_dates_resolve_on_every_weekday():
    for day in range(7):
        today = shift("1987-03-02", day)
        for offset in {*PAST_OFFSETS, *FUTURE_OFFSETS}:
            for i in range(4):
                phrase = relative(today, shift(today, offset), Rng("r", day, offset, i))
                assert resolve(today, phrase) == shift(today, offset), phrase
    assert long_date("1987-03-02") == "Monday 2 March 1987"
    with pytest.raises(ValueError, match="no relative phrase"):
        relative("1987-03-02", "1987-01-01", Rng("r"))
    with pytest.raises(ValueError, match="not a relative date"):
        resolve("1987-03-02", "some day")


def test_boundaries_are_topic_changes():
    for i in range(50):
        dialogue, _ = sample_dialogue(Rng("seg", i), "train", 3, (8, 16))
        for session in dialogue["sessions"]:
            topics = [s["topic"] for s in session["segments"]]
            assert all(a != b for a, b in zip(topics, topics[1:], strict=False))


def test_facts_change_without_contradiction():
    changed = 0
    for i in range(60):
        dialogue, _ = sample_dialogue(Rng("change", i), "train", 6, (8, 16))
        home, moved_on, dead = None, "", set()
        for _, today, turn in turns_of(dialogue):
            if turn["act"] == "moved":
                assert moved_on < turn["when"] < today
                changed += home is not None
                home, moved_on = turn["town"], turn["when"]
            elif turn["act"] == "lives":
                assert home in (None, turn["town"])
                home = turn["town"]
            elif turn["act"] == "pet_died":
                dead.add(turn["pet"])
            elif turn["act"] in ("pet_news", "has_pet"):
                assert turn["pet"] not in dead
    assert changed > 30


def test_answers_equal_a_scan_of_the_dialogue():
    seen = set()
    for i in range(400):
        facts = BY_NAME["dialogue_qa"].sample(Rng("scan", i), "train")
        text = BY_NAME["dialogue_qa"].render(facts, Rng("scan text", i))
        answer = text.rstrip("\n").rsplit("<|assistant|> ", 1)[1]
        question, turns = facts["question"], [t for _, _, t in turns_of(facts) if t["by"] == "user"]
        seen.add(question["ask"])
        if question["ask"] == "home":
            told = [t["town"] for t in turns if t["act"] in ("lives", "moved")]
            assert answer == (told[-1] if told else UNKNOWN)
        elif question["ask"] == "when_bought":
            days = [t["when"] for t in turns if t["act"] == "bought" and t["object"] == question["object"]]
            assert answer == (long_date(days[0]) if days else UNKNOWN)
        elif question["ask"] == "count_moves":
            assert answer == "zero one two three four five".split()[sum(t["act"] == "moved" for t in turns)]
    assert len(seen) > 15


def test_held_out_question_forms():
    for split in ("train", "eval"):
        for i in range(100):
            q = BY_NAME["dialogue_qa"].sample(Rng("form", i), split)["question"]
            assert (q["form"] == len(QUESTIONS[q["ask"]].templates) - 1) == (split == "eval")


def test_eval_names_only_in_eval():
    train, evaluation = set(names("train")), set(names("eval"))
    for i in range(40):
        assert BY_NAME["dialogue"].sample(Rng("n", i), "train")["user"] in train
        assert BY_NAME["dialogue"].sample(Rng("n", i), "eval")["user"] in evaluation


def test_importance_covers_the_scale():
    assert set(EVENT_IMPORTANCE.values()) == set(range(1, 11))


def test_an_empty_log_knows_nothing():
    log = Log()
    assert log.answer({"ask": "home"}) == (UNKNOWN, []) and log.possible() == []
    assert log.answer(log.impossible(Rng("x")))[0] == UNKNOWN


def test_long_dialogue_records():
    d = long_dialogue(Rng("long", 1), sessions=12, turns=(10, 20))
    assert BY_NAME["dialogue"].parse(d["text"]) == d["facts"]
    assert {q["type"] for q in d["questions"]} == set(QUESTION_TYPES)
    for turn in d["turns"]:
        assert d["text"][slice(*turn["span"])] == turn["text"] and 1 <= turn["importance"] <= 10
    starts = [
        t["id"]
        for a, t in zip([None, *d["turns"]], d["turns"], strict=False)
        if a is None or a["topic"] != t["topic"] or a["ref"][0] != t["ref"][0]
    ]
    assert d["boundaries"] == starts
    for q in d["questions"]:
        assert q["answer"] == UNKNOWN or q["answer"] in q["candidates"], q
        assert (q["answer"] == UNKNOWN) == (not q["gold"]) and q["tier"] == "F"
        assert not {g["turn"] for g in q["gold"]} & set(q["distractors"])
        if q["type"] in ("extraction", "update") and " " not in q["answer"]:
            assert any(q["answer"] in d["turns"][g["turn"]]["text"] for g in q["gold"]), q
    with pytest.raises(ValueError, match="sessions"):
        long_dialogue(Rng("x"), sessions=0)
    with pytest.raises(ValueError, match="turns"):
        long_dialogue(Rng("x"), turns=(5, 2))


def test_stream_distances():
    text, mentions = stream(Rng("stream", 1), 6000)
    words_before = {m.start: len(text[: m.start].split()) for m in mentions}
    last: dict[str, int] = {}
    for m in mentions:
        assert text[m.start : m.end] == m.name
        here = words_before[m.start]
        assert m.distance == (here - last[m.name] if m.name in last else None)
        last[m.name] = here
    again = [m.distance for m in mentions if m.distance]
    assert sum(d > 500 for d in again) > 20 and sum(d < 300 for d in again) > 20
    near = [min(abs(d - k) for k in DISTANCES) for d in again]
    assert sum(n <= 25 for n in near) > 0.8 * len(near)
    with pytest.raises(ValueError, match="n_words"):
        stream(Rng("x"), 0)


def test_fact_injection_has_one_answer():
    for n in (0, 1, 20):
        item = fact_injection(Rng("inject", n), n)
        subject, _, answer = item["triple"]
        assert len(item["distractors"]) == n and answer == item["answer"] and answer in item["candidates"]
        assert subject in item["fact"] and subject in item["question"]
        assert all(subject not in d for d in item["distractors"])
    with pytest.raises(ValueError, match="n:"):
        fact_injection(Rng("x"), -1)
