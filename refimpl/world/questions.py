"""A fact base with documents and the evaluation questions T0-T4 and T6-T9 of the RAG spec §4 over it.

`world(seed, size)` draws people, organisations and places, writes their facts into documents and asks about
them. All names are evaluation names. Documents belong to one of three corpora: "main" (passages of one to
three sentences), "long" (10-30 sentences), "redundant" (every fact in three to six wordings). Facts of tier F
are fresh; tier K are the known people of the training text (no document states them); tier C documents
contradict what is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

from refimpl.world.document_formats import Draw, change_history
from refimpl.world.documents import (
    UNKNOWN,
    people,
    read_passage,
    solve,
    timeline,
    write_passage,
    write_question,
)  # fmt: skip
from refimpl.world.lexicon import NUMBER_WORDS
from refimpl.world.names import known_people
from refimpl.world.relations import (
    ARTICLE,
    CHANGES,
    DATES,
    KNOWN_ATTRIBUTES,
    RELATIONS,
    TYPES,
    known_facts,
    state,
)
from refimpl.world.rng import Rng

HOURS_PER_MONTH = 730.0
NOW = len(DATES) * HOURS_PER_MONTH  # the hour after the last month
_DATE_INDEX = {d: i for i, d in enumerate(DATES)}
_FUNCTIONAL = ("lives_in", "works_as", "works_for", "studied_at", "has_pet")
_MORE = ("born_in", "likes_color", "likes", "owns", "plays", "enjoys")
_CHAINS = (
    ("works_for", "based_in"), ("studied_at", "stands_in"), ("lives_in", "~mayor_of"),
    ("works_for", "~leads"),
    ("friend_of", "works_as"), ("friend_of", "has_pet"), ("friend_of", "studied_at"),
    ("friend_of", "works_for"),
    ("friend_of", "works_for", "based_in"), ("works_for", "based_in", "~mayor_of"),
    ("works_for", "~leads", "lives_in"),
    ("lives_in", "~mayor_of", "works_as"), ("friend_of", "studied_at", "stands_in"),
    ("friend_of", "works_for", "based_in", "~mayor_of"), ("friend_of", "lives_in", "~mayor_of", "has_pet"),
    ("works_for", "~leads", "lives_in", "~mayor_of"),
)  # fmt: skip


@dataclass
class Document:
    """One record of a corpus; `sentences` holds (start, end) in `text`, `facts` the facts of each
    sentence.
    """

    id: int
    corpus: str
    tier: str
    t: float
    text: str
    sentences: list[list[int]]
    facts: list[list[list[str]]]


@dataclass
class Question:
    """One question with its full record.

    Parameters
    ----------
    id, type : str
        "T2-0017", "T2".
    text, answer : str
        As asked; the gold answer.
    t_ask : float
        World clock in hours.
    accepted : list of str
        All strings that count as right, the answer included.
    candidates : list of str
        The answer and others of its type.
    gold : list of list of [document id, sentence number, start, end]
        Per hop, every sentence that states its fact.
    chain : list of facts
        The reasoning, one fact per hop.
    entities : list of str
        Named in the question; for scoring only.
    distractors : list of [document id, kind]
    tier : str
        "K", "F" or "C".
    corpus : str
        Where to search.
    form : list of str
        The question as data (see `refimpl.world.documents`).
    held_out : bool
        Whether the wording was never used in training text.
    without : list of int
        Documents to take out of the corpus before asking (the unanswerable twins of T6).
    session : int
        Number of the session (T9), else -1.
    """

    id: str
    type: str
    text: str
    t_ask: float
    answer: str
    accepted: list[str]
    candidates: list[str]
    gold: list[list[list[int]]]
    chain: list[list[str]]
    entities: list[str]
    distractors: list[list]
    tier: str
    corpus: str
    form: list[str]
    held_out: bool
    without: list[int] = field(default_factory=list)
    session: int = -1

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass
class World:
    """A fact base, its documents and its questions."""

    seed: int
    people: list[str]
    aliases: dict[str, str]  # alias -> name
    facts: dict[str, list[list[str]]]  # corpus -> facts
    documents: list[Document]
    sessions: dict[str, list[list[str]]] = field(
        default_factory=dict
    )  # "related" and "shuffled": question ids
    stated: dict[tuple[str, ...], list[list[int]]] = field(default_factory=dict, repr=False)
    by_subject: dict[tuple[str, str], list[Document]] = field(default_factory=dict, repr=False)

    def corpus(self, name: str) -> list[Document]:
        """The documents of one corpus."""
        return [d for d in self.documents if d.corpus == name]


# --- the fact base ------------------------------------------------------------------------------------------


class _Builder:
    def __init__(self, seed: int) -> None:
        self.rng = Rng("rag world", seed)
        self.world = World(seed, [], {}, {"main": [], "long": [], "redundant": []}, [])
        pool = list(people("eval"))
        self.rng.shuffle(pool)
        self.pool, self.everyone = pool, tuple(pool)

    def person(self) -> str:
        if not self.pool:
            raise ValueError(
                f"size: the {len(self.everyone)} evaluation names are used up; ask for fewer documents"
            )
        name = self.pool.pop()
        self.world.people.append(name)
        return name

    def alias(self, name: str, facts: Sequence[Sequence[str]]) -> str | None:
        """A nickname or "the baker of Ripon" that means nobody else in this world."""
        if self.rng.chance(0.5):
            for n in range(3, len(name) - 1):
                nick = name[:n]
                if nick not in self.world.aliases and not any(
                    o != name and o.startswith(nick) for o in self.everyone
                ):
                    return nick
        own = {f[1]: f[2] for f in facts if f[0] == name}
        alias = f"the {own['works_as']} of {own['lives_in']}"
        twin = (own["works_as"], own["lives_in"])
        return None if alias in self.world.aliases or self.jobs_and_towns.count(twin) > 1 else alias

    def document(
        self, facts: list[list[str]], corpus: str = "main", tier: str = "F", t: float = 0.0
    ) -> Document:
        """Write facts as one document and index where each is stated."""
        w, rng = self.world, self.rng
        written = facts
        if len(facts) == 1 and corpus == "main":  # a person with aliases may be called by one
            others = [a for a, n in w.aliases.items() if n == facts[0][0]]
            if others and rng.chance(0.4):
                written = [[rng.choice(others), *facts[0][1:]]]
        text = write_passage(written, rng, rng.choice(("train", "eval")), prose=corpus == "long")
        spans = [[m.start(), m.end()] for m in re.finditer(r"[^ ][^.]*\.", text)]
        per_sentence: list[list[list[str]]] = []
        at = 0
        for i in range(len(spans)):  # a sentence holds as many facts as reading the text so far yields
            n = len(read_passage(text[: spans[i][1]], dict(w.aliases))[0])
            per_sentence.append(facts[at:n])
            at = n
        return self.store(Document(len(w.documents), corpus, tier, t, text, spans, per_sentence))

    def sentence(self, text: str, fact: list[str], corpus: str) -> Document:
        """Store one sentence that states one fact."""
        return self.store(
            Document(len(self.world.documents), corpus, "F", 0.0, text, [[0, len(text)]], [[fact]])
        )

    def store(self, doc: Document) -> Document:
        """Append a document and index where each of its facts is stated."""
        w, flat = self.world, [f for here in doc.facts for f in here]
        w.documents.append(doc)
        for i, (span, here) in enumerate(zip(doc.sentences, doc.facts, strict=True)):
            for f in here:
                places = w.stated.setdefault((doc.corpus, *f), [])
                places.append([doc.id, i, *span])
                if doc.tier == "F" and f[1] != "alias" and len(places) == 1:
                    w.facts[doc.corpus].append(f)
        for subject in dict.fromkeys(f[0] for f in flat):
            w.by_subject.setdefault((doc.corpus, subject), []).append(doc)
        return doc


def _single(rng: Rng, relation: str, subject: str) -> list[str]:
    r = RELATIONS[relation]
    fact = [subject, relation, rng.choice(r.values)]
    return fact + [rng.choice(DATES)] if r.kind == "dated" else fact


def world(seed: int, size: int = 2000) -> World:
    """Draw a world whose main corpus has at least `size` documents.

    Parameters
    ----------
    seed : int
    size : int
        Number of passages of the main corpus, 100 to 2000. The long corpus gets size / 100 documents, the
        redundant one about 1.7 times `size`.

    Raises
    ------
    ValueError
        If `size` is out of range.

    Examples
    --------
    >>> w = world(0, 100)
    >>> len(w.corpus("main")) >= 100
    True
    """
    if not 100 <= size <= 2000:
        raise ValueError(
            f"size: {size} is not between 100 and 2000 (there are {len(people('eval'))} evaluation names)"
        )
    b = _Builder(seed)
    rng, w = b.rng, b.world
    n_static, n_changing, n_redundant, n_long = size * 13 // 100, size // 40, size // 25, max(5, size // 100)
    static = [b.person() for _ in range(n_static)]
    lives = {p: [_single(rng, r, p) for r in _FUNCTIONAL] for p in static}
    b.jobs_and_towns = [(own[1][2], own[0][2]) for own in lives.values()]
    for p in static:
        lives[p] += [_single(rng, r, p) for r in rng.sample(_MORE, 3)]
        lives[p].append(_single(rng, "visited", p))
    friends = rng.sample(static, n_static // 2 * 2)
    for a, c in zip(friends[::2], friends[1::2], strict=True):
        lives[a].append([a, "friend_of", c])
    for town, p in zip(TYPES["town"], rng.sample(static, min(n_static, 64)), strict=False):
        lives[p].append([p, "mayor_of", town])
    for company, p in zip(TYPES["company"], rng.sample(static, min(n_static, 80)), strict=False):
        lives[p].append([p, "leads", company])
    main: list[list[list[str]]] = []
    for p in static:
        facts = lives[p]
        rng.shuffle(facts)
        passages: list[list[list[str]]] = []
        while facts:
            k = min(len(facts), rng.between(1, 3))
            passages.append(facts[:k])
            facts = facts[k:]
        if rng.chance(0.15):
            flat = [f for passage in passages for f in passage]
            for _ in range(rng.between(1, 2)):
                if alias := b.alias(p, flat):
                    w.aliases[alias] = p
                    rng.choice(passages).insert(0, [p, "alias", alias])
        main += passages
    main += [[_single(rng, "based_in", c)] for c in TYPES["company"]]
    main += [[_single(rng, "stands_in", s)] for s in TYPES["school"]]
    rng.shuffle(main)
    changing: list[tuple[float, list[str]]] = []
    for _ in range(n_changing):
        p = b.person()
        for what in CHANGES:
            for f in change_history(Draw(rng, "eval", [p]), p, what, rng.between(2, 6)):
                late = HOURS_PER_MONTH * (f[1].startswith("retracted") * rng.between(1, 6))
                changing.append((_DATE_INDEX[f[3]] * HOURS_PER_MONTH + late, f))
    changing.sort(key=lambda row: row[0])
    for passage in main:
        b.document(passage)
    for t, f in changing:
        b.document([f], t=t)
    for person in known_people()[:60]:  # what these documents say contradicts what the models learnt
        r = rng.choice(KNOWN_ATTRIBUTES)
        values = [v for v in RELATIONS[r].values if v != known_facts()[person, r]]
        b.document([[person, r, rng.choice(values)]], tier="C")
    while len(w.corpus("main")) < size and b.pool:
        p = b.person()
        facts = [_single(rng, r, p) for r in _MORE]
        rng.shuffle(facts)
        b.document(facts[:2])
        b.document(facts[2:3])
    for _ in range(n_long):
        p, q = b.person(), b.person()
        facts = []
        for name in (p, q):
            life = [_single(rng, r, name) for r in (*_FUNCTIONAL, *_MORE, "visited")]
            rng.shuffle(life)
            facts += life
        b.document(facts, corpus="long")
    _redundant(b, n_redundant)
    return w


def _redundant(b: _Builder, n: int) -> None:
    """Every fact three to six times in other words, and now and then a near name with another value."""
    rng, w = b.rng, b.world
    for p in [b.person() for _ in range(n)]:
        for r in ("likes", "owns", "plays", "enjoys"):
            values = rng.sample(RELATIONS[r].values, rng.between(2, 3))
            for v in values:
                copies, wanted = set(), rng.between(3, 6)
                while len(copies) < wanted:
                    text = state(r, p, v, rng, rng.choice(("train", "eval")))
                    if text not in copies:
                        copies.add(text)
                        b.sentence(text, [p, r, v], "redundant")
            near = [o for o in b.pool if o[:3] == p[:3]]
            if near and rng.chance(0.5):
                other = rng.choice([v for v in RELATIONS[r].values if v not in values])
                name = rng.choice(near)
                if ("redundant", name, r, other) not in w.stated:
                    b.sentence(state(r, name, other, rng, "train"), [name, r, other], "redundant")


# --- questions ----------------------------------------------------------------------------------------------


def _gold(w: World, chain: Iterable[Sequence[str]], corpus: str) -> list[list[list[int]]]:
    return [w.stated[(corpus, *f)] for f in chain]


def _candidates(w: World, answer: str, relation: str, rng: Rng) -> list[str]:
    """The answer among others of its type; at most 64."""
    kind = RELATIONS[relation].value if relation in RELATIONS else relation
    if kind == "date":
        pool: Sequence[str] = rng.sample(DATES, 40)
    elif kind == "person":
        pool = rng.sample(w.people, min(len(w.people), 40))
    elif kind == "yesno":
        pool = ("yes", "no")
    elif kind == "number":
        pool = NUMBER_WORDS
    else:
        pool = TYPES[kind]
        pool = rng.sample(pool, 64) if len(pool) > 64 else pool
    return sorted({*pool, answer})


class _Asker:
    """Collects the questions of one type."""

    def __init__(self, w: World, kind: str) -> None:
        self.w, self.kind, self.rng = w, kind, Rng("rag questions", w.seed, kind)
        self.names: dict[str, list[str]] = {}
        for alias, name in w.aliases.items():
            self.names.setdefault(name, []).append(alias)
        self.found: list[Question] = []
        self.seen: set[str] = set()

    def add(
        self,
        form: list[str],
        answer: str,
        chain: list[list[str]],
        of: str,
        corpus: str = "main",
        tier: str = "F",
        accept=lambda text: True,
        distractors: Sequence[list] = (),
        session: int = -1,
        called: str = "",
    ) -> bool:
        """Write the question (of a person `called` by an alias); False if asked before or no wording is
        accepted.
        """
        rng, key = self.rng, json.dumps(form)
        worded = [form[0], called, *form[2:]] if called else form
        if key in self.seen:
            return False
        for _ in range(30):
            split = rng.choice(("train", "eval"))
            text = write_question(worded, rng, split)
            if accept(text):
                break
        else:
            return False
        self.seen.add(key)
        accepted = [answer, *self.names.get(answer, ())] + ([ARTICLE[answer]] if answer in ARTICLE else [])
        entities = [x for x in worded[1:] if x.lstrip("~") not in RELATIONS and x not in CHANGES]
        self.found.append(Question(
            f"{self.kind}-{len(self.found):04d}", self.kind, text, NOW, answer, accepted,
            _candidates(self.w, answer, of, rng), _gold(self.w, chain, corpus) if tier != "K" else [], chain,
            entities,
            list(map(list, distractors)), tier, corpus, form, split == "eval", session=session,
        ))  # fmt: skip
        return True


def _t0(w: World, ask: _Asker, n: int) -> None:
    """What the model already knows (K), and documents that contradict it (C)."""
    for d in w.documents:
        if d.tier == "C":
            ((fact,),) = d.facts
            ask.add(["path", *fact[:2]], fact[2], [fact], fact[1], tier="C")
    known = [(p, r) for p in known_people()[60:] for r in KNOWN_ATTRIBUTES]
    ask.rng.shuffle(known)
    for p, r in known[: n - len(ask.found)]:
        ask.add(["path", p, r], known_facts()[p, r], [[p, r, known_facts()[p, r]]], r, tier="K")


def _direct(w: World, ask: _Asker, n: int, corpus: str, relations: Sequence[str]) -> None:
    facts = [f for f in w.facts[corpus] if f[1] in relations]
    ask.rng.shuffle(facts)
    index = _index(facts)
    for f in facts:
        if len(ask.found) >= n:
            return
        called = ask.rng.choice(ask.names[f[0]]) if f[0] in ask.names and ask.rng.chance(0.5) else ""
        if index[f[0], f[1]] == [f] and f[2] not in called:
            ask.add(["path", f[0], f[1]], f[2], [f], f[1], corpus, called=called)


def _index(facts: Iterable[Sequence[str]]) -> dict[tuple[str, str], list]:
    table: dict[tuple[str, str], list] = {}
    for f in facts:
        table.setdefault((f[0], f[1]), []).append(f)
        table.setdefault((f[2], "~" + f[1]), []).append(f)
        if f[1] in ("friend_of", "married"):
            table.setdefault((f[2], f[1]), []).append(f)
    return table


def _t1(w: World, ask: _Asker, n: int) -> None:
    """One hop; one in five over the long documents (T1-long)."""
    _direct(w, ask, n // 5, "long", (*_FUNCTIONAL, *_MORE))
    _direct(w, ask, n, "main", (*_FUNCTIONAL, *_MORE, "visited"))


_STOP = frozenset(
    """a an the of in on at to for is are was were be been do does did has have had who whom whose what which
