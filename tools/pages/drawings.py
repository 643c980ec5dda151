"""The two drawings of the front matter, as SVG: the front page, and the map after the survey's Fig. 1."""
from __future__ import annotations

from html import escape
from pathlib import Path

from pages import NOTICE, table
from refimpl.systems import CHAPTERS, System

_FONT = "font-family=\"system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\""
_INK, _SOFT = "#1b1b1b", "#555555"
# Tints of a colour-blind safe palette (Okabe and Ito), light enough for black text.
_BLUE, _GREEN, _ORANGE, _PURPLE, _GREY = "#d6e8f5", "#d2eee4", "#fae6c3", "#f3dfea", "#ececec"
_DARK = {_BLUE: "#0072b2", _GREEN: "#009e73", _ORANGE: "#b36b00", _PURPLE: "#aa4a80", _GREY: "#777777"}


def _text(x: float, y: float, words: str, size: int = 15, *, color: str = _INK, anchor: str = "middle",
          bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>'
            f"{escape(words)}</text>\n")


def _rect(x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "none",
          dash: bool = False) -> str:
    dashed = ' stroke-dasharray="5 4"' if dash else ""
    return (f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" fill="{fill}" '
            f'stroke="{stroke}" stroke-width="1.5"{dashed}/>\n')


def _arrow(x1: float, y1: float, x2: float, y2: float, *, both: bool = False) -> str:
    start = ' marker-start="url(#head)"' if both else ""
    return (f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{_SOFT}" stroke-width="2" '
            f'marker-end="url(#head)"{start}/>\n')


def _svg(width: int, height: int, title: str, body: str) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" class="drawing" '
            f'role="group" aria-label="{escape(title)}" {_FONT}>\n<title>{escape(title)}</title>\n'
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{_SOFT}"/></marker></defs>\n'
            f'{_rect(0, 0, width, height, "#ffffff")}{body}</svg>\n')


def _counts(rows: tuple[System, ...], chapter: str) -> tuple[int, int]:
    here = [row for row in rows if row.chapter == chapter]
    return sum(not row.coming for row in here), len(here)


def front(rows: tuple[System, ...]) -> str:
    """Draw the front page's figure: the way of one claim, and how much of each chapter stands."""
    stations = [
        ("The survey says", "a claim, an equation,", "an algorithm", _GREY),
        ("refimpl has it", "the real algorithm,", "one short file", _BLUE),
        ("A check judges it", "and rejects variants", "broken on purpose", _PURPLE),
        ("A notebook runs it", "on models that we", "pretrained, offline", _GREEN),
        ("You read a verdict", "the claim beside", "what was measured", _ORANGE),
    ]
    body = ""
    for place, (head, line_1, line_2, fill) in enumerate(stations):
        x = 20 + place * 196
        body += _rect(x, 22, 172, 92, fill, stroke=_DARK[fill])
        body += _text(x + 86, 48, head, 15, bold=True)
        body += _text(x + 86, 74, line_1, 14) + _text(x + 86, 95, line_2, 14)
        if place < len(stations) - 1:
            body += _arrow(x + 173, 68, x + 195, 68)
    most = max(_counts(rows, chapter)[1] for chapter in CHAPTERS)
    body += _text(20, 152, "What the survey and the reading list name, by chapter", 15, anchor="start",
                  bold=True)
    body += _rect(640, 140, 14, 14, "#0072b2") + _text(662, 152, "built and judged", 14, anchor="start")
    body += _rect(810, 140, 14, 14, _BLUE) + _text(832, 152, "coming", 14, anchor="start")
    for number, (chapter, title) in enumerate(CHAPTERS.items()):
        built, total = _counts(rows, chapter)
        y, unit = 168 + number * 24, 620 / most
        body += _text(272, y + 14, f"{number}  {title}", 14, anchor="end")
        body += _rect(284, y, unit * total, 18, _BLUE)
        if built:
            body += _rect(284, y, unit * built, 18, "#0072b2")
        label = f"{built} of {total}" if built else f"{total}"
        body += _text(292 + unit * total, y + 14, label, 13, anchor="start", color=_SOFT)
    title = "From the survey's claim to a verdict, and the rows of each chapter"
    return _svg(1000, 168 + 24 * len(CHAPTERS) + 14, title, body)


def chapter_address(chapter: str, rows: tuple[System, ...], root: Path) -> str:
    """Return the source file that opens a chapter, or its section of the index while it is coming."""
    notebooks = sorted((root / "chapters").glob(f"{list(CHAPTERS).index(chapter):02d}_*/*.ipynb"))
    if notebooks:
        return f"../../{notebooks[0].relative_to(root).as_posix()}"
    return f"systems.md#systems-{chapter}"


def _source(address: str) -> str:
    """The address as Markdown wants it: a label of the book alone, or the path of a notebook."""
    return address[address.index("#"):] if "#" in address else address


def _link(address: str) -> str:
    """The address as the built page wants it."""
    page, _, anchor = address.partition("#")
    return str(Path(page).with_suffix(".html").as_posix()) + (f"#{anchor}" if anchor else "")


