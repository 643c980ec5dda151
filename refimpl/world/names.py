"""Three name pools: known people (two single tokens), invented training names, invented evaluation names.

Invented names come from one inventory of syllables, so that nothing but memory separates a name seen in
training from one that was not. They are disjoint as strings; each is exactly two or three tokens, which is
why they are a file (`names.txt`, drawn once from all combinations of the syllables and filtered with the
frozen tokenizer).
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from refimpl.world.base import Split
from refimpl.world.lexicon import FIRST_NAMES, SURNAMES
from refimpl.world.rng import Rng

N_TRAIN, N_EVAL = 3200, 480


@cache
def _pools() -> dict[str, tuple[str, ...]]:
    lines = (files("refimpl.world") / "names.txt").read_text().splitlines()
    return {"eval": tuple(lines[1].split()), "train": tuple(lines[2].split())}


def names(split: Split) -> tuple[str, ...]:
    """The invented names of a split: 3200 for training, 480 for evaluation.

    Examples
    --------
    >>> len(names("train")), len(names("eval")), set(names("train")) & set(names("eval"))
    (3200, 480, set())
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split: {split!r} is not one of 'train', 'eval'")
    return _pools()[split]


@cache
def known_people() -> tuple[str, ...]:
    """The 200 people of the K tier, "First Last"; the first 50 are the rarest stratum."""
    rng = Rng("known people")
    firsts = rng.sample(FIRST_NAMES, 100)
    pairs = [f"{f} {s}" for f in firsts for s in rng.sample(SURNAMES, 2)]
    rng.shuffle(pairs)
    return tuple(pairs)
