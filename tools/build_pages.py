"""Write the generated pages of the book, or say with `--check` which of them are old.

Everything under book/_generated/ comes from here, from refimpl/systems.toml and the stored results. The files
are committed, so that the book also builds where nothing but Jupyter Book is installed.
"""
from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ROOT / "book" / "_generated"
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from pages import catalogue, drawings, status  # noqa: E402

from refimpl.systems import load  # noqa: E402


def generate(root: Path = ROOT) -> dict[str, str]:
    """Return the text of every generated file, by its name under book/_generated/."""
    rows = load(root / "refimpl" / "systems.toml")
    keys = catalogue.survey_keys(root / "book" / "references.bib")
    return {
        "systems.md": catalogue.index_page(rows, keys),
        "claims.md": catalogue.claims_page(rows, keys),
        "status.md": status.page(rows, root),
        "map.md": drawings.map_page(rows, root),
        "front.svg": drawings.front(rows),
    }


def stale(root: Path = ROOT) -> list[str]:
    """Name the generated files that differ from what their sources now give."""
    folder = root / "book" / "_generated"
    return [name for name, text in generate(root).items()
            if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text]


def write(root: Path = ROOT) -> list[str]:
    """Rewrite the files that changed, each atomically; return their names."""
    folder = root / "book" / "_generated"
    folder.mkdir(parents=True, exist_ok=True)
    texts, changed = generate(root), stale(root)
    for name in changed:
        partial = folder / f".{name}.partial"
        partial.write_text(texts[name], encoding="utf-8")
        os.replace(partial, folder / name)
    return changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is old")
    if parser.parse_args().check:
        old = stale()
        print("\n".join(f"old: book/_generated/{name}" for name in old) or "generated pages are up to date")
        return 1 if old else 0
    for name in write():
        print(f"wrote book/_generated/{name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
