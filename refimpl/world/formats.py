"""Every format of the world, once: name -> exact text, with its prompt boundary and its inverse."""

from __future__ import annotations

from refimpl.world import (
    dialogues,
    document_formats,
    instructions,
    memory_calls,
    people,
    recall,
    small_worlds,
    story_formats,
)
from refimpl.world.base import Format

FORMATS: tuple[Format, ...] = (
    *story_formats.FORMATS,
    *document_formats.FORMATS,
    *recall.FORMATS,
    *people.FORMATS,
    *dialogues.FORMATS,
    *instructions.FORMATS,
    *memory_calls.FORMATS,
    *small_worlds.FORMATS,
)
BY_NAME: dict[str, Format] = {form.name: form for form in FORMATS}
assert len(BY_NAME) == len(FORMATS), "two formats share a name"
