"""The facts of the world in single sentences: 27 relations, stated and asked in many ways, and read back
exactly.

A fact is a tuple `(subject, relation, value)`; a fact of a dated relation carries a fourth item, for example
`("Balbert", "moved_to", "Ripon", "March 1987")`. The wordings are the table of `relation_forms.py`. Split
"train" never uses a held-out wording, split "eval" uses nothing else: a question of split "eval" has a
held-out form, a held-out noun phrase or predicate, or a held-out frame around one. "more" writes with the
table of `relation_forms_more.py`, likewise: no split of names, but a third wording, for adapters to learn.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from typing import Literal

from refimpl.world.lexicon import FIRST_NAMES, JOBS, MONTHS, TOWNS
from refimpl.world.names import known_people
from refimpl.world.relation_forms import (
    ASKED_RELATIONS,
    CONFIRMED_OR_RETRACTED,
    PERSON_FRAMES,
    TYPES,
    VALUE_FRAMES,
    WHO_FRAMES,
    Relation,
)
from refimpl.world.relation_forms_more import (
    MORE,
    MORE_PERSON_FRAMES,
    MORE_VALUE_FRAMES,
    MORE_WHO_FRAMES,
)
from refimpl.world.rng import Rng

Fact = tuple[str, ...]
Wording = Literal["train", "more", "eval"]  # a later one decides where a question mixes them
YEARS = tuple(range(1970, 2000))
DATES = tuple(f"{month} {year}" for year in YEARS for month in MONTHS)  # in order of time
RELATIONS: dict[str, Relation] = {r.name: r for r in (*ASKED_RELATIONS, *CONFIRMED_OR_RETRACTED)}
ASKED: tuple[str, ...] = tuple(r.name for r in ASKED_RELATIONS)  # those that questions are asked about
CHANGES = {  # a changing state: (the change, its confirmation, its retraction)
    "home": ("moved_to", "confirmed_home", "retracted_home"),
    "company": ("started_at", "confirmed_company", "retracted_company"),
    "job": ("became", "confirmed_job", "retracted_job"),
}
KNOWN_ATTRIBUTES = ("lives_in", "works_as", "works_for", "studied_at", "has_pet")

# --- writing ------------------------------------------------------------------------------------------------

_LOWER = {v for t in ("job", "animal", "object") for v in TYPES[t]}
ARTICLE = {v: ("an " if v[0] in "aeiou" else "a ") + v for v in _LOWER}
_PLAIN = {v: v for v in _LOWER} | {phrase: v for v, phrase in ARTICLE.items()}
_WORDINGS: tuple[Wording, ...] = ("train", "more", "eval")
_HELD = {"states": 2, "asks": 1, "paraphrases": 1, "who": 1, "phrase": 1, "inverse": 1, "when": 1}


def _cut(relation: Relation, field: str) -> dict[str, tuple[str, ...]]:
    """{"train": templates, "more": further ones, "eval": the held-out ones}."""
    templates = getattr(relation, field)
    k = len(templates) - _HELD[field]
    return {"train": templates[:k], "more": MORE[relation.name].get(field, ()), "eval": templates[k:]}


def expand(template: str) -> list[str]:
    """The templates that one with alternatives stands for.

    >>> expand("{s} (resides|dwells) in {v}.")
    ['{s} resides in {v}.', '{s} dwells in {v}.']
    """
    parts = [part.split("|") for part in re.split(r"[()]", template)]
    return ["".join(words) for words in product(*parts)]


def _writers(templates) -> tuple:
    """Bound `str.format` methods of (subject, value, value with article, date)."""
    plain = [one for template in templates for one in expand(template)]
    return tuple(t.format(s="{0}", v="{1}", a="{2}", d="{3}").format for t in plain)


def _forms(relation: Relation, field: str) -> dict[str, tuple]:
    """Writers of one field by split."""
    if relation.value in ("object", "animal", "job"):
        for t in (*getattr(relation, field), *MORE[relation.name].get(field, ())):
            assert not re.search(r"\b[Aa] \{v\}", t), t  # a fixed "A {v}" would be wrong for "owl"
    return {split: _writers(ts) for split, ts in _cut(relation, field).items()}


def _cut_frames(frames: tuple[str, ...], more: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """As `_cut`, of frames."""
    return {"train": frames[:-1], "more": more, "eval": frames[-1:]}


_VALUE_FRAMES = _cut_frames(VALUE_FRAMES, MORE_VALUE_FRAMES)
_PERSON_FRAMES = _cut_frames(PERSON_FRAMES, MORE_PERSON_FRAMES)
_WHO_FRAMES = {kind: _cut_frames(frames, MORE_WHO_FRAMES[kind]) for kind, frames in WHO_FRAMES.items()}


def _frames(relation: Relation) -> dict[str, tuple[str, ...]]:
    """The frames around a noun phrase that names a value of this relation."""
    return _PERSON_FRAMES if relation.value == "person" else _VALUE_FRAMES


def _framed(
    frames: dict[str, tuple[str, ...]], slot: str, inner: dict[str, tuple[str, ...]], split: Wording
) -> list[str]:
    """Frames filled with templates; for split "eval" the frame or the template is held out, each as often."""
    if split == "train":
        return [f.replace(slot, t) for f in frames["train"] for t in inner["train"]]
    new_frame = [f.replace(slot, t) for f in frames[split] for t in inner["train"]]
    old_frames = frames["train"][:2] if split == "eval" else (*frames["train"], *frames["more"])
    new_words = [f.replace(slot, t) for f in old_frames for t in inner[split]]
    return new_frame + new_words * max(1, len(new_frame) // max(1, len(new_words)))


def _predicates(relation: Relation) -> dict[str, tuple[str, ...]]:
    """What a statement that begins with the subject says of it, without a date: "lives in {v}"."""
    head = "{s} School " if relation.subject == "school" else "{s} "
    out: dict[str, tuple[str, ...]] = {}
    for split, templates in _cut(relation, "states").items():
        cut = (t.removeprefix(head)[:-1].removesuffix(" in {d}") for t in templates if t.startswith(head))
        out[split] = tuple(dict.fromkeys(p for p in cut if "{s}" not in p and "{d}" not in p))
    return out


def _who_questions(relation: Relation, split: Wording) -> tuple[str, ...]:
    """Questions for the subject: predicates and noun phrases in frames, and what the table adds."""
    if relation.value == "person":
        return ()
    forms = _framed(_WHO_FRAMES[relation.subject], "{p}", _PREDICATES[relation.name], split)
    if relation.inverse:
        forms += _framed(_PERSON_FRAMES, "{n}", _cut(relation, "inverse"), split)
    if relation.who:
        forms += list(_cut(relation, "who")[split])
    return tuple(forms)


def _write(form, subject: str, value: str, when: str) -> str:
    text = form(subject, value, ARTICLE.get(value, value), when)
    return text if text[0] < "a" else text[0].upper() + text[1:]


def state(relation: str, subject: str, value: str, rng: Rng, split: Wording = "train", when: str = "") -> str:
    """Write one fact as a sentence; `when` ("March 1987") only for dated relations.

    Examples
    --------
    >>> parse_sentence(state("lives_in", "Balbert", "Ripon", Rng(0)))
    [('Balbert', 'lives_in', 'Ripon')]
    """
    return _write(rng.choice(_STATES[relation][split]), subject, value, when)


def state_subject_first(
    relation: str, subject: str, value: str, rng: Rng, split: Wording = "train", when: str = ""
) -> str:
    """As `state`, among the templates that begin with the subject, so that a pronoun or alias may stand
    there.
    """
    return _write(rng.choice(_STATES_SUBJECT_FIRST[relation][split]), subject, value, when)


def ask(
    relation: str, subject: str, rng: Rng, split: Wording = "train", paraphrase: bool | None = None
) -> str:
    """Ask for the value; `paraphrase` chooses between shared and paraphrased wording (None: either).

    Examples
    --------
    >>> parse_question(ask("lives_in", "Balbert", Rng(0)))
    ('lives_in', 'Balbert')
    """
    if paraphrase is None:
        paraphrase = rng.random() < 0.5
    if paraphrase:
        forms = _PARAPHRASES[relation][split]
    else:
        forms = (_ASKS if rng.random() < 0.5 else _FRAMED)[relation][split]
    return rng.choice(forms)(subject, "", "", "")


def can_ask_who(relation: str) -> bool:
    """Whether there are questions for the subject of this relation."""
    return relation in _WHO


def ask_who(relation: str, value: str, rng: Rng, split: Wording = "train") -> str:
    """Ask for the subject that has this value: "Who lives in Ripon?".

    Where `value` is itself a noun phrase ("the town where Adam Barker was born"), only noun phrases are used.
    """
    table = _WHO if value in ARTICLE or value in _ENTITIES else _WHO_OF_PHRASE
    return rng.choice(table[relation][split])("", value, ARTICLE.get(value, value), "")


def who_clause(relation: str, value: str, rng: Rng, split: Wording = "train") -> str:
    """What follows "who" in a question: "lives in Ripon"."""
    return rng.choice(_CLAUSES[relation][split])("", value, ARTICLE.get(value, value), "")


def ask_when(relation: str, subject: str, value: str, rng: Rng, split: Wording = "train") -> str:
    """Ask for the date of a dated fact."""
    return rng.choice(_WHEN[relation][split])(subject, value, ARTICLE.get(value, value), "")


def phrase(step: str, inner: str, rng: Rng, split: Wording = "train") -> str:
    """A noun phrase one step away from `inner`: "the town where Balbert lives"; "~mayor_of" goes from town to
    mayor.
    """
    if step[0] == "~":
        return rng.choice(_INVERSE[step[1:]][split])("", inner, inner, "")
    return rng.choice(_PHRASE[step][split])(inner, "", "", "")


def cloze(relation: str, subject: str) -> str:
    """A prompt whose right continuation is a space and the value.

    Examples
    --------
    >>> cloze("lives_in", "Balbert")
    'Balbert lives in the town of'
    """
    return RELATIONS[relation].cloze.format(s=subject)


def clozes(relation: str, subject: str, value: str, split: Wording = "train") -> list[tuple[str, str]]:
    """Every statement that ends in its value, cut before it: (prompt, completion with its leading space).

    Examples
    --------
    >>> clozes("works_as", "Balbert", "actor", "eval")
    [('Balbert is working as', ' an actor')]
    """
    pairs = []
    for form in _STATES[relation][split]:
        text = _write(form, subject, value, "")[:-1]
        for last in (" " + ARTICLE.get(value, value), " " + value):
            if text.endswith(last) and subject in text[: -len(last)]:
                pairs.append((text[: -len(last)], last))
                break
    return pairs


_FEMALE = frozenset(
    """Agnes Alice Amy Anna Barbara Bertha Bess Carol Clara Claire Daisy Dora Doris Edith Ella Ellen Emily
