"""A small arithmetic language and its interpreter (footprint C6, "code").

    Program:
    let a = 7
    let b = add a 5
    if b > 10 then let a = mul b 2
    repeat 3 let b = sub b 1
    print add a b
    Output: 33

`let X = E`, with E a number, a variable or `add|sub|mul|max|min P Q`; `repeat N let ...`;
`if P > Q then let ...` (also `<`, `=`); the program ends with `print E`. Numbers are integers.
Boundary "Output:".
"""

from __future__ import annotations

import operator
import re

from refimpl.world.base import Facts, Format, Split
from refimpl.world.rng import Rng

OPERATIONS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "max": max, "min": min}
COMPARISONS = {">": operator.gt, "<": operator.lt, "=": operator.eq}
LIMIT = 999  # programs whose values leave [-LIMIT, LIMIT] are not drawn
_TERM = r"(?:-?\d+|[a-z])"
_EXPRESSION = rf"(?:{_TERM}|(?:{'|'.join(OPERATIONS)}) {_TERM} {_TERM})"
_LINE = re.compile(
    rf"(?:repeat (?P<times>\d+) |if (?P<left>{_TERM}) (?P<test>[<>=]) (?P<right>{_TERM}) then )?"
    rf"let (?P<name>[a-z]) = (?P<value>{_EXPRESSION})|print (?P<shown>{_EXPRESSION})"
)


class OutOfRange(ValueError):
    """A variable left [-LIMIT, LIMIT]."""


def _evaluate(expression: str, variables: dict[str, int]) -> int:
    words = expression.split()
    terms = []
    for word in words[-2:] if len(words) == 3 else words:
        if word.isalpha() and word not in variables:
            raise ValueError(f"program: variable {word!r} is used before it is set")
        terms.append(variables[word] if word.isalpha() else int(word))
    return OPERATIONS[words[0]](*terms) if len(words) == 3 else terms[0]


def run(program: list[str]) -> int:
    """Run a program; the number it prints.

    Parameters
    ----------
    program : list of str
        Its lines; the last one prints.

    Examples
    --------
    >>> run(["let a = 2", "repeat 3 let a = mul a 2", "if a > 10 then let a = sub a 1", "print add a 0"])
    15
    """
    variables: dict[str, int] = {}
    for number, line in enumerate(program, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"program: line {number}, {line!r}, is not a statement")
        part = match.groupdict()
        if part["shown"] is not None:
            if number != len(program):
                raise ValueError(f"program: line {number} prints, but only the last line may")
            return _evaluate(part["shown"], variables)
        if part["test"] is not None:
            left, right = _evaluate(part["left"], variables), _evaluate(part["right"], variables)
            times = int(COMPARISONS[part["test"]](left, right))
        else:
            times = int(part["times"] or 1)
        for _ in range(times):
            variables[part["name"]] = _evaluate(part["value"], variables)
            if abs(variables[part["name"]]) > LIMIT:
                raise OutOfRange(f"program: line {number} leaves the range -{LIMIT} ... {LIMIT}")
    raise ValueError("program: its last line does not print")


def _draw_term(rng: Rng, used: list[str]) -> str:
    return rng.choice(used) if rng.random() < 0.6 else str(rng.between(1, 9))


def _draw_expression(rng: Rng, used: list[str]) -> str:
    operation = rng.choice(("add", "add", "sub", "sub", "mul", "max", "min"))
    return f"{operation} {rng.choice(used)} {_draw_term(rng, used)}"


def _sample(rng: Rng, split: Split) -> Facts:
    while True:
        letters = rng.sample("abcdefghijkmnpqrstuvwxyz", 3)
        used = [letters[0]]
        program = [f"let {letters[0]} = {rng.between(1, 20)}"]
        for _ in range(rng.between(1, 5)):
            kind, name = rng.random(), rng.choice(letters[: len(used) + 1])
            if kind < 0.2 and name in used:
                change = f"{rng.choice(('add', 'sub'))} {name} {rng.between(1, 9)}"
                line = f"repeat {rng.between(2, 4)} let {name} = {change}"
            elif kind < 0.45 and name in used:
                test = f"{rng.choice(used)} {rng.choice('><=')} {rng.between(1, 20)}"
                line = f"if {test} then let {name} = {_draw_expression(rng, used)}"
            elif kind < 0.6:
                line = f"let {name} = {rng.between(1, 20)}"
            else:
                line = f"let {name} = {_draw_expression(rng, used)}"
            program.append(line)
            if name not in used:
                used.append(name)
        program.append(f"print {_draw_expression(rng, used) if rng.random() < 0.5 else rng.choice(used)}")
        try:
            value = run(program)
        except OutOfRange:
            continue
        if -LIMIT <= value <= LIMIT:
            return {"program": program}


def _render(facts: Facts, rng: Rng) -> str:
    body = "\n".join(facts["program"])
    return f"Program:\n{body}\nOutput: {run(facts['program'])}\n"


def _parse(text: str) -> Facts:
    match = re.fullmatch(r"Program:\n(.+)\nOutput: (-?\d+)\n", text, re.DOTALL)
    if match is None:
        raise ValueError("text: expected 'Program:', statements and 'Output: n'")
    program = match[1].split("\n")
    if run(program) != int(match[2]):
        raise ValueError(f"text: the program prints {run(program)}, not {match[2]}")
    return {"program": program}


FORMATS = [Format("arithmetic", _sample, _render, _parse, "Output:", ("footprint C6",))]