def _chapter_box(x: float, y: float, width: float, chapter: str, rows: tuple[System, ...], root: Path,
                 fill: str) -> str:
    number, title = list(CHAPTERS).index(chapter), CHAPTERS[chapter]
    built, total = _counts(rows, chapter)
    say = f"{built} of {total} built" if built else f"{total} rows, coming"
    address = _link(chapter_address(chapter, rows, root))
    return (f'<a href="{escape(address)}">\n' + _rect(x, y, width, 58, "#ffffff", stroke=_DARK[fill])
            + f'<circle cx="{x + 23:g}" cy="{y + 29:g}" r="14" fill="{_DARK[fill]}"/>\n'
            + _text(x + 23, y + 34, str(number), 14, color="#ffffff", bold=True)
            + _text(x + 44, y + 26, title, 13, anchor="start", bold=True)
            + _text(x + 44, y + 45, say, 12, anchor="start", color=_SOFT) + "</a>\n")


def book_map(rows: tuple[System, ...], root: Path) -> str:
    """Draw the survey's architecture (its Fig. 1) with the chapters of the book in their places."""
    def box(x, y, width, chapter, fill):
        return _chapter_box(x, y, width, chapter, rows, root, fill)

    body = _rect(350, 20, 300, 106, _GREY, stroke=_DARK[_GREY], dash=True)
    body += _text(500, 43, "Looking inside", 15, bold=True)
    body += box(362, 56, 276, "interpretability", _GREY)
    body += _rect(350, 176, 300, 240, _BLUE, stroke=_DARK[_BLUE])
    body += _text(500, 201, "The language model", 16, bold=True)
    body += box(370, 216, 260, "start", _BLUE) + box(370, 282, 260, "memory", _BLUE)
    body += box(370, 348, 260, "footprint", _BLUE)
    body += _rect(12, 226, 280, 140, _GREEN, stroke=_DARK[_GREEN])
    body += _text(152, 251, "External memory", 16, bold=True)
    body += _text(152, 271, "knowledge bases, agents' notes", 13, color=_SOFT)
    body += box(20, 288, 264, "rag", _GREEN)
    body += _rect(716, 206, 264, 184, _PURPLE, stroke=_DARK[_PURPLE])
    body += _text(848, 231, "People", 16, bold=True)
    body += _text(848, 251, "preferences, judgements", 13, color=_SOFT)
    body += box(733, 260, 230, "alignment", _PURPLE) + box(733, 323, 230, "personalization", _PURPLE)
    body += _rect(12, 470, 968, 118, _ORANGE, stroke=_DARK[_ORANGE])
    body += _text(500, 495, "Optimization and compression: applies to every part above", 16, bold=True)
    for place, (chapter, width) in enumerate([("quantization", 250), ("kvcache", 220), ("svd", 250),
                                              ("tradeoffs", 170)]):
        x = 37 + [0, 258, 486, 744][place]
        body += box(x, 512, width, chapter, _ORANGE)
    body += _arrow(294, 301, 348, 301, both=True) + _text(321, 291, "read", 13, color=_SOFT)
    body += _text(321, 320, "write", 13, color=_SOFT)
    body += _arrow(714, 286, 653, 286) + _text(684, 276, "signals", 13, color=_SOFT)
    body += _arrow(653, 322, 714, 322) + _text(684, 341, "answers", 13, color=_SOFT)
    body += _arrow(500, 173, 500, 129) + _text(510, 156, "traces", 13, color=_SOFT, anchor="start")
    for x, top in ((152, 369), (500, 419), (848, 393)):
        body += _arrow(x, 467, x, top)
    title = "Map of the book: the memory-augmented architecture, each part linked to its chapter"
    return _svg(1000, 608, title, body)


def map_page(rows: tuple[System, ...], root: Path) -> str:
    """Render the page with the clickable map and, for readers without graphics, the same links as a table."""
    places = {"start": "the model itself", "footprint": "what the model holds in memory",
              "memory": "memory inside the model", "rag": "external memory, read and written",
              "quantization": "optimization: fewer bits, fewer weights", "kvcache": "optimization: the cache",
              "svd": "optimization: low rank", "alignment": "signals from people",
              "personalization": "signals from one person", "interpretability": "looking inside",
              "tradeoffs": "optimization: what it costs"}
    lines = []
    for number, (chapter, title) in enumerate(CHAPTERS.items()):
        built, total = _counts(rows, chapter)
        source = _source(chapter_address(chapter, rows, root))
        lines.append([str(number), f"[{title}]({source})", places[chapter], f"{built} of {total}"])
    return f"""{NOTICE}(book-map)=
# The book as a map

The survey's first figure shows a language model with a memory outside it that is read and written, people
whose judgements align it, and compression that applies to every part {{cite}}`x_ge2025survey`. The drawing
below is our own, made from the catalogue: every white box is a chapter, and a click opens it. A chapter that
is not built yet opens its part of the [system index](systems.md).

````{{only}} not epub
```{{raw}} html
{book_map(rows, root)}```
````

{table(["chapter", "title", "place in the picture", "rows built"], lines)}"""
