"""The system index and the claims table, from refimpl/systems.toml."""
from __future__ import annotations

import re
from pathlib import Path

from pages import NOTICE, cell, table
from refimpl.systems import CHAPTERS, VERDICTS, System

_UP = "../../"  # from book/_generated/ to the root of the book

_VERDICT_MEANS = {
    "reproduced": "the size of the effect agrees with the paper's, within our interval",
    "reproduced in direction": "the ordering holds (its paired 95 % interval excludes 0), but not the size",
    "not reproduced": "the ordering does not hold here",
    "not testable at this scale": "the claim needs a quantity our scale does not have; the row says "
                                  "which, and what the largest scale tried here gave",
    "no empirical claim": "a definition, an equation or an overview",
}


def survey_keys(bibliography: Path) -> dict[int, str]:
    """Map the survey's reference numbers to the keys of the bibliography."""
    text = bibliography.read_text(encoding="utf-8")
    return {int(number): key for key, number in re.findall(r"^@\w+\{(s(\d+)_\w+),", text, re.M)}


def citations(row: System, keys: dict[int, str]) -> str:
    """Cite a row's works and name its places in the survey, as Markdown."""
    cited = [keys[number] for number in row.survey_numbers]
    if row.reading and row.reading not in cited:
        cited.append(row.reading)
    parts = [f"{{cite}}`{','.join(cited)}`"] if cited else []
    if row.survey_places:
        parts.append("survey " + ", ".join(place.replace(" ", "\u00a0") for place in row.survey_places))
    return ", ".join(parts)


def _index_row(row: System, keys: dict[int, str]) -> list[str]:
    name = f'<a id="system-{row.id}"></a>{cell(row.name)}'
    if row.coming:
        place = f"coming with chapter {row.number}"
    else:
        links = [f"[{Path(row.notebook).stem}]({_UP}{row.notebook})"]
        if row.module:
            links.append(f"{{py:mod}}`{row.module}`")
        if row.check:
            links.append(f"check `{row.check}`")
        place = ", ".join(links)
    return [name, f"`{row.id}`", row.kind, citations(row, keys), place, row.verdict or "–"]


def index_page(rows: tuple[System, ...], keys: dict[int, str]) -> str:
    """Render the page that lists every row of the catalogue, chapter by chapter."""
    built = sum(not row.coming for row in rows)
    parts = [NOTICE, "# System index\n", f"""
Everything that the survey {{cite}}`x_ge2025survey` and the reading list {{cite}}`x_readinglist2025memory`
name: {len(rows)} rows, of which {built} are built and {len(rows) - built} are announced with their chapter.
Numbers in brackets are the survey's own. A check runs as `python -m refimpl check NAME`. The column on the
right is explained with the [claims](claims.md).
"""]
    for number, (chapter, title) in enumerate(CHAPTERS.items()):
        here = [row for row in rows if row.chapter == chapter]
        parts.append(f"\n(systems-{chapter})=\n## {number} {title}\n\n")
        rendered = table(["name", "id", "kind", "cited as", "where", "verdict"],
                         [_index_row(row, keys) for row in here])
        parts.append(f":::{{container}} catalogue\n\n{rendered}:::\n")
    return "".join(parts)


def claims_page(rows: tuple[System, ...], keys: dict[int, str]) -> str:
    """Render the table of claims: what the paper says beside what was measured here."""
    built = [row for row in rows if not row.coming]
    parts = [NOTICE, "# Claims and verdicts\n", """
What each paper claims, what we ran, what came out. A verdict is earned by a measurement in a notebook, with a
baseline and a control; all five are good results.

"""]
    parts += [f"{verdict}\n: {_VERDICT_MEANS[verdict]}.\n\n" for verdict in VERDICTS]
    parts.append("""What we ran is said by the *fidelity* of a row: **exact** is the paper's algorithm,
**scaled** the same algorithm with smaller numbers, **stand-in** means that a part is replaced, and the row
says which and why.

""")
    if not built:
        return "".join(parts) + f"No row is judged yet; {len(rows)} are coming with their chapters.\n"
    for number, (chapter, title) in enumerate(CHAPTERS.items()):
        here = [row for row in built if row.chapter == chapter]
        if here:
            parts.append(f"## {number} {title}\n\n")
            parts.append(table(
                ["system", "the claim", "fidelity", "measured here", "verdict"],
                [[f"[{cell(row.name)}]({_UP}{row.notebook}) {citations(row, keys)}", cell(row.claim),
                  cell(row.fidelity) or "–", cell(row.measured) or "–",
                  row.verdict + (f": {cell(row.scale)}" if row.scale else "")] for row in here]))
            parts.append("\n")
    parts.append(f"{len(rows) - len(built)} rows of the [index](systems.md) are still coming.\n")
    return "".join(parts)
