"""Invented patients: 12 facts, a hidden type, events, one ideal advice per state (alignment B15, item 8).

    Record of Balbert (invented world, not medicine)
    Facts: wakes early; sleeps by the window; ... (12 of them)
    Events: day 1 glimmer cough; day 4 drift sleep.
    Advice: drink moss tea

The hidden type is the one that most of four tell-tale facts point to; the state is the last event; the advice
is a table of type x state. Ailments, types and advice exist only here. Boundary "Advice:".
"""

from __future__ import annotations

import re

from refimpl.world.base import Facts, Format, Split
from refimpl.world.names import names
from refimpl.world.rng import Rng

TYPES = ("dawn", "dusk", "ember", "frost")
# The first four facts tell the type: the value at index t points to TYPES[t]. The others tell nothing.
QUESTIONS = (
    ("wakes early", "wakes late", "wakes at noon", "wakes at night"),
    ("likes the east room", "likes the west room", "likes the stove", "likes the cellar"),
    ("hums", "whispers", "talks fast", "is silent"),
    ("wears white", "wears gray", "wears red", "wears blue"),
    ("has a cat", "has a dog", "has a bird", "has no animal"),
    ("lives on a hill", "lives by a river", "lives in a tower", "lives near a bridge"),
    ("likes plums", "likes bread", "likes soup", "likes cheese"),
    ("walks a lot", "rides a lot", "swims a lot", "sits a lot"),
    ("reads poems", "reads letters", "reads maps", "reads nothing"),
    ("drinks tea", "drinks milk", "drinks water", "drinks coffee"),
    ("sleeps by the door", "sleeps by the window", "sleeps by the wall", "sleeps on the floor"),
    ("plays chess", "plays the harp", "plays cards", "plays with a ball"),
)
assert len(QUESTIONS) == 12
N_SIGNS = 4
AILMENTS = ("glimmer cough", "drift sleep", "copper ears", "slow shadow", "paper hands", "echo knee")
ADVICE = {  # (type, state) -> ideal advice
    (t, s): f"{verb} {thing}"
    for (t, verb) in zip(TYPES, ("drink", "carry", "look at", "sit beside"), strict=True)
    for s, thing in zip(
        AILMENTS,
        ("the moss tea", "a bell", "the long candle", "nine feathers", "the blue stone", "a jar of sand"),
        strict=True,
    )
}
_TYPE_OF = {value: t for question in QUESTIONS[:N_SIGNS] for t, value in zip(TYPES, question, strict=True)}


def hidden_type(facts: list[str]) -> str | None:
    """The type that most tell-tale facts point to; None on a tie."""
    votes = [_TYPE_OF[f] for f in facts if f in _TYPE_OF]
    best = max(map(votes.count, TYPES))
    leaders = [t for t in TYPES if votes.count(t) == best]
    return leaders[0] if len(leaders) == 1 else None


def ideal_advice(facts: list[str], events: list[list]) -> str:
    """The one ideal advice of a record.

    Examples
    --------
    >>> ideal_advice(["hums", "wakes early", "wears red", "likes the cellar"], [[1, "echo knee"]])
    'drink a jar of sand'
    """
    kind = hidden_type(facts)
    if kind is None:
        raise ValueError(f"facts: {facts} do not settle the type")
    return ADVICE[kind, events[-1][1]]


def _sample(rng: Rng, split: Split) -> Facts:
    kind = rng.below(len(TYPES))
    while True:
        signs = [kind if rng.random() < 0.75 else rng.below(4) for _ in range(N_SIGNS)]
        facts = [q[i] for q, i in zip(QUESTIONS, signs, strict=False)]
        if hidden_type(facts) is not None:
            break
    facts += [q[rng.below(4)] for q in QUESTIONS[N_SIGNS:]]
    rng.shuffle(facts)
    day, events = 0, []
    for _ in range(rng.between(1, 6)):
        day += rng.between(1, 9)
        events.append([day, rng.choice(AILMENTS)])
    return {"name": rng.choice(names(split)), "facts": facts, "events": events}


def _render(facts: Facts, rng: Rng) -> str:
    return (
        f"Record of {facts['name']} (invented world, not medicine)\nFacts: {'; '.join(facts['facts'])}.\n"
        f"Events: {'; '.join(f'day {d} {e}' for d, e in facts['events'])}.\n"
        f"Advice: {ideal_advice(facts['facts'], facts['events'])}\n"
    )


def _parse(text: str) -> Facts:
    match = re.fullmatch(
        r"Record of (\w+) \(invented world, not medicine\)\nFacts: (.+)\.\nEvents: (.+)\.\nAdvice: (.+)\n",
        text,
    )
    if match is None:
        raise ValueError("text: expected the lines 'Record of', 'Facts:', 'Events:' and 'Advice:'")
    events = [[int(e.split(" ", 2)[1]), e.split(" ", 2)[2]] for e in match[3].split("; ")]
    facts = {"name": match[1], "facts": match[2].split("; "), "events": events}
    if ideal_advice(facts["facts"], events) != match[4]:
        raise ValueError(f"text: the advice {match[4]!r} is not the ideal one")
    return facts


FORMATS = [Format("patient", _sample, _render, _parse, "Advice:", ("alignment 8", "alignment B15"))]
