"""Who may import whom, what importing costs, and that it is silent."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "refimpl"
# Packages of the ground floor; every other package below refimpl/ is the room of one chapter.
GROUND_FLOOR = {"world", "checks"}
# Rooms that may import others: the chapter that compares all systems, and agents, whose memory retrieves.
# QLoRA needs the NF4 that chapter 1 counts the bytes of.
ALLOWED = {"tradeoffs": None, "agent_memory": {"rag"}, "quantization": {"footprint"}}
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py" and "_data" not in path.parts
)


def rooms(package: Path) -> set[str]:
    """The names of the chapter rooms of a package."""
    return {path.parent.name for path in package.glob("*/__init__.py")} - GROUND_FLOOR


def imported(path: Path, package: Path) -> set[str]:
    """What a module imports, as absolute dotted names; `from a import b` gives a.b."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*parts[: len(parts) - node.level], *([node.module] if node.module else [])]
                            if node.level else [node.module])  # fmt: skip
            found |= {f"{base}.{name.name}" for name in node.names}
    return found


def forbidden(package: Path) -> list[str]:
    """Imports of a chapter's room from another room, or from the ground floor."""
    all_rooms, wrong = rooms(package), []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        own = parts[0] if len(parts) > 1 and parts[0] in all_rooms else None
        if parts[0] in ("checks", "__main__.py") or ALLOWED.get(own, set()) is None:
            continue  # the command line serves all rooms; what a check may import: tests/checks
        allowed = {own} | ALLOWED.get(own, set())
        for name in sorted(imported(path, package)):
            head, *rest = name.split(".")
            if head == package.name and rest and rest[0] in all_rooms - allowed:
                wrong.append(f"{'/'.join(parts)} imports {name}")
    return wrong


def test_a_room_imports_the_ground_floor_only_and_the_ground_floor_no_room():
    assert forbidden(PACKAGE) == []


@pytest.mark.parametrize(
    ("place", "line", "wrong"),
    [
        ("kvcache/h2o.py", "from refimpl.svd.metric import fit", True),
        ("kvcache/h2o.py", "from refimpl import svd", True),
        ("kvcache/h2o.py", "from ..svd import metric", True),
        ("kvcache/h2o.py", "def f():\n    import refimpl.svd.metric", True),
        ("evaluate.py", "from refimpl.kvcache import h2o", True),
        ("rag/__init__.py", "import refimpl.agent_memory", True),
        ("kvcache/h2o.py", "from refimpl.kvcache.base import Policy", False),
        ("kvcache/h2o.py", "from . import base", False),
        ("kvcache/h2o.py", "from refimpl.evaluate import wilson", False),
        ("kvcache/h2o.py", "from refimpl.world.formats import BY_NAME", False),
        ("agent_memory/store.py", "from refimpl.rag import index", False),
        ("agent_memory/store.py", "from refimpl.svd import metric", True),
        ("tradeoffs/all.py", "from refimpl.svd import metric", False),
    ],
)
def test_the_rule_finds_what_it_forbids(tmp_path, place, line, wrong):
    """On a small package, as long as the rooms are still to come."""
    package = tmp_path / "refimpl"
    for room in ("kvcache", "svd", "rag", "agent_memory", "tradeoffs", "world"):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").write_text("")
    (package / place).write_text(line + "\n")
    assert bool(forbidden(package)) == wrong


def test_every_module_imports_without_a_warning_and_changes_no_setting():
    """All in one process: transformers' own warnings do not count, since nothing here imports it."""
    code = (
        "import sys, torch; threads = torch.get_num_threads(); state = torch.random.get_rng_state()\n"
        f"import {', '.join(name for name in MODULES if name != 'refimpl.viz')}\n"
        "assert torch.get_num_threads() == threads, 'an import changed the number of threads'\n"
        "assert torch.equal(torch.random.get_rng_state(), state), 'an import drew random numbers'\n"
        "assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'transformers', 'matplotlib', 'scipy', 'IPython'}, sorted(loaded)\n"
        "import refimpl.viz\n"  # the one that draws
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_the_package_itself_imports_nothing():
    code = "import sys; before = set(sys.modules); import refimpl; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['refimpl']"
