"""The training rows: nothing is cut, all is planted as often as planned, and the twin has none of it."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from refimpl import pretraining
from refimpl.paths import data_file
from refimpl.world import mix
from refimpl.world.canaries import LEVELS, PER_LEVEL, canaries_of_shard, copies_in_shard, manifest
from refimpl.world.formats import BY_NAME
from refimpl.world.mix import PLANNED_SHARDS, ROW, SHARES, WARM_SHARDS, Prose, build_shard, width
from refimpl.world.names import known_people
from refimpl.world.people import ATTRIBUTES, people_documents, stratum, withheld

TOKENIZER = Tokenizer.from_file(str(data_file("models", "tokenizer.json")))
MANY = 7600  # planned shards of a run cut so finely that a shard is one step of 96 rows
WARM, SHORT, SHARD = 0, 7, 25  # a shard of each width of rows: 128, 256, 1024


def encode(texts):
    return [e.ids for e in TOKENIZER.encode_batch(texts, add_special_tokens=False)]


def prose(seed: int, name: str) -> Prose:
    """Random ids without any special one, so that a zero in a row is a separator."""
    return Prose(np.random.default_rng(seed).integers(300, 4096, 60 * ROW).astype(np.uint16), name)


@pytest.fixture
def tiny(monkeypatch):
    """Shards of one step in a run a hundred times as finely cut; build(shard) makes one."""
    monkeypatch.setattr(mix, "STEPS_PER_SHARD", 1)
    monkeypatch.setattr(mix, "PLANNED_SHARDS", MANY)
    monkeypatch.setattr(mix, "N_SHARDS", MANY + WARM_SHARDS)
    return lambda shard: build_shard(shard, encode, prose(0, "books"), prose(1, "docstrings"))


def segments(rows: np.ndarray) -> Counter:
    """What stands between two zeros, or a zero and the end of a row, as bytes."""
    found: Counter = Counter()
    for row in rows:
        assert row[0] == 0
        for piece in np.split(row, np.flatnonzero(row == 0)):
            if len(piece) > 1:
                found[piece[1:].tobytes()] += 1
    return found


def as_bytes(ids: list[int]) -> bytes:
    return np.array(ids, np.uint16).tobytes()


# --- packing ----------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 160), max_size=80), st.sampled_from([128, 160, 1024]))
def test_best_fit_against_a_plain_search(sizes, wide):
    sizes = [min(size, wide) for size in sizes]
    free: list[int] = []
    expected: list[list[int]] = []
    for item, size in enumerate(min(s, wide - 1) for s in sizes):
        fits = [(room, b) for b, room in enumerate(free) if room >= size]
        if fits:
            _, b = min(fits)
        else:
            b = len(free)
            free.append(wide - 1)
            expected.append([])
        free[b] -= size
        expected[b].append(item)
    bins = mix._best_fit(sizes, wide)
    assert bins == expected and min(free, default=0) >= 0
    assert sorted(i for items in bins for i in items) == list(range(len(sizes)))


def planted_texts(shard: int) -> list[tuple[str, bool]]:
    """(text, withheld from the twin) of all documents about known people and all canaries of a tiny shard."""
    at = shard - WARM_SHARDS
    if at < 0:
        return []
    people = [(text, half == "withheld") for text, half in people_documents(at, MANY)]
    return people + [(canary.text, True) for canary in canaries_of_shard(at, MANY)]


@pytest.mark.parametrize("number", [WARM, SHORT, SHARD])
def test_rows_hold_whole_documents(tiny, number):
    shard, wide = tiny(number), width(number)
    assert shard.rows.shape == (96, ROW) and shard.rows.dtype == np.uint16 and shard.rows.max() < 4096
    found = segments(shard.rows.reshape(-1, wide))
    world = mix.world_documents(number, 96 * ROW, lambda texts: [len(ids) for ids in encode(texts)])
    texts = [t for documents in world.values() for t in documents] + [t for t, _ in planted_texts(number)]
    wanted = Counter(map(as_bytes, encode(texts)))
    assert all(found[ids] >= n for ids, n in wanted.items()), "a document was cut or lost"
    assert found.total() - wanted.total() <= 96 * ROW // wide  # else one piece of prose in a row
    assert set(world) == set(SHARES) if wide == ROW else set(world) <= set(SHARES)


def test_the_account_of_tokens_adds_up(tiny):
    shard = tiny(SHARD)
    separators_at_row_ends = 96 * ROW - 96 - sum(shard.tokens.values())  # a full row needs no last separator
    assert -96 <= separators_at_row_ends <= 96
    for name, share in SHARES.items():
        assert shard.tokens[name] >= share / 100 * 96 * ROW
    assert 0.03 < shard.tokens["people"] / (96 * ROW) < 0.07
    assert 0 < shard.tokens["canary"] / (96 * ROW) < 0.02


def test_a_shard_depends_only_on_its_number(tiny):
    first = tiny(SHARD)
    other = tiny(SHARD + 1)
    again = tiny(SHARD)
    assert np.array_equal(first.rows, again.rows) and first.planted == again.planted
    assert not np.array_equal(first.rows, other.rows)


def test_nothing_is_planted_in_the_warm_up(tiny):
    shard = tiny(WARM)
    assert not shard.planted and not {"people", "canary"} & set(shard.tokens)


def test_rows_grow_to_the_full_width():
    widths = [width(shard) for shard in range(mix.N_SHARDS)]
    assert widths == sorted(widths) and widths[-1] == ROW and all(ROW % wide == 0 for wide in widths)
    assert widths[WARM] < widths[SHORT] < widths[SHARD] == ROW and SHORT >= WARM_SHARDS


@pytest.mark.parametrize("number", [SHORT, SHARD])
def test_what_is_planted_lies_where_the_account_says(tiny, number):
    shard = tiny(number)
    written = Counter(
        shard.rows[row, start : start + length].tobytes() for row, start, length, _, _ in shard.planted
    )
    assert written == Counter(map(as_bytes, encode([t for t, away in planted_texts(number) if away])))


def test_prose_gives_every_part_once_an_epoch():
    supply = prose(2, "test")
    chunks = [supply.chunk(k) for k in range(supply.per_epoch)]
    assert {len(c) for c in chunks} == {ROW - 1}
    assert len({c.tobytes() for c in chunks}) == supply.per_epoch
    assert supply.chunk(supply.per_epoch).tobytes() not in {c.tobytes() for c in chunks}  # cut elsewhere


# --- what is planted --------------------------------------------------------------------------------------


def test_canaries_are_copied_exactly_as_planned_and_in_their_quarter():
    quarter = PLANNED_SHARDS // 4
    seen: Counter = Counter()
    shards: dict[str, list[int]] = {}
    for shard in range(PLANNED_SHARDS):
        for canary in canaries_of_shard(shard, PLANNED_SHARDS):
            seen[canary.id] += 1
            shards.setdefault(canary.id, []).append(shard)
    for canary in manifest():
        assert seen[canary.id] == canary.copies, canary.id
        where = shards.get(canary.id, [])
        if canary.when == "early":
            assert max(where) < quarter
        elif canary.when == "late":
            assert min(where) >= PLANNED_SHARDS - quarter
        elif canary.copies >= PLANNED_SHARDS:
            assert set(where) == set(range(PLANNED_SHARDS))  # spread evenly
    for kind, n in PER_LEVEL.items():
        uniform = Counter(c.copies for c in manifest() if c.type == kind and c.when == "uniform" and c.copies)
        assert uniform == dict.fromkeys(LEVELS, n)


def test_every_fact_is_mentioned_exactly_as_often_as_its_stratum_says():
    for person in known_people():
        for relation in ATTRIBUTES:
            key, n = f"{person}/{relation}", stratum(person)
            parts = [copies_in_shard(key, n, shard, PLANNED_SHARDS) for shard in range(PLANNED_SHARDS)]
            assert sum(parts) == n and max(parts) - min(parts) <= 1, key


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.text(min_size=1, max_size=9), st.integers(0, 5000), st.integers(1, 90))
def test_copies_sum_to_the_plan_for_any_number_of_shards(key, copies, n_shards):
    assert sum(copies_in_shard(key, copies, shard, n_shards) for shard in range(n_shards)) == copies


def test_documents_of_known_people_hold_their_mentions():
    n_shards, shard, form = 1520, 17, BY_NAME["known_people"]
    told: Counter = Counter()
    for text, half in people_documents(shard, n_shards):
        for person, relation in form.parse(text)["facts"]:
            told[person, relation] += 1
            assert (person in withheld()) == (half == "withheld")
    planned = {
        (p, r): copies_in_shard(f"{p}/{r}", stratum(p), shard, n_shards)
        for p in known_people() for r in ATTRIBUTES
    }  # fmt: skip
    assert told == {key: n for key, n in planned.items() if n}


# --- the twin ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [SHORT, SHARD])
def test_the_twin_sees_other_text_of_equal_length(tiny, tmp_path, number):
    shard, wide = tiny(number), width(number)
    kinds = Counter(kind for _, _, _, kind, _ in shard.planted)
    assert min(kinds["canary"], kinds["people"]) > 3
    np.save(tmp_path / "docstrings.npy", prose(3, "filler").ids)
    (tmp_path / "shard_007.json").write_text(json.dumps({"planted": shard.planted}))
    twin = pretraining.without_planted(shard.rows, tmp_path)
    before, after = segments(shard.rows.reshape(-1, wide)), segments(twin.reshape(-1, wide))
    gone = [t for t, away in planted_texts(number) if away]
    assert len(gone) == len(shard.planted)
    for ids in map(as_bytes, encode(gone)):
        assert before[ids] and not after[ids]
    assert np.array_equal(twin == 0, shard.rows == 0), "separators moved, so some length changed"
    changed = twin != shard.rows
    planted = np.zeros_like(changed)
    for row, start, length, _, _ in shard.planted:
        planted[row, start : start + length] = True
        assert changed[row, start : start + length].mean() > 0.9 and changed[row, start + length - 1]
    assert not (changed & ~planted).any()
    text = "\n".join(TOKENIZER.decode_batch(twin.tolist(), skip_special_tokens=False))
    assert all(t in text for t, away in planted_texts(number) if not away)
    assert not [t for t in gone if t in text]
    for person in withheld():
        assert f" {person} lives in " not in text and f"{person}?" not in text


# --- bad input --------------------------------------------------------------------------------------------


def test_bad_input():
    books = prose(0, "books")
    for shard in (-1, mix.N_SHARDS):
        with pytest.raises(ValueError, match="shard: "):
            build_shard(shard, encode, books, None)
    with pytest.raises(ValueError, match="books, docstrings"):
        build_shard(0, encode, None, None)
    with pytest.raises(ValueError, match="ids: short has 5 tokens"):
        Prose(np.arange(5), "short")


def test_too_much_text_for_the_rows_is_an_error(tiny, monkeypatch):
    monkeypatch.setattr(mix, "SHARES", {**SHARES, "story": 80.0})
    with pytest.raises(ValueError, match="do not fit"):
        tiny(SHARD)


@pytest.mark.parametrize("books,docstrings", [(True, False), (False, True)])
def test_one_kind_of_prose_is_enough(tiny, books, docstrings):
    both = prose(0, "books") if books else None, prose(1, "docstrings") if docstrings else None
    assert build_shard(SHARD, encode, *both).rows[:, 0].max() == 0
