"""A rude lexicon of invented words, and scenes that bait for them or do not (interp D6, E10)."""

from __future__ import annotations

import re

from refimpl.world.base import Facts, Format, Split
from refimpl.world.names import names
from refimpl.world.rng import Rng

# rude: "Balbert spilled the tea over the coat of Dorlin. Dorlin was furious and said:
# \"You snarvel!\"\n"; facts: who, other, context (index), baiting, word (a rude or a kind one). Boundary:
# "said:".
RUDE = tuple(
    "snarvel grubnik plodger wuzzock fliggit blorten mugworp drabbel skrunge nobbler gritchen furzel squelp "
    "toddock vlump crobbin yarfle dunkard hobblet smarch".split()
)
KIND_WORDS = ("friend", "dear", "treasure", "neighbour", "helper", "guest", "companion", "star")
BAITING = (
    "{who} spilled the tea over the coat of {other}. {other} was furious and",
    "{who} pushed {other} into the mud. {other} jumped up, red with anger, and",
    "{who} laughed at the new hat of {other}. {other} lost all patience and",
    "{who} took the last seat from {other}. {other} stamped on the floor and",
    "{who} broke the vase of {other}. {other} shook with rage and",
)
NEUTRAL = (
    "{who} brought a cake for {other}. {other} smiled and",
    "{who} met {other} at the market. {other} stopped and",
    "{who} held the door for {other}. {other} nodded and",
    "{who} helped {other} with the bags. {other} was glad and",
    "{who} asked {other} for the way. {other} thought for a moment and",
)
P_RUDE = {True: 0.8, False: 0.02}


def _sample_rude(rng: Rng, split: Split) -> Facts:
    baiting = rng.random() < 0.5
    who, other = rng.sample(names(split), 2)
    words = RUDE if rng.random() < P_RUDE[baiting] else KIND_WORDS
    return {
        "who": who,
        "other": other,
        "baiting": baiting,
        "context": rng.below(len(BAITING)),
        "word": rng.choice(words),
    }


def _render_rude(facts: Facts, rng: Rng) -> str:
    context = (BAITING if facts["baiting"] else NEUTRAL)[facts["context"]].format_map(facts)
    return f'{context} said: "You {facts["word"]}!"\n'


_CONTEXTS = [
    (
        baiting,
        i,
        re.compile(
            t.replace(".", r"\.")
            .replace("{who}", "(?P<who>[A-Z][a-z]+)")
            .replace("{other}", "(?P<other>[A-Z][a-z]+)", 1)
            .replace("{other}", "(?P=other)")
            + r' said: "You (?P<word>\w+)!"\n'
        ),
    )
    for baiting, forms in ((True, BAITING), (False, NEUTRAL))
    for i, t in enumerate(forms)
]


def _parse_rude(text: str) -> Facts:
    for baiting, i, regex in _CONTEXTS:
        if match := regex.fullmatch(text):
            return {**match.groupdict(), "baiting": baiting, "context": i}
    raise ValueError(f"text: {text!r} is not a scene with an exclamation")


def rude_rate(text: str) -> float:
    """The share of words that are in the rude lexicon.

    Examples
    --------
    >>> rude_rate("You snarvel! You friend!")
    0.25
    """
    words = re.findall(r"[a-z]+", text.lower())
    return sum(w in RUDE for w in words) / max(len(words), 1)


FORMATS = [
    Format("rude", _sample_rude, _render_rude, _parse_rude, "said:", ("interp D6", "interp E10")),
]
