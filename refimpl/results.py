"""Stored measurements: one JSON file each, which says how, when and from which sources it was made.

`data/results/NAME.json` holds `command`, `date` (YYYY-MM-DD), `hardware`, `versions`, `sources` (path in
the repository -> SHA-256) and `summary`, and beside them whatever was measured. The book's status page lists
these files and marks one as stale when a source of it has changed.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from refimpl.paths import atomic_write

_HEAD = ("command", "date", "hardware", "versions", "sources", "summary")


def sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file.

    >>> sha256(__file__) == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    True
    """
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def store(
    path: str | Path,
    *,
    command: str,
    summary: str,
    sources: Iterable[str],
    root: str | Path,
    packages: Iterable[str] = ("torch", "transformers"),
    hardware: str | None = None,
    **measured: Any,
) -> dict[str, Any]:
    """Write a measurement and return what was written.

    Parameters: `path` of the JSON file, whose folder is made if it does not exist; `command` that makes it
    again; `summary`, one line for the status page; `sources`, files on which the numbers depend, relative to
    `root`; `packages` whose versions are recorded beside Python's; `hardware` (None: this machine's CPU);
    `measured`, the numbers. Raises `ValueError` for an empty text or a name in `measured` that is taken,
    `FileNotFoundError` for a source that does not exist.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "speed.py").write_text("")
    >>> _ = store(folder / "speed.json", command="make speed", summary="2 MB/s", sources=["speed.py"],
    ...           root=folder, packages=(), speed=2.0)
    >>> changed_sources(json.loads((folder / "speed.json").read_text()), folder)
    []
    """
    for name, text in (("command", command), ("summary", summary)):
        if not text.strip():
            raise ValueError(f"{name} must not be empty")
    taken = sorted(set(measured) & set(_HEAD))
    if taken:
        raise ValueError(f"measured: {', '.join(taken)} are names of the file's head")
    versions = {name: importlib.metadata.version(name) for name in packages}
    result = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware or cpu(),
        "versions": {"python": platform.python_version(), **versions},
        "sources": {name: sha256(Path(root) / name) for name in sorted(sources)},
        "summary": summary,
        **measured,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(result, indent=1) + "\n").encode())
    return result


def changed_sources(result: dict[str, Any], root: str | Path) -> list[str]:
    """Return the sources of a stored measurement that are missing or no longer what it was made from."""
    return [
        name for name, digest in result["sources"].items()
        if not (Path(root) / name).is_file() or sha256(Path(root) / name) != digest
    ]  # fmt: skip


def imported(modules: Iterable[str], root: str | Path, followed: tuple[str, ...]) -> list[str]:
    """Return the files of modules and of what they import, and so on: what a number depends on.

    Parameters: `modules`, dotted names; `root` of the checkout; `followed`, what names of modules begin with
    whose imports are followed. Names without a file (packages) are left out.

    >>> root = Path(__file__).resolve().parents[1]
    >>> imported(["refimpl.results"], root, ("refimpl.",))
    ['refimpl/paths.py', 'refimpl/results.py']
    """
    todo, found = list(modules), {}
    while todo:
        module = todo.pop()
        path = Path(root) / (module.replace(".", "/") + ".py")
        if module in found or not module.startswith(followed) or not path.is_file():
            continue
        found[module] = path.relative_to(root).as_posix()
        todo += [n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    return sorted(found.values())


def cpu() -> str:
    """Return this machine as one line: processor, cores, system.

    >>> "cores" in cpu()
    True
    """
    model = platform.machine()
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        lines = listed.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), model)
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"
