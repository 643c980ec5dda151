"""House style of the book's figures, and the few ways in which a notebook shows a result.

Every picture carries a text alternative.  `make notebooks` copies it to where the book builder looks for it,
so a notebook shows a figure only through `show` or `frames`.  Backgrounds are white and opaque: the pages
keep them so in the dark theme as well.  Needs the `book` extra (matplotlib, IPython).
"""

from __future__ import annotations

import base64
import hashlib
import html
import inspect
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from refimpl.systems import VERDICTS

__all__ = [
    "PALETTE",
    "Claims",
    "Frames",
    "Source",
    "claims_table",
    "frames",
    "show",
    "show_source",
    "use_style",
]

PALETTE = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "pink": "#CC79A7",
    "wine": "#3B0F1E",
    "violet": "#6A1FB0",
}
"""Colours in order of use: contrast at least 3:1 on white, apart under the three dichromacies (tested)."""

_VERDICT_BAR = dict(
    zip(VERDICTS, [PALETTE[c] for c in ("green", "blue", "vermilion", "wine", "wine")], strict=True)
)

DPI = 90
MAX_FRAMES = 24
MAX_FRAMES_BYTES = 250_000
MIN_ALT = 20  # characters: a shorter one names the picture instead of saying what it shows

_STYLE = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "savefig.transparent": False,
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "grid.color": "#D9D9D9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same letters on every machine
    "font.size": 10.0,
    "image.cmap": "viridis",
}


def use_style() -> None:
    """Switch matplotlib to the house style; call it once, in a notebook's first cell.

    >>> use_style()
    >>> matplotlib.rcParams["figure.facecolor"], matplotlib.rcParams["savefig.transparent"]
    ('white', False)
    """
    matplotlib.rcParams.update(_STYLE)
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=list(PALETTE.values()))


def show(fig: Figure, alt: str) -> None:
    """Display a figure as PNG with its text alternative, then close it.

    Parameters
    ----------
    fig : Figure
        The figure; closed afterwards, so that no second copy appears under the cell.
    alt : str
        What is to be seen, in a sentence or two, for someone who cannot see it; at least 20 characters.

    Raises
    ------
    TypeError
        `fig` is not a matplotlib figure, or `alt` is not a string.
    ValueError
        `alt` is too short to say anything, or is a file name.

    Examples
    --------
    >>> fig = Figure(figsize=(2, 1))
    >>> show(fig, alt="An empty picture, two inches wide and one inch high.")
    <figure: An empty picture, two inches wide and one inch high.>
    """
    from IPython.display import display

    _check_figure("fig", fig)
    _check_alt(alt)
    bundle = {"image/png": _base64(_png(fig)), "text/plain": f"<figure: {alt}>"}
    _close(fig)
    display(_Bundle(bundle, {"image/png": {"alt": alt}}))


class _Bundle:
    """Several representations of one output, with the metadata that belongs to each."""

    def __init__(self, data: dict[str, str], metadata: dict[str, Any]):
        self.data, self.metadata = data, metadata

    def __repr__(self) -> str:
        return self.data["text/plain"]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        return self.data, self.metadata


def frames(
    figures: Sequence[Figure] | Callable[[Any], Figure],
    settings: Sequence[Any],
    label: str,
    alt: str,
) -> Frames:
    """A slider over precomputed figures that needs no kernel, no network and no library.

    Parameters
    ----------
    figures : sequence of Figure, or callable
        One figure per setting, or a function that makes the figure of one setting.  All of one size.
    settings : sequence
        The slider's positions, in order: 2 to 24 of them; `str(setting)` is what the reader sees.
    label : str
        What the slider changes, for instance ``"cache budget"``.
    alt : str
        What is to be seen; the setting is appended for each frame.

    Returns
    -------
    Frames
        Displays itself as HTML; its first frame is the picture for print, EPUB and pages without scripts.

    Raises
    ------
    ValueError
        Number of settings outside 2 to 24, figures and settings of unequal number, frames of unequal
        size, or a whole over 250 000 bytes; also the bad `alt` texts that `show` refuses.

    Examples
    --------
    >>> def draw(budget):
    ...     fig = Figure(figsize=(2, 1))
    ...     fig.subplots().bar([0], [budget])
    ...     return fig
    >>> frames(draw, settings=[1, 2, 4], label="budget", alt="One bar, as high as the budget.")
    <3 frames over budget: 1, 2, 4>
    """
    _check_alt(alt)
    if not isinstance(label, str) or not label.strip():
        raise ValueError(f"label must be a non-empty string, got {label!r}")
    settings = list(settings)
    if not 2 <= len(settings) <= MAX_FRAMES:
        raise ValueError(f"settings must hold 2 to {MAX_FRAMES} values, got {len(settings)}")
    if not callable(figures) and len(figures) != len(settings):
        raise ValueError(
            f"figures and settings must be of equal number, got {len(figures)} and {len(settings)}"
        )
    pngs, sizes = [], []
    for i, setting in enumerate(settings):
        fig = figures(setting) if callable(figures) else figures[i]
        _check_figure(f"the figure of {label} = {setting}", fig)
        png = _few_colours(_png(fig))
        _close(fig)
        pngs.append(png)
        sizes.append(Image.open(io.BytesIO(png)).size)
    if len(set(sizes)) > 1:
        raise ValueError(f"all frames must have one size in pixels, got {sorted(set(sizes))}")
    result = Frames(pngs, [str(s) for s in settings], label, alt, sizes[0])
    n_bytes = len(result.html("frames-0")) + len(_base64(pngs[0]))
    if n_bytes > MAX_FRAMES_BYTES:
        raise ValueError(
            f"frames take {n_bytes} bytes, allowed are {MAX_FRAMES_BYTES}: "
            f"use fewer settings than {len(settings)} or smaller figures than {sizes[0]} pixels"
        )
    return result


