"""The catalogue: every system, equation, algorithm, table and figure of the survey and the reading list.

The rows live in `systems.toml` beside this file. The book's index, claims table, map and status page are
generated from them, so a row says everything once: where the survey has the item, where our code, check and
notebook are, what the paper claims, and what was measured here.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

CATALOGUE = Path(__file__).with_name("systems.toml")

CHAPTERS = {
    "start": "Start",
    "footprint": "Memory footprint",
    "memory": "Memory inside the model",
    "rag": "Retrieval and agent memory",
    "quantization": "Quantization and pruning",
    "kvcache": "The key-value cache",
    "svd": "Low-rank approximation",
    "alignment": "Alignment",
    "personalization": "Personalization",
    "interpretability": "Interpretability and evaluation",
    "tradeoffs": "Trade-offs",
}
KINDS = ("system", "equation", "algorithm", "table", "figure", "evaluation", "overview", "baseline")
FIDELITIES = ("exact", "scaled", "stand-in")
VERDICTS = (
    "reproduced",
    "reproduced in direction",
    "not reproduced",
    "not testable at this scale",
    "no empirical claim",
)

_WITHOUT_CODE = ("overview", "figure", "table")  # kinds that may be a passage of the book and nothing else


@dataclass(frozen=True)
class System:
    """One row of the catalogue; empty fields are empty strings.

    Raises ValueError, with the row's address, for a value that is not allowed or a built row with a gap.

    >>> row = System(chapter="kvcache", id="h2o", name="H2O", kind="system", ref="113", status="coming")
    >>> row.survey_numbers, row.coming
    ((113,), True)
    """

    chapter: str
    id: str
    name: str
    kind: str
    ref: str = ""
    reading: str = ""
    room: str = ""
    status: str = ""
    module: str = ""
    check: str = ""
    notebook: str = ""
    fidelity: str = ""
    claim: str = ""
    measured: str = ""
    verdict: str = ""
    scale: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                raise TypeError(f"{self._address}: {field.name} = {value!r} must be a string")
        self._one_of("chapter", self.chapter, tuple(CHAPTERS))
        self._one_of("kind", self.kind, KINDS)
        self._one_of("status", self.status, ("", "coming"))
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.id):
            raise ValueError(f"{self._address}: id = {self.id!r} must be lower-case words joined by hyphens")
        if not self.name:
            raise ValueError(f"{self._address}: name is empty")
        if not (self.ref or self.reading or self.kind == "baseline"):
            raise ValueError(f"{self._address}: give ref (the survey) or reading (the reading list)")
        if self.verdict:
            self._one_of("verdict", self.verdict, VERDICTS)
        if self.fidelity:
            level, _, what = self.fidelity.partition(":")
            self._one_of("fidelity", level, FIDELITIES)
            if level != "exact" and not what.strip():
                raise ValueError(
                    f"{self._address}: fidelity = {self.fidelity!r} must say what differs, "
                    f"as in '{level}: ...'"
                )
        if (self.verdict == "not testable at this scale") != bool(self.scale):
            raise ValueError(
                f"{self._address}: scale (what it would need, the largest scale tried) goes "
                "with the verdict 'not testable at this scale' and with no other"
            )
        gaps = [] if self.coming else self._gaps()
        if gaps:
            raise ValueError(f"{self._address}: no status = 'coming', but these are empty: {', '.join(gaps)}")

    @property
    def coming(self) -> bool:
        """Whether the row is announced but not built yet."""
        return self.status == "coming"

    @property
    def number(self) -> int:
        """The chapter's number in the book."""
        return list(CHAPTERS).index(self.chapter)

    @property
    def survey_numbers(self) -> tuple[int, ...]:
        """The numbers in the survey's own reference list that `ref` names."""
        return tuple(int(part) for part in re.split(r",\s*", self.ref) if part.isdigit())

    @property
    def survey_places(self) -> tuple[str, ...]:
        """The equations, figures, tables and sections of the survey that `ref` names."""
        return tuple(part for part in re.split(r",\s*", self.ref) if part and not part.isdigit())

    @property
    def _address(self) -> str:
        return f"systems.toml [{self.chapter}.{self.id}]"

    def _one_of(self, field: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            shown = ", ".join(repr(option) for option in allowed)
            raise ValueError(f"{self._address}: {field} = {value!r} is not one of {shown}")

    def _gaps(self) -> list[str]:
        needed = ["notebook", "claim", "verdict"]
        if self.kind not in _WITHOUT_CODE:
            needed += ["module", "check", "fidelity"]
        if self.verdict != "no empirical claim":
            needed.append("measured")
        return [field for field in needed if not getattr(self, field)]


def load(path: str | Path = CATALOGUE) -> tuple[System, ...]:
    """Read and check a catalogue file; rows keep the order of the file.

    Parameters: path, default the catalogue of this package. Raises FileNotFoundError for a missing file, and
    ValueError or TypeError naming file, row and field for anything that is not a valid catalogue.

    >>> len(load()) >= 180
    True
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        chapters = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    allowed = {field.name for field in fields(System)} - {"chapter", "id"}
    rows, places = [], {}
    for chapter, table in chapters.items():
        if chapter not in CHAPTERS or not isinstance(table, dict):
            raise ValueError(f"{path}: {chapter!r} is not a chapter; chapters: {', '.join(CHAPTERS)}")
        for id_, row in table.items():
            if not isinstance(row, dict):
                raise TypeError(f"{path}: [{chapter}] holds {id_!r}, which is not a row [{chapter}.id]")
            unknown = set(row) - allowed
            if unknown:
                raise ValueError(
                    f"{path}: [{chapter}.{id_}] has unknown fields {sorted(unknown)}; "
                    f"allowed: {sorted(allowed)}"
                )
            if missing := {"name", "kind"} - set(row):
                raise ValueError(f"{path}: [{chapter}.{id_}] lacks {sorted(missing)}")
            if id_ in places:
                raise ValueError(f"{path}: id {id_!r} is in [{places[id_]}] and again in [{chapter}]")
            places[id_] = chapter
            rows.append(System(chapter=chapter, id=id_, **row))
    return tuple(rows)


@cache
def _catalogue() -> tuple[System, ...]:
    return load()


def systems(
    chapter: str | None = None, *, kind: str | None = None, coming: bool | None = None
) -> tuple[System, ...]:
    """List the catalogue's rows, all or by chapter, kind, and whether they are still to come.

    Raises ValueError for a chapter or kind that does not exist.

    >>> [row.name for row in systems("svd", kind="equation")][0]
    'Truncated SVD of weights'
    """
    for name, value, allowed in (("chapter", chapter, tuple(CHAPTERS)), ("kind", kind, KINDS)):
        if value is not None and value not in allowed:
            raise ValueError(f"{name} = {value!r} is not one of {', '.join(allowed)}")
    return tuple(
        row
        for row in _catalogue()
        if chapter in (None, row.chapter) and kind in (None, row.kind) and coming in (None, row.coming)
    )


def system(id: str) -> System:
    """Return one row by its id; raises ValueError, naming the nearest ids, for an unknown one.

    >>> system("h2o").chapter
    'kvcache'
    """
    rows = {row.id: row for row in _catalogue()}
    if id not in rows:
        near = difflib.get_close_matches(id, rows, n=3) or ["python -m refimpl systems lists them"]
        raise ValueError(f"no system {id!r} in the catalogue; nearest: {', '.join(near)}")
    return rows[id]
