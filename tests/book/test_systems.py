"""The catalogue: every row is valid, what is built is really there, and bad rows are refused."""
import importlib.util
from dataclasses import asdict
from pathlib import Path

import pytest

from refimpl import checks, systems
from refimpl.systems import System

ROOT = Path(__file__).resolve().parents[2]
BUILT = dict(chapter="kvcache", id="toy", name="Toy", kind="system", ref="113", module="refimpl.kvcache.toy",
             check="toy", notebook="chapters/05_kvcache/05_01_toy.ipynb", fidelity="exact",
             claim="It works.", measured="It does (n = 100).", verdict="reproduced")


def test_every_item_of_the_survey_has_a_row():
    """All references but the miscited 63, all equations, figures, algorithms and both tables."""
    rows = systems.load()
    assert {number for row in rows for number in row.survey_numbers} == set(range(1, 123)) - {63}
    places = {place for row in rows for place in row.survey_places}
    expected = {f"Eq. {n}" for n in range(1, 22)} | {f"Fig. {n}" for n in range(1, 10)}
    expected |= {f"Algorithm {n}" for n in range(1, 5)} | {"Table I", "Table II"}
    assert expected <= places, f"no row for {sorted(expected - places)}"


def test_the_reading_list_has_its_22_works():
    assert sum(bool(row.reading) for row in systems.load()) == 22


def test_built_rows_point_at_things_that_exist():
    for row in systems.systems(coming=False):
        assert (ROOT / row.notebook).is_file(), f"{row.id}: no file {row.notebook}"
        if row.module:
            assert importlib.util.find_spec(row.module), f"{row.id}: no module {row.module}"
        if row.check:
            assert row.check in checks.names(), f"{row.id}: no check {row.check}"


def test_a_complete_row_is_accepted():
    assert not System(**BUILT).coming
    System(**{**BUILT, "verdict": "not testable at this scale", "scale": "needs 7 B; tried 10 M, no effect"})
    System(**{**BUILT, "kind": "overview", "module": "", "check": "", "fidelity": "", "measured": "",
              "verdict": "no empirical claim"})


@pytest.mark.parametrize(("change", "words"), [
    ({"kind": "method"}, "kind = 'method' is not one of"),
    ({"chapter": "cache"}, "chapter = 'cache' is not one of"),
    ({"status": "done"}, "status = 'done' is not one of"),
    ({"verdict": "true"}, "verdict = 'true' is not one of"),
    ({"fidelity": "faithful"}, "fidelity = 'faithful' is not one of"),
    ({"fidelity": "scaled"}, "must say what differs"),
    ({"fidelity": "stand-in: "}, "must say what differs"),
    ({"id": "Heavy Hitter"}, "must be lower-case words"),
    ({"name": ""}, "name is empty"),
    ({"ref": ""}, "give ref"),
    ({"claim": ""}, "these are empty: claim"),
    ({"module": "", "check": ""}, "these are empty: module, check"),
    ({"measured": ""}, "these are empty: measured"),
    ({"verdict": "not testable at this scale"}, "scale"),
    ({"scale": "7 B"}, "scale"),
])
def test_a_bad_row_is_refused_with_its_address(change, words):
    with pytest.raises(ValueError, match="systems.toml") as error:
        System(**{**BUILT, **change})
    assert words in str(error.value)


def test_a_value_of_the_wrong_type_is_refused():
    with pytest.raises(TypeError, match="ref = 113 must be a string"):
        System(**{**BUILT, "ref": 113})


@pytest.mark.parametrize(("text", "error", "words"), [
    ("[kvcache.a\n", ValueError, "not valid TOML"),
    ("[cache.a]\nname = 'A'\nkind = 'system'\n", ValueError, "'cache' is not a chapter"),
    ("kvcache = 1\n", ValueError, "'kvcache' is not a chapter"),
    ("[kvcache]\na = 1\n", TypeError, "not a row"),
    ("[kvcache.a]\nname = 'A'\n", ValueError, "lacks ['kind']"),
    ("[kvcache.a]\nname = 'A'\nkind = 'system'\nverdit = 'x'\n", ValueError, "unknown fields ['verdit']"),
    ("[kvcache.a]\nname = 'A'\nkind = 'system'\nref = '1'\nstatus = 'coming'\n"
     "[svd.a]\nname = 'A'\nkind = 'system'\nref = '1'\nstatus = 'coming'\n",
     ValueError, "and again in [svd]"),
])
def test_a_bad_file_is_refused_with_its_name(tmp_path, text, error, words):
    path = tmp_path / "systems.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(error) as raised:
        systems.load(path)
    assert words in str(raised.value) and str(path) in str(raised.value)


def test_listing_selects_by_chapter_kind_and_state():
    everything = systems.systems()
    assert [asdict(row) for row in everything] == [asdict(row) for row in systems.load()]
    assert {row.chapter for row in systems.systems("svd")} == {"svd"}
    assert {row.kind for row in systems.systems(kind="algorithm")} == {"algorithm"}
    assert len(systems.systems(coming=True)) + len(systems.systems(coming=False)) == len(everything)


def test_unknown_names_are_answered_with_the_allowed_ones():
    with pytest.raises(ValueError, match="chapter = 'cache' is not one of start, footprint"):
        systems.systems("cache")
    with pytest.raises(ValueError, match="kind = 'paper' is not one of system"):
        systems.systems(kind="paper")
    with pytest.raises(ValueError, match="nearest: h2o"):
        systems.system("h20")
