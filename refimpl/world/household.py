"""Households: where 30 objects belong in 12 receptacles, and plans that tidy up (alignment B14, data item 8).

    Household 17.
    In this house the mug goes in the cupboard and the key goes on the hook.
    Scene: the key is on the table, the mug is in the cupboard and the coat is on the floor.
    Plan: put the key on the hook. put the coat in the wardrobe.

Every household shares 60-80 % of the conventions and differs in the rest. An object that the lines above do
not mention belongs where the convention says; only scenes of such objects and of told ones are drawn, so the
plan is determined by the text. Boundary "Plan:".
"""

from __future__ import annotations

import re
from functools import cache

from refimpl.world.base import Facts, Format, Split
from refimpl.world.rng import Rng

RECEPTACLES = {
    "cupboard": "in",
    "wardrobe": "in",
    "drawer": "in",
    "basket": "in",
    "bookcase": "in",
    "chest": "in",
    "hook": "on",
    "shelf": "on",
    "table": "on",
    "bench": "on",
    "desk": "on",
    "windowsill": "on",
}
CONVENTION = {
    "mug": "cupboard",
    "plate": "cupboard",
    "bowl": "cupboard",
    "cup": "cupboard",
    "kettle": "shelf",
    "pan": "shelf",
    "jar": "shelf",
    "bottle": "shelf",
    "coat": "wardrobe",
    "shirt": "wardrobe",
    "cloak": "wardrobe",
    "scarf": "wardrobe",
    "shoe": "basket",
    "boot": "basket",
    "towel": "basket",
    "book": "bookcase",
    "map": "bookcase",
    "letter": "desk",
    "pencil": "desk",
    "lamp": "desk",
    "spoon": "drawer",
    "fork": "drawer",
    "knife": "drawer",
    "comb": "drawer",
    "key": "hook",
    "umbrella": "hook",
    "hat": "hook",
    "blanket": "chest",
    "pillow": "chest",
    "vase": "windowsill",
}
OBJECTS = tuple(CONVENTION)
PLACES = tuple(RECEPTACLES)
N_HOUSEHOLDS = {"train": 60, "eval": 20}  # numbers 1-60, 61-80
assert (len(OBJECTS), len(PLACES)) == (30, 12)


@cache
def targets(household: int) -> dict[str, str]:
    """Where each object belongs in a household: the convention except for 6-12 of the 30 objects."""
    rng = Rng("household", household)
    own = dict(CONVENTION)
    for thing in rng.sample(OBJECTS, rng.between(6, 12)):
        while own[thing] == CONVENTION[thing]:
            own[thing] = rng.choice(PLACES)
    return own


@cache
def at(place: str) -> str:
    """The place with its preposition: "in the cupboard"."""
    return f"{RECEPTACLES[place]} the {place}"


def plan(told: dict[str, str], scene: list[list[str]]) -> str:
    """The plan that puts every misplaced object of the scene where it belongs, in the order of the scene.

    Examples
    --------
    >>> plan({"mug": "hook"}, [["mug", "table"], ["key", "hook"]])
    'put the mug on the hook.'
    """
    steps = []
    for thing, place in scene:
        goal = told.get(thing, CONVENTION[thing])
        if goal != place:
            steps.append(f"put the {thing} {at(goal)}.")
    return " ".join(steps) or "nothing to do."


def _sample(rng: Rng, split: Split) -> Facts:
    first = 1 if split == "train" else N_HOUSEHOLDS["train"] + 1
    household = first + rng.below(N_HOUSEHOLDS[split])
    own = targets(household)
    told = {t: own[t] for t in rng.sample(OBJECTS, rng.between(3, 9))}
    clear = [t for t in OBJECTS if t in told or own[t] == CONVENTION[t]]
    scene = [
        [t, own[t] if rng.random() < 0.25 else rng.choice(PLACES)]
        for t in rng.sample(clear, rng.between(2, 6))
    ]
    return {"household": household, "told": told, "scene": scene}


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _render(facts: Facts, rng: Rng) -> str:
    told, scene = facts["told"], facts["scene"]
    return (
        f"Household {facts['household']}.\n"
        f"In this house {_list([f'the {t} goes {at(p)}' for t, p in told.items()])}.\n"
        f"Scene: {_list([f'the {t} is {at(p)}' for t, p in scene])}.\nPlan: {plan(told, scene)}\n"
    )


_TOLD = re.compile(r"the (\w+) goes (?:in|on) the (\w+)")
_SEEN = re.compile(r"the (\w+) is (?:in|on) the (\w+)")


def _parse(text: str) -> Facts:
    lines = text.split("\n")
    if len(lines) != 5 or not re.fullmatch(r"Household \d+\.", lines[0]):
        raise ValueError("text: expected the lines 'Household n.', 'In this house', 'Scene:' and 'Plan:'")
    facts = {
        "household": int(lines[0][10:-1]),
        "told": dict(_TOLD.findall(lines[1])),
        "scene": [list(pair) for pair in _SEEN.findall(lines[2])],
    }
    if _render(facts, Rng("unused")) != text:
        raise ValueError(f"text: the plan {lines[3]!r} does not fit the scene")
    return facts


FORMATS = [Format("household", _sample, _render, _parse, "Plan:", ("alignment 8", "alignment B14"))]
