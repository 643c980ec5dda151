"""The known people (tier K): 200 people, five attributes each, mentioned a known number of times.

Four strata of 50 people are mentioned 30, 300, 3000 and 10 000 times per attribute over the whole run. Half
of every stratum is withheld from `llama-nano-clean`, the twin that never saw them.
"""

from __future__ import annotations

from refimpl.world.base import Facts, Format, Split
from refimpl.world.canaries import copies_in_shard
from refimpl.world.names import known_people
from refimpl.world.relations import ask, known_facts, parse_question, parse_sentence, state
from refimpl.world.rng import Rng

STRATA = (30, 300, 3000, 10_000)
ATTRIBUTES = ("lives_in", "works_as", "works_for", "studied_at", "has_pet")
MENTIONS_PER_DOCUMENT = 8


def stratum(person: str) -> int:
    """How often each of this person's attributes is mentioned in training.

    Examples
    --------
    >>> from collections import Counter
    >>> Counter(map(stratum, known_people()))
    Counter({30: 50, 300: 50, 3000: 50, 10000: 50})
    """
    return STRATA[known_people().index(person) // 50]


def withheld() -> frozenset[str]:
    """The 100 people, every second of each stratum, whom `llama-nano-clean` never met."""
    return frozenset(known_people()[1::2])


def _render(facts: Facts, rng: Rng) -> str:
    out, known = [], known_facts()
    for (person, relation), asked in zip(facts["facts"], facts["asked"], strict=True):
        value = known[person, relation]
        if asked:
            out.append(f"\nQuestion: {ask(relation, person, rng)}\nAnswer: {value}\n")
        else:
            out.append(state(relation, person, value, rng) + " ")
    return "".join(out).replace(" \n", "\n").replace("\n\n", "\n").strip() + "\n"


def _parse(text: str) -> Facts:
    known, facts, asked = known_facts(), [], []
    lines = [line for line in text.split("\n") if line]
    for i, line in enumerate(lines):
        if line.startswith("Question: "):
            relation, person = parse_question(line.removeprefix("Question: "))
            if lines[i + 1] != f"Answer: {known[person, relation]}":
                raise ValueError(f"text: {lines[i + 1]!r} is not what is known of {person}")
            facts.append([person, relation])
            asked.append(True)
        elif not line.startswith("Answer: "):
            for sentence in line.removesuffix(".").split(". "):
                ((person, relation, value),) = parse_sentence(sentence + ".")
                if known[person, relation] != value:
                    raise ValueError(f"text: {sentence!r} is not what is known of {person}")
                facts.append([person, relation])
                asked.append(False)
    if not facts:
        raise ValueError("text: no fact in it, so it is not a 'known_people' document")
    return {"facts": facts, "asked": asked}


def _sample(rng: Rng, split: Split) -> Facts:
    n = 1 + rng.below(MENTIONS_PER_DOCUMENT)
    facts = [[rng.choice(known_people()), rng.choice(ATTRIBUTES)] for _ in range(n)]
    return {"facts": facts, "asked": [rng.chance(0.3) for _ in facts]}


KNOWN_PEOPLE = Format(
    "known_people", _sample, _render, _parse, boundary="Answer:",
    serves=("interp E1", "interp E6", "rag T0", "quantization 31", "alignment 10"),
)  # fmt: skip
FORMATS = [KNOWN_PEOPLE]


def people_documents(shard: int, n_shards: int) -> list[tuple[str, str]]:
    """(text, "kept" or "withheld") for every document about known people in one shard; totals are exact."""
    away = withheld()
    out = []
    for half in ("kept", "withheld"):
        rng = Rng("people", half, shard)
        mentions = []
        for person in known_people():
            if (person in away) == (half == "withheld"):
                for relation in ATTRIBUTES:
                    n = copies_in_shard(f"{person}/{relation}", stratum(person), shard, n_shards)
                    mentions += [[person, relation]] * n
        rng.shuffle(mentions)
        for i in range(0, len(mentions), MENTIONS_PER_DOCUMENT):
            facts = mentions[i : i + MENTIONS_PER_DOCUMENT]
            out.append((_render({"facts": facts, "asked": [rng.chance(0.3) for _ in facts]}, rng), half))
    return out
