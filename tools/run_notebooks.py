"""Execute the book's notebooks and store them with their outputs: `make notebooks` is the only way to do so.

    python tools/run_notebooks.py                      every notebook below chapters/ that is not up to date
    python tools/run_notebooks.py PATH ...             only these
    python tools/run_notebooks.py --force PATH ...     these in any case
    python tools/run_notebooks.py --check              run nothing; exit 1 if one is old

A notebook is up to date when its code, the outputs stored in it and the sources that it used are those of its
last run.  The sources are found while it runs: every module of refimpl that it imported and every file
below data/ that it opened.  What each run took stands in book/_static/runs.json, for the status page.

Runs are repeatable: one thread, no network, no progress bars, fixed hash seed.  The global random generators
are left alone, because a reader's are not seeded either; notebooks pass generators.  A notebook that
raises is reported and left as it was.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbclient.util import run_sync

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("book/_static/runs.json")
CELL_TIMEOUT_S = 600

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "PYTHONHASHSEED": "0",
    "COLUMNS": "100",
}
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CELL_METADATA = {"tags", "mystnb"}  # the rest is what some editor left: timings, folding, scrolling

# Runs in the kernel before the first cell: remembers every file that is opened.
WATCH = """
import os as _os, sys as _sys
_opened = set()
_sys.addaudithook(lambda event, args: event == "open" and isinstance(args[0], (str, bytes, _os.PathLike))
                  and _opened.add(_os.fsdecode(args[0])))
"""
# Evaluated in the kernel after the last cell. Few files: IPython abbreviates a list of over 1000 items.
REPORT = """{
    "opened": sorted(f for f in _opened if "data" in f),
    "modules": sorted(m.__file__ for n, m in _sys.modules.items()
                      if n.split(".")[0] == "refimpl" and getattr(m, "__file__", None)),
    "peak": __import__("resource").getrusage(0).ru_maxrss * (1 if _sys.platform == "darwin" else 1024),
    "threads": _sys.modules["torch"].get_num_threads() if "torch" in _sys.modules else 1,
    "versions": {n: _sys.modules[n].__version__ for n in ("torch", "transformers", "numpy")
                 if n in _sys.modules},
}"""


class NotebookError(Exception):
    """A notebook raised, or shows something that must not be stored."""


def sha256(*parts: bytes) -> str:
    """Hash of the parts, each with its length, so that their borders count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def code_hash(nb: nbformat.NotebookNode) -> str:
    """Hash of the code cells' sources: prose may change without a run."""
    return sha256(*(c.source.encode() for c in nb.cells if c.cell_type == "code"))


def outputs_hash(nb: nbformat.NotebookNode) -> str:
    """Hash of what the cells show and of their execution counts."""
    shown = [[c.execution_count, c.outputs] for c in nb.cells if c.cell_type == "code"]
    return sha256(json.dumps(shown, sort_keys=True).encode())


def sources_hash(root: Path, sources: list[str]) -> str:
    """Hash of files given relative to `root`; a file that is gone counts as a change."""
    files = [root / name for name in sources]
    return sha256(*(f.read_bytes() if f.is_file() else b"missing" for f in files))


def is_current(nb: nbformat.NotebookNode, record: dict | None, root: Path) -> bool:
    """Whether code, outputs and sources are those of the run that `record` describes."""
    return record is not None and (
        record["code"] == code_hash(nb)
        and record["outputs"] == outputs_hash(nb)
        and record["sources_sha256"] == sources_hash(root, record["sources"])
    )


def normalise(nb: nbformat.NotebookNode) -> None:
    """Give a notebook the house's metadata, stable cell ids, and its figures' text alternatives.

    Raises `NotebookError` for an image without a text alternative, and for a cell with two images (the book
    builder knows one text alternative per cell).
    """
    nb.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    nb.nbformat, nb.nbformat_minor = 4, 5
    seen = set()
    for i, cell in enumerate(nb.cells):
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in CELL_METADATA})
        if cell.get("id") in seen or not cell.get("id"):
            cell["id"] = f"cell-{i}-{sha256(cell.source.encode())[:8]}"
        seen.add(cell["id"])
        if cell.cell_type == "code":
            _copy_alt(i, cell)


def _copy_alt(i: int, cell: nbformat.NotebookNode) -> None:
    images = [o for o in cell.outputs if "image/png" in o.get("data", {})]
    if len(images) > 1:
        raise NotebookError(f"cell {i} shows {len(images)} images: one per cell, each with its alt text")
    mystnb = cell.metadata.get("mystnb", {})
    mystnb.get("image", {}).pop("alt", None)  # of an older run
    for output in images:
        alt = output.get("metadata", {}).get("image/png", {}).get("alt")
        if not alt:
            raise NotebookError(f"cell {i} shows an image without alt text: use refimpl.viz.show")
        mystnb.setdefault("image", {})["alt"] = alt
        cell.metadata["mystnb"] = mystnb
    if mystnb.get("image") == {}:
        del mystnb["image"]
    if mystnb == {}:
        cell.metadata.pop("mystnb", None)