class Frames:
    """What `frames` returns: PNGs, their settings, and the HTML that moves between them."""

    _displayed = itertools.count(1)  # every display gets its own id, also of one object shown twice

    def __init__(self, pngs: list[bytes], settings: list[str], label: str, alt: str, size: tuple[int, int]):
        self.pngs, self.settings, self.label, self.alt, self.size = pngs, settings, label, alt, size

    def __repr__(self) -> str:
        return f"<{len(self.pngs)} frames over {self.label}: {', '.join(self.settings)}>"

    def alts(self) -> list[str]:
        """The text alternative of each frame."""
        return [f"{self.alt} ({self.label}: {setting})" for setting in self.settings]

    def html(self, uid: str) -> str:
        """The self-contained markup, well-formed as XML too, because EPUB pages are XHTML."""
        sources = [f"data:image/png;base64,{_base64(png)}" for png in self.pngs]
        width, height = self.size
        label, first = html.escape(self.label), html.escape(self.settings[0])
        # dark-light: the theme leaves such an image as it is in its dark mode
        image = (
            f'<img class="dark-light" src="{sources[0]}" alt="{_attr(self.alts()[0])}" '
            f'width="{width}" height="{height}"'
        )
        # "</" would end the script, "<" and "&" would break XHTML: \u escapes are plain JSON
        data = json.dumps({"src": sources, "alt": self.alts(), "at": self.settings})
        for char in "<>&":
            data = data.replace(char, f"\\u{ord(char):04x}")
        return (
            f'<figure id="{uid}" class="frames" style="margin:0;padding:.5em;background:#fff;color:#222">'
            f'{image} style="max-width:100%;height:auto;display:block;margin:0 auto" />'
            # hidden until the script runs: a page without scripts shows a figure, not a dead slider
            f'<label class="frames-control" style="display:none">{label} '
            f'<input type="range" min="0" max="{len(self.pngs) - 1}" value="0" step="1" '
            f'style="vertical-align:middle;width:50%" /> <output>{first}</output></label>'
            f'<figcaption style="color:#222">{label}: <span>{first}</span></figcaption>'
            f"<style>@media print {{ #{uid} .frames-control {{ display: none !important }} "
            f"#{uid} figcaption {{ display: block !important }} }}</style>"
            "<script>(function () {"
            f'const root = document.getElementById("{uid}"), data = {data};'
            "const get = function (name) { return root.querySelector(name); };"
            'const input = get("input"), image = get("img");'
            "const move = function () {"
            "const i = Number(input.value); image.src = data.src[i]; image.alt = data.alt[i];"
            'get("output").textContent = get("span").textContent = data.at[i];'
            'input.setAttribute("aria-valuetext", data.at[i]); };'
            'input.addEventListener("input", move); get("label").style.display = "block";'
            'get("figcaption").style.display = "none"; move();'
            "})();</script></figure>"
        )

    def _repr_html_(self) -> str:
        key = hashlib.sha256(b"".join(self.pngs) + self.label.encode()).hexdigest()[:8]
        return self.html(f"frames-{key}-{next(self._displayed)}")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        bundle = {
            "text/html": self._repr_html_(),
            "image/png": _base64(self.pngs[0]),
            "text/plain": repr(self),
        }
        return bundle, {"image/png": {"alt": self.alts()[0]}}