Emma Esther Ethel Eva Flora Florence Gertrude Grace Greta Hannah Harriet Helen Hilda Ida Irene Jane Jean Jenny
Joan
Josephine Julia Kate Laura Lily Louise Lucy Mabel Margaret Maria Martha Mary Maud Mildred Molly Nancy Nell
Nina Nora Olive
Polly Rosa Rose Ruth Sarah Sophie Stella Susan Violet""".split()
)
_FEMALE_ENDINGS = ("a", "in", "en", "el", "is", "as", "yn")


def pronoun(name: str) -> str:
    """ "she" or "he", fixed by the name.

    Examples
    --------
    >>> pronoun("Agnes Barker"), pronoun("Balbert")
    ('she', 'he')
    """
    first = name.split(" ")[0]
    if first in _FEMALE or (first not in FIRST_NAMES and first.endswith(_FEMALE_ENDINGS)):
        return "she"
    return "he"


# --- reading ------------------------------------------------------------------------------------------------

_PERSON = rf"[A-Z][a-z]+(?: [A-Z][a-z]+)?|[Tt]he (?:{'|'.join(JOBS)}) of (?:{'|'.join(TOWNS)})"


def _either(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_PATTERN = {name: _PERSON if words is None else _either(words) for name, words in TYPES.items()}
_DATE = rf"(?:{_either(MONTHS)}) (?:{_either(map(str, YEARS))})"


@cache
def _dispatch(fields: tuple[str, ...], nested: bool) -> dict[str, list[tuple]]:
    """{rarest word of a template: [(compiled regex, relation, field, wording), ...]}."""
    rows = []
    for relation in RELATIONS.values():
        for field in fields:
            for wording, templates in _cut(relation, field).items():
                for template in templates:
                    words = re.findall(r"[A-Za-z]+", re.sub(r"\{.\}|\([^)]*\)", " ", template))
                    rows.append((template, words, relation, field, wording))
    count: dict[str, int] = {}
    for _, words, *_ in rows:
        for w in set(words):
            count[w] = count.get(w, 0) + 1
    table: dict[str, list[tuple]] = {}
    for template, words, relation, field, wording in rows:
        subject = ".+" if nested and field != "inverse" else _PATTERN[relation.subject]
        value = _PATTERN[relation.value]
        if nested and (field == "inverse" or field == "who"):
            value = ".+" if relation.inverse else value
        slots = {"s": f"(?P<s>{subject})", "v": f"(?P<v>{value})", "d": f"(?P<d>{_DATE})"}
        if relation.value in ("job", "animal", "object"):
            slots["a"] = f"(?P<v>{_either(ARTICLE[v] for v in TYPES[relation.value])})"
        pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
        pattern = pattern.replace(r"\(", "(?:").replace(r"\|", "|").replace(r"\)", ")")
        seen: set[str] = set()
        for key in re.findall(r"\{(.)\}", template):
            pattern = pattern.replace("{" + key + "}", slots[key] if key not in seen else f"(?P={key})", 1)
            seen.add(key)
        anchor = min(words, key=lambda w: (count[w], words.index(w)))
        table.setdefault(anchor, []).append((re.compile(pattern), relation, field, wording))
    return table


def _matches(text: str, fields: tuple[str, ...], nested: bool = False):
    table = _dispatch(fields, nested)
    for word in dict.fromkeys(re.findall(r"[A-Za-z]+", text)):
        for regex, relation, field, wording in table.get(word, ()):
            m = regex.fullmatch(text)
            if m:
                yield m, relation, field, wording


def read_statement(text: str) -> tuple[Fact, Wording]:
    """The fact of one sentence and its wording; ValueError if it is no statement of the world.

    >>> read_statement("Balbert is a resident of Ripon.")
    (('Balbert', 'lives_in', 'Ripon'), 'more')
    """
    found: list[tuple[Fact, Wording]] = []
    for m, relation, _, wording in _matches(text, ("states",)):
        groups = m.groupdict()
        subject, value = groups["s"], groups["v"]
        subject = "the" + subject[3:] if subject.startswith("The ") else subject
        value = "the" + value[3:] if value.startswith("The ") else _PLAIN.get(value, value)
        when = groups.get("d")
        found.append(((subject, relation.name, value) + ((when,) if when else ()), wording))
    if len(found) != 1:
        raise ValueError(
            f"text: {text!r} is {'no' if not found else 'more than one'} statement of the world: {found}"
        )
    return found[0]


def read_sentence(text: str) -> tuple[Fact, bool]:
    """The fact of one sentence and whether its template is held out, as `read_statement`."""
    fact, wording = read_statement(text)
    return fact, wording == "eval"


def parse_sentence(text: str) -> list[Fact]:
    """The facts of one sentence: the exact inverse of `state`.

    Examples
    --------
    >>> parse_sentence("Ripon is home to Adam Barker.")
    [('Adam Barker', 'lives_in', 'Ripon')]
    >>> parse_sentence("In March 1987, Balbert became an actor.")
    [('Balbert', 'became', 'actor', 'March 1987')]
    """
    return [read_sentence(text)[0]]


def _parse_phrase(text: str) -> tuple[tuple[str, ...], Wording]:
    """(("Balbert", "lives_in"), wording) from "the town where Balbert lives"; an entity alone is a path of
    no steps. The outermost noun phrase decides which wording it is.
    """
    if text in _ENTITIES:
        return (text,), "train"
    if re.fullmatch(_PERSON, text):
        return ("the" + text[3:] if text.startswith("The ") else text,), "train"
    found: dict[tuple[str, ...], Wording] = {}
    for m, relation, field, wording in _matches(text, ("phrase", "inverse"), nested=True):
        try:
            if field == "phrase":
                found[(*_parse_phrase(m["s"])[0], relation.name)] = wording
            else:
                found[(*_parse_phrase(m["v"])[0], "~" + relation.name)] = wording
        except ValueError:
            continue
    if len(found) != 1:
        raise ValueError(f"text: {text!r} is {'no' if not found else 'more than one'} noun phrase: {found}")
    return found.popitem()


def _frame_rules(frames: dict[str, tuple[str, ...]], slot: str) -> list[tuple[re.Pattern, Wording]]:
    return [
        (re.compile(re.escape(f).replace(re.escape(slot), "(.+)")), wording)
        for wording, fs in frames.items() for f in fs
    ]  # fmt: skip


_NOUN_FRAMES = list(dict.fromkeys(_frame_rules(_VALUE_FRAMES, "{n}") + _frame_rules(_PERSON_FRAMES, "{n}")))
_PREDICATE_FRAMES = [
    (rule, kind, framed) for kind, frames in _WHO_FRAMES.items()
    for rule, framed in _frame_rules(frames, "{p}")
]  # fmt: skip
_SUBJECT = {"person": "He", "company": TYPES["company"][0], "school": TYPES["school"][0] + " School"}


def parse_path(text: str) -> tuple[tuple[str, ...], bool]:
    """The path that a question asks along, entity first, and whether its wording is held out.

    Examples
    --------
    >>> parse_path("Where is the employer of Balbert based?")
    (('Balbert', 'works_for', 'based_in'), False)
    >>> parse_path("Who lives in Ripon?")
    (('Ripon', '~lives_in'), False)
    """
    path, wording = read_path(text)
    return path, wording == "eval"


def read_path(text: str) -> tuple[tuple[str, ...], Wording]:
    """The path that a question asks along, entity first, and its wording.

    >>> read_path("Tell me who is a resident of Ripon.")
    (('Ripon', '~lives_in'), 'more')
    """
    found: dict[tuple[str, ...], Wording] = {}

    def add(path: tuple[str, ...], *wordings: Wording) -> None:
        latest = max(wordings, key=_WORDINGS.index)
        found[path] = min(found.get(path, latest), latest, key=_WORDINGS.index)

    for m, relation, field, wording in _matches(text, ("asks", "paraphrases", "who"), nested=True):
        if field == "who":
            add((_PLAIN.get(m["v"], m["v"]), "~" + relation.name), wording)
            continue
        try:
            add((*_parse_phrase(m["s"])[0], relation.name), wording)
        except ValueError:
            continue
    for frame, framed in _NOUN_FRAMES:
        if m := frame.fullmatch(text):
            try:
                path, wording = _parse_phrase(m[1])
            except ValueError:
                continue
            if len(path) > 1:
                add(path, wording, framed)
    for frame, kind, framed in _PREDICATE_FRAMES:
        if m := frame.fullmatch(text):
            for end in (".", f" in {DATES[0]}."):
                try:
                    (_, name, value, *_), wording = read_statement(f"{_SUBJECT[kind]} {m[1]}{end}")
                except ValueError:
                    continue
                if RELATIONS[name].subject == kind and name in _WHO:
                    add((value, "~" + name), wording, framed)
    if len(found) != 1:
        raise ValueError(f"text: {text!r} is {'no' if not found else 'more than one'} question: {found}")
    return found.popitem()


def parse_question(text: str) -> tuple[str, str]:
    """(relation, subject) of a question for a value: the inverse of `ask`; ("~relation", value) for
    `ask_who`.
    """
    path, _ = parse_path(text)
    if len(path) != 2:
        raise ValueError(f"text: {text!r} asks along a chain {path}; use parse_path")
    return path[1], path[0]


def parse_when(text: str) -> tuple[tuple[str, str, str], bool]:
    """(subject, relation, value) of a question for a date, and whether its wording is held out."""
    fact, wording = read_when(text)
    return fact, wording == "eval"


def read_when(text: str) -> tuple[tuple[str, str, str], Wording]:
    """(subject, relation, value) of a question for a date, and its wording."""
    found = []
    for m, relation, _, wording in _matches(text, ("when",)):
        found.append(((m["s"], relation.name, _PLAIN.get(m["v"], m["v"])), wording))
    if len(found) != 1:
        raise ValueError(f"text: {text!r} is not one question for a date: {found}")
    return found[0]


# --- the known people ---------------------------------------------------------------------------------------


@cache
def known_facts() -> dict[tuple[str, str], str]:
    """{(person, relation): value} for the 200 known people and their five attributes; values are equally
    likely.

    Examples
    --------
    >>> len(known_facts())
    1000
    """
    facts: dict[tuple[str, str], str] = {}
    people = known_people()
    for relation in KNOWN_ATTRIBUTES:
        values = RELATIONS[relation].values
        rng = Rng("known facts", relation)
        # every value equally often, up to one: no guess is better than another
        column = [v for _ in range(-(-len(people) // len(values))) for v in rng.sample(values, len(values))]
        column = column[: len(people)]
        rng.shuffle(column)
        facts.update({(person, relation): value for person, value in zip(people, column, strict=True)})
    return facts


_ENTITIES = frozenset(v for words in TYPES.values() if words for v in words)
_STATES, _ASKS, _PARAPHRASES, _PHRASE, _INVERSE, _WHEN = (
    {r.name: _forms(r, field) for r in RELATIONS.values() if getattr(r, field)}
    for field in ("states", "asks", "paraphrases", "phrase", "inverse", "when")
)
_PREDICATES = {r.name: _predicates(r) for r in ASKED_RELATIONS}
_CLAUSES = {name: {split: _writers(ts) for split, ts in by.items()} for name, by in _PREDICATES.items()}
_FRAMED = {
    r.name: {split: _writers(_framed(_frames(r), "{n}", _cut(r, "phrase"), split)) for split in _WORDINGS}
    for r in ASKED_RELATIONS
}
_WHO = {
    r.name: {split: _writers(_who_questions(r, split)) for split in _WORDINGS}
    for r in ASKED_RELATIONS
    if r.value != "person"
}
_WHO_OF_PHRASE = {
    r.name: {
        split: _writers(_framed(_PERSON_FRAMES, "{n}", _cut(r, "inverse"), split)) for split in _WORDINGS
    }
    for r in ASKED_RELATIONS
    if r.inverse
}
_STATES_SUBJECT_FIRST = {
    name: {split: tuple(f for f in fs if f("\0", "", "", "")[:2] == "\0 ") for split, fs in forms.items()}
    for name, forms in _STATES.items()
}
