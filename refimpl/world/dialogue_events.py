"""Event types with their importance from 1 to 10; `importance` reads an event and gives its number."""

from __future__ import annotations

from refimpl.world.base import Facts, Format, Split
from refimpl.world.dialogue_phrases import ACTS
from refimpl.world.lexicon import COLORS, FOODS, JOBS, OBJECTS, TOWNS
from refimpl.world.names import names
from refimpl.world.phrasebook import PhraseIndex, Phrases, article
from refimpl.world.rng import Rng

IMPORTANCE = {act: spec.importance for act, spec in ACTS.items()}  # of the acts of a dialogue

# type -> (importance, forms); the last form is held out of training
_EVENTS = {
    "birth": (
        10,
        "{name} had a child.|A child was born to {name}.|{name} gave birth to a child."
        "|{name} has a baby now.",
    ),
    "marriage": (
        10,
        "{name} married {other}.|{name} and {other} had their wedding."
        "|{name} and {other} got married."
        "|{name} became the wife of {other}.",
    ),
    "death": (
        10,
        "{name} died in {town}.|{name} passed away in {town}.|The life of {name} ended in {town}."
        "|They buried {name} in {town}.",
    ),
    "divorce": (
        9,
        "{name} left {other} for good.|{name} and {other} ended their marriage."
        "|The marriage of {name} and {other} is over.|{name} and {other} are no longer married.",
    ),
    "fire": (
        9,
        "The house of {name} burned down.|A fire took the house of {name}."
        "|{name} lost the house in a fire."
        "|Nothing is left of the house of {name} after the fire.",
    ),
    "move": (
        8,
        "{name} moved to {town}.|{name} went to live in {town}.|{name} has a new home in {town}."
        "|{name} packed everything and moved to {town}.",
    ),
    "new_job": (
        8,
        "{name} became {a_job}.|{name} started a new job as {a_job}.|They took {name} as {a_job}."
        "|From now on {name} works as {a_job}.",
    ),
    "accident": (
        8,
        "{name} broke a leg.|{name} fell and broke a leg.|{name} lies in bed with a broken leg."
        "|The leg of {name} is broken.",
    ),
    "lost_job": (
        8,
        "{name} lost the job as {a_job}.|{name} is no longer {a_job}."
        "|They sent {name} away as {a_job}."
        "|{name} had to give up the work of {a_job}.",
    ),
    "exam": (
        7,
        "{name} passed the last exam.|{name} finished school."
        "|{name} got the last mark and left school."
        "|School is over for {name}.",
    ),
    "prize": (
        7,
        "{name} won a prize in {town}.|A prize went to {name} in {town}."
        "|They gave {name} a prize in {town}."
        "|In {town} the prize was for {name}.",
    ),
    "friend": (
        6,
        "{name} made friends with {other}.|{name} and {other} became friends."
        "|{other} is a friend of {name} now.|From that day {name} and {other} were friends.",
    ),
    "quarrel": (
        6,
        "{name} had a quarrel with {other}.|{name} and {other} shouted at each other."
        "|{name} and {other} do not speak any more.|There was a quarrel of {name} with {other}.",
    ),
    "illness": (
        6,
        "{name} has a fever.|{name} is ill and stays in bed.|{name} was taken ill."
        "|A fever holds {name} in bed.",
    ),
    "promise": (
        5,
        "{name} promised {other} {a_object}.|{name} gave {other} the promise of {a_object}."
        "|{name} will give {a_object} to {other}, as promised."
        "|{other} was promised {a_object} by {name}.",
    ),
    "trip": (
        4,
        "{name} went on a trip to {town}.|{name} visited {town}.|{name} took the train to {town}."
        "|{name} spent a few days in {town}.",
    ),
    "meeting": (
        4,
        "{name} met {other} in {town}.|{name} and {other} met in {town}."
        "|In {town} {name} ran into {other}.|{name} had lunch with {other} in {town}.",
    ),
    "loss": (
        4,
        "{name} lost {a_object}.|{name} cannot find {a_object} any more."
        "|{a_Object} of {name} is gone."
        "|{name} left {a_object} somewhere.",
    ),
    "purchase": (
        3,
        "{name} bought {a_object}.|{name} came home with {a_object}.|{name} paid for {a_object}."
        "|{name} got {a_object} at the market.",
    ),
    "paint": (
        3,
        "{name} painted the door {color}.|The door of {name} is {color} now."
        "|{name} made the door {color}."
        "|{name} gave the door a {color} coat of paint.",
    ),
    "meal": (
        2,
        "{name} ate {food}.|{name} had {food} for lunch.|{name} made {food} for dinner."
        "|There was {food} on the plate of {name}.",
    ),
    "cleaning": (
        2,
        "{name} cleaned the {object}.|{name} washed the {object}."
        "|{name} wiped the dust off the {object}."
        "|{name} made the {object} clean.",
    ),
    "walk": (
        2,
        "{name} took a short walk.|{name} walked round the house.|{name} went out for some air."
        "|{name} walked up and down the street.",
    ),
    "weather": (
        1,
        "It rained in {town}.|The sun came out in {town}.|There was some wind in {town}."
        "|It was a cloudy day in {town}.",
    ),
    "idle": (
        1,
        "{name} sat on a chair.|{name} looked out of the window.|{name} did nothing."
        "|{name} waited for the tea.",
    ),
    "sleep": (1, "{name} went to bed.|{name} slept.|{name} took a nap.|{name} fell asleep in the chair."),
}
EVENT_FORMS = {kind: Phrases(forms.split("|"), a_Object="An? [a-z]+") for kind, (_, forms) in _EVENTS.items()}
EVENT_IMPORTANCE = {kind: level for kind, (level, _) in _EVENTS.items()}
_TYPES = tuple(_EVENTS)
_INDEX = PhraseIndex(EVENT_FORMS)
_VALUES = {"town": TOWNS, "job": JOBS, "object": OBJECTS, "color": COLORS, "food": FOODS}
_FIELDS = {kind: tuple(f for f in _VALUES if f"{f}}}" in forms) for kind, (_, forms) in _EVENTS.items()}


