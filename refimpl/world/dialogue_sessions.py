"""Sessions of a user with an assistant over several days: drawn, written, read back.

The text of a dialogue has one line per turn and a header per session:

    Session of Monday 2 March 1987 with Balbert
    <|user|> I moved to Ripon yesterday. I am so happy!
    <|assistant|> What good news!

Facts: {"user", "sessions": [{"date": ISO, "segments": [{"topic", "turns": [...]}]}]}. Adjacent segments of a
session differ in topic, so the gold boundaries are the topic changes. Relative dates are stored resolved,
pronouns too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from refimpl.world.base import Split
from refimpl.world.dialogue_phrases import ASKS, TOPIC_OF
from refimpl.world.dialogue_questions import (
    ANSWERS,
    DONT_KNOW,
    UNKNOWN,
    Log,
    draw_form,
    read_question,
    write_question,
)
from refimpl.world.dialogue_speaker import TOPICS, Speaker
from refimpl.world.dialogue_turns import reply, say, understand, understand_reply
from refimpl.world.rng import Rng
from refimpl.world.session_dates import LONG_DATE, long_date, random_day, read_long_date, shift

HEADER = re.compile(rf"Session of ({LONG_DATE}) with ([A-Z][a-z]+)")


def draw_session(speaker: Speaker, today: str, n_turns: int, index: int) -> dict:
    """A session of about `n_turns` turns (both speakers together)."""
    rng, segments, count, previous = speaker.rng, [], 0, None
    speaker.told = set()
    if rng.random() < 0.5:
        segments.append(
            {
                "topic": "greeting",
                "turns": [
                    {"by": "user", "act": "greet", "mood": "neutral"},
                    {"by": "assistant", "act": "greet"},
                ],
            }
        )
        count = 2
    while count < n_turns:
        if count and rng.random() < 0.12 and previous != "recall" and (options := speaker.log.possible()):
            question = rng.choice(options) if rng.random() < 0.85 else speaker.log.impossible(rng)
            turns = [
                {"by": "user", "act": "recall", **question, "form": draw_form(question["ask"], "train", rng)},
                {"by": "assistant", "act": "answer", "value": speaker.log.answer(question)[0]},
            ]
            topic = "recall"
        else:
            topic = rng.choice(TOPICS)
            while topic == previous:
                topic = rng.choice(TOPICS)
            turns, acts = [], set()
            for _ in range(1 if topic in ("weather", "hobby", "taste") else rng.between(1, 3)):
                turn = speaker.turn(topic, today)
                if turn["act"] in acts and topic not in ("shopping", "travel", "family"):
                    break
                acts.add(turn["act"])
                turns.append(turn)
                speaker.log.add(turn, [index, count + len(turns) - 1])
                if topic in ASKS and rng.random() < 0.35:
                    turns.append({"by": "assistant", "act": "ask", "about": topic})
                    if rng.random() < 0.6:
                        turns.append({"by": "user", "act": "reply", "mood": "neutral"})
                        turns.append({"by": "assistant", "act": "ack"})
                else:
                    turns.append({"by": "assistant", "act": "ack"})
        segments.append({"topic": topic, "turns": turns})
        count, previous = count + len(turns), topic
    if rng.random() < 0.4:
        segments.append(
            {
                "topic": "farewell",
                "turns": [{"by": "user", "act": "bye", "mood": "neutral"}, {"by": "assistant", "act": "bye"}],
            }
        )
    return {"date": today, "segments": segments}


def sample_dialogue(rng: Rng, split: Split, n_sessions: int, turns: tuple[int, int]) -> tuple[dict, Log]:
    """The facts of a dialogue and the log of what was stated in it."""
    speaker, today, sessions = Speaker(rng, split), random_day(rng), []
    for i in range(n_sessions):
        sessions.append(draw_session(speaker, today, rng.between(*turns), i))
        today = shift(today, rng.between(1, 20))
    return {"user": speaker.user, "sessions": sessions}, speaker.log


def turns_of(dialogue: dict) -> Iterator[tuple[list[int], str, dict]]:
    """([session, turn], ISO date of the session, turn) for every turn."""
    for i, session in enumerate(dialogue["sessions"]):
        j = 0
        for segment in session["segments"]:
            for turn in segment["turns"]:
                yield [i, j], session["date"], turn
                j += 1


def log_of(dialogue: dict) -> Log:
    """Replay the statements of a dialogue."""
    log = Log()
    for ref, _, turn in turns_of(dialogue):
        if turn["by"] == "user" and turn["act"] != "recall":
            log.add(turn, ref)
    return log


def render_lines(dialogue: dict, rng: Rng) -> list[str]:
    """The lines of a dialogue: a header for each session and one line for each turn."""
    lines, user, log = [], dialogue["user"], Log()
    for i, session in enumerate(dialogue["sessions"]):
        today, last_kin, mood = session["date"], None, "neutral"
        lines.append(f"Session of {long_date(today)} with {user}")
        for segment in session["segments"]:
            first = True
            for turn in segment["turns"]:
                act = turn["act"]
                if turn["by"] == "user":
                    if act == "recall":
                        text, mood = write_question(turn, log), "neutral"
                    else:
                        kin, mood = turn.get("kin"), turn["mood"]
                        opener = (
                            first and segment["topic"] not in ("greeting", "farewell") and rng.random() < 0.3
                        )
                        text = say(turn, today, rng, known=kin == last_kin, opener=opener)
                        last_kin = kin or last_kin
                        log.add(turn, [i, 0])
                    lines.append("<|user|> " + text)
                else:
                    if act == "answer":
                        value = turn["value"]
                        text = rng.choice(DONT_KNOW) if value == UNKNOWN else ANSWERS.write(rng, turn)
                    else:
                        text = reply(turn, mood, user, rng)
                    lines.append("<|assistant|> " + text)
                first = False
    return lines


def parse_lines(lines: list[str]) -> dict:
    """The inverse of `render_lines`."""
    dialogue: dict = {}
    session: dict = {}
    last_kin, after = None, ""
    for line in lines:
        if header := HEADER.fullmatch(line):
            dialogue.setdefault("user", header[2])
            if header[2] != dialogue["user"]:
                raise ValueError(f"text: two users, {dialogue['user']!r} and {header[2]!r}")
            session = {"date": read_long_date(header[1]), "segments": []}
            dialogue.setdefault("sessions", []).append(session)
            last_kin = None
            continue
        role, _, text = line.partition(" ")
        if not session or role not in ("<|user|>", "<|assistant|>"):
            raise ValueError(f"text: {line!r} is neither a session header nor a turn")
        if role == "<|user|>":
            try:
                turn = {"by": "user", "act": "recall", **read_question(text)}
            except ValueError:
                turn = understand(text, session["date"], last_kin)
            after = turn["act"]
            if "kin" in turn and after != "recall":
                last_kin = (turn["kin"], turn["name"])
        elif after == "recall":
            value = UNKNOWN if text in DONT_KNOW else (ANSWERS.read(text) or {}).get("value")
            if value is None:
                raise ValueError(f"text: no known answer matches {text!r}")
            turn = {"by": "assistant", "act": "answer", "value": value}
        else:
            turn = understand_reply(text, after, dialogue["user"])
        segments = session["segments"]
        topic = "recall" if after == "recall" else TOPIC_OF[after]
        if topic and (not segments or segments[-1]["topic"] != topic):
            segments.append({"topic": topic, "turns": []})
        segments[-1]["turns"].append(turn)
    if not dialogue:
        raise ValueError("text: no session header, so it is not a dialogue")
    return dialogue
