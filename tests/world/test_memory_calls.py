"""Memory calls: syntax, round trips, refusal of malformed calls."""

from __future__ import annotations

import json
import re

import pytest

from refimpl.world.memory_calls import FORMATS
from refimpl.world.memory_relations import ASK_OBJECT, ASK_SUBJECT, RELATIONS, STATEMENTS, VALUES, state
from refimpl.world.names import names
from refimpl.world.rng import Rng

BY_NAME = {f.name: f for f in FORMATS}
CALL = re.compile(r"\[MEM_(?:WRITE|READ)\{[^{}>]*>>[^{}>]+>>[^{}>]*\}\]")


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_parse_inverts_render(fmt, split):
    for i in range(200):
        facts = fmt.sample(Rng("memory test", fmt.name, split, i), split)
        assert json.loads(json.dumps(facts)) == facts
        text = fmt.render(facts, Rng("surface", i))
        assert fmt.parse(text) == facts, text
        if fmt.boundary:
            assert fmt.prompt(text)[1].startswith(" ")


def test_call_syntax():
    for i in range(100):
        write = BY_NAME["mem_write"].document(Rng("w", i))
        calls = write.split("Write: ")[1].rstrip("\n")
        assert calls == "none" or CALL.sub("", calls).strip() == ""
        facts = BY_NAME["mem_write"].parse(write)["items"]
        assert len(CALL.findall(calls)) == sum(isinstance(f, dict) for f in facts)
        read = BY_NAME["mem_read"].document(Rng("r", i)).split("Read: ")[1].rstrip("\n")
        assert CALL.fullmatch(read) and (read.endswith(">>}]") != read.startswith("[MEM_READ{>>"))


def test_exact_strings():
    facts = {"s": "Balbert", "r": "lives in", "o": "Ripon", "form": 0}
    write = BY_NAME["mem_write"].render({"items": [facts]}, Rng("x"))
    assert write == "Text: Balbert lives in Ripon.\nWrite: [MEM_WRITE{ Balbert>> lives in>> Ripon}]\n"
    inline = BY_NAME["mem_inline"].render({"items": [{**facts, "calls": [0]}]}, Rng("x"))
    assert inline == "Balbert lives in ({MEM_READ( Balbert>> lives in>>)--> Ripon}) Ripon.\n"
    marked = BY_NAME["mem_inline_write"].render({"items": [facts]}, Rng("x"))
    assert marked == "({USER_ST})Balbert lives in Ripon.({USER_END})--> Balbert>> lives in>> Ripon})\n"
    answer = BY_NAME["mem_answer"].render(
        {"r": "lives in", "o": "Ripon", "form": 0, "result": ["Tor", "Bel", "Kan"]}, Rng("x")
    )
    assert answer == (
        "Question: Who lives in Ripon?\nRead: [MEM_READ{>> lives in>> Ripon}]\n"
        "Result: Tor, Bel, Kan\nAnswer: Tor, Bel and Kan\n"
    )


@pytest.mark.parametrize(
    "name, text",
    [
        ("mem_write", "Text: Balbert lives in Ripon.\nWrite: [MEM_WRITE{ Balbert>> lives in>> Derby}]\n"),
        ("mem_write", "Text: Balbert sings.\nWrite: none\n"),
        ("mem_read", "Question: Where does Balbert live?\nRead: [MEM_READ{>> lives in>> Balbert}]\n"),
        ("mem_read", "Question: Where does Balbert live?\nRead: [MEM_READ{ Balbert>> lives in}]\n"),
        (
            "mem_answer",
            "Question: Who lives in Ripon?\nRead: [MEM_READ{>> lives in>> Ripon}]\nResult: none\n"
            "Answer: Tor\n",
        ),
        ("mem_inline", "Balbert lives in ({MEM_READ( Tor>> lives in>>)--> Ripon}) Ripon.\n"),
        (
            "mem_inline_write",
            "({USER_ST})Balbert lives in Ripon.({USER_END})--> Ripon>> lives in>> Balbert})\n",
        ),
    ],
)
def test_wrong_calls_are_refused(name, text):
    with pytest.raises(ValueError):
        BY_NAME[name].parse(text)


def test_a_call_precedes_the_first_mention_of_its_answer():
    for i in range(200):
        text = BY_NAME["mem_inline"].document(Rng("order", i))
        for match in re.finditer(r"\(\{MEM_READ\( (\w+)>> ([^>]+)>>(?:;[^)]*)?\)--> (\w+)", text):
            sentence_start = text.rfind(". ", 0, match.start()) + 1
            assert match[3] not in re.sub(r"\(\{.*?\}\)", "", text[sentence_start : match.start()]).split()


def test_forms_are_held_out_and_separators_never_occur_in_values():
    for relation in RELATIONS:
        assert len(STATEMENTS[relation].templates) >= 4
        assert len(ASK_OBJECT[relation].templates) >= 3 and len(ASK_SUBJECT[relation].templates) >= 3
        assert not any(set(">{};,()") & set(v) for v in VALUES[relation])
    shown = {
        s: {state(i) for n in range(300) for i in BY_NAME["mem_write"].sample(Rng(s, n), s)["items"]}
        for s in ("train", "eval")
    }
    assert not any(x.startswith("The birthplace") for x in shown["train"])
    assert any(x.startswith("The birthplace") for x in shown["eval"])
    people = set(names("eval"))
    assert all(
        BY_NAME["mem_read"].sample(Rng("e", n), "eval").get("s", names("eval")[0]) in people
        for n in range(50)
    )
