"""Long dialogues for evaluation (rag T5): gold boundaries, importance, questions with full records."""

from __future__ import annotations

from datetime import date

from refimpl.world.base import Split
from refimpl.world.dialogue_phrases import ACTS
from refimpl.world.dialogue_questions import STATES, UNKNOWN, Log, draw_form, write_question
from refimpl.world.dialogue_sessions import log_of, render_lines, sample_dialogue, turns_of
from refimpl.world.dialogue_summary import CLAUSES, clause
from refimpl.world.lexicon import NUMBER_WORDS
from refimpl.world.rng import Rng
from refimpl.world.session_dates import long_date, read_long_date, shift

QUESTION_TYPES = ("extraction", "multi-session", "update", "temporal", "abstention")


def _type_of(ask: str, answer: str, refs: list[list[int]], changes: int) -> str:
    if answer == UNKNOWN:
        return "abstention"
    if ask.startswith(("when_", "first_")):
        return "temporal"
    if ask.startswith("before_") or (ask in STATES and changes > 1):
        return "update"
    return "multi-session" if len({session for session, _ in refs}) > 1 else "extraction"


def _candidates(ask: str, question: dict, dialogue: dict, log: Log) -> list[str]:
    base = ask.removeprefix("before_")
    if base in STATES or base in ("kin_job_in", "kin_home_of"):
        base = {"kin_job_in": "kin_job", "kin_home_of": "kin_home"}.get(base, base)
        return list(STATES[base][0])
    if ask.startswith("count_"):
        return list(NUMBER_WORDS)
    if ask == "first_bought":
        return [question["object"], question["other"]]
    if ask.startswith("when_"):
        return sorted({long_date(t["when"]) for _, _, t in turns_of(dialogue) if "when" in t})
    people = {name for name, _ in log.kin.values()} | {p for pets in log.pets.values() for p, _ in pets}
    return sorted(people | {dialogue["user"]})


def _triple(turn: dict, user: str) -> list[str]:
    value = next(
        (turn[k] for k in ("town", "job", "company", "food", "hobby", "color", "object", "pet") if k in turn),
        "",
    )
    return [turn.get("name", user), turn["act"], value]


def long_dialogue(
    rng: Rng,
    *,
    sessions: int | None = None,
    turns: tuple[int, int] = (10, 30),
    split: Split = "eval",
    questions_per_type: int = 6,
) -> dict:
    """A dialogue of many sessions with everything that an evaluation of memory needs.

    Parameters
    ----------
    rng : Rng
        Source of chance.
    sessions : int or None
        Number of sessions; None draws 10-40.
    turns : (int, int)
        Fewest and most turns of a session, about.
    split : "train" or "eval"
        Names and question forms.
    questions_per_type : int
        At most so many of each of `QUESTION_TYPES`.

    Returns
    -------
    dict
        "facts" and "text" (format `dialogue`); "turns": id, ref, date, hours (world clock), by, topic,
        importance, boundary (starts a segment), text, span; "boundaries": ids of turns that start a segment;
        "questions": id, type, text, t_ask, answer, aliases, candidates, gold [{turn, span}], chain, entities,
        distractors, tier "F".

    Raises
    ------
    ValueError
        When `sessions` < 1 or `turns` is not an increasing pair of positive numbers.

    Examples
    --------
    >>> d = long_dialogue(Rng("doc"), sessions=3, turns=(6, 8))
    >>> all(d["text"][t["span"][0]:t["span"][1]] == t["text"] for t in d["turns"])
    True
    """
    if sessions is not None and sessions < 1:
        raise ValueError(f"sessions: {sessions!r} is not at least 1")
    if not 1 <= turns[0] <= turns[1]:
        raise ValueError(f"turns: {turns!r} is not (fewest, most) with 1 <= fewest <= most")
    dialogue, _ = sample_dialogue(rng, split, sessions or rng.between(10, 40), turns)
    lines, log = render_lines(dialogue, rng), log_of(dialogue)
    table, by_ref = _turn_table(dialogue, lines)
    asked_at = shift(dialogue["sessions"][-1]["date"], 1)
    options = log.possible()
    rng.shuffle(options)
    options += [log.impossible(rng) for _ in range(3 * questions_per_type)]
    count, records, seen = dict.fromkeys(QUESTION_TYPES, 0), [], set()
    for question in options:
        ask = question["ask"]
        answer, refs = log.answer(question)
        changes = len(log.history(question.get("name", "I"), ask)) if ask in STATES else 0
        kind = _type_of(ask, answer, refs, changes)
        text = write_question({**question, "form": draw_form(ask, split, rng)}, log)
        key = str(sorted(question.items()))
        if count[kind] == questions_per_type or key in seen:
            continue
        seen.add(key)
        count[kind] += 1
        gold = [by_ref[tuple(ref)] for ref in refs]
        acts = {table[i]["act"] for i in gold}
        records.append(
            {
                "id": f"q{len(records)}",
                "type": kind,
                "text": text,
                "t_ask": asked_at,
                "answer": answer,
                "aliases": _aliases(answer),
                "candidates": _candidates(ask, question, dialogue, log),
                "gold": [{"turn": i, "span": table[i]["span"]} for i in gold],
                "chain": [_triple(table[i]["facts"], dialogue["user"]) for i in gold],
                "entities": [v for k, v in question.items() if k not in ("ask", "form")]
                or [dialogue["user"]],
                "distractors": [t["id"] for t in table if t["act"] in acts and t["id"] not in gold][:10],
                "tier": "F",
            }
        )
    return {
        "facts": dialogue,
        "text": "\n".join(lines) + "\n",
        "turns": table,
        "boundaries": [t["id"] for t in table if t["boundary"]],
        "questions": records,
    }


def _aliases(answer: str) -> list[str]:
    if " " not in answer:
        return [answer]
    return [answer, answer.split(" ", 1)[1], read_long_date(answer)]


def _turn_table(dialogue: dict, lines: list[str]) -> tuple[list[dict], dict[tuple[int, int], int]]:
    starts, at = [], 0
    for line in lines:
        starts.append(at)
        at += len(line) + 1
    table, by_ref, row = [], {}, 0
    for i, session in enumerate(dialogue["sessions"]):
        row, j = row + 1, 0  # skip the header
        for segment in session["segments"]:
            for n, turn in enumerate(segment["turns"]):
                line, by = lines[row], turn["by"]
                skip = line.index(" ") + 1
                by_ref[i, j] = len(table)
                table.append(
                    {
                        "id": len(table),
                        "ref": [i, j],
                        "date": session["date"],
                        "hours": _hours(dialogue, i, j),
                        "by": by,
                        "act": turn["act"],
                        "topic": segment["topic"],
                        "boundary": n == 0,
                        "text": line[skip:],
                        "importance": ACTS[turn["act"]].importance
                        if by == "user" and turn["act"] in ACTS
                        else 1,
                        "clause": clause(turn) if turn["act"] in CLAUSES else None,
                        "facts": turn,
                        "span": [starts[row] + skip, starts[row] + len(line)],
                    }
                )
                row, j = row + 1, j + 1
    return table, by_ref


def _hours(dialogue: dict, session: int, turn: int) -> float:
    """Hours since the first session began; sessions start at the same hour, a turn takes a minute."""
    first, now = (date.fromisoformat(dialogue["sessions"][i]["date"]) for i in (0, session))
    return 24.0 * (now - first).days + turn / 60
