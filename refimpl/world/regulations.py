"""Regulations in controlled English: Horn rules, facts, a question, an answer with its premises (interp C5).

    Regulations:
    1. If a student has paid the fee and has at least 20 credits, then the student may use the library.
    2. Balbert has paid the fee.
    3. Balbert has 25 credits.
    Question: May Balbert use the library?
    Answer: Yes (1, 2, 3)

An answer is "Yes (premises)", "No (premises)" or "Uncertain"; nothing is assumed false because it is not
stated. A permission heads at most one rule of a document, with one sign, so a proof is unique and premises
never contradict.
"""

from __future__ import annotations

import re

from refimpl.world.base import Facts, Format, Split
from refimpl.world.names import names
from refimpl.world.rng import Rng

SUBJECTS = tuple(
    "algebra biology botany chemistry drawing geography geometry grammar history logic medicine music optics "
    "painting physics poetry rhetoric sculpture statics surveying".split()
)
STATES = (
    "has paid the fee",
    "holds a library card",
    "lives in the college",
    "is in the second year",
    "is in the final year",
    "has a letter from a teacher",
    "works in the kitchen",
    "has signed the book of rules",
    "sings in the choir",
    "has returned all books",
    "has an advisor",
    "is a member of the club",
    *(f"has passed the {s} exam" for s in SUBJECTS),
    *(f"takes the {s} course" for s in SUBJECTS),
)
PERMISSIONS = (
    "use the library",
    "enter the laboratory",
    "borrow the telescope",
    "sit in the front row",
    "stay in the hall at night",
    "teach the first year",
    "join the excursion",
    "receive the grant",
    "take the final exam",
    "keep a key of the gate",
    "eat at the high table",
    "vote in the assembly",
    "leave the town on Sunday",
    "print a book",
    "ring the bell",
    *(f"take the advanced {s} course" for s in SUBJECTS),
)
# An atom is a state, "may <permission>" or ">= <n>" (at least n credits).
_CREDITS = re.compile(r"has at least (\d+) credits")


def _condition(atom: str) -> str:
    return f"has at least {atom[3:]} credits" if atom[:2] == ">=" else atom


def _read_condition(text: str) -> str:
    match = _CREDITS.fullmatch(text)
    return f">= {match[1]}" if match else text


def holds(atom: str, known: dict, credits_: int | None) -> bool:
    """Whether an atom is known, or follows from the number of credits."""
    if atom[:2] == ">=":
        return credits_ is not None and credits_ >= int(atom[3:])
    return atom in known


def forward_chain(premises: list[dict], goal: str) -> tuple[str, list[int]]:
    """The answer for `goal` and the numbers (from 1) of the premises of its proof.

    Parameters
    ----------
    premises : list of {"if": [atoms], "then": permission, "not": bool} or {"fact": atom} or {"credits": n}
        All about one student.
    goal : str
        A permission, "use the library".

    Examples
    --------
    >>> rule = {"if": ["has paid the fee"], "then": "print a book", "not": False}
    >>> forward_chain([rule, {"fact": "has paid the fee"}], "print a book")
    ('Yes', [1, 2])
    >>> forward_chain([rule], "print a book")
    ('Uncertain', [])
    """
    known: dict[str, set[int]] = {p["fact"]: {i} for i, p in enumerate(premises, 1) if "fact" in p}
    credits_ = next((p["credits"] for p in premises if "credits" in p), None)
    at = {i for i, p in enumerate(premises, 1) if "credits" in p}
    grown = True
    while grown:
        grown = False
        for i, rule in enumerate(premises, 1):
            if "if" not in rule:
                continue
            head = ("may not " if rule["not"] else "may ") + rule["then"]
            if head not in known and all(holds(a, known, credits_) for a in rule["if"]):
                known[head] = {i}.union(*(at if a[:2] == ">=" else known[a] for a in rule["if"]))
                grown = True
    for answer, head in (("Yes", "may "), ("No", "may not ")):
        if head + goal in known:
            return answer, sorted(known[head + goal])
    return "Uncertain", []


