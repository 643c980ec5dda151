"""The command line: what it prints, and its exit codes."""

import subprocess
import sys
import types

import pytest

from refimpl import checks, models
from refimpl.__main__ import main
from refimpl.systems import systems


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


def test_evaluate_passes_name_and_quick_on_and_fails_with_a_must_gate(monkeypatch):
    calls = []
    gates = types.ModuleType("refimpl.world.gates")
    gates.evaluate_gates = lambda name, quick: calls.append((name, quick)) or name == "llama-mini"
    monkeypatch.setitem(sys.modules, "refimpl.world.gates", gates)
    assert main(["evaluate", "llama-mini", "--quick"]) == 0
    assert main(["evaluate", "llama-nano"]) == 1
    assert calls == [("llama-mini", True), ("llama-nano", False)]


def test_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "data_file", lambda *parts: tmp_path.joinpath(*parts))
    assert main(["card", "llama-nano"]) == 1
    assert "llama-nano is not installed" in capsys.readouterr().err
    folder = tmp_path / "models" / "llama-nano"
    folder.mkdir(parents=True)
    (folder / "checksums.json").write_text('{"revision": "0123456789ab"}')
    (folder / "card.md").write_text("# llama-nano\nTrained on Ünïcode.\n", encoding="utf-8")
    assert main(["card", "llama-nano"]) == 0
    shown = capsys.readouterr().out
    assert "revision 0123456789ab" in shown and "Ünïcode" in shown
