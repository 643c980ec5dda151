"""The formats made of facts: passages with questions (in seven variants), biographies, triples.

The common lines, exactly (RAG spec §3.11), with 1-6 passages and 1-5 question-answer pairs::

    Context:
    [1] Balbert lives in Ripon. He is a baker.
    [2] The home of Marnas is in Dover.
    Question: Where does Marnas live?
    Answer: Dover

`document_qa`             one step, in both directions; the answer stands in the context
`document_multihop`       two or three steps, comparison, intersection, count, list
`document_unknown`        half of the questions cannot be answered: "Answer: unknown"
`document_counterfactual` what the context says of a known person contradicts what is known
`document_distractors`    one gold passage among near names, same relation, same entity
`document_long`           one passage of 10-30 sentences in prose
`facts_that_change`       dated updates, confirmations and retractions; now, before, as of, how often
`answerable`              one question; "Answerable? yes" or "Answerable? no" in place of the answer
`biography`               10-30 sentences of prose, no question
`triples`                 "Sentence: ..." then "Triples: Balbert >> lives in >> Ripon; ..."
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

from refimpl.world.base import Facts, Format, Split
from refimpl.world.documents import (
    UNKNOWN,
    draw_alias,
    people,
    people_of,
    read_passage,
    read_question,
    solve,
    write_passage,
    write_question,
)  # fmt: skip
from refimpl.world.names import known_people
from refimpl.world.relations import (
    CHANGES,
    DATES,
    KNOWN_ATTRIBUTES,
    RELATIONS,
    can_ask_who,
    known_facts,
)
from refimpl.world.rng import Rng

ALIAS_SHARE = 0.15
# Relations of a person that may stand in one context; of each group one, so that no two of them answer one
# question.
_GROUPS = (
    ("lives_in", "lives_in", "moved_to"), ("works_for", "works_for", "started_at"),
    ("works_as", "works_as", "became"),
    ("studied_at",), ("has_pet",), ("born_in",), ("likes_color",), ("likes",), ("owns",), ("plays",),
    ("enjoys",),
    ("friend_of",), ("married",), ("visited",), ("mayor_of",), ("leads",),
)  # fmt: skip
_ONE_EACH = frozenset(r for g in _GROUPS for r in g)
_SHORT_CHAINS = (
    ("works_for", "based_in"), ("studied_at", "stands_in"), ("lives_in", "~mayor_of"),
    ("works_for", "~leads"),
    ("born_in", "~mayor_of"), ("friend_of", "lives_in"), ("friend_of", "works_as"), ("friend_of", "has_pet"),
    ("married", "studied_at"), ("married", "likes"), ("friend_of", "plays"), ("leads", "based_in"),
    ("married", "enjoys"), ("friend_of", "born_in"), ("married", "works_for"), ("friend_of", "likes_color"),
)  # fmt: skip
_LONG_CHAINS = (
    ("friend_of", "works_for", "based_in"), ("works_for", "~leads", "has_pet"),
    ("lives_in", "~mayor_of", "plays"),
    ("works_for", "based_in", "~mayor_of"), ("married", "studied_at", "stands_in"),
    ("friend_of", "lives_in", "~mayor_of"),
    ("studied_at", "stands_in", "~mayor_of"), ("friend_of", "works_for", "~leads"),
)  # fmt: skip
_SAME = ("lives_in", "works_as", "works_for", "studied_at", "has_pet", "born_in")
_FIRST = ("moved_to", "started_at", "became", "married", "visited")
_COUNTED = (
    "lives_in",
    "works_as",
    "works_for",
    "studied_at",
    "has_pet",
    "born_in",
    "likes",
    "plays",
    "enjoys",
)
_LISTED = ("likes", "owns", "plays", "enjoys")

# --- drawing facts ------------------------------------------------------------------------------------------


class Draw:
    """Draws facts of one document: fresh people, and no value twice for one relation, so that answers are
    unique.
    """

    __slots__ = ("rng", "people", "used", "n")

    def __init__(self, rng: Rng, split: Split, cast: Sequence[str] = ()) -> None:
        self.rng = rng
        self.people = [*cast, *rng.sample(people(split), 24 - len(cast))]
        self.used: dict[str, set[str]] = {}
        self.n = 0

    def person(self) -> str:
        """A person who was not drawn before."""
        self.n += 1
        return self.people[self.n - 1]

    def value(self, relation: str) -> str:
        """A value of the relation that was not drawn before."""
        r = RELATIONS[relation]
        values = r.values
        if values is None:
            return self.person()
        used = self.used.setdefault(relation, set())
        while (v := self.rng.choice(values)) in used:
            pass
        used.add(v)
        return v

    def fact(self, subject: str, relation: str, value: str | None = None) -> list[str]:
        """One fact; its value and date are drawn."""
        fact = [subject, relation, self.value(relation) if value is None else value]
        if RELATIONS[relation].kind == "dated":
            fact.append(self.rng.choice(DATES))
        return fact

    def chain(self, steps: Sequence[str]) -> tuple[list[list[str]], list[str]]:
        """The facts along a chain of steps that starts at a person, and its question."""
        start = here = self.person()
        facts = []
        for step in steps:
            if step[0] == "~":
                fact = self.fact(self.person(), step[1:], here)
                here = fact[0]
            else:
                fact = self.fact(here, step)
                here = fact[2]
            facts.append(fact)
        return facts, ["path", start, *steps]


def _relations(rng: Rng, k: int) -> list[str]:
    return [g[0] if len(g) == 1 else rng.choice(g) for g in rng.sample(_GROUPS, k)]


def _grid(draw: Draw, n: int) -> list[list[str]]:
    """n facts from a small grid of people x relations: same relation, other person and same person, other
    relation.
    """
    rng = draw.rng
    n_people = min(n, rng.between(1 + (n > 1), 4))
    relations = _relations(rng, max(-(-n // n_people), rng.between(1, 4)))
    cast = [draw.person() for _ in range(n_people)]
    cells = [(p, r) for p in cast for r in relations]
    return [draw.fact(p, r) for p, r in rng.sample(cells, n)]


def _direct_question(fact: Sequence[str], rng: Rng, split: Split) -> list[str]:
    """A question that this one fact answers: for its value, for its subject, or for its date.

    Training asks for the subject more often than evaluation does: that direction is learned last.
    """
    s, r, v = fact[0], fact[1], fact[2]
    draw = rng.random()
    if len(fact) == 4 and draw < 0.4:
        return ["when", s, r, v]
    if draw > (0.55 if split == "train" else 0.7) and can_ask_who(r):
        return ["path", v, "~" + r]
    return ["path", s, r]


def _aliased(passages: list[list[list[str]]], split: Split, rng: Rng) -> None:
    """Give 15 % of the people aliases, each at the head of a passage whose first fact is about that
    person.
    """
    everyone = {f[0] for p in passages for f in p} | {f[2] for p in passages for f in p}
    taken: set[str] = set()
    for passage in passages:
        name = passage[0][0]
        if name in taken or name not in _POOL[split]:
            continue
        taken.add(name)
        if rng.random() >= ALIAS_SHARE:
            continue
        for _ in range(1 if rng.random() < 0.8 else 2):
            alias = draw_alias(name, (f for p in passages for f in p), everyone, rng)
            if alias and alias not in everyone and [name, "alias", alias] not in passage:
                everyone.add(alias)
                passage.insert(0, [name, "alias", alias])


_POOL = {split: frozenset(people(split)) for split in ("train", "eval")}


def _merge(facts: list[list[str]], rng: Rng, limit: int) -> list[list[list[str]]]:
    """Put facts into passages, shuffled; two facts of one subject share a passage now and then, or as `limit`
    demands.
    """
    rng.shuffle(facts)
    passages: list[list[list[str]]] = []
    for fact in facts:
        if passages and (len(passages) >= limit or rng.random() < 0.25):
            same = [p for p in passages if p[-1][0] == fact[0]]
            if same:
                rng.choice(same).append(fact)
                continue
        passages.append([fact])
    return passages


# --- the common layout --------------------------------------------------------------------------------------


def _write_context(facts: Facts, rng: Rng, prose: bool = False) -> list[str]:
    split = facts["split"]
    lines = ["Context:"]
    for i, passage in enumerate(facts["passages"], 1):
        lines.append(f"[{i}] {write_passage(passage, rng, split, prose)}")
    return lines


def _aliases(facts: Facts) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for passage in facts["passages"]:
        for f in passage:
            if f[1] == "alias":
                table.setdefault(f[0], []).append(f[2])
    return table


def _write_question(question: Sequence[str], aliases: dict[str, list[str]], facts: Facts, rng: Rng) -> str:
    if aliases:
        question = list(question)
        for i in people_of(question):
            if question[i] in aliases and rng.random() < 0.5:
                question[i] = rng.choice(aliases[question[i]])
    return write_question(question, rng, facts["split"])


def _renderer(prose: bool = False) -> Callable[[Facts, Rng], str]:
    def render(facts: Facts, rng: Rng) -> str:
        lines = _write_context(facts, rng, prose)
        aliases = _aliases(facts)
        for question, answer in facts["qa"]:
            lines.append("Question: " + _write_question(question, aliases, facts, rng))
            lines.append("Answer: " + answer)
        return "\n".join(lines) + "\n"

    return render


def _parse_context(lines: list[str]) -> tuple[list, Split, dict[str, str], int]:
    if lines[0] != "Context:":
        raise ValueError(f"text: first line {lines[0]!r} is not 'Context:'")
    passages, aliases, splits = [], {}, set()
    at = 1
    while at < len(lines) and (m := re.fullmatch(r"\[(\d+)\] (.+)", lines[at])):
        if int(m[1]) != at:
            raise ValueError(f"text: passage {m[1]} stands at place {at}")
        found, split = read_passage(m[2], aliases)
        passages.append(found)
        splits.add(split)
        at += 1
    if len(splits) != 1:
        raise ValueError("text: no passage, or passages of both splits")
    return passages, splits.pop(), aliases, at


def parse_qa(text: str) -> Facts:
    """Read `Context:` ... `Question:` ... `Answer:` back to {"split", "passages", "qa"}."""
    if not text.endswith("\n"):
        raise ValueError("text: a document ends with a newline")
    lines = text[:-1].split("\n")
    passages, split, aliases, at = _parse_context(lines)
    qa = []
    if (len(lines) - at) % 2 or at == len(lines):
        raise ValueError("text: questions and answers must come in pairs")
    for question, answer in zip(lines[at::2], lines[at + 1 :: 2], strict=True):
        if not question.startswith("Question: ") or not answer.startswith("Answer: "):
            raise ValueError(f"text: {question!r} and {answer!r} are not a question and an answer")
        parsed, _ = read_question(question[len("Question: ") :], aliases)
        qa.append([parsed, answer[len("Answer: ") :]])
    return {"split": split, "passages": passages, "qa": qa}


def _answered(passages: list[list[list[str]]], questions: Sequence[list[str]]) -> list[list]:
    """[question, answer] of every question with exactly one answer in these passages, without repeats."""
    flat = [f for p in passages for f in p]
    out = []
    for q in questions:
        answers = solve(flat, q)
        if len(answers) == 1 and [q, answers[0]] not in out:
            out.append([q, answers[0]])
    return out


# --- document_qa --------------------------------------------------------------------------------------------


def _sample_qa(rng: Rng, split: Split) -> Facts:
    draw = Draw(rng, split)
    k = rng.between(1, 6)
    passages = _merge(_grid(draw, k + rng.below(3) if k > 1 else k), rng, k)
    return _with_direct_questions(passages, split, rng)


def _with_direct_questions(passages, split: Split, rng: Rng) -> Facts:
    n = rng.between(1, min(5, 1 + len(passages)))
    questions = []
    for _ in range(n):
        questions.append(_direct_question(rng.choice(rng.choice(passages)), rng, split))
    qa = _answered(passages, questions)
    if not qa:  # "who is married to ..." both ways; ask plainly
        f = passages[0][0]
        qa = [[["path", f[0], f[1]], f[2]]]
    _aliased(passages, split, rng)
    return {"split": split, "passages": passages, "qa": qa}


DOCUMENT_QA = Format(
    "document_qa", _sample_qa, _renderer(), parse_qa, boundary="Answer:",
    serves=("rag T1", "rag 3.11", "rag 3.4", "rag 3.14", "interp D2", "interp E1", "interp E6", "memory D4",
            "kv-cache recall"),
)  # fmt: skip

# --- document_multihop --------------------------------------------------------------------------------------


def _sample_multihop(rng: Rng, split: Split) -> Facts:
    draw = Draw(rng, split)
    what = rng.random()
    questions: list[list[str]] = []
    if what < 0.6:  # chains: two with the same steps, so that the bridge decides
        steps = rng.choice(_SHORT_CHAINS if what < 0.45 else _LONG_CHAINS)
        facts, q = draw.chain(steps)
        other, q2 = draw.chain(steps)
        facts += other
        questions = [q, q2] if rng.random() < 0.6 else [q]
        questions += [_direct_question(rng.choice(facts), rng, split)] if rng.random() < 0.3 else []
    elif what < 0.7:  # same value?
        relation = rng.choice(_SAME)
        a, b, c = draw.person(), draw.person(), draw.person()
        value = draw.value(relation)
        facts = [draw.fact(a, relation, value), draw.fact(b, relation, value), draw.fact(c, relation)]
        facts += [draw.fact(p, r) for p in (a, c) for r in _others(rng, relation, 1)]
        for pair in ([a, b], [a, c]):
            rng.shuffle(pair)
            questions.append(["same", relation, *pair])
        rng.shuffle(questions)
        questions = questions[: rng.between(1, 2)]
    elif what < 0.8:  # whose event came first?
        relation = rng.choice(_FIRST)
        cast = [draw.person() for _ in range(rng.between(2, 4))]
        facts = [draw.fact(p, relation) for p in cast]
        questions = [["first", relation, *rng.sample(cast, 2)] for _ in range(rng.between(1, 2))]
    elif what < 0.88:  # two constraints, one person
        one, two = rng.sample(_SAME, 2)
        v1, v2 = draw.value(one), draw.value(two)
        a, b, c = draw.person(), draw.person(), draw.person()
        facts = [draw.fact(a, one, v1), draw.fact(a, two, v2), draw.fact(b, one, v1), draw.fact(c, two, v2),
                 draw.fact(b, two), draw.fact(c, one)]  # fmt: skip
        questions = [["both", one, v1, two, v2]]
    elif what < 0.94:  # how many?
        relation = rng.choice(_COUNTED)
        value = draw.value(relation)
        facts = [draw.fact(draw.person(), relation, value) for _ in range(rng.between(1, 5))]
        facts += [draw.fact(draw.person(), relation) for _ in range(rng.between(1, 2))]
        questions = [["count", relation, value]]
    else:  # all of them
        relation = rng.choice(_LISTED)
        a = draw.person()
        facts = [draw.fact(a, relation) for _ in range(rng.between(2, 3))]
        facts += [draw.fact(draw.person(), relation), draw.fact(a, _others(rng, relation, 1)[0])]
        questions = [["list", a, relation]]
    passages = _merge(facts, rng, 6)
    qa = _answered(passages, questions)
    if not qa:  # two dates were equal
        return _sample_multihop(rng, split)
    _aliased(passages, split, rng)
    return {"split": split, "passages": passages, "qa": qa}


def _others(rng: Rng, relation: str, k: int) -> list[str]:
    group = next(g for g in _GROUPS if relation in g)
    rest = [g[0] for g in _GROUPS if g is not group and g[0] not in ("married", "friend_of")]
    return rng.sample(rest, k)


DOCUMENT_MULTIHOP = Format(
    "document_multihop", _sample_multihop, _renderer(), parse_qa, boundary="Answer:",
    serves=("rag T2", "rag T3", "rag 3.10", "rag 3.12", "interp D2", "interp C4", "interp E6"),
)  # fmt: skip

# --- document_unknown, answerable ---------------------------------------------------------------------------


def _sample_partly_answerable(rng: Rng, split: Split, n: int) -> Facts:
    """n questions over one context, each unanswerable with probability one half; at least two passages."""
    draw = Draw(rng, split)
    k = rng.between(2, 6)
    cast = [draw.person() for _ in range(rng.between(2, 4))]
    relations = _relations(rng, 4)
    cells = [(p, r) for p in cast for r in relations]
    chosen = rng.sample(cells, k)
    passages = _merge([draw.fact(p, r) for p, r in chosen], rng, k)
    flat = [f for p in passages for f in p]
    missing = [c for c in cells if c not in chosen]
    # both kinds of distractor where the grid has them: the person with another relation, another with the
    # relation
    near = [c for c in missing if any(f[0] == c[0] for f in flat) and any(f[1] == c[1] for f in flat)]
    qa: list[list] = []
    for _ in range(n):
        if rng.random() < 0.5:
            p, r = rng.choice(near or missing)
            if rng.random() < 0.25 and can_ask_who(r):
                q = ["path", draw.value(r), "~" + r]
            else:
                q = ["path", p, r]
            answers = solve(flat, q) or [UNKNOWN]
        else:
            q = _direct_question(rng.choice(flat), rng, split)
            answers = solve(flat, q)
        if len(answers) == 1 and [q, answers[0]] not in qa:
            qa.append([q, answers[0]])
    if not qa:
        return _sample_partly_answerable(rng, split, n)
    _aliased(passages, split, rng)
    return {"split": split, "passages": passages, "qa": qa}


def _sample_unknown(rng: Rng, split: Split) -> Facts:
    return _sample_partly_answerable(rng, split, rng.between(1, 4))


DOCUMENT_UNKNOWN = Format(
    "document_unknown", _sample_unknown, _renderer(), parse_qa, boundary="Answer:",
    serves=("rag 3.11", "rag T6", "rag 2 negative rejection", "interp D2"),
)  # fmt: skip


def _sample_answerable(rng: Rng, split: Split) -> Facts:
    facts = _sample_partly_answerable(rng, split, 1)
    ((question, answer),) = facts["qa"]
    return {"split": split, "passages": facts["passages"], "question": question,
            "answerable": "no" if answer == UNKNOWN else "yes"}  # fmt: skip


def _render_answerable(facts: Facts, rng: Rng) -> str:
    lines = _write_context(facts, rng)
    lines.append("Question: " + _write_question(facts["question"], _aliases(facts), facts, rng))
    lines.append("Answerable? " + facts["answerable"])
    return "\n".join(lines) + "\n"


def _parse_answerable(text: str) -> Facts:
    lines = text.split("\n")
    passages, split, aliases, at = _parse_context(lines)
    if len(lines) != at + 3 or lines[-1] or lines[at + 1] not in ("Answerable? yes", "Answerable? no"):
        raise ValueError(
            "text: after the context one 'Question:' and one 'Answerable? yes' or 'no' must follow"
        )
    question, _ = read_question(lines[at].removeprefix("Question: "), aliases)
    return {
        "split": split,
        "passages": passages,
        "question": question,
        "answerable": lines[at + 1].split(" ")[1],
    }


ANSWERABLE = Format(
    "answerable", _sample_answerable, _render_answerable, _parse_answerable, boundary="Answerable?",
    serves=("rag 4 answerable", "rag 3.20"),
)  # fmt: skip

# --- document_counterfactual --------------------------------------------------------------------------------

# Only the two commonest strata, without the half that the twin never meets: a false value must not drown a
# rare fact.
COUNTERFACTUAL_PEOPLE = {"train": known_people()[100::2], "eval": known_people()[100:]}


def _sample_counterfactual(rng: Rng, split: Split) -> Facts:
    known = known_facts()
    cast = rng.sample(COUNTERFACTUAL_PEOPLE[split], rng.between(1, 3))
    draw = Draw(rng, split, cast)
    people_here = cast + [draw.people[len(cast)]] * rng.below(2)
    relations = rng.sample(KNOWN_ATTRIBUTES, rng.between(2, 4))
    cells = [(p, r) for p in people_here for r in relations]
    chosen = rng.sample(cells, min(len(cells), rng.between(2, 7)))
    if all(p not in cast for p, _ in chosen):
        chosen[0] = (cast[0], relations[0])
    facts = []
    for p, r in chosen:
        fact = draw.fact(p, r)
        while known.get((p, r)) == fact[2]:
            fact = draw.fact(p, r)
        facts.append(fact)
    return _with_direct_questions(_merge(facts, rng, 6), split, rng)


DOCUMENT_COUNTERFACTUAL = Format(
    "document_counterfactual", _sample_counterfactual, _renderer(), parse_qa, boundary="Answer:",
    serves=("rag 3.11", "rag T0", "rag 4 tier C", "quantization 31", "interp C4"),
)  # fmt: skip

# --- document_distractors -----------------------------------------------------------------------------------


@cache
def _near_names(split: Split) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for name in people(split):
        table.setdefault(name[:3], []).append(name)
    return table


def _sample_distractors(rng: Rng, split: Split) -> Facts:
    draw = Draw(rng, split)
    gold = draw.person()
    relation, *others = _relations(rng, 4)
    near = [n for n in _near_names(split)[gold[:3]] if n not in draw.people]
    facts = [draw.fact(gold, relation)]
    k = rng.between(4, 6)
    while len(facts) < k:
        kind = rng.random()
        if kind < 0.3 and near:
            facts.append(draw.fact(near.pop(rng.below(len(near))), relation))
        elif kind < 0.65 and others:
            facts.append(draw.fact(gold, others.pop()))
        else:
            facts.append(draw.fact(draw.person(), relation))
    question = _direct_question(facts[0], rng, split)
    passages = [[f] for f in facts]
    rng.shuffle(passages)
    qa = _answered(passages, [question])
    if not qa:
        return _sample_distractors(rng, split)
    return {"split": split, "passages": passages, "qa": qa}


DOCUMENT_DISTRACTORS = Format(
    "document_distractors", _sample_distractors, _renderer(), parse_qa, boundary="Answer:",
    serves=("rag T6", "rag 3.7", "rag 3.14", "rag 2 noise robustness"),
)  # fmt: skip

# --- long documents -----------------------------------------------------------------------------------------


def _life(draw: Draw, person: str, n: int) -> list[list[str]]:
    """n facts about one person, at most one per relation, except that likes and possessions may be
    several.
    """
    rng = draw.rng
    relations = _relations(rng, min(n, len(_GROUPS)))
    extra = [r for r in ("likes", "owns", "plays", "enjoys") for _ in range(2)]
    while len(relations) < n and extra:
        relations.append(extra.pop(rng.below(len(extra))))
    return [draw.fact(person, r) for r in relations]


def _sample_lives(rng: Rng, split: Split) -> tuple[list[list[str]], Draw]:
    draw = Draw(rng, split)
    n = rng.between(13, 34)  # facts; joined sentences and aliases leave 10-30 sentences
    heroes = rng.between(1 + (n > 18), 3)
    facts: list[list[str]] = []
    for h in range(heroes):
        person = draw.person()
        life = _life(draw, person, n // heroes + (h < n % heroes))
        if rng.random() < ALIAS_SHARE:
            alias = draw_alias(person, life, draw.people, rng)
            life = ([[person, "alias", alias]] if alias else []) + life
        facts += life
    return facts, draw


def _sample_biography(rng: Rng, split: Split) -> Facts:
    return {"split": split, "facts": _sample_lives(rng, split)[0]}


def _render_biography(facts: Facts, rng: Rng) -> str:
    return write_passage(facts["facts"], rng, facts["split"], prose=True) + "\n"


def _parse_biography(text: str) -> Facts:
    if not text.endswith("\n") or "\n" in text[:-1]:
        raise ValueError("text: a biography is one line that ends with a newline")
    facts, split = read_passage(text[:-1])
    return {"split": split, "facts": facts}


BIOGRAPHY = Format(
    "biography", _sample_biography, _render_biography, _parse_biography,
    serves=("rag T1", "rag 3.2", "interp E6", "interp C4", "memory D1"),
)  # fmt: skip


def _sample_long(rng: Rng, split: Split) -> Facts:
    facts, _ = _sample_lives(rng, split)
    plain = [f for f in facts if f[1] != "alias"]
    asked = [_direct_question(rng.choice(plain), rng, split) for _ in range(rng.between(2, 5))]
    qa = _answered([facts], asked)
    if not qa:
        return _sample_long(rng, split)
    return {"split": split, "passages": [facts], "qa": qa}


DOCUMENT_LONG = Format(
    "document_long", _sample_long, _renderer(prose=True), parse_qa, boundary="Answer:",
    serves=("rag T1-long", "rag 3.2", "rag 3.9", "kv-cache recall", "memory D4"),
)  # fmt: skip

# --- facts that change --------------------------------------------------------------------------------------


def change_history(draw: Draw, person: str, what: str, updates: int) -> list[list[str]]:
    """Dated changes of one state in order of time, with some confirmations and at most one retraction."""
    rng = draw.rng
    change, confirmation, retraction = CHANGES[what]
    n = updates + rng.below(2)
    months = sorted(rng.sample(range(len(DATES)), n + 1))
    facts: list[list[str]] = []
    value = ""
    for i, month in enumerate(months[:n]):
        if facts and i >= updates:  # a confirmation of the latest state: nothing changes
            facts.append([person, confirmation, value, DATES[month]])
        else:
            value = draw.value(change)
            facts.append([person, change, value, DATES[month]])
    if updates > 2 and rng.random() < 0.3:  # take back a change that is not the first
        wrong = facts[1 + rng.below(updates - 1)]
        if all(f[1] != confirmation for f in facts):
            facts.append([person, retraction, wrong[2], wrong[3]])
    return facts


def _change_question(history: list[list[str]], what: str, rng: Rng) -> list[str]:
    person, kind = history[0][0], rng.random()
    if kind < 0.35:
        return ["now", what, person]
    if kind < 0.6:
        return ["before", what, person]
    if kind < 0.8:
        first = DATES.index(history[0][3])
        return ["asof", what, person, DATES[rng.between(first, len(DATES) - 1)]]
    return ["times", what, person]


def _sample_changes(rng: Rng, split: Split) -> Facts:
    draw = Draw(rng, split)
    what = rng.choice(tuple(CHANGES))
    histories = [
        change_history(draw, draw.person(), what, rng.between(1, 4)) for _ in range(rng.between(1, 3))
    ]
    passages = [[f] for h in histories for f in h]
    if rng.random() < 0.7:  # as the news came in: interleaved, in order of time
        passages.sort(key=lambda p: DATES.index(p[0][3]) + len(DATES) * p[0][1].startswith("retracted"))
    else:
        rng.shuffle(passages)
    questions = [_change_question(rng.choice(histories), what, rng) for _ in range(rng.between(1, 4))]
    qa = _answered(passages, questions)
    if not qa:
        return _sample_changes(rng, split)
    return {"split": split, "passages": passages, "qa": qa}


FACTS_THAT_CHANGE = Format(
    "facts_that_change", _sample_changes, _renderer(), parse_qa, boundary="Answer:",
    serves=("rag T4", "rag T8", "rag 3.16", "rag 3.22", "interp E6"),
)  # fmt: skip

# --- triples ------------------------------------------------------------------------------------------------


def _sample_triples(rng: Rng, split: Split) -> Facts:
    draw = Draw(rng, split)
    n = rng.between(1, 4)
    if rng.random() < 0.25:
        facts = draw.chain(rng.choice(_SHORT_CHAINS))[0]
    elif rng.random() < 0.5:
        facts = _life(draw, draw.person(), n)
    else:
        facts = _grid(draw, n)
    return {"split": split, "facts": facts}


def write_triples(facts: Sequence[Sequence[str]]) -> str:
    """ "Balbert >> lives in >> Ripon; ...": one triple per fact; a dated fact has its date as a fourth
    part.
    """
    return "; ".join(" >> ".join((f[0], f[1].replace("_", " "), *f[2:])) for f in facts)


def parse_triples(text: str) -> list[list[str]]:
    """The inverse of `write_triples`."""
    facts = []
    for part in text.split("; "):
        fields = part.split(" >> ")
        if len(fields) not in (3, 4) or fields[1].replace(" ", "_") not in RELATIONS:
            raise ValueError(f"text: {part!r} is no triple 'subject >> relation >> value'")
        facts.append([fields[0], fields[1].replace(" ", "_"), *fields[2:]])
    return facts


def _render_triples(facts: Facts, rng: Rng) -> str:
    sentence = write_passage(facts["facts"], rng, facts["split"])
    return f"Sentence: {sentence}\nTriples: {write_triples(facts['facts'])}\n"


def _parse_triples_document(text: str) -> Facts:
    m = re.fullmatch(r"Sentence: (.+)\nTriples: (.+)\n", text)
    if not m:
        raise ValueError("text: not a line 'Sentence: ...' and a line 'Triples: ...'")
    facts, split = read_passage(m[1])
    if parse_triples(m[2]) != facts:
        raise ValueError(f"text: the triples {m[2]!r} are not those of the sentence")
    return {"split": split, "facts": facts}


TRIPLES = Format(
    "triples", _sample_triples, _render_triples, _parse_triples_document, boundary="Triples:",
    serves=("rag 4 triples", "rag 3.12", "rag 3.21", "interp C4", "interp E11"),
)  # fmt: skip

FORMATS = [
    DOCUMENT_QA, DOCUMENT_MULTIHOP, DOCUMENT_UNKNOWN, DOCUMENT_COUNTERFACTUAL, DOCUMENT_DISTRACTORS,
    DOCUMENT_LONG,
    FACTS_THAT_CHANGE, ANSWERABLE, BIOGRAPHY, TRIPLES,
]  # fmt: skip
