"""Passages of several facts, with aliases and pronouns, and the questions that can be asked about them.

A fact is a list `[subject, relation, value]` (dated relations: a fourth item). `[name, "alias", other]` says
that `other` names the same person. A passage is a list of facts; `write_passage` and `read_passage` are
inverse. In a passage a pronoun always means the subject of the sentence before.

A question is a list whose first item is its kind:

=========================================  ==============================================================
["path", entity, step, ...]                follow the steps; "~lives_in" goes from a town to who lives there
["when", subject, relation, value]         the date of a dated fact
["both", relation, value, relation, value] who has both values
["same", relation, person, person]         yes or no
["first", relation, person, person]        whose dated fact is earlier
["count", relation, value]                 how many people have this value (a number word)
["list", subject, relation]                all values, joined by ", "
["everyone", relation, value]              all subjects, joined by ", "
["now" | "before", state, person]          a state that changes ("home", "company", "job")
["asof", state, person, date]              the state in a month of the past
["times", state, person]                   how often it changed (a number word)
=========================================  ==============================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from refimpl.world.base import Split
from refimpl.world.lexicon import NUMBER_WORDS
from refimpl.world.names import names
from refimpl.world.relation_forms_more import (
    MORE_ALIAS,
    MORE_APPOSITION,
    MORE_CHANGING,
    MORE_COUNT,
    MORE_FIRST,
    MORE_LIST,
    MORE_OPENINGS,
    MORE_SAME,
)
from refimpl.world.relations import (
    _DATE,
    _PATTERN,
    _PERSON,
    _PLAIN,
    _STATES_SUBJECT_FIRST,
    ARTICLE,
    CHANGES,
    DATES,
    RELATIONS,
    TYPES,
    Wording,
    _either,
    _write,
    ask,
    ask_when,
    ask_who,
    phrase,
    pronoun,
    read_path,
    read_statement,
    read_when,
    state,
    who_clause,
)  # fmt: skip
from refimpl.world.rng import Rng

UNKNOWN = "unknown"
_DATE_INDEX = {d: i for i, d in enumerate(DATES)}
_VALUES = frozenset(v for words in TYPES.values() if words for v in words)


def people(split: Split) -> tuple[str, ...]:
    """The invented names of a split that are no value of any relation (one name is also a school)."""
    return _PEOPLE[split]


_PEOPLE = {split: tuple(n for n in names(split) if n not in _VALUES) for split in ("train", "eval")}

# --- passages -----------------------------------------------------------------------------------------------

_ALIAS = {
    "train": (
        "Friends call {s} {v}.",
        "{s} is often called {v}.",
        "Many know {s} as {v}.",
        "{s} is known as {v}.",
        "Another name for {s} is {v}.",
    ),
    "more": MORE_ALIAS,
    "eval": ("{s} goes by the name of {v}.",),
}
_APPOSITION = {
    "train": ("{s}, whom friends call {v}, ", "{s}, often called {v}, ", "{s}, known as {v}, "),
    "more": MORE_APPOSITION,
    "eval": ("{s}, also known as {v}, ",),
}
_OPENINGS = {
    "train": (
        "Besides, ",
        "In fact, ",
        "As many know, ",
        "It is said that ",
        "Everyone agrees that ",
        "Of course ",
    ),
    "more": MORE_OPENINGS,
    "eval": ("To be sure, ", "As one hears, "),
}
_NO_JOIN = {"friend_of", "married", "alias"}


def _alias_rules(table: dict, end: str) -> list[tuple[re.Pattern, Wording]]:
    return [
        (re.compile(re.escape(t).replace(r"\{s\}", f"(?P<s>{_PERSON})").replace(r"\{v\}",
                                                                                f"(?P<v>{_PERSON})") + end),
         split)
        for split, ts in table.items() for t in ts
    ]  # fmt: skip


_ALIAS_RULES = _alias_rules(_ALIAS, "$")
_APPOSITION_RULES = _alias_rules(_APPOSITION, "")


def write_passage(
    facts: Sequence[Sequence[str]], rng: Rng, split: Wording = "train", prose: bool = False
) -> str:
    """Write facts as sentences in their order; `prose` adds openings ("In fact, ...") and joins two facts
    with "and". The facts of split "train" may also be written in the wording "more".

    Examples
    --------
    >>> facts = [["Balbert", "alias", "Bal"], ["Balbert", "lives_in", "Ripon"], ["Balbert", "plays", "cello"]]
    >>> read_passage(write_passage(facts, Rng(3)))[0] == facts
    True
    """
    out: list[str] = []
    alias: dict[str, list[str]] = {}
    previous = apposition = ""
    i, n = 0, len(facts)
    while i < n:
        fact = facts[i]
        subject, relation, value = fact[0], fact[1], fact[2]
        i += 1
        if relation == "alias":
            following = facts[i] if i < n else None
            first = following and following[0] == subject and following[1] != "alias"
            if first and _STATES_SUBJECT_FIRST[following[1]][split] and rng.random() < 0.5:
                apposition = rng.choice(_APPOSITION[split]).format(s=subject, v=value)
            else:
                out.append(rng.choice(_ALIAS[split]).format(s=subject, v=value))
                previous = subject
            alias.setdefault(subject, []).append(value)
            continue
        when = fact[3] if len(fact) == 4 else ""
        forms = _STATES_SUBJECT_FIRST[relation][split]
        if apposition:
            text = _write(rng.choice(forms), "X", value, when)
            text, apposition = apposition + text[2:], ""
        else:
            draw, mention = rng.random(), subject
            if previous == subject and forms and draw < 0.45:
                mention = pronoun(subject)
            elif subject in alias and draw < 0.8:
                mention = rng.choice(alias[subject])
            if mention in ("he", "she") or (prose and forms and rng.random() < 0.4):
                if prose and rng.random() < 0.3:
                    text = rng.choice(_OPENINGS[split]) + rng.choice(forms)(
                        mention, value, ARTICLE.get(value, value), when
                    )
                else:
                    text = _write(rng.choice(forms), mention, value, when)
            else:
                text = state(relation, mention, value, rng, split, when)
                forms = ()
        if prose and forms and i < n and relation not in _NO_JOIN and rng.random() < 0.35:
            following = facts[i]
            second = _STATES_SUBJECT_FIRST.get(following[1])
            if following[0] == subject and second and second[split] and following[1] not in _NO_JOIN:
                tail = _write(
                    rng.choice(second[split]), "X", following[2], following[3] if len(following) == 4 else ""
                )
                text = f"{text[:-1]} and {tail[2:]}"
                i += 1
        out.append(text)
        previous = "" if RELATIONS[relation].value == "person" else subject
    return " ".join(out)


def _read_one(text: str) -> tuple[list[list[str]], Wording]:
    """The facts of one sentence, pronouns and aliases unresolved."""
    for rule, wording in _ALIAS_RULES:
        if m := rule.match(text):
            return [[m["s"], "alias", "the" + m["v"][3:] if m["v"].startswith("The ") else m["v"]]], wording
    head: list[list[str]] = []
    for rule, _ in _APPOSITION_RULES:
        if m := rule.match(text):
            head = [[m["s"], "alias", m["v"]]]
            text = f"{m['s']} {text[m.end() :]}"
            break
    for opening in (o for openings in _OPENINGS.values() for o in openings):
        if text.startswith(opening):
            text = text[len(opening) :]
            text = text[0].upper() + text[1:]
            break
    try:
        fact, wording = read_statement(text)
        return [*head, list(fact)], wording
    except ValueError:
        found = []
        for m in re.finditer(" and ", text):
            try:
                one, wording = read_statement(text[: m.start()] + ".")
                two, _ = read_statement("He " + text[m.end() :])
                found.append(([*head, list(one), [one[0], *two[1:]]], wording))
            except ValueError:
                continue
        if len(found) != 1:
            raise ValueError(f"text: {text!r} is no sentence of the world") from None
        return found[0]


def read_passage(text: str, aliases: dict[str, str] | None = None) -> tuple[list[list[str]], Wording]:
    """The facts of a passage and its wording; `aliases` (alias -> name) is used and extended."""
    aliases = {} if aliases is None else aliases
    facts: list[list[str]] = []
    wordings = set()
    previous = ""
    for sentence in re.split(r"(?<=\.) ", text):
        found, wording = _read_one(sentence)
        wordings.add(wording)
        for fact in found:
            if fact[0] in ("He", "She"):
                if not previous or pronoun(previous).title() != fact[0]:
                    raise ValueError(f"text: {sentence!r} has a pronoun without antecedent in {text!r}")
                fact[0] = previous
            fact[0] = aliases.get(fact[0], fact[0])
            if fact[1] == "alias":
                aliases[fact[2]] = fact[0]
            previous = fact[0]
            facts.append(fact)
    if len(wordings) != 1:
        raise ValueError(f"text: {text!r} mixes training and held-out templates, or those of a third table")
    return facts, wordings.pop()


def draw_alias(name: str, facts: Iterable[Sequence[str]], others: Iterable[str], rng: Rng) -> str | None:
    """A nickname or "the baker of Ripon", agreeing with the facts; None where none would be unambiguous."""
    if " " in name:
        return None
    if rng.random() < 0.6:
        nick = name[: 4 if len(name) > 6 and rng.random() < 0.3 else 3]
        taken = any(o != name and o.startswith(nick) for o in others)
        return None if taken or nick == name or nick in _VALUES or nick in ("She", "The") else nick
    own = {f[1]: f[2] for f in facts if f[0] == name}
    job = own.get("works_as") or own.get("became") or rng.choice(TYPES["job"])
    town = own.get("lives_in") or own.get("moved_to") or rng.choice(TYPES["town"])
    return f"the {job} of {town}"


# --- questions ----------------------------------------------------------------------------------------------

_SAME = {
    "lives_in": ("Do {x} and {y} live in the same town?", "Is {x} a neighbor of {y} in one town?",
                 "Is the home town of {x} also that of {y}?"),
    "works_as": ("Do {x} and {y} have the same job?", "Do {x} and {y} earn money in the same way?",
                 "Is the trade of {x} also that of {y}?"),
    "works_for": ("Do {x} and {y} work for the same company?", "Is {x} a colleague of {y}?",
                  "Is the employer of {x} also that of {y}?"),
    "studied_at": ("Did {x} and {y} go to the same school?", "Did {x} and {y} learn in the same classrooms?",
                   "Is the old school of {x} also that of {y}?"),
    "has_pet": ("Do {x} and {y} have the same kind of pet?", "Do {x} and {y} keep the same animal?",
                "Is the pet of {x} of the same kind as that of {y}?"),
    "born_in": ("Were {x} and {y} born in the same town?", "Do {x} and {y} come from the same place?",
                "Is the birth town of {x} also that of {y}?"),
}  # fmt: skip
_EVENT = {"moved_to": "moved", "started_at": "joined a company", "became": "took up a trade",
          "married": "got married",
          "visited": "went on a trip"}  # fmt: skip
_FIRST = (
    "Who {e} first, {x} or {y}?",
    "Of {x} and {y}, who {e} earlier?",
    "Who {e} before the other, {x} or {y}?",
)
_PLURAL = {
    "lives_in": "live in {v}", "works_as": "work as {a}", "works_for": "work for {v}",
    "studied_at": "went to {v} School",
    "has_pet": "have a pet {v}", "born_in": "were born in {v}", "likes": "like {v}", "plays": "play the {v}",
    "enjoys": "enjoy {v}", "visited": "visited {v}",
}  # fmt: skip
_COUNT = ("How many people {e}?", "What is the number of people who {e}?", "Of all people, how many {e}?")
_THING = {"likes": ("food", "likes"), "owns": ("thing", "owns"), "plays": ("instrument", "plays"),
          "enjoys": ("hobby", "enjoys"), "visited": ("town", "visited"), "friend_of": ("friend",
                                                                                       "has")}  # fmt: skip
_LIST = ("Name every {n} that {x} {e}.", "Which is each {n} that {x} {e}?", "List each {n} that {x} {e}.")
_CHANGING = {
    ("now", "home"): ("Where does {x} live now?", "In which town is {x} at home at present?",
                      "What is the present home of {x}?"),
    ("now", "company"): ("Where does {x} work now?", "Which company is the present employer of {x}?",
                         "What is the present company of {x}?"),
    ("now", "job"): ("What is the job of {x} now?", "What does {x} work as at present?",
                     "What is the present trade of {x}?"),
    ("before", "home"): ("Where did {x} live before that?", "Which town did {x} leave last?",
                         "What was the home of {x} before the present one?"),
    ("before", "company"): ("Where did {x} work before that?", "Which company did {x} leave last?",
                            "What was the company of {x} before the present one?"),
    ("before", "job"): ("What was the job of {x} before that?", "Which trade did {x} give up last?",
                        "What was the trade of {x} before the present one?"),
    ("asof", "home"): ("Where did {x} live in {d}?", "Which town was home to {x} in {d}?",
                       "What was the home of {x} in {d}?"),
    ("asof", "company"): ("Where did {x} work in {d}?", "Which company paid {x} in {d}?",
                          "What was the company of {x} in {d}?"),
    ("asof", "job"): ("What was the job of {x} in {d}?", "What did {x} work as in {d}?",
                      "What was the trade of {x} in {d}?"),
    ("times", "home"): ("How often did {x} move?", "How many times did {x} change towns?",
                        "How many moves did {x} make?"),
    ("times", "company"): ("How often did {x} join a company?",
                           "How many times did {x} start at a new company?",
                           "How many employers did {x} join?"),
    ("times", "job"): ("How often did {x} take up a trade?", "How many times did {x} start a new trade?",
                       "How many trades did {x} learn?"),
}  # fmt: skip


def _special_templates(same, first, count, listing, changing) -> dict[tuple[str, str], tuple[str, ...]]:
    table = {("same", r): ts for r, ts in same.items()}
    table |= {("first", r): tuple(t.replace("{e}", e) for t in first) for r, e in _EVENT.items()}
    table |= {("count", r): tuple(t.replace("{e}", e) for t in count) for r, e in _PLURAL.items()}
    table |= {
        ("list", r): tuple(t.replace("{n}", n).replace("{e}", e) for t in listing)
        for r, (n, e) in _THING.items()
    }
    return table | changing


_MORE_SPECIAL = _special_templates(MORE_SAME, MORE_FIRST, MORE_COUNT, MORE_LIST, MORE_CHANGING)
_SPECIAL: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
    key: {"train": ts[:-1], "more": _MORE_SPECIAL[key], "eval": ts[-1:]}
    for key, ts in _special_templates(_SAME, _FIRST, _COUNT, _LIST, _CHANGING).items()
}
_SPECIAL_FORMS = {
    key: {split: tuple(t.format(x="{0}", y="{1}", v="{2}", a="{3}", d="{4}").format for t in part)
          for split, part in by.items()}
    for key, by in _SPECIAL.items()
}  # fmt: skip


def _special_rules() -> dict[str, list[tuple]]:
    """{first word: [(regex, kind, key, wording)]} for all special templates."""
    rules: dict[str, list[tuple]] = {}
    for (kind, key), by in _SPECIAL.items():
        value = RELATIONS[key].value if key in RELATIONS else ""
        for wording, t in ((wording, t) for wording, ts in by.items() for t in ts):
            pattern = re.escape(t).replace(r"\{", "{").replace(r"\}", "}")
            for slot, inside in (
                ("x", _PERSON), ("y", _PERSON), ("d", _DATE), ("v", _PATTERN.get(value, "")),
                ("a", _either(ARTICLE.get(v, v) for v in TYPES.get(value) or ())),
            ):  # fmt: skip
                pattern = pattern.replace("{" + slot + "}", f"(?P<{'v' if slot == 'a' else slot}>{inside})")
            rules.setdefault(t.split(" ")[0], []).append((re.compile(pattern), kind, key, wording))
    return rules


_SPECIAL_RULES = _special_rules()


def write_question(
    question: Sequence[str], rng: Rng, split: Wording = "train", paraphrase: bool | None = None
) -> str:
    """The question as text.

    Examples
    --------
    >>> read_question(write_question(["path", "Balbert", "works_for", "based_in"], Rng(1)))
    (['path', 'Balbert', 'works_for', 'based_in'], 'train')
    """
    kind = question[0]
    if kind == "path":
        inner = question[1]
        for step in question[2:-1]:
            inner = phrase(step, inner, rng, split)
        last = question[-1]
        if last[0] == "~":
            return ask_who(last[1:], inner, rng, split)
        return ask(last, inner, rng, split, paraphrase)
    if kind == "when":
        return ask_when(question[2], question[1], question[3], rng, split)
    if kind == "both":
        first, second = (who_clause(question[i], question[i + 1], rng, split) for i in (1, 3))
        return f"Who {first} and {second}?"
    if kind == "everyone":
        return f"Name everyone who {who_clause(question[1], question[2], rng, split)}."
    if kind == "count":
        key, args = question[1], ("", "", question[2], ARTICLE.get(question[2], question[2]), "")
    elif kind == "list":
        key, args = question[2], (question[1], "", "", "", "")
    elif kind in ("same", "first"):
        key, args = question[1], (question[2], question[3], "", "", "")
    else:
        key, args = question[1], (question[2], "", "", "", question[3] if kind == "asof" else "")
    return rng.choice(_SPECIAL_FORMS[kind, key][split])(*args)


def read_question(text: str, aliases: dict[str, str] | None = None) -> tuple[list[str], Wording]:
    """The question that `text` asks, people's aliases resolved, and the wording of its template."""
    aliases = aliases or {}
    for regex, kind, key, split in _SPECIAL_RULES.get(text.split(" ")[0], ()):
        m = regex.fullmatch(text)
        if not m:
            continue
        g = {k: aliases.get(v, v) for k, v in m.groupdict().items()}
        if kind == "count":
            return [kind, key, _PLAIN.get(g["v"], g["v"])], split
        if kind == "list":
            return [kind, g["x"], key], split
        if kind in ("same", "first"):
            return [kind, key, g["x"], g["y"]], split
        return [kind, key, g["x"], *([g["d"]] if kind == "asof" else [])], split
    if text.startswith("Name everyone who "):
        path, split = read_path("Who " + text[len("Name everyone who ") : -1] + "?")
        return ["everyone", path[1][1:], path[0]], split
    try:
        path, split = read_path(text)
        return ["path", aliases.get(path[0], path[0]), *path[1:]], split
    except ValueError:
        pass
    if text.startswith("When "):
        (s, r, v), split = read_when(text)
        return ["when", aliases.get(s, s), r, v], split
    for m in re.finditer(" and ", text):
        try:
            one, split = read_path(text[: m.start()] + "?")
            two, _ = read_path("Who " + text[m.end() :])
        except ValueError:
            continue
        return ["both", one[1][1:], one[0], two[1][1:], two[0]], split
    raise ValueError(f"text: {text!r} is no question of the world")


