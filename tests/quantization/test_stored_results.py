"""The scripts that measure chapter 4 run in their small modes; what is stored is of these sources."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from data_scripts import load_script

from refimpl.checks.tiny import random_ids, tiny
from refimpl.models import load
from refimpl.quantization.catalogue import METHODS, compress
from refimpl.quantization.harness import Probe, change, measure, standard_probe
from refimpl.results import changed_sources

ROOT = Path(__file__).parents[2]
STORED = ROOT / "data" / "results" / "quantization"


@pytest.mark.parametrize(
    "name",
    ["grid", "gpu", "bench", "peers", "trained", "trained-llama-mini", "trained-gpt2-mini", "models"],
)
def test_stored_results_are_of_these_sources(name):
    file = STORED / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"{file.name} is not there yet")
    assert changed_sources(json.loads(file.read_text()), ROOT) == []


def test_stored_cells_name_settings_that_are_still_those_of_the_catalogue():
    stored = json.loads((STORED / "grid.json").read_text())
    assert stored["settings"] == {name: METHODS[name].settings for name in stored["settings"]}
    for table in stored["models"].values():
        assert set(table) - {"none"} <= set(METHODS) and "none" in table


def test_gpu_script_in_its_small_mode(tmp_path, monkeypatch):
    gpu, out, to = load_script("quantization_gpu"), str(tmp_path / "out"), tmp_path / "gpu.json"
    for given in (["--tiny", "--device", "cpu", "--out", out], ["--join", out, "--to", str(to)]):
        monkeypatch.setattr(sys, "argv", ["quantization_gpu.py", *given])
        assert gpu.main() == 0
    runs = json.loads(to.read_text())["runs"]
    assert set(runs) == {f"{size}-{method}-4-g128" for size in ("1.3B", "7B") for method in ("gptq", "rtn")}
    for run in runs.values():
        assert run["error"] is None and len(run["blocks_s"]) == 2 and len(run["layers"]) == 14
        assert sum(run["blocks_s"]) <= run["seconds"] + 0.1 and run["bytes_after"] < run["bytes_before"]


def test_the_grid_names_every_method_and_finds_its_sources():
    grid = load_script("quantization_grid")
    cells = grid.cells()
    assert len(set(cells)) == len(cells) == len({grid.path_of(cell) for cell in cells})
    assert {cell[1] for cell in cells} == {*METHODS, grid.DENSE}
    for method in METHODS:
        assert all((ROOT / file).is_file() for file in grid.sources_of(method))
    assert grid.state_of("gptq 3 g32") != grid.state_of("gptq 4 g32")


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="name must be one of"):
        compress("gptq 5", tiny("llama"), random_ids(1, 8))


def test_a_model_loses_nothing_against_itself_and_something_when_compressed():
    model, tokenizer = load("llama-nano")
    probe = standard_probe(tokenizer, documents=2, items=1, length=64)
    same = measure(model, probe, model)
    assert all(np.abs(values).max() < 1e-6 for values in same.kl.values())
    assert all(values.max() == 0 for values in same.flip.values())
    assert set(same.exact) == set(probe.items) and same.accuracy("known") == 1
    worse, _ = load("llama-nano")
    compress("rtn 3 row", worse, random_ids(2, 16))
    lost = measure(worse, probe, model)
    assert lost.kl["stories"].mean() > 0.5 and lost.perplexity("stories") > 2 * same.perplexity("stories")
    assert change(lost.nll["topics"], same.nll["topics"]).value > 0.2


def test_the_two_dialects_say_the_same():
    _, tokenizer = load("llama-nano")
    probe = standard_probe(tokenizer, documents=3, items=1, length=32)
    upland, lowland = (tokenizer.decode(probe.documents[name][0, 1:]) for name in ("upland", "lowland"))
    named = lambda text: {w.strip(".") for w in text.split() if w[0].isupper() and w != "In"}
    said = [named(text) for text in (upland, lowland)]
    assert upland != lowland and len(said[0] & said[1]) >= 0.8 * len(said[0])  # the same people and towns
    with pytest.raises(ValueError, match=">= 1"):
        standard_probe(tokenizer, documents=0)
    with pytest.raises(ValueError, match="neither"):
        measure(load("llama-nano")[0], Probe({}, {}))
