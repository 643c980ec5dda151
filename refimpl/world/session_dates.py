"""Dates of dialogue sessions: long form, relative phrases and back."""

from __future__ import annotations

import re
from datetime import date
from functools import cache

from refimpl.world.lexicon import MONTHS, NUMBER_WORDS, WEEKDAYS
from refimpl.world.rng import Rng

FIRST_DAY = date(1950, 1, 1).toordinal()
N_DAYS = date(2010, 1, 1).toordinal() - FIRST_DAY
_NUMBERS = "|".join(NUMBER_WORDS[2:])
_WEEKDAY = "|".join(WEEKDAYS)
LONG_DATE = rf"(?:{_WEEKDAY}) \d{{1,2}} (?:{'|'.join(MONTHS)}) \d{{4}}"
WHEN = (
    rf"(?:[Yy]esterday|[Tt]omorrow|(?:[Ll]ast|[Nn]ext) (?:{_WEEKDAY})|(?:{_NUMBERS}) (?:days|weeks) ago"
    rf"|(?:{_NUMBERS.title()}) (?:days|weeks) ago|[Aa] week ago"
    rf"|[Ii]n (?:{_NUMBERS}) (?:days|weeks)|[Ii]n a week)"
)


def random_day(rng: Rng) -> str:
    """An ISO date of 1950-2009."""
    return shift(date.fromordinal(FIRST_DAY).isoformat(), rng.below(N_DAYS))


@cache
def _ordinal(iso: str) -> int:
    return date.fromisoformat(iso).toordinal()


@cache
def _iso(ordinal: int) -> str:
    return date.fromordinal(ordinal).isoformat()


def shift(iso: str, days: int) -> str:
    """The ISO date `days` later.

    Examples
    --------
    >>> shift("1987-02-28", 2)
    '1987-03-02'
    """
    return _iso(_ordinal(iso) + days)


@cache
def long_date(iso: str) -> str:
    """The date as the world writes it.

    Examples
    --------
    >>> long_date("1987-03-02")
    'Monday 2 March 1987'
    """
    d = date.fromisoformat(iso)
    return f"{WEEKDAYS[d.weekday()]} {d.day} {MONTHS[d.month - 1]} {d.year}"


def read_long_date(text: str) -> str:
    """The ISO date of a long date; ValueError when the weekday is wrong.

    Examples
    --------
    >>> read_long_date("Monday 2 March 1987")
    '1987-03-02'
    """
    if not re.fullmatch(LONG_DATE, text):
        raise ValueError(f"text: {text!r} is not a date like 'Monday 2 March 1987'")
    _, day, month, year = text.split()
    iso = date(int(year), MONTHS.index(month) + 1, int(day)).isoformat()
    if long_date(iso) != text:
        raise ValueError(f"text: {text!r} names the wrong weekday; that day is {long_date(iso)}")
    return iso


@cache
def _phrases(offset: int, weekday: int) -> tuple[str, ...]:
    n, name = abs(offset), WEEKDAYS[weekday]
    found = []
    if n == 1:
        found.append("yesterday" if offset < 0 else "tomorrow")
    if 2 <= n <= 6:
        found.append(f"{NUMBER_WORDS[n]} days ago" if offset < 0 else f"in {NUMBER_WORDS[n]} days")
    if 2 <= n <= 7:
        found.append(f"last {name}" if offset < 0 else f"next {name}")
    if n == 7:
        found.append("a week ago" if offset < 0 else "in a week")
    if n in (14, 21, 28):
        found.append(
            f"{NUMBER_WORDS[n // 7]} weeks ago" if offset < 0 else f"in {NUMBER_WORDS[n // 7]} weeks"
        )
    if not found:
        raise ValueError(f"offset: {offset} days has no relative phrase; allowed are ±1-7, ±14, ±21, ±28")
    return tuple(found)


PAST_OFFSETS = (-1, -1, -2, -3, -4, -5, -6, -7, -14, -21, -28)
FUTURE_OFFSETS = tuple(-n for n in PAST_OFFSETS)


def relative(today: str, day: str, rng: Rng) -> str:
    """A relative phrase for `day` said on `today`."""
    there = _ordinal(day)
    options = _phrases(there - _ordinal(today), (there - 1) % 7)
    return options[int(rng.random() * len(options))]


@cache
def _offsets(weekday: int) -> dict[str, int]:
    found = {}
    for n in {*PAST_OFFSETS, *FUTURE_OFFSETS}:
        for phrase in _phrases(n, (weekday + n) % 7):
            found[phrase] = n
    return found


def resolve(today: str, phrase: str) -> str:
    """The ISO date a relative phrase means when said on `today`.

    Examples
    --------
    >>> resolve("1987-03-02", "last Friday"), resolve("1987-03-02", "in two weeks")
    ('1987-02-27', '1987-03-16')
    """
    offsets = _offsets((_ordinal(today) - 1) % 7)
    key = phrase[0].lower() + phrase[1:]
    if key not in offsets:
        raise ValueError(f"phrase: {phrase!r} is not a relative date")
    return shift(today, offsets[key])
