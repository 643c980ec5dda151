"""The instructions, each with its surface forms and the function that computes its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from refimpl.world.base import Facts
from refimpl.world.lexicon import (
    ANIMALS,
    CODES,
    COLORS,
    COMPANIES,
    FIRST_NAMES,
    FOODS,
    JOBS,
    MONTHS,
    NUMBER_WORDS,
    OBJECTS,
    TOWNS,
)
from refimpl.world.names import names
from refimpl.world.phrasebook import Phrases

KINDS: dict[str, tuple[str, ...]] = {
    "animals": ANIMALS,
    "foods": FOODS,
    "objects": OBJECTS,
    "colors": COLORS,
    "jobs": JOBS,
    "towns": TOWNS,
    "companies": COMPANIES,
    "people": FIRST_NAMES,
    "codes": CODES,
    "months": MONTHS,
    "numbers": tuple(map(str, range(10, 100))),
    "names": (),  # names: the invented names of the split
}
KIND_NAMES = tuple(KINDS)
_IRREGULAR = {
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "calf": "calves",
    "wolf": "wolves",
    "knife": "knives",
    "scarf": "scarves",
    "fisherman": "fishermen",
}


def plural(noun: str) -> str:
    """The plural of an English noun of the lexicon.

    Examples
    --------
    >>> plural("box"), plural("pony"), plural("mouse"), plural("key")
    ('boxes', 'ponies', 'mice', 'keys')
    """
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "sh", "ch")):
        return noun + "es"
    if noun[-1] == "y" and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


@dataclass(frozen=True)
class Task:
    """One instruction.

    Parameters
    ----------
    forms : Phrases
        Surface forms; `{words}` is the input, `{a}`, `{b}`, `{n}`, `{kind}` are arguments.
    answer : (words, facts) -> str
        Computes the reply.
    args : str
        Which arguments to draw: "in" a word of the input, "out" a word that is not in it, "maybe" either with
        probability 1/2, "new" another word b, "n" a number 2-4, "kind" mixes in words of another kind,
        "double" repeats a word, "odd" adds one word of another kind.
    kinds : tuple of str
        The types of input it takes.
    """

    forms: Phrases
    answer: Callable[[list[str], Facts], str]
    args: str = ""
    kinds: tuple[str, ...] = KIND_NAMES


COUNTS = {"two": 2, "three": 3, "four": 4}
_WORDS = r"[A-Za-z0-9]+(?: [A-Za-z0-9]+)*"


def _forms(*templates: str) -> Phrases:
    return Phrases(
        templates, words=_WORDS, a=r"[A-Za-z0-9]+", b=r"[A-Za-z0-9]+", n="two|three|four", kind="[a-z]+"
    )


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _number(n: int) -> str:
    return NUMBER_WORDS[n]


def of_kind(words: Sequence[str], kind: str) -> list[str]:
    return [w for w in words if w in members()[kind]]


@cache
def members() -> dict[str, frozenset[str]]:
    invented = frozenset(names("train")) | frozenset(names("eval"))
    return {k: frozenset(v) or invented for k, v in KINDS.items()}


_NOUNS = ("animals", "objects", "jobs")
_LOWER = ("animals", "foods", "objects", "colors", "jobs", "codes")
DISTINCT = ("animals", "objects", "colors", "towns", "people", "months", "numbers", "companies")

TASKS: dict[str, Task] = {
    "copy": Task(
        _forms("Repeat these words: {words}", "Copy this: {words}", "Say after me: {words}"),
        lambda w, f: " ".join(w),
    ),
    "reverse": Task(
        _forms(
            "Reverse the order of these words: {words}",
            "Write these words from last to first: {words}",
            "Here is a list: {words}. Turn it around.",
        ),
        lambda w, f: " ".join(w[::-1]),
    ),
    "first": Task(
        _forms(
            "What is the first word? {words}",
            "Give me the first word of this list: {words}",
            "Here is a list: {words}. Which word comes first?",
        ),
        lambda w, f: w[0],
    ),
    "last": Task(
        _forms(
            "What is the last word? {words}",
            "Give me the last word of this list: {words}",
            "Here is a list: {words}. Which word comes last?",
        ),
        lambda w, f: w[-1],
    ),
    "second": Task(
        _forms(
            "What is the second word? {words}",
            "Give me the second word of this list: {words}",
            "Here is a list: {words}. Which word is the second?",
        ),
        lambda w, f: w[1],
    ),
    "ends": Task(
        _forms(
            "Give the first and the last word: {words}",
            "Keep only the two ends of this list: {words}",
            "Here is a list: {words}. Name its first and last word.",
        ),
        lambda w, f: f"{w[0]} {w[-1]}",
    ),
    "count": Task(
        _forms(
            "How many words are there? {words}",
            "Count these words: {words}",
            "Here is a list: {words}. How long is it?",
        ),
        lambda w, f: _number(len(w)),
    ),
    "upper": Task(
        _forms(
            "Write each word with a big first letter: {words}",
            "Capitalise these words: {words}",
            "Here is a list: {words}. Make it a title.",
        ),
        lambda w, f: " ".join(x[0].upper() + x[1:] for x in w),
        kinds=_LOWER,
    ),
    "sort": Task(
        _forms(
            "Sort these words: {words}",
            "Put these words in order of the alphabet: {words}",
            "Here is a list: {words}. Sort it.",
        ),
        lambda w, f: " ".join(sorted(w)),
    ),
    "smallest": Task(
        _forms(
            "Which of these comes first in order? {words}",
            "Find the start of the sorted list: {words}",
            "Here is a list: {words}. Which one would a sorted list begin with?",
        ),
        lambda w, f: min(w),
    ),
    "longest": Task(
        _forms(
            "Which word has the most letters? {words}",
            "Find the longest word: {words}",
            "Here is a list: {words}. Which word is the longest?",
        ),
        lambda w, f: max(w, key=len),
        kinds=_LOWER,
    ),
    "select": Task(
        _forms(
            "List only the {kind}: {words}",
            "Which of these are {kind}? {words}",
            "Here is a list: {words}. Keep the {kind}.",
        ),
        lambda w, f: " ".join(of_kind(w, f["kind"])),
        "kind",
        DISTINCT,
    ),
    "drop": Task(
        _forms(
            "Remove the {kind}: {words}",
            "Take all {kind} out of this list: {words}",
            "Here is a list: {words}. Give me the rest without the {kind}.",
        ),
        lambda w, f: " ".join(x for x in w if x not in members()[f["kind"]]),
        "kind",
        DISTINCT,
    ),
    "count_kind": Task(
        _forms(
            "How many {kind} are in this list? {words}",
            "Count the {kind}: {words}",
            "Here is a list: {words}. How many {kind} are there?",
        ),
        lambda w, f: _number(len(of_kind(w, f["kind"]))),
        "kind",
        DISTINCT,
    ),
    "odd": Task(
        _forms(
            "Which one does not belong? {words}",
            "Find the odd one out: {words}",
            "Here is a list: {words}. One word is of another kind. Which?",
        ),
        lambda w, f: next(x for x in w if x not in members()[f["main"]]),
        "odd",
        DISTINCT,
    ),
    "replace": Task(
        _forms(
            "Replace {a} by {b}: {words}",
            "Write {b} in place of {a}: {words}",
            "Here is a list: {words}. Change {a} into {b}.",
        ),
        lambda w, f: " ".join(f["b"] if x == f["a"] else x for x in w),
        "in new",
    ),
    "remove": Task(
        _forms(
            "Leave out {a}: {words}",
            "Write this list without {a}: {words}",
            "Here is a list: {words}. Strike out {a}.",
        ),
        lambda w, f: " ".join(x for x in w if x != f["a"]),
        "in",
    ),
    "member": Task(
        _forms(
            "Is {a} in this list? {words}",
            "Does this list contain {a}? {words}",
            "Here is a list: {words}. Do you see {a} in it?",
        ),
        lambda w, f: _yes(f["a"] in w),
        "maybe",
    ),
    "absent": Task(
        _forms(
            "Is {a} missing from this list? {words}",
            "Does this list lack {a}? {words}",
            "Here is a list: {words}. Is it without {a}?",
        ),
        lambda w, f: _yes(f["a"] not in w),
        "maybe",
    ),
    "repeat": Task(
        _forms(
            "Write this {n} times: {words}",
            "Say this {n} times in a row: {words}",
            "Here is a text: {words}. Repeat it {n} times.",
        ),
        lambda w, f: " ".join(w * COUNTS[f["n"]]),
        "n",
    ),
    "comma": Task(
        _forms(
            "Join these words with commas: {words}",
            "Put a comma between the words: {words}",
            "Here is a list: {words}. Separate the words by commas.",
        ),
        lambda w, f: ", ".join(w),
    ),
    "and": Task(
        _forms(
            "Join these words with and: {words}",
            "Put the word and between all words: {words}",
            "Here is a list: {words}. Chain it with and.",
        ),
        lambda w, f: " and ".join(w),
    ),
    "plural": Task(
        _forms(
            "Give the plural of each word: {words}",
            "Say that there are many of each: {words}",
            "Here is a list: {words}. Make every word plural.",
        ),
        lambda w, f: " ".join(map(plural, w)),
        kinds=_NOUNS,
    ),
    "the": Task(
        _forms(
            "Write the before each word: {words}",
            "Put the word the in front of every word: {words}",
            "Here is a list: {words}. Add the to each word.",
        ),
        lambda w, f: " ".join(f"the {x}" for x in w),
    ),
    "double": Task(
        _forms(
            "Write every word twice: {words}",
            "Double each word: {words}",
            "Here is a list: {words}. Say each word two times.",
        ),
        lambda w, f: " ".join(f"{x} {x}" for x in w),
    ),
    "swap": Task(
        _forms(
            "Swap the first and the last word: {words}",
            "Let the first and last word change places: {words}",
            "Here is a list: {words}. Exchange its two ends.",
        ),
        lambda w, f: " ".join([w[-1], *w[1:-1], w[0]]),
    ),
    "take": Task(
        _forms(
            "Give the first {n} words: {words}",
            "Keep {n} words from the start: {words}",
            "Here is a list: {words}. Name the first {n}.",
        ),
        lambda w, f: " ".join(w[: COUNTS[f["n"]]]),
        "n",
    ),
    "tail": Task(
        _forms(
            "Give the last {n} words: {words}",
            "Keep {n} words from the end: {words}",
            "Here is a list: {words}. Name the last {n}.",
        ),
        lambda w, f: " ".join(w[-COUNTS[f["n"]] :]),
        "n",
    ),
    "append": Task(
        _forms(
            "Add {b} at the end: {words}",
            "Write {b} after this list: {words}",
            "Here is a list: {words}. Let it end with {b}.",
        ),
        lambda w, f: " ".join([*w, f["b"]]),
        "new",
    ),
    "prepend": Task(
        _forms(
            "Add {b} at the start: {words}",
            "Write {b} before this list: {words}",
            "Here is a list: {words}. Let it begin with {b}.",
        ),
        lambda w, f: " ".join([f["b"], *w]),
        "new",
    ),
    "after": Task(
        _forms(
            "Which word follows {a}? {words}",
            "What comes right after {a}? {words}",
            "Here is a list: {words}. Which word is next to {a} on its right?",
        ),
        lambda w, f: w[w.index(f["a"]) + 1],
        "notlast",
    ),
    "occurs": Task(
        _forms(
            "How often does {a} occur? {words}",
            "Count how many times you read {a}: {words}",
            "Here is a list: {words}. How many times is {a} in it?",
        ),
        lambda w, f: _number(w.count(f["a"])),
        "doubled",
    ),
    "unique": Task(
        _forms(
            "Write each word only once: {words}",
            "Remove words that come again: {words}",
            "Here is a list: {words}. Keep no word twice.",
        ),
        lambda w, f: " ".join(dict.fromkeys(w)),
        "doubled",
    ),
    "number": Task(
        _forms(
            "Number these words: {words}",
            "Write a number before each word: {words}",
            "Here is a list: {words}. Give each word its number.",
        ),
        lambda w, f: " ".join(f"{i} {x}" for i, x in enumerate(w, 1)),
        kinds=_LOWER,
    ),
}
TASK_NAMES = tuple(TASKS)


def held_out(task: str, kind: str) -> bool:
    """Whether the combination of a task and a type of input is kept for evaluation (about one in seven)."""
    return (3 * TASK_NAMES.index(task) + 5 * KIND_NAMES.index(kind)) % 7 == 3


COMBINATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    split: tuple(
        (t, k) for t, task in TASKS.items() for k in task.kinds if held_out(t, k) == (split == "eval")
    )
    for split in ("train", "eval")
}