def people_of(question: Sequence[str]) -> list[int]:
    """The positions in a question at which a person may stand (for aliases)."""
    return {"path": [1], "when": [1], "same": [2, 3], "first": [2, 3], "list": [1], "both": [],
            "everyone": [],
            "count": []}.get(question[0], [2])  # fmt: skip


# --- answers ------------------------------------------------------------------------------------------------


def number_word(n: int) -> str:
    """ "three" for 3; digits above twelve."""
    return NUMBER_WORDS[n] if n < len(NUMBER_WORDS) else str(n)


def timeline(facts: Iterable[Sequence[str]], what: str, person: str) -> list[tuple[str, str]]:
    """(date, value) of the changes of a state that were not taken back, in order of time."""
    change, _, retraction = CHANGES[what]
    mine = [f for f in facts if f[0] == person]
    gone = {(f[2], f[3]) for f in mine if f[1] == retraction}
    kept = {(f[3], f[2]) for f in mine if f[1] == change and (f[2], f[3]) not in gone}
    return sorted(kept, key=lambda row: _DATE_INDEX[row[0]])


def follow(facts: Sequence[Sequence[str]], start: str, steps: Iterable[str]) -> list[str]:
    """All ends of a path through the facts, in order of the facts."""
    ends = [start]
    for step in steps:
        nxt: dict[str, None] = {}
        inverse, name = step[0] == "~", step.lstrip("~")
        symmetric = name in ("friend_of", "married")
        for end in ends:
            for f in facts:
                if f[1] != name:
                    continue
                if f[2 if inverse else 0] == end:
                    nxt[f[0 if inverse else 2]] = None
                elif symmetric and f[0 if inverse else 2] == end:
                    nxt[f[2 if inverse else 0]] = None
        ends = list(nxt)
    return ends


