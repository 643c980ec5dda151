"""Calls to an explicit memory of triples: RET-LLM's lines and MemLLM's inline calls (memory D6, rag 3.21)."""

from __future__ import annotations

import re

from refimpl.world.base import Facts, Format, Split
from refimpl.world.memory_relations import (
    ASK_OBJECT,
    ASK_SUBJECT,
    RELATIONS,
    VALUES,
    draw,
    draw_form,
    draw_items,
    question,
    read_question,
    read_statement,
    read_statements,
    state,
    triple,
)
from refimpl.world.names import names
from refimpl.world.rng import Rng


# mem_write: "Text: Balbert lives in Ripon. It was a quiet day.\n
#   Write: [MEM_WRITE{ Balbert>> lives in>> Ripon}]\n"; several calls are joined by a space; "none" when the
# text states nothing. Boundary: "Write:".
def _calls(items: list[dict | str]) -> str:
    return " ".join(f"[MEM_WRITE{{{triple(i)}}}]" for i in items if isinstance(i, dict)) or "none"


def _sample_write(rng: Rng, split: Split) -> Facts:
    return {"items": draw_items(rng, split, rng.between(1, 4))}


def _render_write(facts: Facts, rng: Rng) -> str:
    return f"Text: {' '.join(map(state, facts['items']))}\nWrite: {_calls(facts['items'])}\n"


def _parse_write(text: str) -> Facts:
    match = re.fullmatch(r"Text: (.+)\nWrite: (.+)\n", text)
    if match is None:
        raise ValueError("text: expected the lines 'Text: ...' and 'Write: ...'")
    items = read_statements(match[1])
    if match[2] != _calls(items):
        raise ValueError(f"text: the calls {match[2]!r} are not those of its sentences, {_calls(items)!r}")
    return {"items": items}


# mem_read: "Question: Where does Balbert live?\nRead: [MEM_READ{ Balbert>> lives in>>}]\n"; asking for the
# subject: "Question: Who lives in Ripon?\nRead: [MEM_READ{>> lives in>> Ripon}]\n". Boundary: "Read:".
def _sample_question(rng: Rng, split: Split) -> Facts:
    r = rng.choice(RELATIONS)
    if rng.random() < 0.65:
        return {"r": r, "s": rng.choice(names(split)), "form": draw_form(ASK_OBJECT[r], split, rng)}
    return {"r": r, "o": rng.choice(VALUES[r]), "form": draw_form(ASK_SUBJECT[r], split, rng)}


def call(facts: Facts) -> str:
    """`[MEM_READ{ Balbert>> lives in>>}]` or `[MEM_READ{>> lives in>> Ripon}]`."""
    subject, value = ("" if facts.get(k) is None else f" {facts[k]}" for k in "so")
    return f"[MEM_READ{{{subject}>> {facts['r']}>>{value}}}]"


def _render_read(facts: Facts, rng: Rng) -> str:
    return f"Question: {question(facts)}\nRead: {call(facts)}\n"


def _parse_read(text: str) -> Facts:
    match = re.fullmatch(r"Question: (.+)\nRead: (.+)\n", text)
    if match is None:
        raise ValueError("text: expected the lines 'Question: ...' and 'Read: ...'")
    facts = read_question(match[1])
    if match[2] != call(facts):
        raise ValueError(f"text: the call {match[2]!r} does not ask the question; that is {call(facts)!r}")
    return facts


# mem_answer: mem_read plus "Result: Balbert, Dorlin\nAnswer: Balbert and Dorlin\n"; an empty result is
# "none", its answer "unknown". Boundary: "Answer:".
def _answer(result: list[str]) -> str:
    if not result:
        return "unknown"
    return result[0] if len(result) == 1 else f"{', '.join(result[:-1])} and {result[-1]}"


def _sample_answer(rng: Rng, split: Split) -> Facts:
    asked = _sample_question(rng, split)
    if rng.random() < 0.15:
        return {**asked, "result": []}
    pool = VALUES[asked["r"]] if "s" in asked else names(split)
    return {**asked, "result": rng.sample(pool, 1 if "s" in asked else rng.between(1, 4))}


def _render_answer(facts: Facts, rng: Rng) -> str:
    result = facts["result"]
    return f"{_render_read(facts, rng)}Result: {', '.join(result) or 'none'}\nAnswer: {_answer(result)}\n"


def _parse_answer(text: str) -> Facts:
    match = re.fullmatch(r"(Question: .+\nRead: .+\n)Result: (.+)\nAnswer: (.+)\n", text)
    if match is None:
        raise ValueError("text: expected the lines 'Question:', 'Read:', 'Result:' and 'Answer:'")
    result = [] if match[2] == "none" else match[2].split(", ")
    if match[3] != _answer(result):
        raise ValueError(f"text: the answer {match[3]!r} does not follow from the result {match[2]!r}")
    return {**_parse_read(match[1]), "result": result}


