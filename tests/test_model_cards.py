"""The cards say what was stored: regenerated, they do not change."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from refimpl.models import bundled, evaluation, folder_of, revision

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("model_cards", ROOT / "tools" / "model_cards.py")
model_cards = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(model_cards)


def test_every_bundled_model_has_a_card_and_none_is_old():
    assert set(model_cards.ABOUT) == set(bundled())
    assert model_cards.stale() == []


@pytest.mark.parametrize("name", [n for n in model_cards.ABOUT if n != "llama-pocket"])
def test_gates_were_measured_on_the_weights_that_ship(name):
    found = evaluation(name)
    assert found.get("revision", revision(name)) == revision(name)
    assert len(found["gates"]) >= 20


@pytest.mark.parametrize("name", list(model_cards.ABOUT))
def test_history_holds_the_whole_run(name):
    history = json.loads((folder_of(name) / "history.json").read_text())
    losses = [r["loss"] for r in history["records"]]
    assert history["records"][-1]["step"] == history["run"]["config"]["steps"]
    assert losses[-1] < losses[0] / 2


def test_the_twin_knows_nothing_of_the_withheld_half_and_no_canary():
    clean = json.loads((folder_of("llama-nano-clean") / "history.json").read_text())["evaluations"][-1]
    nano = json.loads((folder_of("llama-nano") / "history.json").read_text())["evaluations"][-1]
    assert clean["facts"]["train/10000/withheld"] < 0.1 < 0.9 < nano["facts"]["train/10000/withheld"]
    assert clean["facts"]["train/10000/kept"] > 0.9
    assert max(clean["extracted"].values()) == 0 < max(nano["extracted"].values())
