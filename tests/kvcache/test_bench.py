"""The scripts that measure: their small modes run; what is stored is of the sources that are here."""

import json
from pathlib import Path

import pytest
import torch
from data_scripts import load_script

from refimpl.models import new
from refimpl.results import changed_sources

ROOT = Path(__file__).parents[2]
STORED = ROOT / "data" / "results" / "kvcache"


def test_gpu_script_in_its_small_mode(tmp_path, monkeypatch):
    script, out, to = load_script("kvcache_gpu"), tmp_path / "out", tmp_path / "gpu.json"
    for options in (["--tiny", "--device", "cpu", "--out", out], ["--join", out, "--to", to]):
        monkeypatch.setattr("sys.argv", ["kvcache_gpu.py", *map(str, options)])
        with torch.random.fork_rng():  # the script seeds the global generator
            assert script.main() == 0
    runs = json.loads(to.read_text())["runs"]
    methods = ("full", "dynamic", "streaming_llm", "snapkv", "h2o", "d2o", "kivi", "minikv", "quest")
    assert set(runs) == {f"{method}-{n}" for method in methods for n in (256, 512)}
    assert all(row["error"] is None for row in runs.values())
    assert runs["full-256"]["held"]["payload"] == runs["dynamic-256"]["held"]["payload"]
    assert runs["minikv-256"]["share_of_full_bytes"] < 0.5
    assert all(len(row["seconds"]) >= 4 for row in runs.values())


def test_a_failure_is_a_result_and_the_others_go_on(monkeypatch):
    gpu = load_script("kvcache_gpu")

    def fails(model, n):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "METHODS", {"h2o": fails, **{m: gpu.METHODS[m] for m in ("full", "dynamic")}})
    rows = gpu.measure(gpu.build(gpu.TINY, "cpu", torch.float32), 64, 1, "cpu", 1)
    assert "out of memory" in rows["h2o"]["error"]
    assert rows["full"]["error"] is None and rows["dynamic"]["time_of_dynamic"]["value"] == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_the_race_compares_the_same_model(batch):
    bench, model = load_script("kvcache_bench"), new("llama-nano")
    rows = bench.at_a_quarter(model, batch, 64, 1, 1, ["streaming_llm", "h2o"])
    assert set(rows) == {"dynamic", "full", "streaming_llm", "h2o"}
    assert rows["full"]["against"] == "dynamic" and rows["h2o"]["against"] == "full"
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows.values())


def test_the_grid_names_every_method_and_stream():
    grid = load_script("kvcache_grid")
    cells = grid.cells()
    files = [grid.path_of(cell, piece) for cell in cells for piece in grid.pieces(cell)]
    assert len(set(cells)) == len(cells) and len(set(files)) == len(files)
    assert {cell[2] for cell in cells if cell[0] == "stream"} >= {"window", "streaming_llm", "lacache", "h2o"}
    assert {cell[1] for cell in cells} == {"llama-nano", "llama-mini", "gpt2-mini"}
    blocks = grid.blocks("streaming_llm", torch.randint(300, 400, (2, 12)), new("llama-nano"))
    assert blocks[-1]["tokens"] == 11 and len(blocks[-1]["nll"]) == 2


@pytest.mark.parametrize("name", ["grid", "streams", "bench", "gpu"])
def test_stored_results_are_of_these_sources(name):
    file = STORED / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"{file.name} is not there yet")
    assert changed_sources(json.loads(file.read_text()), ROOT) == []