# importance: "Event: Balbert moved to Ripon.\nImportance: 8\n". Boundary: "Importance:".
def _sample(rng: Rng, split: Split) -> Facts:
    kind = rng.choice(_TYPES)
    last = len(EVENT_FORMS[kind].forms) - 1
    facts: Facts = {"type": kind, "form": last if split == "eval" else rng.below(last)}
    template = EVENT_FORMS[kind].templates[facts["form"]]
    name, other = rng.sample(names(split), 2)
    if "{name}" in template:
        facts["name"] = name
    if "{other}" in template:
        facts["other"] = other
    for field in _FIELDS[kind]:
        facts[field] = rng.choice(_VALUES[field])
    return facts


def event_sentence(facts: Facts) -> str:
    """The sentence of an event in its form `facts["form"]`."""
    values = dict(facts)
    for field in ("job", "object"):
        if field in facts:
            values["a_" + field] = article(facts[field])
            values["a_" + field.title()] = values["a_" + field].capitalize()
    return EVENT_FORMS[facts["type"]].forms[facts["form"]] % values


def _render(facts: Facts, rng: Rng) -> str:
    return f"Event: {event_sentence(facts)}\nImportance: {EVENT_IMPORTANCE[facts['type']]}\n"


def _parse(text: str) -> Facts:
    event, _, level = text.removesuffix("\n").partition("\nImportance: ")
    if not event.startswith("Event: "):
        raise ValueError(f"text: {text!r} does not start with 'Event: '")
    kind, form, slots = _INDEX.read(event[7:])
    if level != str(EVENT_IMPORTANCE[kind]):
        raise ValueError(f"text: importance {level!r} of {kind!r}; it is {EVENT_IMPORTANCE[kind]}")
    facts: Facts = {"type": kind, "form": form}
    for slot, value in slots.items():
        if slot.startswith("a_"):
            facts[slot[2:].lower()] = value.split()[1]
        else:
            facts[slot] = value
    return facts


IMPORTANCE_FORMAT = Format(
    "importance", _sample, _render, _parse, "Importance:", ("rag T5", "rag 3.17", "rag formats")
)