def solve(facts: Sequence[Sequence[str]], question: Sequence[str]) -> list[str]:
    """All right answers by brute force: none (unknown), one, or several (the question is then ambiguous).

    Examples
    --------
    >>> solve([["Balbert", "works_for", "Acorn"], ["Acorn", "based_in", "Ripon"]],
    ...       ["path", "Balbert", "works_for", "based_in"])
    ['Ripon']
    """
    kind = question[0]
    if kind == "path":
        return follow(facts, question[1], question[2:])
    if kind == "when":
        _, s, r, v = question
        pairs = ((s, v), (v, s)) if r == "married" else ((s, v),)
        return list(dict.fromkeys(f[3] for f in facts if f[1] == r and (f[0], f[2]) in pairs))
    if kind == "both":
        one = set(follow(facts, question[2], ["~" + question[1]]))
        return [p for p in follow(facts, question[4], ["~" + question[3]]) if p in one]
    if kind == "same":
        a, b = (follow(facts, question[i], [question[1]]) for i in (2, 3))
        return [] if not a or not b else ["yes" if set(a) & set(b) else "no"]
    if kind == "first":
        dates = []
        for person in question[2:4]:
            mine = [f[3] for f in facts if f[1] == question[1] and person in (f[0], f[2])]
            dates.append(min((_DATE_INDEX[d] for d in mine), default=-1))
        if min(dates) < 0 or dates[0] == dates[1]:
            return []
        return [question[2] if dates[0] < dates[1] else question[3]]
    if kind == "count":
        return [number_word(len(follow(facts, question[2], ["~" + question[1]])))]
    if kind == "list":
        found = follow(facts, question[1], [question[2]])
        return [", ".join(found)] if found else []
    if kind == "everyone":
        found = follow(facts, question[2], ["~" + question[1]])
        return [", ".join(found)] if found else []
    line = timeline(facts, question[1], question[2])
    if kind == "times":
        return [number_word(len(line))] if line else []
    if kind == "now":
        return [line[-1][1]] if line else []
    if kind == "before":
        return [line[-2][1]] if len(line) > 1 else []
    if kind == "asof":
        past = [v for d, v in line if _DATE_INDEX[d] <= _DATE_INDEX[question[3]]]
        return past[-1:]
    raise ValueError(f"question: kind {kind!r} is unknown")


