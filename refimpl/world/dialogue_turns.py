"""Turns of a dialogue, written and read back."""

from __future__ import annotations

from functools import cache

from refimpl.world.dialogue_phrases import (
    ACKS,
    ACTS,
    ASK_TOPIC,
    ASKS,
    FAREWELLS,
    GREETINGS,
    KIND_ACKS,
    KIND_MOOD,
    MOOD_OF,
    MOODS,
    OPENERS,
    PRONOUN,
)
from refimpl.world.phrasebook import PhraseIndex, article
from refimpl.world.rng import Rng
from refimpl.world.session_dates import relative, resolve


@cache
def _index() -> PhraseIndex:
    return PhraseIndex({name: act.phrases for name, act in ACTS.items()})


def say(turn: dict, today: str, rng: Rng, *, known: bool = False, opener: bool = False) -> str:
    """The text of a user's act; `known` allows a pronoun for a relative, `opener` adds "Guess what!"."""
    act = ACTS[turn["act"]]
    values = dict(turn)
    if "when" in turn:
        phrase = relative(today, turn["when"], rng)
        values["when"], values["When"] = phrase, phrase[0].upper() + phrase[1:]
    for field in act.articles:
        values["a_" + field] = article(turn[field])
    if "kin" in turn:
        pronoun = known and rng.random() < 0.7
        who = PRONOUN[turn["kin"]] if pronoun else f"my {turn['kin']} {turn['name']}"
        values["who"], values["Who"] = who, who[0].upper() + who[1:]
    text = act.phrases.write(rng, values)
    if opener:
        text = f"{rng.choice(OPENERS)} {text}"
    if turn["mood"] != "neutral":
        text = f"{text} {rng.choice(MOODS[turn['mood']])}"
    return text


def understand(text: str, today: str, last_kin: tuple[str, str] | None) -> dict:
    """The inverse of `say`; `last_kin` = (kin, name) is what a pronoun means."""
    for opener in OPENERS:
        if text.startswith(opener + " "):
            text = text[len(opener) + 1 :]
            break
    mood = "neutral"
    for tail, name in MOOD_OF.items():
        if text.endswith(" " + tail):
            text, mood = text[: -len(tail) - 1], name
            break
    act, _, slots = _index().read(text)
    turn = {"by": "user", "act": act, "mood": mood}
    for slot, value in slots.items():
        if slot in ("who", "Who"):
            if " " in value:
                _, turn["kin"], turn["name"] = value.split()
            elif last_kin is None or PRONOUN[last_kin[0]] != value.lower():
                raise ValueError(f"text: {value!r} in {text!r} refers to nobody")
            else:
                turn["kin"], turn["name"] = last_kin
        elif slot in ("when", "When"):
            turn["when"] = resolve(today, value)
        elif slot.startswith("a_"):
            turn[slot[2:]] = value.split()[1]
        else:
            turn[slot] = value
    return turn


def reply(turn: dict, mood: str, user: str, rng: Rng) -> str:
    """The text of an assistant's turn: "greet", "bye", "ack" or "ask" (the answers are written elsewhere)."""
    act = turn["act"]
    if act == "ask":
        return rng.choice(ASKS[turn["about"]])
    if act == "greet":
        return GREETINGS.write(rng, {"user": user})
    if act == "bye":
        return FAREWELLS.write(rng, {"user": user})
    if mood in KIND_ACKS and rng.random() < 0.7:
        return rng.choice(KIND_ACKS[mood])
    return ACKS.write(rng, {"user": user})


def understand_reply(text: str, after: str, user: str) -> dict:
    """The inverse of `reply`; `after` is the act of the user's turn before it."""
    if text in ASK_TOPIC:
        return {"by": "assistant", "act": "ask", "about": ASK_TOPIC[text]}
    for act, phrases in (("greet", GREETINGS), ("bye", FAREWELLS), ("ack", ACKS)):
        slots = phrases.read(text)
        if slots is not None and slots.get("user", user) == user:
            return {"by": "assistant", "act": after if after in ("greet", "bye") else act}
    if text in KIND_MOOD:
        return {"by": "assistant", "act": "ack"}
    raise ValueError(f"text: no known reply of an assistant matches {text!r}")
