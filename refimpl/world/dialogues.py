"""The formats made of dialogues: plain, with a question, summary, attributes, pronoun rewriting, importance.

Every completion follows from the text before it, so `parse` computes it again and refuses a document
that has another.
"""

from __future__ import annotations

from refimpl.world.base import Facts, Format, Split
from refimpl.world.dialogue_events import IMPORTANCE, IMPORTANCE_FORMAT
from refimpl.world.dialogue_phrases import PRONOUN, TOPIC_OF
from refimpl.world.dialogue_questions import draw_form, read_question, write_question
from refimpl.world.dialogue_sessions import log_of, parse_lines, render_lines, sample_dialogue, turns_of
from refimpl.world.dialogue_speaker import TOPICS, Speaker
from refimpl.world.dialogue_summary import REWRITE, summary
from refimpl.world.dialogue_turns import say, understand
from refimpl.world.rng import Rng
from refimpl.world.session_dates import long_date, random_day, read_long_date


def _split_end(text: str, marker: str) -> tuple[list[str], str]:
    """(the lines before the last line, the last line after its marker)."""
    lines = text.split("\n")
    if len(lines) < 3 or lines[-1] or not lines[-2].startswith(marker + " "):
        raise ValueError(f"text: does not end with a line {marker!r} ...")
    return lines[:-2], lines[-2][len(marker) + 1 :]


def _expect(found: str, right: str) -> None:
    if found != right:
        raise ValueError(f"text: says {found!r} where the dialogue gives {right!r}")


# dialogue: see dialogue_sessions. No prompt boundary.
def _sample(rng: Rng, split: Split) -> Facts:
    return sample_dialogue(rng, split, rng.between(1, 4), (4, 12))[0]


def _render(facts: Facts, rng: Rng) -> str:
    return "\n".join(render_lines(facts, rng)) + "\n"


def _parse(text: str) -> Facts:
    if not text.endswith("\n"):
        raise ValueError("text: a document ends with a newline")
    return parse_lines(text[:-1].split("\n"))


# dialogue_qa: a dialogue of 1-4 sessions, then
#   <|user|> Where do I live now?
#   <|assistant|> Ripon
# The answer is one value, a date ("Monday 2 March 1987"), a number word or "unknown". Boundary:
# "<|assistant|>".
def _sample_qa(rng: Rng, split: Split) -> Facts:
    dialogue, log = sample_dialogue(rng, split, rng.between(1, 4), (4, 10))
    options = log.possible()
    known = [q for q in options if q["ask"] != "kin_name"] or options
    question = rng.choice(known) if known and rng.chance(0.82) else log.impossible(rng)
    return {**dialogue, "question": {**question, "form": draw_form(question["ask"], split, rng)}}


def _render_qa(facts: Facts, rng: Rng) -> str:
    lines, log = render_lines(facts, rng), log_of(facts)
    question = facts["question"]
    lines.append("<|user|> " + write_question(question, log))
    lines.append("<|assistant|> " + log.answer(question)[0])
    return "\n".join(lines) + "\n"


def _parse_qa(text: str) -> Facts:
    lines, answer = _split_end(text, "<|assistant|>")
    if not lines[-1].startswith("<|user|> "):
        raise ValueError("text: the line before the answer is not a turn of the user")
    facts = {**parse_lines(lines[:-1]), "question": read_question(lines[-1][9:])}
    _expect(answer, log_of(facts).answer(facts["question"])[0])
    return facts


# dialogue_summary: one session, then "Summary: Balbert moved to Ripon on Sunday 1 March 1987; Balbert likes
# jam best." Small talk does not enter; "nothing new." when there is nothing else. Boundary: "Summary:".
def _sample_summary(rng: Rng, split: Split) -> Facts:
    return sample_dialogue(rng, split, 1, (4, 14))[0]


def _render_summary(facts: Facts, rng: Rng) -> str:
    return "\n".join([*render_lines(facts, rng), "Summary: " + summary(facts)]) + "\n"


def _parse_summary(text: str) -> Facts:
    lines, line = _split_end(text, "Summary:")
    facts = parse_lines(lines)
    _expect(line, summary(facts))
    return facts


# dialogue_attributes: "Date: Monday 2 March 1987\n<|user|> I moved to Ripon yesterday. I am so happy!\n
#   Attributes: topic=home; mood=happy; about=me; date=Sunday 1 March 1987; importance=8".
# Boundary: "Attributes:".
def _one_turn(rng: Rng, split: Split) -> Facts:
    today = random_day(rng)
    speaker = Speaker(rng, split)
    return {"date": today, **speaker.turn(rng.choice(TOPICS), today)}


