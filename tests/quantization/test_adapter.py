"""The QLoRA adapter that ships, and the script that trained it."""

import json
import sys
from pathlib import Path

import pytest
from data_scripts import load_script

from refimpl.lora import load_lora
from refimpl.models import load, revision
from refimpl.paths import data_file
from refimpl.quantization.frozen import compress_frozen
from refimpl.quantization.harness import Probe, measure
from refimpl.quantization.nf4 import NF4
from refimpl.quantization.study import fact_questions, new_facts
from refimpl.results import changed_sources

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shipped():
    return json.loads(data_file("adapters", "qlora-facts-llama-mini.json").read_text())


def test_the_script_in_its_small_mode(tmp_path, monkeypatch):
    script = load_script("quantization_adapter")
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--device", "cpu", "--tiny"])
    assert script.main() == 0
    stored = json.loads((tmp_path / "qlora-facts-llama-mini.json").read_text())
    assert len(stored["losses"]) == 2 and len(stored["with"]["facts"]) == 3
    assert stored["with"]["nll"] != stored["without"]["nll"]
    assert "| with the adapter |" in (tmp_path / "qlora-facts-llama-mini.md").read_text()


def test_what_ships_is_of_these_sources_and_this_model(shipped):
    assert changed_sources(shipped, ROOT) == []
    assert (shipped["model"], shipped["revision"]) == ("llama-mini", revision("llama-mini"))
    assert data_file("adapters", "qlora-facts-llama-mini.safetensors").stat().st_size <= 3 * 2**20
    assert sum(shipped["with"]["facts"]) >= 57 and sum(shipped["without"]["facts"]) <= 6


def test_the_shipped_adapter_answers_here_as_it_did_where_it_was_trained(shipped):
    model, tokenizer = load("llama-mini")
    compress_frozen(model, NF4())
    probe = Probe({}, {"facts": fact_questions(tokenizer, new_facts(20))[:24]})
    assert measure(model, probe).exact["facts"].sum() <= 3
    load_lora(model, data_file("adapters", "qlora-facts-llama-mini.safetensors"))
    now = measure(model, probe).exact["facts"]
    assert now.sum() >= 22
