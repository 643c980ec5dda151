"""The study of chapter 4's live comparisons on three models: cells, script in small, stored file."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_scripts import load_script

from refimpl.quantization.calibrate import stats_of
from refimpl.quantization.evaluation.long_context import position_gap
from refimpl.quantization.harness import change
from refimpl.quantization.spqr import SpQR
from refimpl.results import changed_sources, cpu, sha256
from refimpl.world.names import known_people
from refimpl.world.people import STRATA, stratum

ROOT = Path(__file__).parents[2]
STORED = ROOT / "data" / "results" / "quantization" / "models.json"


@pytest.fixture(scope="module")
def script():
    return load_script("quantization_models")


@pytest.fixture(scope="module")
def stored():
    if not STORED.is_file():
        pytest.skip(f"{STORED.name} is not there yet")
    return json.loads(STORED.read_text())


@pytest.fixture
def row(script):
    """An arm at one seed, of four documents and three questions."""
    return lambda values, digits="101": script.as_arm({"stories": np.array(values)}, {"known": digits})


def test_there_is_a_cell_for_each_system_model_and_seed_of_what_is_calibrated(script):
    cells = script.cells()
    assert len(cells) == len(set(cells)) == len({script.path_of(key) for key in cells}) == 39
    for model in ("llama-nano", "llama-mini", "gpt2-mini"):
        seeds = {name: {s for m, n, s in cells if (m, n) == (model, name)} for name in script.SYSTEMS}
        assert seeds.pop("quantized-entropy") == {0}
        assert len(seeds) == 4 and all(of_it == {0, 1, 2} for of_it in seeds.values())


def test_a_systems_sources_hold_every_module_that_its_arms_call(script):
    def called(code):
        yield from code.co_names
        for constant in code.co_consts:
            if hasattr(constant, "co_names"):
                yield from called(constant)

    for name, system in script.SYSTEMS.items():
        files = set(script.sources_of(name))
        assert "refimpl/quantization/texts.py" in files and all((ROOT / file).is_file() for file in files)
        for function in (system.arms, *system.helpers):
            for what in called(function.__code__):
                found = vars(script).get(what)
                module = getattr(found, "__module__", None) or ""
                if module.startswith(script.FOLLOWED):
                    assert module.replace(".", "/") + ".py" in files, (name, what)
                # Functions of the script itself must be part of the hash by which a cell is recognised.
                if module == script.__name__:
                    shared = {script.as_arm, script.sizes}
                    assert found in {*system.helpers, *shared}, (name, what)
    assert "refimpl/quantization/spqr.py" not in script.sources_of("hwpq")


def test_a_small_cell_runs_and_is_recognised_until_its_settings_change(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    key = ("llama-nano", "quantized-entropy", 0)
    assert not script.made(key)
    found = script.cell(key, True, "cpu")
    arms = found["arms"]
    assert {name for pair in script.SYSTEMS[key[1]].pairs for name in pair} == set(arms)
    assert all(len(arm["nll"]["topics"]) == 2 for arm in arms.values())
    for bits in (8, 4):
        H = [arms[f"{bits} bits, {group}"]["numbers"]["entropy"] for group in ("matrix", "row", "32")]
        assert H[0] < H[1] < H[2] < bits
    coded = arms["4 bits, matrix"]["numbers"]
    best = min(coded[coder] for coder in ("huffman", "rans", "zlib", "lzma"))
    assert coded["ratio"] == pytest.approx(4 / best, rel=1e-3) and coded["ratio"] > 1
    monkeypatch.setattr(script, "cell", lambda *job: dict(found))
    assert "4 bits, matrix" in script.work((key, True, "cpu")) and not script.path_of(key).exists()
    script.work((key, False, "cpu"))
    assert script.made(key)
    written = json.loads(script.path_of(key).read_text())
    assert written["hardware"] == cpu() and set(written["versions"]) == {"python", "torch", "transformers"}
    written["settings"]["measured"] = 1
    script.path_of(key).write_text(json.dumps(written))
    assert not script.made(key)


def test_a_failing_cell_tells_and_costs_no_other(script, monkeypatch):
    def fails(run, settings):
        raise ValueError("refused: no such layer")
        yield

    script.state_of("spqr")  # kept: the arms that follow have no such file
    monkeypatch.setitem(script.SYSTEMS, "spqr", replace(script.SYSTEMS["spqr"], arms=fails))
    told = script.work((("llama-nano", "spqr", 1), True, "cpu"))
    assert "llama-nano  spqr  1" in told and "ValueError: refused: no such layer" in told


def test_random_floats_cost_what_spqrs_do_and_lie_elsewhere(script):
    draws = torch.Generator().manual_seed(0)
    W, X = torch.randn(32, 64, generator=draws), torch.randn(199, 64, generator=draws)
    chosen = SpQR(3, threshold=0.3)("fc", W, stats_of(X))
    control = script.with_random_floats("fc", W, stats_of(X), chosen.values.numel(), draws)
    assert control.nbytes() == chosen.nbytes() and control.values.numel() > 0
    assert not torch.equal(control.columns, chosen.columns)
    # Grids fitted to all weights, and the same feedback: one float moves its own row only.
    none = SpQR(3, threshold=float("inf"))("fc", W, stats_of(X)).weight
    one = script.with_random_floats("fc", W, stats_of(X), 1, draws).weight
    same = torch.isclose(one, none, atol=1e-6).all(1)
    assert same.sum() == 31 and (one - W).abs()[~same].min() < 1e-3
    assert torch.equal(script.with_random_floats("fc", W, stats_of(X), 0, draws).weight, none)


def test_slopes_of_documents_have_the_mean_that_position_gap_finds(script):
    rng = np.random.default_rng(0)
    old = rng.normal(size=(5, 40))
    new = old + 0.01 * np.arange(1, 41) * np.arange(5)[:, None]
    found, whole = script.by_position(new, old), position_gap(new, old, n_bins=4)
    assert found["slope"] == pytest.approx(10 * np.arange(5), abs=1e-6)
    assert found["slope"].mean() == pytest.approx(whole.slope.value)
    for (a, b), gap in whole.bins.items():
        assert found[f"added at {a}-{b}"].mean() == pytest.approx(gap.value)
    assert found["stories"] == pytest.approx(new.mean(1))


def test_calibration_on_people_names_none_of_those_who_are_asked_about(script):
    run = script.Run("llama-nano", 1, "cpu")
    ids = script.side_door(run, "people", 3, 64)
    assert ids.shape == (3, 64) and (ids[:, 0] == run.tokenizer.bos_token_id).all()
    text = "".join(run.tokenizer.decode(row[1:]) for row in ids)
    known = {p for p in known_people() if stratum(p) == STRATA[-1]}
    assert not any(f" {person} " in text for person in known)
    assert any(person in text for person in known_people() if person not in known)
    other = script.side_door(script.Run("llama-nano", 2, "cpu"), "people", 3, 64)
    assert not torch.equal(ids, other)


def test_pairs_are_made_of_documents_and_of_questions(script, row):
    new, old = [1.0, 2.0, 3.0, 4.5], [0.5, 1.0, 2.0, 4.0]
    first, second = script.SYSTEMS["llmc"].pairs[0]
    arms = {name: {} for pair in script.SYSTEMS["llmc"].pairs for name in pair}
    for name in arms:
        arms[name] = {str(s): row(new if name == first else old) for s in range(3)}
    found = script.pairs_of("llmc", arms)[f"{first} - {second}"]
    assert found["stories"]["value"] == pytest.approx(0.75) and found["stories"]["holds"]
    assert found["known"]["value"] == 0 and not found["known"]["holds"]
    # One cell is enough only where nothing is calibrated or drawn.
    one = np.array([new]), np.array([old])
    assert script.compared("quantized-entropy", *one)["holds"] and not script.compared("llmc", *one)["holds"]


def test_joining_keeps_the_machines_that_measured(script, tmp_path, monkeypatch, row):
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    monkeypatch.setattr(script, "RESULT", tmp_path / "stored" / "models.json")
    assert script.join() == 1 and not script.RESULT.exists()
    system = script.SYSTEMS["spqr"]
    arms = {name: row([1.0, 2.0, 3.0, 4.5]) for pair in system.pairs for name in pair}
    for seed in (0, 1):
        found = {
            "revision": "r", "arms": arms, "cell": ("llama-nano", "spqr", seed), "seconds": 1.0,
            "hardware": f"machine {seed}", "versions": {"python": "3.12.0", "torch": f"2.{11 + seed}"},
            **script.state_of("spqr"),
        }  # fmt: skip
        script.path_of(("llama-nano", "spqr", seed)).write_text(json.dumps(found))
    assert script.join() == 1
    made = json.loads(script.RESULT.read_text())
    assert made["hardware"] == "machine 0; machine 1"
    assert made["versions"] == {"python": "3.12.0", "torch": "2.11, 2.12"}
    assert len(made["missing"]) == 37 and set(made["sources"]) == set(script.sources_of("spqr"))
    assert set(made["models"]["llama-nano"]["spqr"]["arms"]["SpQR"]) == {"0", "1"}


def test_what_is_stored_is_of_these_sources_and_settings_and_complete(script, stored):
    assert changed_sources(stored, ROOT) == [] and not stored["missing"]
    assert stored["settings"] == {name: script.state_of(name)["settings"] for name in script.SYSTEMS}
    assert STORED.stat().st_size < 700_000
    for model in script.MODELS:
        assert set(stored["models"][model]) == set(script.SYSTEMS)
        weights = ROOT / "data" / "models" / model / "model.safetensors"
        assert sha256(weights).startswith(stored["revisions"][model])


def test_pairs_follow_from_the_stored_values(script, stored):
    for systems in stored["models"].values():
        for name, found in systems.items():
            system = script.SYSTEMS[name]
            assert set(found["pairs"]) == {f"{a} - {b}" for a, b in system.pairs}
            for a, b in system.pairs:
                rows = [[script.values_of(r) for r in found["arms"][arm].values()] for arm in (a, b)]
                assert [len(of_it) for of_it in rows] == [len(system.seeds)] * 2
                for what, told in found["pairs"][f"{a} - {b}"].items():
                    new, old = (np.array([r[what] for r in of_it]) for of_it in rows)
                    moved = change(new.mean(0), old.mean(0))
                    assert told["by_seed"] == pytest.approx((new - old).mean(1), abs=1e-3)
                    assert (told["value"], told["lo"], told["hi"]) == pytest.approx(
                        (moved.value, moved.lo, moved.hi), abs=1e-3
                    )
                    beyond = told["lo"] > 0 or told["hi"] < 0
                    same_sign = len(set(np.sign(told["by_seed"]))) == 1
                    assert told["holds"] == (beyond and same_sign)


def test_stored_controls_are_what_they_must_be(script, stored):
    for systems in stored["models"].values():
        unmoved = systems["llmc"]["pairs"]["rounding, on topics - rounding, on stories"]
        assert all(x["lo"] == x["hi"] == 0 for x in unmoved.values())
        of = lambda arm, name, systems=systems: [
            row["numbers"]["bytes"] for row in systems[name]["arms"][arm].values()
        ]
        assert of("SpQR", "spqr") == of("random floats", "spqr")
        assert of("2 % largest", "long-context-compression") == of("2 % random", "long-context-compression")
        dense = systems["long-context-compression"]["arms"][script.DENSE]["0"]
        assert set(dense["nll"]["slope"]) == {0.0}
        for row in dense["items"].values():
            assert set(row) <= {"0", "1"} and len(row) == 50
