"""Every data item of every spec is served by something that exists, or says why it can wait."""

from __future__ import annotations

import importlib
import tomllib
from importlib.resources import files

import pytest

from refimpl.world.formats import BY_NAME

TABLE = files("refimpl.world") / "spec_items.toml"
ITEMS = tomllib.loads(TABLE.read_text(encoding="utf-8"))["item"]
REQUIRED = (
    [f"memory D{n}" for n in range(1, 7)]
    + ["kv stream", "kv recall"]
    + [f"alignment {n}" for n in range(1, 12)]
    + [f"interp E{n}" for n in range(1, 14)]
    + [f"rag {part}" for part in ("entities", "relations", "tier K", "tier F", "tier C", "record", "sizes")]
    + [f"rag format {what}" for what in ("answer", "unknown", "triples", "mem_read", "mem_write",
                                         "answerable", "attributes", "summary", "pronouns", "importance")]
    + [f"rag T{n}" for n in range(11)]
    + [f"footprint C6 {card}" for card in ("business", "long context", "conversation", "code", "literature",
                                           "support", "legal", "shape only")]
)  # fmt: skip
SERVERS = ("formats", "function", "label", "waits")


def problems(item: dict) -> list[str]:
    """What is wrong with one row."""
    found = [f"no {key!r}" for key in ("id", "spec", "what") if not item.get(key)]
    found += [f"unknown field {key!r}" for key in item if key not in ("id", "spec", "what", *SERVERS)]
    if not any(item.get(key) for key in SERVERS):
        found.append(f"served by nothing: give one of {', '.join(SERVERS)}")
    found += [f"no format {name!r}" for name in item.get("formats", ()) if name not in BY_NAME]
    for key in ("function", "label"):
        module, _, name = item.get(key, "").partition(":")
        if key in item and not hasattr(importlib.import_module(module), name):
            found.append(f"{key}: no {name!r} in {module}")
    return found


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item["id"])
def test_the_item_is_served(item):
    assert not problems(item)


def test_no_item_is_missing_or_listed_twice():
    ids = [item["id"] for item in ITEMS]
    assert len(ids) == len(set(ids))
    # "interp E6" may be cut into "interp E6 people", "interp E6 hops", ...
    missing = [need for need in REQUIRED if not any(i == need or i.startswith(need + " ") for i in ids)]
    assert not missing


def test_every_format_serves_an_item_and_says_so():
    served = {name for item in ITEMS for name in item.get("formats", ())}
    assert not set(BY_NAME) - served, "formats that no item needs"
    assert all(form.serves for form in BY_NAME.values())


def test_what_waits_gives_a_reason():
    assert all(len(item["waits"].split()) >= 6 for item in ITEMS if "waits" in item)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"formats": []},
        {"formats": ["no_such_format"]},
        {"function": "refimpl.world.streams:no_such_function"},
        {"label": "refimpl.world.stories:no_such_label"},
        {"waits": ""},
        {"formats": ["story"], "reason": "misspelt field"},
    ],
)
def test_a_bad_row_is_found(row):
    assert problems({"id": "x", "spec": "y", "what": "z", **row})