def claims_table(rows: Sequence[Mapping[str, str]]) -> Claims:
    """The table that ends a chapter: the paper's claim, our scale, what was measured, the verdict.

    Parameters
    ----------
    rows : sequence of mappings
        Each with exactly the keys ``claim``, ``scale``, ``measured``, ``verdict``: non-empty strings; the
        verdict is one of `refimpl.systems.VERDICTS`.

    Raises
    ------
    ValueError
        No rows, missing or additional keys, empty text, an unknown verdict.

    Examples
    --------
    >>> claims_table([{"claim": "Sinks matter", "scale": "10 M parameters", "measured": "+0.4 nats",
    ...                "verdict": "reproduced in direction"}])
    paper's claim: Sinks matter
    our scale: 10 M parameters
    measured: +0.4 nats
    verdict: reproduced in direction
    """
    rows = [dict(row) for row in rows]
    if not rows:
        raise ValueError("rows must hold at least one claim, got none")
    for i, row in enumerate(rows):
        if set(row) != set(Claims.columns):
            raise ValueError(f"rows[{i}] must have the keys {list(Claims.columns)}, got {list(row)}")
        for key, text in row.items():
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"rows[{i}][{key!r}] must be a non-empty string, got {text!r}")
        if row["verdict"] not in VERDICTS:
            raise ValueError(f"rows[{i}]['verdict'] is {row['verdict']!r}, allowed are {list(VERDICTS)}")
    return Claims(rows)


class Claims:
    """What `claims_table` returns: displays itself as an HTML table, or as text in a terminal."""

    columns = {"claim": "paper's claim", "scale": "our scale", "measured": "measured", "verdict": "verdict"}

    def __init__(self, rows: list[dict[str, str]]):
        self.rows = rows

    def __repr__(self) -> str:
        return "\n\n".join(
            "\n".join(f"{title}: {row[key]}" for key, title in self.columns.items()) for row in self.rows
        )

    def _repr_html_(self) -> str:
        cell = "padding:.4em .8em;text-align:left;vertical-align:top"
        head = "".join(
            f'<th scope="col" style="{cell}">{html.escape(title)}</th>' for title in self.columns.values()
        )
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="{cell}">{html.escape(row[key])}</td>' for key in ("claim", "scale", "measured")
            )
            + f'<td style="border-left:.4em solid {_VERDICT_BAR[row["verdict"]]};{cell}">'
            + f"<strong>{html.escape(row['verdict'])}</strong></td></tr>"
            for row in self.rows
        )
        return f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def show_source(obj: Any) -> Source:
    """The source of a class, function or module, highlighted: what the book explains is what it runs.

    Raises
    ------
    TypeError
        `obj` has no Python source (a number, a built-in).

    Examples
    --------
    >>> print(repr(show_source(use_style)).splitlines()[0])
    # refimpl.viz.use_style
    """
    return Source(_name(obj), inspect.getsource(obj).rstrip())


class Source:
    """What `show_source` returns: a fenced Python block, which pages and JupyterLab highlight themselves."""

    def __init__(self, name: str, text: str):
        self.name, self.text = name, text

    def __repr__(self) -> str:
        return f"# {self.name}\n{self.text}"

    def _repr_markdown_(self) -> str:
        # the fence is longer than any run of backticks that a docstring is likely to hold
        return f"``````python\n{self!r}\n``````"


def _name(obj: Any) -> str:
    if inspect.ismodule(obj):
        return obj.__name__
    return f"{obj.__module__}.{obj.__qualname__}" if hasattr(obj, "__qualname__") else type(obj).__name__


def _check_figure(name: str, fig: Any) -> None:
    if not isinstance(fig, Figure):
        raise TypeError(f"{name} must be a matplotlib Figure, got {type(fig).__name__}")


def _check_alt(alt: Any) -> None:
    if not isinstance(alt, str):
        raise TypeError(f"alt must be a string, got {type(alt).__name__}")
    if len(alt.strip()) < MIN_ALT:
        raise ValueError(f"alt must say in {MIN_ALT} or more characters what is to be seen, got {alt!r}")
    if Path(alt).suffix.lower() in {".png", ".jpg", ".jpeg", ".svg"}:
        raise ValueError(f"alt must say what is to be seen, got the file name {alt!r}")


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    # without the Software entry the same drawing gives the same bytes under every matplotlib version
    fig.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _few_colours(png: bytes) -> bytes:
    """The same picture with a palette of 32 colours: about a fifth of the bytes."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image = image.quantize(32, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _close(fig: Figure) -> None:
    from matplotlib import pyplot

    pyplot.close(fig)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _attr(text: str) -> str:
    return html.escape(text, quote=True)
