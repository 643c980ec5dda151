"""Copying from the context: needles, key-value lists both ways, multi-query recall, repeats and echoes.

These documents make induction heads form and are the yardstick of every cache, memory and compression
chapter. Keys and values are drawn without any regularity, so that only the context can tell the answer.
"""

from __future__ import annotations

import re

from refimpl.world.base import Facts, Format, Split
from refimpl.world.lexicon import (
    ANIMALS,
    CODES,
    COLORS,
    COMPANIES,
    FIRST_NAMES,
    FOODS,
    HOBBIES,
    INSTRUMENTS,
    JOBS,
    OBJECTS,
    SURNAMES,
    TOWNS,
)
from refimpl.world.names import names
from refimpl.world.rng import Rng
from refimpl.world.story_formats import FORMATS as STORY_FORMATS

NUMBERS = tuple(str(n) for n in range(10, 100))
KEY_POOLS = (FIRST_NAMES, TOWNS, OBJECTS, CODES, ANIMALS, SURNAMES, NUMBERS)
REVERSE_POOLS = (TOWNS, JOBS, COMPANIES, ANIMALS, FOODS, OBJECTS, INSTRUMENTS, HOBBIES, COLORS)
VALUE_POOLS = (CODES, CODES, TOWNS, JOBS, COMPANIES, NUMBERS, OBJECTS, FOODS)
WORDS = tuple(
    dict.fromkeys(
        (*FIRST_NAMES, *SURNAMES, *TOWNS, *JOBS, *COMPANIES, *OBJECTS, *ANIMALS, *FOODS, *COLORS, *HOBBIES,
         *CODES, *NUMBERS)
    )
)  # fmt: skip


def _log_uniform(rng: Rng, low: int, high: int) -> int:
    return int(low * ((high + 1) / low) ** rng.random())


# ----------------------------------------------------------------------------------------------------------
# needle: "Find the codes.", a story (or many) with "The code of K is V." at the end of some lines, questions


def filler_lines(rng: Rng, n_words: int) -> list[str]:
    """Story lines of two or three sentences with at least `n_words` words in all."""
    lines: list[str] = []
    words = 0
    while words < n_words:
        pieces = _SENTENCE_END.split(STORY_FORMATS[0].document(rng).rstrip("\n"))
        at = 0
        while at < len(pieces) and words < n_words:
            step = 2 + rng.below(2)
            lines.append(" ".join(pieces[at : at + step]))
            words += lines[-1].count(" ") + 1
            at += step
    return lines


_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_NEEDLE = re.compile(r"^(.*) The code of (\w+) is (\w+)\.$")


def needle_facts(rng: Rng, n_words: int, depths: list[float], keys: tuple[str, ...] = FIRST_NAMES) -> Facts:
    """A haystack of about `n_words` words with a needle at each relative depth; the first is asked for."""
    lines = filler_lines(rng, n_words)
    while len(lines) < len(depths):  # one needle a line
        lines += filler_lines(rng, 1)
    chosen = rng.sample(keys, len(depths))
    needles = [
        [min(len(lines) - 1, int(depth * len(lines))), key, rng.choice(CODES)]
        for depth, key in zip(depths, chosen, strict=True)
    ]
    seen: set[int] = set()
    for needle in needles:  # one needle a line: move on to the next free line, round the end
        while needle[0] in seen:
            needle[0] = (needle[0] + 1) % len(lines)
        seen.add(needle[0])
    ask = [chosen[0], *(k for k in chosen[1:] if rng.chance(0.5))]
    return {"lines": lines, "needles": sorted(needles), "ask": ask}


