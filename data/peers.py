"""Cross-checks against peer libraries: `make peers` writes data/results/peers.json.

lm-evaluation-harness brings many packages with it, so it gets an environment of its own, _build/peers, with
the versions of constraints.txt. Needs a package index.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from refimpl.results import store

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / "_build" / "peers" / "bin" / "python"
TEST = "tests/test_evaluate.py::test_lm_evaluation_harness_gives_the_same_numbers"
SOURCES = ("data/peers.py", "refimpl/evaluate.py", "tests/test_evaluate.py")
PACKAGES = ("lm_eval", "torch", "transformers", "datasets")


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """Run a command in the repository's root and show it."""
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], cwd=ROOT, text=True, **options)


def install() -> None:
    """Make the environment; PyTorch comes from TORCH_INDEX if that is set."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = PYTHON.parents[2] / "peers-constraints.txt"
    constraints.parent.mkdir(parents=True, exist_ok=True)
    constraints.write_text("\n".join(pin for pin in pins if not pin.startswith("torch==")) + "\n")
    run(sys.executable, "-m", "venv", PYTHON.parents[1], check=True)
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    run(PYTHON, "-m", "pip", "install", *index, torch, check=True)
    wanted = [*project["dependencies"], *extras["test"], *extras["peers"]]
    run(PYTHON, "-m", "pip", "install", *wanted, "-c", constraints, check=True)


def main() -> int:
    """Install, test, store what came out; 1 if a peer disagrees."""
    install()
    tests = run(PYTHON, "-m", "pytest", "-n", "0", TEST, capture_output=True)
    print(tests.stdout + tests.stderr)
    closing = tests.stdout.strip().splitlines()[-1].strip("= ")
    # A skipped test ends with status 0 as well: it means that the peer was not there.
    agreed = tests.returncode == 0 and " passed" in closing and "skipped" not in closing
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {PACKAGES}}}))"
    versions = json.loads(run(PYTHON, "-c", code, check=True, capture_output=True).stdout)
    said = "perplexity and multiple choice agree with" if agreed else "DISAGREES with"
    store(
        ROOT / "data" / "results" / "peers.json", command="make peers", sources=SOURCES, root=ROOT,
        summary=f"{said} lm-evaluation-harness {versions['lm_eval']}: {closing}",
        packages=(), peers=versions, tests=[TEST], agreed=agreed,
    )  # fmt: skip
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
