"""Nine relations with their phrasings: statements, and questions for the object or the subject."""

from __future__ import annotations

from refimpl.world.base import Facts, Split
from refimpl.world.lexicon import ANIMALS, COMPANIES, FOODS, HOBBIES, INSTRUMENTS, JOBS, SCHOOLS, TOWNS
from refimpl.world.names import names
from refimpl.world.phrasebook import NAME, WORD, PhraseIndex, Phrases, article
from refimpl.world.rng import Rng

# relation -> (values, statements, questions for the object, questions for the subject); the last form of each
# is held out of training. {s} subject, {o} object, {a_o} object with article.
_RELATIONS = {
    "lives in": (
        TOWNS,
        "{s} lives in {o}.|The home of {s} is in {o}.|{s} has a house in {o}.|You find {s} in {o}.",
        "Where does {s} live?|In which town does {s} live?|Where is the home of {s}?"
        "|Which town is home to {s}?",
        "Who lives in {o}?|Who has a house in {o}?|Whose home is {o}?",
    ),
    "born in": (
        TOWNS,
        "{s} was born in {o}.|{o} is the town where {s} was born."
        "|{s} came into the world in {o}."
        "|The birthplace of {s} is {o}.",
        "Where was {s} born?|In which town was {s} born?|What is the birthplace of {s}?",
        "Who was born in {o}?|Who came into the world in {o}?|Whose birthplace is {o}?",
    ),
    "works as": (
        JOBS,
        "{s} works as {a_o}.|{s} is {a_o}.|{s} earns a living as {a_o}.|The job of {s} is {o}.",
        "What is the job of {s}?|What does {s} work as?|How does {s} earn a living?",
        "Who works as {a_o}?|Who is {a_o}?|Who earns a living as {a_o}?",
    ),
    "works at": (
        COMPANIES,
        "{s} works at {o}.|{s} has a desk at {o}.|{o} is the firm of {s}.|{o} pays {s}.",
        "Which company does {s} work at?|Where does {s} work?|Which firm pays {s}?",
        "Who works at {o}?|Who has a desk at {o}?|Whom does {o} pay?",
    ),
    "studied at": (
        SCHOOLS,
        "{s} studied at {o}.|{s} was a student at {o}.|{s} went to the school {o}."
        "|{o} was the school of {s}.",
        "Where did {s} study?|Which school did {s} go to?|At which school was {s} a student?",
        "Who studied at {o}?|Who was a student at {o}?|Who went to the school {o}?",
    ),
    "likes": (
        FOODS,
        "{s} likes {o}.|{s} is fond of {o}.|{s} would eat {o} every day.|Nothing pleases {s} like {o}.",
        "Which food does {s} like?|What does {s} like to eat?|What would {s} eat every day?",
        "Who likes {o}?|Who is fond of {o}?|Who would eat {o} every day?",
    ),
    "enjoys": (
        HOBBIES,
        "{s} enjoys {o}.|The hobby of {s} is {o}.|{s} has taken up {o}.|{s} spends free days with {o}.",
        "What is the hobby of {s}?|What does {s} enjoy?|How does {s} spend free days?",
        "Who enjoys {o}?|Whose hobby is {o}?|Who has taken up {o}?",
    ),
    "plays": (
        INSTRUMENTS,
        "{s} plays the {o}.|{s} is good at the {o}.|{s} practises the {o}.|The {o} is the joy of {s}.",
        "What does {s} play?|Which instrument does {s} play?|What does {s} practise?",
        "Who plays the {o}?|Who is good at the {o}?|Who practises the {o}?",
    ),
    "keeps": (
        ANIMALS,
        "{s} keeps {a_o}.|{s} has {a_o} at home.|{s} feeds {a_o}.|The animal of {s} is {a_o}.",
        "Which animal does {s} keep?|What animal does {s} have at home?|What does {s} feed?",
        "Who keeps {a_o}?|Who has {a_o} at home?|Who feeds {a_o}?",
    ),
}
RELATIONS = tuple(_RELATIONS)
VALUES = {r: v[0] for r, v in _RELATIONS.items()}


def _books(column: int) -> dict[str, Phrases]:
    books = {}
    for relation, row in _RELATIONS.items():
        value = NAME if row[0][0][0].isupper() else WORD
        books[relation] = Phrases(row[column].split("|"), s=NAME, o=f"(?:{value})", a_o=f"an? {WORD}")
    return books


STATEMENTS, ASK_OBJECT, ASK_SUBJECT = _books(1), _books(2), _books(3)
_STATE, _OBJECT, _SUBJECT = map(PhraseIndex, (STATEMENTS, ASK_OBJECT, ASK_SUBJECT))
FILLERS = (
    "It was a quiet day.",
    "Nobody knew what to say.",
    "Then the bell rang.",
    "The weather was fine.",
    "There is not much more to tell.",
    "That was long ago.",
    "So people say.",
    "The tea was cold by then.",
)


def draw_form(book: Phrases, split: Split, rng: Rng) -> int:
    last = len(book.forms) - 1
    return last if split == "eval" else rng.below(last)


def _fill(book: Phrases, fact: dict) -> str:
    o = fact.get("o", "")
    return book.forms[fact["form"]] % {"s": fact.get("s", ""), "o": o, "a_o": article(o) if o else ""}


def _slots(slots: dict[str, str]) -> dict[str, str]:
    return {("o" if k == "a_o" else k): (v.split()[1] if k == "a_o" else v) for k, v in slots.items()}


def draw(rng: Rng, split: Split, subject: str | None = None) -> dict:
    r = rng.choice(RELATIONS)
    s = subject or rng.choice(names(split))
    return {"s": s, "r": r, "o": rng.choice(VALUES[r]), "form": draw_form(STATEMENTS[r], split, rng)}


def state(item: dict | str) -> str:
    """The sentence of a fact; a filler is its own sentence."""
    return item if isinstance(item, str) else _fill(STATEMENTS[item["r"]], item)


def read_statement(sentence: str) -> dict | str:
    """The inverse of `state`."""
    if sentence in FILLERS:
        return sentence
    r, form, slots = _STATE.read(sentence)
    return {**_slots(slots), "r": r, "form": form}


def triple(fact: dict) -> str:
    """` Balbert>> lives in>> Ripon`: every field begins with a space, as its tokens do in running text."""
    return f" {fact['s']}>> {fact['r']}>> {fact['o']}"


def read_statements(text: str) -> list[dict | str]:
    return [read_statement(part + ".") for part in text.removesuffix(".").split(". ")]


def draw_items(rng: Rng, split: Split, n: int) -> list[dict | str]:
    pool = names(split)
    subjects = [rng.choice(pool) for _ in range(2)]
    return [
        rng.choice(FILLERS) if rng.random() < 0.2 else draw(rng, split, rng.choice(subjects))
        for _ in range(n)
    ]


def question(facts: Facts) -> str:
    """The text of a question."""
    return _fill((ASK_OBJECT if "s" in facts else ASK_SUBJECT)[facts["r"]], facts)


def read_question(text: str) -> Facts:
    """The inverse of `question`."""
    try:
        r, form, slots = _OBJECT.read(text)
    except ValueError:
        r, form, slots = _SUBJECT.read(text)
    return {"r": r, **_slots(slots), "form": form}