def attributes(turn: dict) -> str:
    """The attribute line of a user's turn."""
    when = f"; date={long_date(turn['when'])}" if "when" in turn else ""
    about = turn.get("name", turn.get("pet", "me"))
    act = turn["act"]
    return f"topic={TOPIC_OF[act]}; mood={turn['mood']}; about={about}{when}; importance={IMPORTANCE[act]}"


def _render_turn(facts: Facts, rng: Rng) -> str:
    today = facts["date"]
    return f"Date: {long_date(today)}\n<|user|> {say(facts, today, rng, opener=rng.chance(0.2))}\n"


def _parse_turn(lines: list[str]) -> Facts:
    if len(lines) != 2 or not lines[0].startswith("Date: ") or not lines[1].startswith("<|user|> "):
        raise ValueError("text: expected the lines 'Date: ...' and '<|user|> ...'")
    today = read_long_date(lines[0][6:])
    return {"date": today, **understand(lines[1][9:], today, None)}


def _render_attributes(facts: Facts, rng: Rng) -> str:
    return f"{_render_turn(facts, rng)}Attributes: {attributes(facts)}\n"


def _parse_attributes(text: str) -> Facts:
    lines, line = _split_end(text, "Attributes:")
    facts = _parse_turn(lines)
    _expect(line, attributes(facts))
    return facts


# pronoun_rewrite: one to three turns about relatives, then a question with a pronoun, then
#   Full question: Where does my sister Balbert live?
# The pronoun means the last relative of its gender. Facts: a dialogue of one session, "pronoun" ("she" or
# "he"), "question" (index in REWRITE). Boundary: "Full question:".
def _sample_rewrite(rng: Rng, split: Split) -> Facts:
    speaker, today, turns = Speaker(rng, split), random_day(rng), []
    for _ in range(rng.between(1, 3)):
        turns += [{**speaker.turn("family", today), "mood": "neutral"}, {"by": "assistant", "act": "ack"}]
    session = {"date": today, "segments": [{"topic": "family", "turns": turns}]}
    return {
        "user": speaker.user,
        "sessions": [session],
        "pronoun": rng.choice(_pronouns(turns)),
        "question": rng.below(len(REWRITE)),
    }


def _pronouns(turns: list[dict]) -> list[str]:
    """The pronouns that refer to somebody, in the order first told."""
    return list(dict.fromkeys(PRONOUN[t["kin"]] for t in turns if "kin" in t))


def _referent(facts: Facts) -> tuple[str, str]:
    """(kin, name) of the last relative with the pronoun."""
    told = [t for _, _, t in turns_of(facts) if "kin" in t and PRONOUN[t["kin"]] == facts["pronoun"]]
    return told[-1]["kin"], told[-1]["name"]


def _render_rewrite(facts: Facts, rng: Rng) -> str:
    short, full = REWRITE[facts["question"]].both(*_referent(facts))
    return "\n".join([*render_lines(facts, rng), f"<|user|> {short}", f"Full question: {full}"]) + "\n"


def _parse_rewrite(text: str) -> Facts:
    lines, line = _split_end(text, "Full question:")
    dialogue = parse_lines(lines[:-1])
    for pronoun in _pronouns([t for _, _, t in turns_of(dialogue)]):
        facts = {**dialogue, "pronoun": pronoun}
        kin, name = _referent(facts)
        for i, rewrite in enumerate(REWRITE):
            short, full = rewrite.both(kin, name)
            if (f"<|user|> {short}", full) == (lines[-1], line):
                return {**facts, "question": i}
    raise ValueError(f"text: {line!r} does not rewrite {lines[-1]!r}")


FORMATS = [
    Format("dialogue", _sample, _render, _parse, None, ("rag T5", "rag T4", "rag 3.19", "rag 3.26")),
    Format(
        "dialogue_qa", _sample_qa, _render_qa, _parse_qa, "<|assistant|>", ("rag T4", "rag T5", "rag 3.15")
    ),
    Format(
        "dialogue_summary",
        _sample_summary,
        _render_summary,
        _parse_summary,
        "Summary:",
        ("rag T5", "rag 3.20"),
    ),
    Format(
        "dialogue_attributes", _one_turn, _render_attributes, _parse_attributes, "Attributes:", ("rag 3.24",)
    ),
    Format(
        "pronoun_rewrite",
        _sample_rewrite,
        _render_rewrite,
        _parse_rewrite,
        "Full question:",
        ("rag T5", "rag 3.8"),
    ),
    IMPORTANCE_FORMAT,
]