def jaccard(a: str, b: str) -> float:
    """Jaccard similarity of the sets of words (lower-case, without punctuation)."""
    x, y = (set(re.findall(r"[a-z0-9]+", t.lower())) for t in (a, b))
    return len(x & y) / len(x | y) if x | y else 1.0


def near_duplicate(text: str, rng: Rng, low: float = 0.6, high: float = 0.9) -> str:
    """A copy of `text` with words replaced until its Jaccard similarity to `text` lies in [low, high].

    Each replaced word is replaced everywhere by another word of the same type (a town by a town, a name by a
    name), so that the copy still reads well and states other facts; plain words are dropped only when that is
    not enough.

    Raises
    ------
    ValueError
        If the text has too few words to reach the range.
    """
    words = list(dict.fromkeys(re.findall(r"[A-Za-z]+", text)))
    typed = {v: t for t, vs in TYPES.items() if vs for v in vs}
    pool = set(_PEOPLE["train"]) | set(_PEOPLE["eval"])
    rng.shuffle(words)
    words.sort(key=lambda w: w not in typed and w not in pool)
    out, goal = text, low + (high - low) * rng.random()
    for w in words:
        if jaccard(text, out) <= goal:
            break
        if w in typed:
            new = rng.choice(TYPES[typed[w]])
        elif w in pool:
            new = rng.choice(_PEOPLE["train"] if w in _TRAIN else _PEOPLE["eval"])
        else:
            new = ""
        trial = re.sub(rf"\b{w}\b" if new else rf" \b{w}\b", new, out)
        if jaccard(text, trial) >= low:
            out = trial
    if not low <= jaccard(text, out) <= high:
        raise ValueError(
            f"text: {len(words)} different words are too few for a Jaccard similarity in [{low}, {high}]"
        )
    return out


_TRAIN = frozenset(_PEOPLE["train"])