def _sample(rng: Rng, split: Split) -> Facts:
    depth = rng.between(1, 3)
    permissions = rng.sample(PERMISSIONS, depth + 2)
    states = rng.sample(STATES, 12)
    threshold = rng.between(2, 9) * 5
    premises: list[dict] = []
    facts: list[dict] = []
    for level in range(depth + 1):  # the last rule is a distractor, not linked to the chain
        body = [states.pop() for _ in range(rng.between(1, 2))]
        if 0 < level < depth:
            body.append("may " + permissions[level - 1])
        if level == 0 and rng.random() < 0.5:
            body.append(f">= {threshold}")
        rng.shuffle(body)
        negative = level >= depth - 1 and rng.random() < 0.5
        premises.append({"if": body, "then": permissions[level], "not": negative})
        facts += [{"fact": a} for a in body if a in STATES]
    kind = rng.below(3)
    if kind == 2:  # uncertain: drop something the chain needs, or ask for what no rule speaks of
        facts.pop(0)
    facts += [{"fact": states.pop()} for _ in range(rng.below(3))]
    if any(">=" in a for rule in premises for a in rule["if"]):
        facts.append({"credits": threshold + (rng.below(20) if rng.random() < 0.8 else -1 - rng.below(5))})
    premises += facts
    rng.shuffle(premises)
    goal = permissions[depth - 1] if rng.random() < 0.85 else permissions[-1]
    return {"person": rng.choice(names(split)), "premises": premises, "goal": goal}


def _render(facts: Facts, rng: Rng) -> str:
    person, lines = facts["person"], ["Regulations:"]
    for i, p in enumerate(facts["premises"], 1):
        if "if" in p:
            conditions = " and ".join(map(_condition, p["if"]))
            lines.append(
                f"{i}. If a student {conditions}, then the student may {'not ' * p['not']}{p['then']}."
            )
        elif "fact" in p:
            lines.append(f"{i}. {person} {p['fact']}.")
        else:
            lines.append(f"{i}. {person} has {p['credits']} credits.")
    answer, proof = forward_chain(facts["premises"], facts["goal"])
    cited = f" ({', '.join(map(str, proof))})" if proof else ""
    return "\n".join([*lines, f"Question: May {person} {facts['goal']}?", f"Answer: {answer}{cited}"]) + "\n"


_RULE = re.compile(r"\d+\. If a student (.+), then the student may (not )?(.+)\.")
_FACT = re.compile(r"\d+\. ([A-Z][a-z]+) (?:has (\d+) credits|(.+))\.")


def _parse(text: str) -> Facts:
    lines = text.removesuffix("\n").split("\n")
    ask = re.fullmatch(r"Question: May ([A-Z][a-z]+) (.+)\?", lines[-2]) if len(lines) > 3 else None
    if ask is None or lines[0] != "Regulations:":
        raise ValueError("text: expected 'Regulations:', numbered premises, 'Question:' and 'Answer:'")
    premises: list[dict] = []
    for line in lines[1:-2]:
        if rule := _RULE.fullmatch(line):
            body = list(map(_read_condition, rule[1].split(" and ")))
            premises.append({"if": body, "then": rule[3], "not": rule[2] is not None})
        elif fact := _FACT.fullmatch(line):
            premises.append({"credits": int(fact[2])} if fact[2] else {"fact": fact[3]})
        else:
            raise ValueError(f"text: {line!r} is neither a rule nor a fact")
    facts = {"person": ask[1], "premises": premises, "goal": ask[2]}
    if _render(facts, Rng("unused")) != text:
        raise ValueError(f"text: {lines[-1]!r} does not follow from the premises")
    return facts


FORMATS = [Format("regulations", _sample, _render, _parse, "Answer:", ("interp C5", "interp E11"))]
