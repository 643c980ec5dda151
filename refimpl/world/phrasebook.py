"""Surface forms: one fact, many templates, each of which can be read back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from refimpl.world.rng import Rng

SLOT = re.compile(r"\{(\w+)\}")
NAME = "[A-Z][a-z]+"
WORD = "[a-z]+"
DEFAULT_PATTERNS = {
    **dict.fromkeys(("name", "town", "company", "user", "other", "Name"), NAME),
    **dict.fromkeys(("job", "animal", "food", "hobby", "color", "object", "instrument", "number"), WORD),
    **dict.fromkeys(("a_job", "a_object", "a_animal"), f"an? {WORD}"),
}


def article(word: str) -> str:
    """The word with its indefinite article.

    Examples
    --------
    >>> article("apple"), article("mug"), article("uniform")
    ('an apple', 'a mug', 'a uniform')
    """
    return ("an " if word[0] in "aeiouAEIOU" and not word.startswith("uni") else "a ") + word


class Phrases:
    """Templates with `{slot}`s that say the same thing.

    Parameters
    ----------
    templates : sequence of str, or one string with a template per line
        The surface forms; every slot name needs a pattern.
    **patterns : str
        Regular expressions of slots that `DEFAULT_PATTERNS` lacks.

    Examples
    --------
    >>> lives = Phrases("I live in {town}.|My home is in {town}.".split("|"))
    >>> lives.write(Rng("x"), {"town": "Ripon"}) in ("I live in Ripon.", "My home is in Ripon.")
    True
    >>> lives.read("My home is in Ripon.")
    {'town': 'Ripon'}
    >>> lives.read("My home is a boat.") is None
    True
    """

    def __init__(self, templates: Sequence[str] | str, **patterns: str) -> None:
        if isinstance(templates, str):
            templates = [line.strip() for line in templates.strip().split("\n")]
        if not templates or len(set(templates)) != len(templates):
            raise ValueError(f"templates: expected at least one and no repeats, got {list(templates)}")
        self.templates = tuple(templates)
        self.forms = tuple(SLOT.sub(r"%(\1)s", t.replace("%", "%%")) for t in templates)
        self.regexes = tuple(re.compile(self._regex(t, patterns)) for t in templates)

    @staticmethod
    def _regex(template: str, patterns: Mapping[str, str]) -> str:
        parts, seen = [], set()
        for i, piece in enumerate(SLOT.split(template)):
            if i % 2 == 0:
                parts.append(re.escape(piece))
            elif piece in seen:
                parts.append(f"(?P={piece})")
            else:
                seen.add(piece)
                pattern = patterns.get(piece) or DEFAULT_PATTERNS.get(piece)
                if pattern is None:
                    raise ValueError(f"templates: slot {piece!r} of {template!r} has no pattern")
                parts.append(f"(?P<{piece}>{pattern})")
        return "".join(parts)

    def write(self, rng: Rng, values: Mapping[str, object]) -> str:
        """One form, all equally likely, with its slots filled."""
        forms = self.forms
        return forms[int(rng.random() * len(forms))] % values

    def read(self, text: str) -> dict[str, str] | None:
        """The slot values of the first form that matches the whole text, or None."""
        for regex in self.regexes:
            if match := regex.fullmatch(text):
                return match.groupdict()
        return None

    def form_of(self, text: str) -> int | None:
        """The index of the first form that matches the whole text, or None."""
        for i, regex in enumerate(self.regexes):
            if regex.fullmatch(text):
                return i
        return None


class PhraseIndex:
    """Finds which of several `Phrases` a text belongs to.

    Forms that begin with a fixed word are looked up by that word; the others are tried in order.
    """

    def __init__(self, phrases: Mapping[str, Phrases]) -> None:
        self.by_word: dict[str, list[tuple[str, int, re.Pattern]]] = {}
        self.rest: list[tuple[str, int, re.Pattern]] = []
        for key, book in phrases.items():
            for i, (template, regex) in enumerate(zip(book.templates, book.regexes, strict=True)):
                first = template.split()[0]
                home = self.rest if "{" in first else self.by_word.setdefault(first, [])
                home.append((key, i, regex))

    def read(self, text: str) -> tuple[str, int, dict[str, str]]:
        """(key, index of the form, slot values); ValueError when no form matches."""
        for key, i, regex in (*self.by_word.get(text.split(" ", 1)[0], ()), *self.rest):
            if match := regex.fullmatch(text):
                return key, i, match.groupdict()
        raise ValueError(f"text: no known phrase matches {text!r}")
