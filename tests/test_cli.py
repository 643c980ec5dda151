"""The command line: what it prints, and its exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from refimpl import checks, models, paths
from refimpl.__main__ import main
from refimpl.systems import systems
from refimpl.world import gates


def test_without_arguments_it_explains_itself(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for word in ("systems", "check", "evaluate", "card", "examples", "exit codes"):
        assert word in shown


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "refimpl", "card", "gpt3"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "llama-mini, gpt2-mini" in done.stderr and "Traceback" not in done.stderr


def test_systems_lists_every_row_once(capsys):
    assert main(["systems"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == [row.id for row in systems()]
    assert main(["systems", "svd"]) == 0
    shown = capsys.readouterr().out
    assert "Low-rank" in shown and "kvcache" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["systems", "cooking"], "unknown chapter 'cooking'; allowed: start, footprint"),
        (["check", "nothing"], "unknown check 'nothing'; allowed: all, "),
        (["evaluate", "gpt3"], "unknown model 'gpt3'; allowed: llama-mini, gpt2-mini"),
        (["card", "gpt3"], "unknown model 'gpt3'; allowed: llama-mini, gpt2-mini"),
        (["check"], "required: name"),
        (["paint"], "invalid choice: 'paint'"),
        (["card", "llama-mini", "--loud"], "unrecognized arguments: --loud"),
    ],
)
def test_wrong_usage_is_2_and_names_what_is_allowed(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def three_checks(monkeypatch):
    """Checks that pass, fail, and judge an exercise."""

    def run(name, candidate=None):
        if name == "bad":
            raise AssertionError("keys were lost at position 3")
        print(f"{name}: passed")

    monkeypatch.setattr(checks, "names", lambda: ["bad", "exercise", "good"])
    monkeypatch.setattr(checks, "implementation", lambda name: None if name == "exercise" else object())
    monkeypatch.setattr(checks, "run", run)


def test_check(three_checks, capsys):
    assert main(["check", "good"]) == 0
    assert main(["check", "bad"]) == 1
    assert "bad: FAILED" in (shown := capsys.readouterr().out) and "keys were lost at position 3" in shown
    assert main(["check", "all"]) == 1
    assert "1 of 2 checks passed" in capsys.readouterr().out
    assert main(["check", "exercise"]) == 2
    assert "refimpl.checks.run('exercise', your_function)" in capsys.readouterr().err


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """A model of random weights as llama-nano, with two gates that are quick to measure, and its record."""
    values = {"canaries": np.array([1.0] * 16), "judge": np.array([1.0, 0.0] * 100), "qa": np.zeros(200)}
    monkeypatch.setattr(models, "data_file", lambda *parts: tmp_path.joinpath(*parts))
    few = tuple(gate for gate in ALL if gate["metric"] in {*values, "book_score"})
    monkeypatch.setattr(gates, "gates", lambda: few)
    measured = {name: lambda subject, found=found: found for name, found in values.items()}
    monkeypatch.setattr(gates, "METRICS", measured)
    folder = tmp_path / "models" / "llama-nano"
    tokenizer_file = paths.data_file("models", "tokenizer.json")
    models.save_model(models.new("llama-nano"), folder, tokenizer_file=tokenizer_file)

    def store(**changes):
        book = {"value": 1.6, "lo": 1.55, "hi": 1.65, "n": 20}
        rows = gates.as_json(gates.evaluate_gates(None, None, "llama-nano", book_score=book))
        record = {"gates": rows, "book_score": book, "revision": models.revision("llama-nano")} | changes
        (folder / "evaluation.json").write_text(json.dumps(record))
        return record

    return values, store


ALL = gates.gates()


def test_evaluate_shows_every_gate_beside_what_is_stored(evaluated, capsys):
    evaluated[1]()
    for arguments in (["evaluate", "llama-nano"], ["evaluate", "llama-nano", "--quick"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        row = {line[:32].strip(): line[32:].split() for line in shown.splitlines()}
        assert row["book score"] == "must 1.600 [1.550, 1.650] 1.65 yes 1.600 yes".split()
        assert row["canary extraction"] == "must 1.000 [0.806, 1.000] 0.8 yes 1.000 yes".split()
        # Question answering binds the minis only: missed by a nano, it is shown as a dash and does not count.
        assert row["question answering"] == "must 0.000 [0.000, 0.019] 0.95 – 0.000 yes".split()
        assert row["judge"][-3:] == ["–", "0.500", "yes"]
        assert "every must gate holds" in shown


@pytest.mark.parametrize(
    ("found", "quick", "code"),
    [
        (12, False, 1),  # 0.75 misses 0.8 ...
        (12, True, 0),  # ... but so few items do not refute it: the interval reaches 0.90
        (7, True, 1),
    ],
)
def test_evaluate_fails_with_a_must_gate_that_is_missed(evaluated, capsys, found, quick, code):
    values, store = evaluated
    values["canaries"][found:] = 0.0
    store()
    assert main(["evaluate", "llama-nano"] + ["--quick"] * quick) == code
    assert ("must gates that fail or disagree: canary extraction" in capsys.readouterr().out) == bool(code)


def test_evaluate_fails_when_a_must_gate_disagrees_with_its_record(evaluated, capsys):
    values, store = evaluated
    record = store()
    for row in record["gates"]:
        row |= {"value": 0.3, "lo": 0.25, "hi": 0.35}  # all of them: but only those that bind count
    store(gates=record["gates"])
    assert main(["evaluate", "llama-nano"]) == 1
    assert "fail or disagree: book score, canary extraction\n" in capsys.readouterr().out
    store(gates=[])
    assert main(["evaluate", "llama-nano"]) == 1
    assert "none NO" in capsys.readouterr().out


def test_evaluate_without_books_says_that_the_book_score_is_missing(evaluated, capsys):
    evaluated[1](book_score=None)
    assert main(["evaluate", "llama-nano"]) == 0
    assert "no held-out books were given" in capsys.readouterr().out


def test_evaluate_needs_the_model_and_its_record(evaluated, capsys):
    assert main(["evaluate", "llama-nano"]) == 1
    assert "llama-nano was not evaluated" in capsys.readouterr().err
    assert main(["evaluate", "llama-mini"]) == 1
    assert "llama-mini is not installed" in capsys.readouterr().err


def test_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "data_file", lambda *parts: tmp_path.joinpath(*parts))
    assert main(["card", "llama-nano"]) == 1
    assert "llama-nano is not installed" in capsys.readouterr().err
    folder = tmp_path / "models" / "llama-nano"
    folder.mkdir(parents=True)
    checksums = {"model.safetensors": "", "tokenizer.json": "", "revision": "0123456789ab"}
    (folder / "checksums.json").write_text(json.dumps(checksums))
    (folder / "card.md").write_text("# llama-nano\nTrained on Ünïcode.\n", encoding="utf-8")
    assert main(["card", "llama-nano"]) == 0
    shown = capsys.readouterr().out
    assert "revision 0123456789ab" in shown and "Ünïcode" in shown
