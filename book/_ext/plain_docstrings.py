"""Sphinx extension: docstrings are written for people who read code; this turns them into reStructuredText.

In our docstrings `name` is code, a list may follow a line directly, stars and bars are just characters, and a
heading is a word on a line of its own, underlined or not; under it, `name : text` describes a parameter.
"""
import re

_LITERAL = re.compile(r"(``.+?``|(?<![`:\w])`[^`]+`(?![`_]))", re.S)
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(?=[^\s*])([^*\n]+?)(?<=[^\s*])\1(?![\w*])")
_ITEM = re.compile(r"\s*- ")
_UNDERLINED = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.M)
_PARAMETER = re.compile(r"^(\*{0,2}\w[\w*, ]*?) : (.*(?:\n +\S.*)*)", re.M)


def _inline(text: str) -> str:
    parts = _LITERAL.split(text)
    for place, part in enumerate(parts):
        if place % 2:
            ends = parts[place + 1][:1]
            parts[place] = f"``{part.strip('`')}``" + ("\\ " if ends.isalnum() else "")
            continue
        kept = _EMPHASIS.split(part)  # text, stars, words, text, stars, words, text ...
        plain = [re.sub(r"(?<=\w)_(?!\w)", r"\\_", re.sub(r"([*|])", r"\\\1", piece)) for piece in kept[::3]]
        marked = [f"{stars}{words}{stars}" for stars, words in zip(kept[1::3], kept[2::3], strict=True)]
        parts[place] = plain[0] + "".join(mark + piece for mark, piece in zip(marked, plain[1:], strict=True))
    return "".join(parts)


def _sections(text: str) -> str:
    """Turn underlined headings into bold ones, and the parameters under them into a list."""
    parts = _UNDERLINED.split(text)
    for place in range(1, len(parts), 2):
        parts[place] = f"**{parts[place]}**\n"
        parts[place + 1] = _PARAMETER.sub(_parameter, parts[place + 1])
    return "".join(parts)


def _parameter(match: re.Match) -> str:
    lines = match[2].split("\n")
    return "\n".join([f"- `{match[1]}`: {lines[0]}", *(f"  {line.strip()}" for line in lines[1:])])


def _spaced(lines: list[str]) -> list[str]:
    """Put an empty line before and after the list in a paragraph, and set its heading in bold."""
    out: list[str] = []
    in_list = False
    for line in lines:
        if _ITEM.match(line):
            if not in_list and out:
                if re.fullmatch(r"\s*[A-Z][\w ]*", out[-1]):
                    out[-1] = f"**{out[-1].strip()}**"
                out.append("")
            in_list = True
        elif in_list and not line.startswith(" "):
            out.append("")
            in_list = False
        out.append(line)
    return out


def _prose(text: str) -> list[str]:
    """Convert everything between two doctests, paragraph by paragraph."""
    out: list[str] = []
    in_list = False
    for paragraph in re.split(r"(\n(?:[ \t]*\n)+)", _sections(text)):
        lines = paragraph.split("\n")
        if not paragraph.strip():
            out.extend([""] * (len(lines) - 2))
            continue
        indented = all(line.startswith("  ") for line in lines if line)
        if lines[0].startswith("===") or (indented and not in_list):  # a table, a drawing, a display
            out.extend(["::", "", *(f"  {line}" for line in lines)])
        else:
            out.extend(_spaced(_inline(paragraph).split("\n")))
        in_list = any(_ITEM.match(line) for line in lines) or (indented and in_list)
    return out


def to_rst(lines: list[str]) -> list[str]:
    """Return the lines of a docstring as reStructuredText.

    >>> to_rst(["Run `f(**kw)`.", "", "Notes", "- one |x|", "- two", "Then more."])
    ['Run ``f(**kw)``.', '', '**Notes**', '', '- one \\\\|x\\\\|', '- two', '', 'Then more.']
    >>> to_rst(["Parameters", "----------", "x : [B, T],", "    ids.", "", "Raises `E`s."])
    ['**Parameters**', '', '- ``x``: [B, T],', '  ids.', '', 'Raises ``E``\\\\ s.']
    >>> to_rst(["As in:", "", "    a  *", "    b", "", "Or:", ">>> 1", "1"])
    ['As in:', '', '::', '', '      a  *', '      b', '', 'Or:', '', '>>> 1', '1']
    """
    out: list[str] = []
    prose: list[str] = []

    def flush() -> None:
        if prose:
            out.extend(_prose("\n".join(prose)))
            prose.clear()

    in_doctest = False
    for line in lines:
        begins = line.lstrip().startswith(">>>") and not in_doctest
        if begins:
            flush()
            if out and out[-1].strip():
                out.append("")
        in_doctest = begins or (in_doctest and bool(line.strip()))
        (out if in_doctest else prose).append(line)
    flush()
    return out


def _process(app, what, name, obj, options, lines):
    ours = str(getattr(obj, "__module__", None) or name).startswith("refimpl")
    lines[:] = to_rst(lines) if ours else lines[:1]  # a borrowed function: its own summary line will do


def _skip(app, what, name, obj, skip, options):
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app):
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-skip-member", _skip)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