def _sample_needle(rng: Rng, split: Split) -> Facts:
    n_words = _log_uniform(rng, 30, 620)
    n_needles = 1 + rng.below(min(6, 1 + n_words // 40))
    keys = FIRST_NAMES if rng.chance(0.6) else names(split)
    return needle_facts(rng, n_words, [rng.random() for _ in range(n_needles)], keys)


def _render_needle(facts: Facts, rng: Rng) -> str:
    lines = list(facts["lines"])
    value = {}
    for at, key, code in facts["needles"]:
        lines[at] = f"{lines[at]} The code of {key} is {code}."
        value[key] = code
    asked = "".join(f"Question: What is the code of {key}?\nAnswer: {value[key]}\n" for key in facts["ask"])
    return "\n".join(["Find the codes.", *lines]) + "\n" + asked


def _parse_needle(text: str) -> Facts:
    lines, needles, ask = [], [], []
    header, *rows = text.rstrip("\n").split("\n")
    if header != "Find the codes.":
        raise ValueError(f"text: {header!r} is not 'Find the codes.', so it is not a 'needle' document")
    at = 0
    while at < len(rows) and not rows[at].startswith("Question: "):
        hit = _NEEDLE.match(rows[at])
        if hit:
            needles.append([at, hit[2], hit[3]])
        lines.append(hit[1] if hit else rows[at])
        at += 1
    value = {key: code for _, key, code in needles}
    for question, answer in zip(rows[at::2], rows[at + 1 :: 2], strict=True):
        key = question.removeprefix("Question: What is the code of ").removesuffix("?")
        if value.get(key) != answer.removeprefix("Answer: "):
            raise ValueError(
                f"text: the answer to {question!r} is not in it, so it is not a 'needle' document"
            )
        ask.append(key)
    if not ask:
        raise ValueError("text: no question at its end, so it is not a 'needle' document")
    return {"lines": lines, "needles": needles, "ask": ask}


NEEDLE = Format(
    "needle", _sample_needle, _render_needle, _parse_needle, boundary="Answer:",
    serves=("kv head", "memory D2", "interp D3", "interp E7", "rag T8", "quantization 35"),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# key_value and mqar: n pairs, then q queries


def pair_facts(rng: Rng, n: int, q: int, keys: tuple[str, ...], values: tuple[str, ...]) -> Facts:
    """n pairs with different keys, then q different keys to look up."""
    chosen = rng.sample(keys, n)
    return {"pairs": [[k, rng.choice(values)] for k in chosen], "ask": rng.sample(chosen, q)}


def _sample_pairs(rng: Rng, split: Split) -> Facts:
    keys = rng.choice(KEY_POOLS)
    n = min(_log_uniform(rng, 3, 120), len(keys))
    q = 1 + rng.below(n)
    return pair_facts(rng, n, q, keys, rng.choice(VALUE_POOLS))


def _render_key_value(facts: Facts, rng: Rng) -> str:
    value = dict(facts["pairs"])
    top = "".join(f"{k} = {v}\n" for k, v in facts["pairs"])
    return f"Pairs:\n{top}Lookup:\n" + "".join(f"{k} = {value[k]}\n" for k in facts["ask"])


def _checked(pairs: list[list[str]], asked: list[list[str]], name: str) -> Facts:
    value = dict(pairs)
    if len(value) != len(pairs) or not asked or any(value.get(k) != v for k, v in asked):
        raise ValueError(f"text: a looked-up pair was never given, so it is not a {name!r} document")
    return {"pairs": pairs, "ask": [k for k, _ in asked]}


def _parse_key_value(text: str) -> Facts:
    if not text.startswith("Pairs:\n") or "\nLookup:\n" not in text:
        raise ValueError("text: no 'Pairs:' and 'Lookup:' lines, so it is not a 'key_value' document")
    top, _, rest = text.rstrip("\n").removeprefix("Pairs:\n").partition("\nLookup:\n")
    return _checked(
        [r.split(" = ") for r in top.split("\n")], [r.split(" = ") for r in rest.split("\n")], "key_value"
    )


def _render_mqar(facts: Facts, rng: Rng) -> str:
    value = dict(facts["pairs"])
    top = ", ".join(f"{k} {v}" for k, v in facts["pairs"])
    return f"Recall: {top}; " + ", ".join(f"{k} {value[k]}" for k in facts["ask"]) + ".\n"


def _parse_mqar(text: str) -> Facts:
    if not text.startswith("Recall: ") or not text.endswith(".\n"):
        raise ValueError("text: no 'Recall: ... .' line, so it is not an 'mqar' document")
    top, _, rest = text[8:-2].partition("; ")
    return _checked([r.split(" ") for r in top.split(", ")], [r.split(" ") for r in rest.split(", ")], "mqar")


KEY_VALUE = Format("key_value", _sample_pairs, _render_key_value, _parse_key_value, boundary=" =",
                   serves=("kv head", "rag T8", "interp D3"))  # fmt: skip
MQAR = Format("mqar", _sample_pairs, _render_mqar, _parse_mqar, serves=("memory D4", "interp E7"))


# ----------------------------------------------------------------------------------------------------------
# reverse_lookup: pairs with different values, looked up from the value back to its key


def _sample_reverse(rng: Rng, split: Split) -> Facts:
    """Most keys are invented names of two or three tokens: those that questions ask for."""
    keys = names(split) if rng.chance(0.7) else FIRST_NAMES
    values = rng.choice(REVERSE_POOLS)
    n = min(_log_uniform(rng, 2, 40), len(values))
    pairs = [[k, v] for k, v in zip(rng.sample(keys, n), rng.sample(values, n), strict=True)]
    ask = rng.sample([v for _, v in pairs], 1 + rng.below(n))
    return {"pairs": pairs, "ask": ask}


def _render_reverse(facts: Facts, rng: Rng) -> str:
    key = {v: k for k, v in facts["pairs"]}
    top = "".join(f"{k} = {v}\n" for k, v in facts["pairs"])
    return f"Pairs:\n{top}Reverse:\n" + "".join(f"{v} = {key[v]}\n" for v in facts["ask"])


def _parse_reverse(text: str) -> Facts:
    if not text.startswith("Pairs:\n") or "\nReverse:\n" not in text:
        raise ValueError("text: no 'Pairs:' and 'Reverse:' lines, so it is not a 'reverse_lookup' document")
    top, _, rest = text.rstrip("\n").removeprefix("Pairs:\n").partition("\nReverse:\n")
    pairs = [row.split(" = ") for row in top.split("\n")]
    asked = [row.split(" = ") for row in rest.split("\n")]
    checked = _checked([p[::-1] for p in pairs], asked, "reverse_lookup")
    return {"pairs": pairs, "ask": checked["ask"]}


REVERSE_LOOKUP = Format("reverse_lookup", _sample_reverse, _render_reverse, _parse_reverse, boundary=" =",
                        serves=("interp E1", "interp D2", "rag 3.11"))  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# repeat: a list of random words, two to four times over


def _sample_repeat(rng: Rng, split: Split) -> Facts:
    times = 2 if rng.chance(0.7) else 3 + rng.below(2)
    n = _log_uniform(rng, 5, 900 // (2 * times))
    if rng.chance(0.15):  # strings of letters and digits: copying must not depend on knowing the word
        words = [
            "".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(2))
            for _ in range(n // 2 + 2)
        ]
    else:
        words = [rng.choice(WORDS) for _ in range(n)]
    return {"words": words, "times": times}


def _render_repeat(facts: Facts, rng: Rng) -> str:
    return (" ".join(facts["words"]) + "\n") * facts["times"]


def _parse_repeat(text: str) -> Facts:
    rows = text.rstrip("\n").split("\n")
    if len(rows) < 2 or len(set(rows)) != 1:
        raise ValueError("text: not the same line again and again, so it is not a 'repeat' document")
    return {"words": rows[0].split(" "), "times": len(rows)}


REPEAT = Format("repeat", _sample_repeat, _render_repeat, _parse_repeat, serves=("interp A4", "interp E7"))


# ----------------------------------------------------------------------------------------------------------
# echo: one line of random words in which pieces of it come again, at any place and without any mark


def _sample_echo(rng: Rng, split: Split) -> Facts:
    """Only that two words met before tells that a piece comes again: what an induction head is for."""
    n = _log_uniform(rng, 16, 420)
    fragments = rng.chance(0.5)  # parts of words: copying must not depend on knowing the word
    words: list[str] = []
    while len(words) < n:
        if len(words) > 4 and rng.chance(0.6):
            length = rng.between(2, min(30, len(words)))
            start = rng.below(len(words) - length + 1)
            words += words[start : start + length]
        else:
            words += [_fragment(rng) if fragments else rng.choice(WORDS) for _ in range(rng.between(1, 8))]
    return {"words": words[:n]}


def _fragment(rng: Rng) -> str:
    """One to five letters out of a word, or two signs."""
    if rng.chance(0.2):
        return "".join(
            rng.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") for _ in "12"
        )
    word = rng.choice(WORDS)
    start = rng.below(len(word))
    return word[start : start + rng.between(1, 5)]


def _parse_echo(text: str) -> Facts:
    words = text.removesuffix("\n").split(" ")
    if not text.endswith("\n") or "\n" in text[:-1] or len(words) < 8 or not all(map(_is_echoed, words)):
        raise ValueError("text: not one line of words and parts of words, so it is not an 'echo' document")
    return {"words": words}


def _is_echoed(word: str) -> bool:
    return word in _WORDS or re.fullmatch(r"[A-Za-z0-9]{1,5}", word) is not None


_WORDS = frozenset(WORDS)
ECHO = Format(
    "echo", _sample_echo, lambda facts, rng: " ".join(facts["words"]) + "\n", _parse_echo,
    serves=("interp A4", "interp E1", "interp E7"),
)  # fmt: skip

FORMATS = [NEEDLE, KEY_VALUE, MQAR, REVERSE_LOOKUP, REPEAT, ECHO]