where when how and or by with from as that this it its he she his her they their one would could
can""".split()
)


def content_words(text: str) -> set[str]:
    """Lower-case words that are no function words."""
    return {w for w in re.findall(r"[a-z]+", text.lower()) if w not in _STOP}


def _t2(w: World, ask: _Asker, n: int) -> None:
    """Chains of 2-4 hops: no bridge in the question, no content word but the start shared with the gold
    sentences.
    """
    rng, index = ask.rng, _index(w.facts["main"])
    starts = [p for p in w.people if (p, "works_for") in index]
    chains = [(p, steps) for p in starts for steps in _CHAINS]
    rng.shuffle(chains)
    for p, steps in chains:
        if len(ask.found) >= n:
            return
        here, chain, ends = p, [], {p}
        for step in steps:
            facts = index.get((here, step), [])
            if len(facts) != 1:
                break
            (f,) = facts
            chain.append(f)
            here = f[0] if f[2] == here else f[2]
            ends.add(here)
        if len(chain) != len(steps) or len(ends) != len(steps) + 1:
            continue
        gold = [w.documents[d].text[a:z] for hop in _gold(w, chain, "main") for d, _, a, z in hop]
        words = set().union(*map(content_words, gold)) - {p.lower()}
        last = steps[-1]
        ask.add(["path", p, *steps], here, chain, "person" if last[0] == "~" else last,
                accept=lambda text, words=words: not content_words(text) & words)  # fmt: skip


def _t3(w: World, ask: _Asker, n: int) -> None:
    """Intersections (half), then comparison, count and aggregates in equal parts."""
    rng, facts = ask.rng, w.facts["main"]
    index = _index(facts)
    people_ = [p for p in w.people if (p, "works_for") in index]
    rng.shuffle(people_)
    for p in people_:
        pairs = [(a, c) for a in _FUNCTIONAL for c in _FUNCTIONAL if a < c]
        rng.shuffle(pairs)
        for one, two in pairs:
            (f,), (g,) = index[p, one], index[p, two]
            alone = [index[f[2], "~" + one], index[g[2], "~" + two]]
            places = [w.stated[("main", *h)][0][0] for h in (f, g)]
            if places[0] == places[1] or not all(5 <= len(a) <= 15 for a in alone):
                continue
            if len({h[0] for h in alone[0]} & {h[0] for h in alone[1]}) != 1:
                continue
            wrong = [[w.stated[("main", *h)][0][0], "one constraint"] for a in alone for h in a if h[0] != p]
            ask.add(["both", one, f[2], two, g[2]], p, [f, g], "person", distractors=wrong)
        if len(ask.found) >= n // 2:
            break
    sixth = max(1, (n - len(ask.found)) // 3)
    for _ in range(40 * sixth):
        if len(ask.found) >= n // 2 + sixth:
            break
        a, c = rng.sample(people_, 2)
        r = rng.choice(("visited", *_FUNCTIONAL))
        (f,), (g,) = index[a, r], index[c, r]
        if r == "visited":
            if f[3] != g[3]:
                ask.add(["first", r, a, c], min((f, g), key=lambda x: _DATE_INDEX[x[3]])[0], [f, g], "person")
            continue
        if rng.chance(0.5) and len(index[f[2], "~" + r]) > 1:
            g = rng.choice([x for x in index[f[2], "~" + r] if x is not f])
        ask.add(["same", r, a, g[0]], "yes" if f[2] == g[2] else "no", [f, g], "yesno")
    values = [
        (r, v) for r in _FUNCTIONAL for v in RELATIONS[r].values if 1 < len(index.get((v, "~" + r), ())) <= 12
    ]
    rng.shuffle(values)
    for i, (r, v) in enumerate(values):
        if len(ask.found) >= n:
            return
        form = ["everyone" if i % 2 else "count", r, v]
        ask.add(form, solve(index[v, "~" + r], form)[0], index[v, "~" + r], "person" if i % 2 else "number")


def _t4(w: World, ask: _Asker, n: int) -> None:
    """Facts that change: now, before, as of a date, how often."""
    rng, facts = ask.rng, w.facts["main"]
    mine: dict[tuple[str, str], list] = {}
    for f in facts:
        for what, names_ in CHANGES.items():
            if f[1] in names_:
                mine.setdefault((f[0], what), []).append(f)
    rows = [(p, what, kind) for p, what in mine for kind in ("now", "before", "asof", "times", "asof")]
    rng.shuffle(rows)
    for p, what, kind in rows:
        if len(ask.found) >= n:
            return
        history = mine[p, what]
        line = timeline(history, what, p)
        form = [kind, what, p]
        if kind == "asof":
            form.append(DATES[rng.between(_DATE_INDEX[line[0][0]], len(DATES) - 1)])
        answers = solve(history, form)
        if len(answers) != 1:
            continue
        stating = [f for f in history if f[1] == CHANGES[what][0]]
        chain = stating if kind == "times" else [f for f in stating if f[2] == answers[0]]
        stale = [[w.stated[("main", *f)][0][0], "stale"] for f in history if f not in chain]
        ask.add(form, answers[0], chain, "number" if kind == "times" else CHANGES[what][0], distractors=stale)


def _t6(w: World, ask: _Asker, n: int) -> None:
    """One hop with named distractors, each question followed by its twin without the gold documents."""
    index = _index(w.facts["main"])
    facts = [f for f in w.facts["main"] if f[1] in _FUNCTIONAL]
    ask.rng.shuffle(facts)
    near: dict[tuple[str, str], list] = {}
    for f in w.facts["main"]:
        near.setdefault((f[0][:3], f[1]), []).append(f)
    for f in facts:
        if len(ask.found) >= n:
            return
        gold = {d for d, *_ in w.stated[("main", *f)]}
        where = lambda h: w.stated[("main", *h)][0][0]  # noqa: E731
        wrong = [[where(h), "near name"] for h in near[f[0][:3], f[1]] if h[0] != f[0]]
        wrong += [[where(h), "same relation"] for h in index[f[2], "~" + f[1]] if h[0] != f[0]]
        wrong += [[d.id, "same entity"] for d in w.by_subject["main", f[0]] if d.id not in gold]
        form = ["path", f[0], f[1]]
        if not ask.add(form, f[2], [f], f[1], distractors=wrong):
            continue
        asked = ask.found[-1]
        ask.found.append(replace(
            asked, id=f"T6-{len(ask.found):04d}", answer=UNKNOWN, accepted=[UNKNOWN], gold=[], chain=[],
            candidates=sorted({*asked.candidates, UNKNOWN}), without=sorted(gold),
        ))  # fmt: skip


def _t7(w: World, ask: _Asker, n: int) -> None:
    """All values of a relation, each stated in three to six wordings."""
    index = _index(w.facts["redundant"])
    stated = w.stated
    rows = [
        (k, fs)
        for k, fs in index.items()
        if k[1][0] != "~" and len(fs) > 1 and all(len(stated["redundant", *f]) > 2 for f in fs)
    ]
    ask.rng.shuffle(rows)
    for (p, r), fs in rows[:n]:
        ask.add(["list", p, r], ", ".join(f[2] for f in fs), fs, r, "redundant")


def _t8(w: World, ask: _Asker, n: int) -> None:
    """When, and which first. (Sequence order, needles and key-value lists are formats of their own.)"""
    rng, dated = (
        ask.rng,
        [f for f in w.facts["main"] if f[1] in ("visited", "moved_to", "started_at", "became")],
    )
    taken_back = {(f[0], f[2], f[3]) for f in w.facts["main"] if f[1].startswith("retracted")}
    count: dict[tuple[str, ...], int] = {}
    for f in dated:
        count[f[0], f[1]] = count.get((f[0], f[1]), 0) + 1
        count[f[0], f[1], f[2]] = count.get((f[0], f[1], f[2]), 0) + 1
    single = [f for f in dated if count[f[0], f[1]] == 1]
    for _ in range(20 * n):  # a small world may not have n / 2 pairs
        if len(ask.found) >= n // 2:
            break
        f, g = rng.choice(single), rng.choice(single)
        if f[1] == g[1] and f[0] != g[0] and f[3] != g[3]:
            ask.add(
                ["first", f[1], f[0], g[0]], min((f, g), key=lambda x: _DATE_INDEX[x[3]])[0], [f, g], "person"
            )
    rng.shuffle(dated)
    for f in dated:
        if len(ask.found) >= n:
            return
        if count[f[0], f[1], f[2]] == 1 and (f[0], f[2], f[3]) not in taken_back:
            ask.add(["when", *f[:3]], f[3], [f], "date")


def _t9(w: World, ask: _Asker, n: int) -> None:
    """Sessions of eight related questions in which few facts are needed often (Zipf), and a shuffled
    control.
    """
    rng, index = ask.rng, _index(w.facts["main"])
    relations = (*_FUNCTIONAL, "friend_of")
    starts = [p for p in w.people if all((p, r) in index for r in relations)]
    rng.shuffle(starts)
    related: list[list[str]] = []
    for p in starts:
        if len(ask.found) >= n:
            break
        friend = next(x for f in index[p, "friend_of"] for x in (f[0], f[2]) if x != p)
        forms = [["path", x, r] for x in (p, friend) for r in _FUNCTIONAL]
        forms += [["path", p, "friend_of", r] for r in _FUNCTIONAL] + [["path", p, "works_for", "based_in"]]
        rng.shuffle(forms)
        zipf = [sum(1 / (j + 1) for j in range(i + 1)) for i in range(len(forms))]
        session = []
        for _ in range(8):
            form = forms[rng.weighted(zipf)]
            here, chain = form[1], []
            for step in form[2:]:
                facts = index.get((here, step), [])
                if len(facts) != 1:
                    break
                chain.append(facts[0])
                here = facts[0][0] if facts[0][2] == here else facts[0][2]
            if len(chain) != len(form) - 2:
                continue
            ask.seen.clear()  # a session repeats itself on purpose
            ask.add(form, here, chain, form[-1], session=len(related))
            session.append(ask.found[-1].id)
        related.append(session)
    ids = [q for s in related for q in s]
    rng.shuffle(ids)
    at = iter(ids)
    w.sessions = {"related": related, "shuffled": [[next(at) for _ in s] for s in related]}


_TYPES = {"T0": _t0, "T1": _t1, "T2": _t2, "T3": _t3, "T4": _t4, "T6": _t6, "T7": _t7, "T8": _t8, "T9": _t9}


def questions(w: World, kind: str, n: int = 300) -> list[Question]:
    """Up to n questions of one type ("T0" ... "T4", "T6" ... "T9") over a world; fewer where a small world
    has no more.

    Examples
    --------
    >>> w = world(0, 100)
    >>> q = questions(w, "T1", 10)[0]
    >>> q.type, solve(w.facts[q.corpus], q.form) == [q.answer]
    ('T1', True)
    """
    if kind not in _TYPES:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(_TYPES)}")
    if n < 1:
        raise ValueError(f"n: {n} is not a positive number of questions")
    ask = _Asker(w, kind)
    _TYPES[kind](w, ask, n)
    return ask.found[:n]