def execute(nb: nbformat.NotebookNode, folder: Path, root: Path) -> dict:
    """Run all cells in a new kernel in `folder`; return the run's record.

    Raises `NotebookError` if a cell raises, takes over ten minutes, stores an error or kills the kernel.
    """
    client = NotebookClient(
        nb,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,  # else the borders between writes depend on timing
        record_timing=False,
        store_widget_state=False,  # a slider without its kernel is dead
    )
    start = time.perf_counter()
    with client.setup_kernel(env={**os.environ, **ENVIRONMENT}):
        in_kernel = partial(run_sync(client.kc.execute_interactive), silent=True, store_history=False)
        in_kernel(WATCH)
        try:
            for i, cell in enumerate(nb.cells):
                client.execute_cell(cell, i)
        except CellExecutionError as error:
            plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
            raise NotebookError(f"cell {i} raised\n{plain}") from error
        except (CellTimeoutError, DeadKernelError) as error:
            raise NotebookError(f"cell {i}: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - start
        reply = in_kernel("", user_expressions={"report": REPORT})
    answer = reply["content"]["user_expressions"]["report"]
    if answer["status"] != "ok":
        raise NotebookError(f"the kernel could not report what it used: {answer['evalue']}")
    report = ast.literal_eval(answer["data"]["text/plain"])
    for i, cell in enumerate(nb.cells):
        if any(o.output_type == "error" for o in cell.get("outputs", [])):
            raise NotebookError(f"cell {i} stores an error output")
    sources = _sources(report, folder, root)
    return {
        "seconds": round(seconds, 1),
        "peak_mb": round(report["peak"] / 2**20),
        "threads": report["threads"],
        "versions": {"python": platform.python_version(), **report["versions"]},
        "models": _models(root, sources),
        "sources": sources,
        "sources_sha256": sources_hash(root, sources),
    }


def _sources(report: dict, folder: Path, root: Path) -> list[str]:
    """The modules of refimpl and the files below data/ that a run used, relative to `root`."""
    used = set()
    for name in report["modules"] + report["opened"]:
        path = (folder / name).resolve()
        if path.suffix != ".pyc" and path.is_file() and path.is_relative_to(root):
            relative = path.relative_to(root)
            if relative.parts[0] in {"refimpl", "data"}:
                used.add(relative.as_posix())
    return sorted(used)


def _models(root: Path, sources: list[str]) -> dict[str, str]:
    """SHA-256 of the weights of every bundled model and adapter among the sources, by name."""
    return {
        Path(name).parent.name: hashlib.sha256((root / name).read_bytes()).hexdigest()
        for name in sources
        if name.startswith(("data/models/", "data/adapters/")) and name.endswith(".safetensors")
    }


def run(path: Path, root: Path, record: dict | None, force: bool) -> tuple[str, dict | None]:
    """Bring one notebook up to date; return what was done, and its new record (None: nothing to record)."""
    stored_bytes = path.read_bytes()
    stored = nbformat.reads(stored_bytes.decode("utf-8"), as_version=4)
    if not force and is_current(stored, record, root):
        return _tidy(path, stored, stored_bytes), None
    nb = nbformat.from_dict(json.loads(json.dumps(stored)))
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    try:
        new = execute(nb, path.parent, root)
        normalise(nb)
    except NotebookError as error:
        return f"FAILED, left as it was: {error}", None
    new = {"code": code_hash(nb), "outputs": outputs_hash(nb), **new}
    text = nbformat.writes(nb) + "\n"
    nbformat.validate(nb)
    if text.encode() == stored_bytes:
        return f"ran in {new['seconds']} s, unchanged", new
    _write(path, text)
    return f"ran in {new['seconds']} s, {new['peak_mb']} MB, rewritten", new


def _tidy(path: Path, nb: nbformat.NotebookNode, stored_bytes: bytes) -> str:
    """Normalise an up-to-date notebook whose prose was edited; an editor leaves its own metadata."""
    try:
        normalise(nb)
    except NotebookError as error:
        return f"FAILED, left as it was: {error}"
    text = nbformat.writes(nb) + "\n"
    if text.encode() == stored_bytes:
        return "up to date"
    _write(path, text)
    return "up to date, metadata tidied"


def _write(path: Path, text: str) -> None:
    partial_file = path.with_name(f".{path.name}.partial")
    partial_file.write_text(text, encoding="utf-8")
    os.replace(partial_file, path)


def _run_named(name: str, root: Path, records: dict, force: bool) -> tuple[str, str, dict | None]:
    return name, *run(root / name, root, records.get(name), force)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run what the command line asks for; 0 if every notebook is up to date in the end, 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of chapters/")
    parser.add_argument("--force", action="store_true", help="run also what is up to date")
    parser.add_argument("--check", action="store_true", help="run nothing; exit 1 if one is old")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time, one thread each (2)")
    options = parser.parse_args(argv)
    missing = [str(p) for p in options.notebooks if not p.is_file()]
    if missing:
        parser.error(f"no such notebook: {', '.join(missing)}")
    if options.jobs < 1:
        parser.error(f"--jobs must be 1 or more, got {options.jobs}")

    all_names = sorted(
        p.relative_to(root).as_posix()
        for p in (root / "chapters").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in p.parts
    )
    names = [p.resolve().relative_to(root).as_posix() for p in options.notebooks] or all_names
    runs = root / RUNS
    records = json.loads(runs.read_text(encoding="utf-8")) if runs.is_file() else {}
    if options.check:
        stored = {name: nbformat.read(root / name, as_version=4) for name in names}
        old = [name for name in names if not is_current(stored[name], records.get(name), root)]
        print("\n".join(f"not up to date: {name}" for name in old) or "all notebooks are up to date")
        return 1 if old else 0

    failed = 0
    task = partial(_run_named, root=root, records=records, force=options.force)
    with ThreadPoolExecutor(max_workers=options.jobs) as pool:
        for name, outcome, record in pool.map(task, names):
            print(f"{name}: {outcome}", flush=True)
            failed += outcome.startswith("FAILED")
            if record is not None:
                records[name] = record
                _write_runs(runs, {name: records[name] for name in sorted(records) if name in all_names})
    return 1 if failed else 0


def _write_runs(path: Path, records: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(records, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
