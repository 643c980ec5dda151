"""The small languages of the world in one list: dialects, law, households, patients, business, code."""

from __future__ import annotations

from refimpl.world import arithmetic, business, groups_dialects, household, patients, regulations, rude_words

FORMATS = [
    *groups_dialects.FORMATS,
    *rude_words.FORMATS,
    *regulations.FORMATS,
    *household.FORMATS,
    *patients.FORMATS,
    *business.FORMATS,
    *arithmetic.FORMATS,
]
