"""Test both ends of the supported versions: `make compat` writes data/results/compat.json.

Two environments below _build/compat/: one with the oldest torch and transformers that pyproject.toml allows,
one with the newest.  In each run the tests of what touches their internals.  Needs a package index.
"""

import os
import platform
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from refimpl.results import store

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "data" / "results" / "compat.json"
FOOTPRINT = ("activations", "checkpointing", "tracker")
TESTS = ("tests/test_models.py", "tests/test_backbone.py", "tests/test_trace.py") + tuple(
    f"tests/footprint/test_{name}.py" for name in FOOTPRINT
)
SOURCES = (
    "pyproject.toml", "refimpl/models.py", "refimpl/backbone.py", "refimpl/trace.py",
    *(f"refimpl/footprint/{name}.py" for name in FOOTPRINT), *TESTS,
)  # fmt: skip
ENDS = ("oldest", "newest")
PACKAGES = ("torch", "transformers")


def pin(requirement: Requirement, end: str) -> str:
    """The requirement of one end: the oldest minor version, or the range, of which pip takes the newest.

    >>> pin(Requirement("torch>=2.11,<2.14"), "oldest"), pin(Requirement("torch>=2.11,<2.14"), "newest")
    ('torch==2.11.*', 'torch<2.14,>=2.11')
    """
    if end == "newest":
        return str(requirement)
    (lowest,) = (s.version for s in requirement.specifier if s.operator == ">=")
    return f"{requirement.name}=={lowest}.*"


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """Run a command in the repository's root and show what it prints."""
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], cwd=ROOT, **options)


def try_end(end: str, requirements: dict[str, Requirement]) -> dict:
    """Install one end and test it: versions, pytest's exit status and closing line."""
    python = ROOT / "_build" / "compat" / end / "bin" / "python"
    run(sys.executable, "-m", "venv", python.parents[1], check=True)
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    run(python, "-m", "pip", "install", *index, pin(requirements["torch"], end), check=True)
    pins = [pin(requirements[name], end) for name in PACKAGES]
    run(python, "-m", "pip", "install", *pins, "-e", ".[book,test]", check=True)
    versions = {
        name: run(
            python, "-c", f"import importlib.metadata as m; print(m.version({name!r}))",
            check=True, capture_output=True, text=True,
        ).stdout.strip()
        for name in PACKAGES
    }  # fmt: skip
    tests = run(python, "-m", "pytest", *TESTS, capture_output=True, text=True)
    print(tests.stdout)
    return {
        "versions": {"python": platform.python_version(), **versions},
        "status": tests.returncode,
        "pytest": tests.stdout.strip().splitlines()[-1].strip("= "),
    }


def main() -> int:
    """Test both ends, store what came out; 1 if one failed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = {r.name: r for r in map(Requirement, project["dependencies"])}
    ends = {end: try_end(end, requirements) for end in ENDS}
    summary = "; ".join(
        f"{end} (torch {r['versions']['torch']}, transformers {r['versions']['transformers']}): {r['pytest']}"
        for end, r in ends.items()
    )
    store(RESULT, command="make compat", summary=summary, sources=SOURCES, root=ROOT, packages=(), ends=ends)
    print(summary)
    return 1 if any(r["status"] for r in ends.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
