"""Every check accepts the real thing, rejects every mutant in words, and computes its reference itself.

`mutants/<chapter>_<system>.py` declares MUTANTS = [(check name, what is broken, implementation)], and
SOLUTIONS = {check name: function} for the checks of exercises, which have no implementation in refimpl.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

from refimpl import checks

MUTANT_FILES = sorted((Path(__file__).parent / "mutants").glob("*.py"))
CHECK_FILES = sorted(Path(checks.__file__).parent.rglob("*.py"))


def _load(path):
    spec = importlib.util.spec_from_file_location(f"mutants_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = [_load(path) for path in MUTANT_FILES]
MUTANTS = [row for module in MODULES for row in module.MUTANTS]
SOLUTIONS = {name: f for module in MODULES for name, f in getattr(module, "SOLUTIONS", {}).items()}


def _real(name):
    return SOLUTIONS[name] if name in SOLUTIONS else checks.implementation(name)


@pytest.mark.parametrize("name", checks.names())
def test_check_accepts_the_real_implementation(name, capsys):
    assert _real(name) is not None, f"{name}: no implementation in refimpl and no solution beside the mutants"
    assert checks.get(name)(_real(name)) is None
    assert capsys.readouterr().out == f"{name}: passed\n"


@pytest.mark.parametrize("name", checks.names())
def test_check_has_at_least_two_mutants(name):
    assert sum(row[0] == name for row in MUTANTS) >= 2


@pytest.mark.parametrize(("name", "broken", "mutant"), MUTANTS, ids=[f"{r[0]}: {r[1]}" for r in MUTANTS])
def test_check_rejects_mutant(name, broken, mutant, capsys):
    with pytest.raises(AssertionError) as caught:     # any other exception does not count as a rejection
        checks.get(name)(mutant)
    assert caught.value.__cause__ is None, f"the mutant crashed instead of being wrong: {caught.value}"
    assert len(str(caught.value).split()) >= 4, "a diagnosis says in words what is wrong"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", checks.names())
def test_stub_is_not_attempted_yet(name, capsys):
    def stub(*args, **kwargs):
        raise NotImplementedError

    assert checks.get(name)(stub) is None
    assert capsys.readouterr().out == f"{name}: not attempted yet\n"


@pytest.mark.parametrize("path", CHECK_FILES, ids=lambda p: p.stem)
def test_check_imports_nothing_of_refimpl_but_the_framework(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            from_refimpl = node.module == "refimpl"
            modules = [f"refimpl.{alias.name}" for alias in node.names] if from_refimpl else [node.module]
        for module in modules:
            if module.split(".")[0] == "refimpl":
                assert f"{module}.".startswith("refimpl.checks."), f"{path.name} imports {module}"


def test_unknown_check_names_the_allowed_ones():
    with pytest.raises(ValueError, match="no check 'tracer'; allowed: .*trace"):
        checks.get("tracer")


def test_run_uses_refimpls_own_implementation(capsys):
    checks.run("trace")
    assert capsys.readouterr().out == "trace: passed\n"


def test_run_of_an_exercise_needs_a_candidate(capsys):
    with pytest.raises(ValueError, match="exercise"):
        checks.run("bits_per_byte")
    checks.run("bits_per_byte", SOLUTIONS["bits_per_byte"])
    assert capsys.readouterr().out == "bits_per_byte: passed\n"
