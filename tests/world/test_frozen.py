"""data/world is what the code makes, is verified when read, and stays small."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import world_frozen

from refimpl.paths import data_file
from refimpl.world import frozen
from refimpl.world.canaries import LEVELS, N_TWINS, manifest
from refimpl.world.formats import BY_NAME
from refimpl.world.frozen import KINDS, load_dialogues, load_manifest, load_questions, load_world
from refimpl.world.long_dialogues import QUESTION_TYPES
from refimpl.world.mix import N_STEPS, PLANNED_SHARDS, STEPS_PER_SHARD
from refimpl.world.names import known_people
from refimpl.world.people import STRATA, stratum, withheld
from refimpl.world.relations import known_facts


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of data/world that a test may damage."""
    shutil.copytree(data_file("world"), tmp_path / "world")
    monkeypatch.setattr(frozen, "data_file", lambda *parts: tmp_path.joinpath(*parts))
    return tmp_path / "world"


def test_every_file_is_what_the_code_makes():
    made = world_frozen.generate(pins=False)  # tests/world/test_pins.py checks the pins
    stored = {name: data_file("world", name).read_text(encoding="utf-8") for name in made}
    old = [name for name, text in made.items() if stored[name] != text]
    assert not old, f"data/world is not what the frozen code makes: {old}; see tools/world_frozen.py"
    assert (
        json.loads(made["checksums.json"])["pins.json"]
        == hashlib.sha256(data_file("world", "pins.json").read_bytes()).hexdigest()
    )


def test_the_folder_is_small_and_holds_nothing_else():
    folder = data_file("world")
    present = {str(f.relative_to(folder).as_posix()) for f in folder.rglob("*") if f.is_file()}
    listed = set(json.loads((folder / "checksums.json").read_text())) - {"world(0, 2000)"}
    assert present == listed | {"checksums.json", "tokens.md"}
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 4 * 2**20


def test_questions_are_three_hundred_of_each_kind_with_spans_in_the_world():
    w = load_world()
    assert set(w.sessions) == {"related", "shuffled"}
    for kind in KINDS:
        rows = load_questions(kind)
        assert len(rows) == 300 and {q.type for q in rows} == {kind}
        for q in rows:
            assert q.answer in q.candidates and q.answer in q.accepted
            for hop, fact in zip(q.gold, q.chain, strict=bool(q.gold)):
                for doc, sentence, start, end in hop:
                    assert w.documents[doc].sentences[sentence] == [start, end]
                    assert fact in w.documents[doc].facts[sentence]


def test_candidates_of_two_questions_are_not_one_list():
    a, b = load_questions("T1")[:2], load_questions("T1")[:2]
    a[0].candidates.append("x")
    assert "x" not in a[1].candidates and "x" not in b[0].candidates


def test_dialogues_have_three_hundred_questions_of_all_types():
    dialogues = load_dialogues()
    asked = [q for d in dialogues for q in d["questions"]]
    assert len(asked) >= 300 and len({q["id"] for q in asked}) == len(asked)
    assert {q["type"] for q in asked} == set(QUESTION_TYPES)
    for d in dialogues:
        sessions = BY_NAME["dialogue"].parse(d["text"])["sessions"]
        said = [turn for s in sessions for segment in s["segments"] for turn in segment["turns"]]
        assert [t["by"] for t in d["turns"]] == [t["by"] for t in said]
        assert 10 <= d["turns"][-1]["session"] + 1 <= 40
        assert [t["id"] for t in d["turns"] if t["boundary"]] == d["boundaries"]
        for q in d["questions"]:
            assert all(d["turns"][g["turn"]]["span"] == g["span"] for g in q["gold"])


def test_the_manifest_lists_everything_planted():
    m = load_manifest()
    planned, quarter = PLANNED_SHARDS * STEPS_PER_SHARD, PLANNED_SHARDS // 4 * STEPS_PER_SHARD
    warm = N_STEPS - planned  # nothing is planted in the warm-up
    assert [c["id"] for c in m["canaries"]] == [c.id for c in manifest()]
    assert m["steps"] == N_STEPS and sum(c["copies"] == 0 for c in m["canaries"]) == 3 * N_TWINS
    tokenizer = data_file("models", "tokenizer.json").read_bytes()
    assert m["tokenizer"] == hashlib.sha256(tokenizer).hexdigest()
    for c in m["canaries"]:
        assert bool(c["steps"]) == bool(c["copies"]) and len(c["tokens"]) <= 130
        if c["type"] == "words":
            assert len(c["tokens"]) >= 48
        if c["when"] != "uniform":
            first, end = c["steps"]
            low, high = (warm, warm + quarter) if c["when"] == "early" else (N_STEPS - quarter, N_STEPS)
            assert low <= first < end <= high
        elif c["copies"] == max(LEVELS):
            assert c["steps"] == [warm, N_STEPS]
    assert {p["name"] for p in m["people"] if p["withheld"]} == withheld()
    assert {p["name"]: p["mentions"] for p in m["people"]} == {p: stratum(p) for p in known_people()}
    assert all(known_facts()[p["name"], r] == v for p in m["people"] for r, v in p["facts"].items())
    mentions = sum(STRATA) * 50 * 5
    assert all(mentions / 2 / 8 <= n < mentions / 2 / 8 + 80 for n in m["documents"].values())


def test_length_tells_no_canary_from_its_twins():
    m = load_manifest()["canaries"]
    for kind in ("words", "secret", "story"):
        planted, twins = (
            [len(c["tokens"]) for c in m if c["type"] == kind and bool(c["copies"]) == there]
            for there in (True, False)
        )
        spread = (sum((n - sum(twins) / len(twins)) ** 2 for n in twins) / len(twins)) ** 0.5
        assert abs(sum(planted) / len(planted) - sum(twins) / len(twins)) < 0.5 * spread + 0.5


def test_a_damaged_file_is_refused(copy):
    file = copy / "questions" / "T3.jsonl"
    file.write_text(file.read_text().replace("T3-0007", "T3-0008"))
    with pytest.raises(ValueError, match="T3.jsonl: its content does not match"):
        load_questions("T3")
    assert load_questions("T4")


@pytest.mark.parametrize(
    "name,load",
    [("questions/T1.jsonl", lambda: load_questions("T1")), ("questions/T5.jsonl", load_dialogues),
     ("manifest.json", load_manifest), ("checksums.json", load_world)],
)  # fmt: skip
def test_a_missing_file_is_named(copy, name, load):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load()


def test_another_world_is_refused(copy, monkeypatch):
    sums = json.loads((copy / "checksums.json").read_text())
    (copy / "checksums.json").write_text(json.dumps({**sums, "world(0, 2000)": "0"}))
    with pytest.raises(ValueError, match="not the frozen ones"):
        load_world()


@pytest.mark.parametrize("kind", ["T5", "T10", "t1", ""])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match="kind: "):
        load_questions(kind)
