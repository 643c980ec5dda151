"""Train the tokenizer on a sample of the training mix.

    python data/tokenizer.py --books BOOKS [--megabytes 40]

Frozen by pretraining: running this again is only right together with training every model again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from refimpl.corpus import docstrings, read_books
from refimpl.paths import atomic_write
from refimpl.world.formats import BY_NAME
from refimpl.world.lexicon import (
    ANIMALS,
    CODES,
    COMPANIES,
    FIRST_NAMES,
    FOODS,
    JOBS,
    OBJECTS,
    SCHOOLS,
    SURNAMES,
    TOWNS,
)
from refimpl.world.mix import SHARES
from refimpl.world.people import KNOWN_PEOPLE
from refimpl.world.rng import Rng
from refimpl.world.tokens import train_tokenizer

POOLS = (FIRST_NAMES, SURNAMES, TOWNS, JOBS, COMPANIES, SCHOOLS, OBJECTS, CODES, ANIMALS, FOODS)
POOL_LINES = 400  # every pool word this often: enough for the rarest to become one token


def sample_of_mix(books: Path | None, megabytes: float, held_out: set[int]):
    """Texts in the proportions of the training mix."""
    rng = Rng("tokenizer")
    for name, share in SHARES.items():
        left = share / 100 * megabytes * 1e6
        while left > 0:
            text = BY_NAME[name].document(rng)
            left -= len(text)
            yield text
    left = 0.05 * megabytes * 1e6
    while left > 0:
        text = KNOWN_PEOPLE.document(rng)
        left -= len(text)
        yield text
    natural = {"docstrings": (0.12, list(docstrings(max_bytes=int(megabytes * 1e6)).documents))}
    if books:
        natural["books"] = (0.38, [t for i, t in enumerate(read_books(books)) if i not in held_out])
    for share, texts in natural.values():
        left = share * megabytes * 1e6
        while left > 0:
            text = rng.choice(texts)
            at = rng.below(max(1, len(text) - 20_000))
            piece = text[at : at + 20_000]
            left -= len(piece)
            yield piece
    for pool in POOLS:
        for _ in range(POOL_LINES):
            yield "".join(f" {word}" for word in rng.sample(pool, len(pool)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path)
    parser.add_argument("--held-out", type=int, nargs="*", default=[])
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--out", type=Path, default=Path("data/models/tokenizer.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = train_tokenizer(sample_of_mix(args.books, args.megabytes, set(args.held_out)))
    atomic_write(args.out, text.encode())