# mem_inline (MemLLM, reading): sentences; before the last word of some a call with its answers,
#   Balbert lives in ({MEM_READ( Balbert>> lives in>>)--> Ripon}) Ripon.
# Two queries are joined by ";", their answers too: the second asks for another fact of the text. No boundary:
# a call starts wherever the model writes "({".
_INLINE = re.compile(r" \(\{MEM_READ\((.+?)\)-->(.+?)\}\)")


def _sample_inline(rng: Rng, split: Split) -> Facts:
    items = [{**draw(rng, split, s), "form": 0} for s in rng.sample(names(split), rng.between(2, 5))]
    for i, item in enumerate(items):
        if rng.random() < 0.7:
            item["calls"] = [i]
            if i > 0 and rng.random() < 0.3:
                other = items[rng.below(i)]
                item["calls"].append(
                    next(j for j, q in enumerate(items) if (q["r"], q["o"]) == (other["r"], other["o"]))
                )
    return {"items": items}


def _inline(items: list[dict], item: dict) -> str:
    asked = [items[j] for j in item["calls"]]
    queries = [
        f" {q['s']}>> {q['r']}>>" if n == 0 else f">> {q['r']}>> {q['o']}" for n, q in enumerate(asked)
    ]
    answers = [f" {q['o'] if n == 0 else q['s']}" for n, q in enumerate(asked)]
    return f" ({{MEM_READ({';'.join(queries)})-->{';'.join(answers)}}})"


def _render_inline(facts: Facts, rng: Rng) -> str:
    out = []
    for item in facts["items"]:
        sentence = state(item)
        if "calls" in item:
            cut = sentence.rindex(" ")
            sentence = sentence[:cut] + _inline(facts["items"], item) + sentence[cut:]
        out.append(sentence)
    return " ".join(out) + "\n"


def _parse_inline(text: str) -> Facts:
    found, items = [], []
    for part in text.removesuffix(".\n").split(". "):
        found.append(_INLINE.search(part))
        items.append(read_statement(_INLINE.sub("", part) + "."))
    for i, (item, match) in enumerate(zip(items, found, strict=True)):
        if match is None:
            continue
        item["calls"] = [i]
        if ";" in match[1]:
            query = match[1].split(";")[1], match[2].split(";")[1]
            item["calls"].append(
                next(j for j, q in enumerate(items) if (f">> {q['r']}>> {q['o']}", f" {q['s']}") == query)
            )
        if _inline(items, item) != match[0]:
            raise ValueError(f"text: the call {match[0]!r} does not belong there")
    return {"items": items}


# mem_inline_write (MemLLM, writing): context sentences, the marked sentence, its triples:
#   It was a quiet day. ({USER_ST})Balbert lives in Ripon.({USER_END})--> Balbert>> lives in>> Ripon})
# Facts: items; the last one is marked. No boundary: the completion starts with the token "-->".
def _sample_inline_write(rng: Rng, split: Split) -> Facts:
    return {"items": [*draw_items(rng, split, rng.between(0, 2)), draw(rng, split)]}


def _render_inline_write(facts: Facts, rng: Rng) -> str:
    *before, last = facts["items"]
    context = "".join(state(i) + " " for i in before)
    return f"{context}({{USER_ST}}){state(last)}({{USER_END}})-->{triple(last)}}})\n"


def _parse_inline_write(text: str) -> Facts:
    match = re.fullmatch(r"(?:(.+) )?\(\{USER_ST\}\)(.+)\(\{USER_END\}\)-->(.+)\}\)\n", text)
    if match is None:
        raise ValueError("text: expected '({USER_ST})sentence({USER_END})-->triple})'")
    items = [*(read_statements(match[1]) if match[1] else []), read_statement(match[2])]
    if match[3] != triple(items[-1]):
        raise ValueError(f"text: the triple {match[3]!r} is not that of the marked sentence")
    return {"items": items}


FORMATS = [
    Format("mem_write", _sample_write, _render_write, _parse_write, "Write:", ("memory D6", "rag 3.21")),
    Format("mem_read", _sample_question, _render_read, _parse_read, "Read:", ("memory D6", "rag 3.21")),
    Format("mem_answer", _sample_answer, _render_answer, _parse_answer, "Answer:", ("rag 3.21",)),
    Format("mem_inline", _sample_inline, _render_inline, _parse_inline, None, ("memory D6", "memory 2.15")),
    Format(
        "mem_inline_write",
        _sample_inline_write,
        _render_inline_write,
        _parse_inline_write,
        None,
        ("memory D6",),
    ),
]
