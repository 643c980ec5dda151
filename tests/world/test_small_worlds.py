"""The small languages: round trips, and each answer against an independent reference."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter

import pytest

from refimpl.world.arithmetic import run
from refimpl.world.groups_dialects import SKEW, to_text, translate
from refimpl.world.household import CONVENTION, N_HOUSEHOLDS, OBJECTS, targets
from refimpl.world.patients import ADVICE, AILMENTS, TYPES
from refimpl.world.regulations import forward_chain
from refimpl.world.rng import Rng
from refimpl.world.rude_words import P_RUDE, RUDE, rude_rate
from refimpl.world.small_worlds import FORMATS

BY_NAME = {f.name: f for f in FORMATS}


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_parse_inverts_render(fmt, split):
    for i in range(200):
        facts = fmt.sample(Rng("small test", fmt.name, split, i), split)
        assert json.loads(json.dumps(facts)) == facts
        text = fmt.render(facts, Rng("surface", i))
        assert fmt.parse(text) == facts, text
        assert text.endswith("\n")
        if fmt.boundary:
            assert fmt.prompt(text)[1].startswith(" ")


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_other_text_is_refused(fmt):
    with pytest.raises(ValueError):
        fmt.parse("Nothing of the kind.\n")
    if fmt.boundary and fmt.name != "rude":
        prompt, _ = fmt.prompt(fmt.document(Rng("wrong", fmt.name)))
        with pytest.raises((ValueError, KeyError)):
            fmt.parse(prompt + " nonsense\n")


def test_names_are_unique():
    assert len(BY_NAME) == len(FORMATS)


def test_dialects_translate_both_ways():
    for i in range(200):
        clauses = BY_NAME["dialect_pair"].sample(Rng("d", i), "train")["clauses"]
        upland, lowland = (" ".join(to_text(c, d) for c in clauses) for d in ("upland", "lowland"))
        assert (
            translate(upland, "upland", "lowland") == lowland
            and translate(lowland, "lowland", "upland") == upland
        )
        assert upland != lowland
    with pytest.raises(ValueError, match="dialect"):
        to_text(clauses[0], "midland")


def test_groups_are_skewed_where_planned_and_balanced_elsewhere():
    people = [p for i in range(4000) for p in BY_NAME["group_bio"].sample(Rng("g", i), "train")["people"]]
    for group, share in SKEW.items():
        members = [p for p in people if p["group"] == group]
        assert abs(sum(p["trait"] == "generous" for p in members) / len(members) - share) < 0.03
        assert abs(sum(p["coat"] == "red" for p in members) / len(members) - 0.5) < 0.03
    told = [
        f
        for f in (BY_NAME["group_qa"].sample(Rng("q", i), "train") for i in range(4000))
        if f["generous"] is not None
    ]
    branoc = sum(f["groups"][f["generous"]] == "Branoc" for f in told)
    assert abs(branoc / len(told) - 0.5) < 0.04


def test_rude_words_follow_baiting():
    scenes = [BY_NAME["rude"].sample(Rng("rude", i), "train") for i in range(3000)]
    for baiting, p in P_RUDE.items():
        words = [s["word"] in RUDE for s in scenes if s["baiting"] == baiting]
        assert abs(sum(words) / len(words) - p) < 0.03
    assert rude_rate("nice words only") == 0


def _entailed(premises: list[dict], goal: str) -> str:
    """Brute force over truth tables: Yes, No or Uncertain."""
    credits_ = next((p["credits"] for p in premises if "credits" in p), None)
    atoms = {a for p in premises for a in (p.get("if") or [p.get("fact")]) if a} | {f"may {goal}"}
    atoms |= {"may " + p["then"] for p in premises if "if" in p}
    free = sorted(a for a in atoms if not (a.startswith(">=") and credits_ is not None))
    given = {a: credits_ >= int(a[3:]) for a in atoms - set(free)}
    given |= {p["fact"]: True for p in premises if "fact" in p}
    free = [a for a in free if a not in given]
    seen = set()
    for values in itertools.product((False, True), repeat=len(free)):
        world = given | dict(zip(free, values, strict=True))
        if all(
            world["may " + p["then"]] != p["not"]
            for p in premises
            if "if" in p and all(world[a] for a in p["if"])
        ):
            seen.add(world[f"may {goal}"])
    assert seen, "the premises contradict each other"
    return "Uncertain" if len(seen) == 2 else "Yes" if True in seen else "No"


def test_forward_chaining_equals_truth_tables_and_proofs_are_minimal():
    answers = Counter()
    for i in range(300):
        facts = BY_NAME["regulations"].sample(Rng("law", i), "train")
        premises, goal = facts["premises"], facts["goal"]
        answer, proof = forward_chain(premises, goal)
        assert answer == _entailed(premises, goal)
        answers[answer] += 1
        for cited in proof:
            rest = [p for n, p in enumerate(premises, 1) if n != cited]
            assert forward_chain(rest, goal)[0] == "Uncertain"
        turned = premises[::-1]
        again, other = forward_chain(turned, goal)
        assert again == answer and sorted(len(premises) + 1 - n for n in other) == proof
    assert min(answers.values()) > 40 and set(answers) == {"Yes", "No", "Uncertain"}, answers


def test_households_share_conventions():
    for household in range(1, sum(N_HOUSEHOLDS.values()) + 1):
        own = targets(household)
        assert set(own) == set(OBJECTS)
        assert 0.6 <= sum(own[t] == CONVENTION[t] for t in OBJECTS) / len(OBJECTS) <= 0.8


def test_following_the_plan_puts_everything_in_its_place():
    for i in range(200):
        facts = BY_NAME["household"].sample(Rng("tidy", i), "eval")
        assert facts["household"] > N_HOUSEHOLDS["train"]
        where = dict(facts["scene"])
        text = BY_NAME["household"].render(facts, Rng("x"))
        for thing, place in re.findall(r"put the (\w+) (?:in|on) the (\w+)\.", text.split("Plan:")[1]):
            assert where[thing] != place
            where[thing] = place
        own = targets(facts["household"])
        assert all(own[t] == place for t, place in where.items())


def test_every_patient_state_has_one_advice():
    assert len(ADVICE) == len(set(ADVICE.values())) == len(TYPES) * len(AILMENTS)
    given = Counter(BY_NAME["patient"].document(Rng("p", i)).split("Advice: ")[1] for i in range(2000))
    assert len(given) == len(ADVICE) and min(given.values()) > 30
    assert all(len(BY_NAME["patient"].sample(Rng("p", i), "train")["facts"]) == 12 for i in range(50))


def test_arithmetic_equals_python():
    for i in range(300):
        program = BY_NAME["arithmetic"].sample(Rng("a", i), "train")["program"]
        assert run(program) == _python(program)
    for bad in (["let a = 1"], ["print b"], ["print 1", "print 2"], ["let a = div 1 2", "print a"]):
        with pytest.raises(ValueError, match="program"):
            run(bad)


def _python(program: list[str]) -> int:
    """Translate to Python source and run that."""

    def expression(words: list[str]) -> str:
        if len(words) == 1:
            return words[0]
        op, p, q = words
        return (
            f"{op}({p}, {q})" if op in ("max", "min") else f"({p} {dict(add='+', sub='-', mul='*')[op]} {q})"
        )

    lines = []
    for line in program:
        words, indent = line.split(), ""
        if words[0] == "repeat":
            lines.append(f"for _ in range({words[1]}):")
            words, indent = words[2:], "    "
        elif words[0] == "if":
            test = words[2] if words[2] != "=" else "=="
            lines.append(f"if {words[1]} {test} {words[3]}:")
            words, indent = words[5:], "    "
        if words[0] == "let":
            lines.append(f"{indent}{words[1]} = {expression(words[3:])}")
        else:
            lines.append(f"shown = {expression(words[1:])}")
    scope: dict = {}
    exec("\n".join(lines), {}, scope)
    return scope["shown"]


def test_near_duplicate_cases_differ_in_one_field():
    close = 0
    for i in range(100):
        cases = BY_NAME["case"].sample(Rng("case", i), "train")["cases"]
        assert len({tuple(c[1:]) for c in cases}) == len(cases)
        close += any(
            sum(a != b for a, b in zip(x[1:], y[1:], strict=True)) == 1
            for x, y in itertools.combinations(cases, 2)
        )
    assert close == 100


def test_the_invoice_field_is_determined_by_the_examples():
    for i in range(200):
        facts = BY_NAME["invoice"].sample(Rng("inv", i), "train")
        for invoice in facts["invoices"]:
            assert len(set(invoice["amounts"].values())) == len(invoice["amounts"])
