"""Long streams in which rare names recur at controlled distances (memory D1); injected facts (memory D3)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from refimpl.world.base import Split
from refimpl.world.lexicon import ANIMALS, FIRST_NAMES, FOODS, JOBS, OBJECTS, TOWNS
from refimpl.world.memory_relations import ASK_OBJECT, FILLERS, RELATIONS, STATEMENTS, VALUES
from refimpl.world.names import names
from refimpl.world.phrasebook import article
from refimpl.world.rng import Rng

DISTANCES = (
    32,
    64,
    128,
    256,
    512,
    1024,
    2048,
    4096,
)  # words between two mentions of a name; met within a few words

# What surrounds the rare names. {hero} is a common first name that stays for the whole stream.
_FILLER = tuple(
    line.strip()
    for line in """
{hero} walked on and found {a_thing} in the grass.
It was still early, and {hero} was in no hurry.
{A_animal} sat by the side of the road and did not move.
"There must be some {food} left," said {hero}.
The rain had stopped, but the path was wet.
In the evening {hero} wrote everything down in a little book.
There was a market that day, and somebody sold {food}.
{hero} put the {thing} back into the bag.
The road to {town} was long and went up and down.
Nobody spoke for a while.
Then {a_animal} crossed the road.
{hero} had never been to {town} before.
They ate {food} and looked at the fire.
On the wall there hung an old {thing}.
A bell rang somewhere, far away.
The wind blew from the sea, and it smelled of {food}.
{hero} slept well and woke up late.
Some children ran after {a_animal} and laughed.
"I know this place," said {hero}, "but I forget from when."
The shop had {a_thing} in the window.
All the doors in {town} were closed.
{hero} counted the coins and bought some {food}.
The next day was like the one before.
At noon it grew so hot that even the {animal} lay down.
The letter from {town} had not come.""".strip().split("\n")
)
_FIRST = (
    " In {town} {hero} met a new face: {a_job} with {a_thing}, by the name of {name}.",
    " Somebody knocked. It was the {job} from {town}, who had {a_thing} and was called {name}.",
    " {hero} heard of the {job} who lived in {town} and owned {a_thing}. The name was {name}.",
    " At the inn sat {a_job} from {town} with {a_thing}. People there said {name}.",
)
# The words before the name identify its bearer, so that whoever remembers can foresee it.
_AGAIN = (
    " Again there was the {job} from {town}, the one with the {thing}: {name}.",
    " Who came along but the {job} of {town} with the old {thing}? It was {name}.",
    " {hero} thought of the {job} in {town} who had the {thing}, of {name}.",
    " A letter came from the {job} of {town}. The {thing} was fine, wrote {name}.",
    " By the fire they spoke of the {job} from {town} and the {thing}, that is, of {name}.",
)


@dataclass(frozen=True)
class Mention:
    """One mention of a rare name.

    Parameters
    ----------
    start, end : int
        Characters of the name in the text.
    name : str
        The name.
    distance : int or None
        Words since the previous mention of the same name; None for the first.
    """

    start: int
    end: int
    name: str
    distance: int | None


def stream(
    rng: Rng, n_words: int, *, split: Split = "train", new_name: float = 0.08
) -> tuple[str, list[Mention]]:
    """Connected prose of about `n_words` words in which rare names recur at the distances `DISTANCES`.

    Parameters
    ----------
    rng : Rng
        Source of chance.
    n_words : int
        Length; the text ends with the first sentence that reaches it.
    split : "train" or "eval"
        The name pool; every bearer of a name has a job, a town and an object of its own.
    new_name : float
        Probability that a sentence introduces a name.

    Returns
    -------
    (str, list of Mention)
        The text, one paragraph, and its mentions in order.

    Raises
    ------
    ValueError
        When `n_words` < 1 or more names are needed than the pool has.

    Examples
    --------
    >>> text, mentions = stream(Rng("s"), 500)
    >>> all(text[m.start:m.end] == m.name for m in mentions)
    True
    """
    if n_words < 1:
        raise ValueError(f"n_words: {n_words!r} is not at least 1")
    if not 0 < new_name < 1:
        raise ValueError(f"new_name: {new_name!r} is not between 0 and 1")
    pool = rng.sample(names(split), min(len(names(split)), 2000))  # fewer than pairs (job, town)
    hero = rng.choice(FIRST_NAMES)
    due: list[tuple[int, str]] = []  # (word at which a name should come again, name)
    bearers: dict[str, dict] = {}
    taken: set[tuple[str, str]] = set()
    last: dict[str, int] = {}
    parts: list[str] = []
    mentions: list[Mention] = []
    at = words = 0
    while words < n_words:
        name = None
        if due and due[0][0] <= words + 12:
            name = heapq.heappop(due)[1]
            template = rng.choice(_AGAIN)
        elif rng.random() < new_name:
            if not pool:
                raise ValueError(f"n_words: {n_words!r} needs more names than split {split!r} has")
            name = pool.pop()
            while True:
                job, town, thing = rng.choice(JOBS), rng.choice(TOWNS), rng.choice(OBJECTS)
                if (job, town) not in taken:
                    break
            taken.add((job, town))
            bearers[name] = {
                "name": name,
                "hero": hero,
                "job": job,
                "town": town,
                "thing": thing,
                "a_job": article(job),
                "a_thing": article(thing),
            }
            template = rng.choice(_FIRST)
        if name is None:
            animal, thing = rng.choice(ANIMALS), rng.choice(OBJECTS)
            text = " " + rng.choice(_FILLER).format_map(
                {
                    "hero": hero,
                    "food": rng.choice(FOODS),
                    "town": rng.choice(TOWNS),
                    "thing": thing,
                    "animal": animal,
                    "a_animal": article(animal),
                    "A_animal": article(animal).capitalize(),
                    "a_thing": article(thing),
                }
            )
        else:
            text = template.format_map(bearers[name])
        if not parts:
            text = text[1:]
        if name is not None:
            offset = text.rindex(name)
            word = words + text.count(" ", 1, offset)
            distance = word - last[name] if name in last else None
            mentions.append(Mention(at + offset, at + offset + len(name), name, distance))
            last[name] = word
            heapq.heappush(due, (word + rng.choice(DISTANCES), name))
        parts.append(text)
        at += len(text)
        words += len(text.split())
    return "".join(parts) + "\n", mentions


def fact_injection(rng: Rng, n: int, *, split: Split = "eval") -> dict:
    """A fact, n distractor contexts and a question about the fact (memory D3).

    Parameters
    ----------
    rng : Rng
        Source of chance.
    n : int
        Number of distractor contexts, each of 3-5 sentences about other people; at least 0.
    split : "train" or "eval"
        The name pool and the forms.

    Returns
    -------
    dict
        "fact", "distractors" (list of str), "question", "answer", "candidates" (the values of the relation),
        "triple". The answer's relation occurs in about half of the distractors, with other subjects
        and values.

    Examples
    --------
    >>> item = fact_injection(Rng("i"), 3)
    >>> len(item["distractors"]), item["answer"] in item["fact"]
    (3, True)
    """
    if n < 0:
        raise ValueError(f"n: {n!r} is not at least 0")
    relation = rng.choice(RELATIONS)
    subject, *others = rng.sample(names(split), min(2 * n + 2, len(names(split))))
    answer = rng.choice(VALUES[relation])

    def sentence(who: str, r: str, value: str) -> str:
        return STATEMENTS[r].write(rng, {"s": who, "o": value, "a_o": article(value)})

    distractors = []
    for i in range(n):
        sentences = [rng.choice(FILLERS)]
        for j in range(rng.between(2, 4)):
            r = relation if j == 0 and rng.random() < 0.5 else rng.choice(RELATIONS)
            value = rng.choice(VALUES[r])
            while r == relation and value == answer:
                value = rng.choice(VALUES[r])
            sentences.append(sentence(others[(2 * i + j % 2) % len(others)], r, value))
        rng.shuffle(sentences)
        distractors.append(" ".join(sentences))
    asked = ASK_OBJECT[relation].write(rng, {"s": subject})
    return {
        "fact": sentence(subject, relation, answer),
        "distractors": distractors,
        "question": asked,
        "answer": answer,
        "candidates": list(VALUES[relation]),
        "triple": [subject, relation, answer],
    }
