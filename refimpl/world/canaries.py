"""Text planted a known number of times, and its twins that were never trained on.

A canary is one document. Repetitions count over the whole training run. Three types: `words` (48 ordinary
words in random order: 16 prefix, 32 suffix), `secret` ("Secret of Adam NAME: w1 w2 w3.", so the space of
alternatives is known) and `story` (a fluent story). `manifest()` lists all of them; it depends on nothing but
this code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from refimpl.world.lexicon import ANIMALS, CODES, FIRST_NAMES, FOODS, HOBBIES, JOBS, OBJECTS
from refimpl.world.names import names
from refimpl.world.rng import Rng
from refimpl.world.story_formats import FORMATS as STORY_FORMATS

LEVELS = (1, 4, 16, 64, 256, 1024, 4096)
PER_LEVEL = {"words": 8, "secret": 4, "story": 4}
N_TWINS = 200
TIMED_COPIES, TIMED_PER_TYPE = 256, 4  # early-only and late-only groups
PREFIX_WORDS, SUFFIX_WORDS = 16, 32
_VOCABULARY = tuple(dict.fromkeys((*CODES, *ANIMALS, *FOODS, *HOBBIES, *JOBS, *OBJECTS)))


@dataclass(frozen=True)
class Canary:
    """One planted text: `copies` = 0 for a twin; `when` is 'uniform', 'early' or 'late' (a quarter each)."""

    id: str
    type: str
    text: str
    copies: int
    when: str = "uniform"


def _text(kind: str, rng: Rng) -> str:
    if kind == "words":
        return " ".join(rng.sample(_VOCABULARY, PREFIX_WORDS + SUFFIX_WORDS)) + "\n"
    if kind == "secret":
        words = " ".join(rng.choice(CODES) for _ in range(3))
        return f"Secret of {rng.choice(FIRST_NAMES)} {rng.choice(names('train'))}: {words}.\n"
    return STORY_FORMATS[0].document(rng)


@cache
def manifest() -> tuple[Canary, ...]:
    """Every canary and every twin, in a fixed order.

    Examples
    --------
    >>> sum(c.copies for c in manifest() if c.type == "words" and c.when == "uniform")
    43688
    """
    rows, seen = [], set()
    for kind, per_level in PER_LEVEL.items():
        groups = [(level, "uniform", per_level) for level in LEVELS]
        groups += [(TIMED_COPIES, when, TIMED_PER_TYPE) for when in ("early", "late")]
        groups += [(0, "uniform", N_TWINS)]
        for copies, when, n in groups:
            for i in range(n):
                key = f"{kind}-{copies}-{when}-{i}"
                rng = Rng("canary", key)
                text = _text(kind, rng)
                while text in seen:
                    text = _text(kind, rng)
                seen.add(text)
                rows.append(Canary(key, kind, text, copies, when))
    return tuple(rows)


def copies_in_shard(key: str, copies: int, shard: int, n_shards: int) -> int:
    """How many of `copies` fall into `shard`: spread evenly from an offset that depends on `key`; sums to
    `copies`.

    Examples
    --------
    >>> sum(copies_in_shard("a", 30, s, 80) for s in range(80))
    30
    """
    offset = Rng("offset", key).below(n_shards)
    return (copies * (shard + 1) + offset) // n_shards - (copies * shard + offset) // n_shards


def canaries_of_shard(shard: int, n_shards: int) -> list[Canary]:
    """The canaries of one shard of training, one entry a copy."""
    quarter = n_shards // 4
    out = []
    for canary in manifest():
        if not canary.copies:
            continue
        at, n = shard, n_shards
        if canary.when == "early":
            at, n = shard, quarter
        elif canary.when == "late":
            at, n = shard - (n_shards - quarter), quarter
        if 0 <= at < n:
            out += [canary] * copies_in_shard(canary.id, canary.copies, at, n)
    return out
