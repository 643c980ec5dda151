"""Pins: the SHA-256 of the first megabyte of every format, so that a machine that writes other text stops.

The models were trained on the text of one machine and are measured on that of another. `check_pins()` runs
before rows are prepared; a test runs it on shorter samples. A format that differs means another Python that
broke its promise about `random()`, or code that was changed after the formats were frozen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from refimpl.paths import data_file
from refimpl.world.formats import BY_NAME
from refimpl.world.rng import Rng

LENGTHS = (100_000, 1_000_000)  # bytes for which data/world/pins.json holds a digest


def format_digest(name: str, n_bytes: int = 1_000_000) -> str:
    """SHA-256 (hex) of the first `n_bytes` bytes of the training documents of one format.

    Parameters
    ----------
    name : str
        A format of `refimpl.world.formats`.
    n_bytes : int
        How much text, default 1 000 000 bytes; at least 1.

    Raises
    ------
    ValueError
        For an unknown format or no bytes.

    Examples
    --------
    >>> format_digest("mqar", 1000) == format_digest("mqar", 1000)
    True
    """
    if name not in BY_NAME:
        raise ValueError(f"name: {name!r} is not one of the formats {', '.join(BY_NAME)}")
    if n_bytes < 1:
        raise ValueError(f"n_bytes: {n_bytes!r} is not at least 1")
    rng, digest, left = Rng("pins", name), hashlib.sha256(), n_bytes
    while left > 0:
        piece = BY_NAME[name].document(rng).encode()[:left]
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()


def pins() -> dict[str, dict[str, str]]:
    """The stored digests: format -> number of bytes -> SHA-256.

    Examples
    --------
    >>> sorted(pins()["story"])
    ['100000', '1000000']
    """
    return json.loads(data_file("world", "pins.json").read_text())


def check_pins(names: Iterable[str] | None = None, n_bytes: int = 1_000_000) -> None:
    """Generate text of every format and compare it with the stored digests.

    Parameters
    ----------
    names : iterable of str or None
        Which formats; None means all of them (about 15 seconds at 1 MB each).
    n_bytes : int
        One of `LENGTHS`.

    Raises
    ------
    ValueError
        Naming every format whose text differs from the pin, or that has none.

    Examples
    --------
    >>> check_pins(["repeat"], 100_000)
    """
    if n_bytes not in LENGTHS:
        raise ValueError(f"n_bytes: {n_bytes!r} is not one of {LENGTHS}")
    stored = pins()
    chosen = tuple(BY_NAME) if names is None else tuple(names)
    without = [name for name in chosen if name not in stored]
    if without:
        raise ValueError(f"names: no pin for {', '.join(without)}; pinned are {', '.join(stored)}")
    wrong = [name for name in chosen if format_digest(name, n_bytes) != stored[name][str(n_bytes)]]
    if wrong:
        raise ValueError(
            f"format {', '.join(wrong)}: the first {n_bytes} bytes are not those that the bundled models "
            "were trained on; restore the code of refimpl/world, or use a Python from 3.11 to 3.13"
        )
