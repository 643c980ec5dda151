"""The world is the same text on every machine: digests of every format, and errors that name what differs."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from refimpl.world import pins
from refimpl.world.formats import BY_NAME
from refimpl.world.pins import LENGTHS, check_pins, format_digest
from refimpl.world.rng import Rng


def test_every_format_writes_what_it_wrote_when_it_was_frozen():
    check_pins(n_bytes=100_000)


@pytest.mark.parametrize("name", ["story", "repeat", "regulations"])
def test_a_megabyte_is_the_same(name):
    check_pins([name])


def test_every_format_is_pinned_at_every_length():
    stored = pins.pins()
    assert set(stored) == set(BY_NAME)
    digests = [digest for row in stored.values() for digest in row.values()]
    assert len(set(digests)) == len(digests) == len(BY_NAME) * len(LENGTHS)
    assert all(tuple(map(int, row)) == LENGTHS for row in stored.values())


def test_the_digest_is_that_of_exactly_so_many_bytes():
    rng, text = Rng("pins", "ticket"), b""
    while len(text) < 5000:
        text += BY_NAME["ticket"].document(rng).encode()
    for n in (1, 4999, 5000):
        assert format_digest("ticket", n) == hashlib.sha256(text[:n]).hexdigest()


def test_a_changed_format_is_named(monkeypatch):
    right = BY_NAME["ticket"]
    changed = replace(right, render=lambda facts, rng: right.render(facts, rng).replace("Ticket", "ticket"))
    monkeypatch.setitem(BY_NAME, "ticket", changed)
    with pytest.raises(ValueError, match="format ticket: the first 100000 bytes"):
        check_pins(["case", "ticket"], 100_000)


def test_bad_input():
    with pytest.raises(ValueError, match="n_bytes: 5 is not one of"):
        check_pins(n_bytes=5)
    with pytest.raises(ValueError, match="no pin for no_such_format"):
        check_pins(["no_such_format"])
    with pytest.raises(ValueError, match="name: 'no_such_format'"):
        format_digest("no_such_format")
    with pytest.raises(ValueError, match="n_bytes: 0"):
        format_digest("story", 0)
