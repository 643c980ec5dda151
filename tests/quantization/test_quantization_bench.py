"""The scripts that measure speed: their parts run small."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_scripts import load_script
from safetensors.torch import load_file

from refimpl.checks.tiny import random_ids, tiny
from refimpl.quantization import CompressedLinear
from refimpl.quantization.kernels import BLOCKS


@pytest.fixture(scope="module")
def bench():
    return load_script("quantization_bench")


def test_every_way_to_multiply_is_timed_in_turns(bench):
    rows = bench.products(128, 1, 2, 1e-4)
    ours = {f"ours {name}" for name in ("int8", "int4", "w8a8")}
    assert {"float32", "bfloat16", "int4, unpacked whole", "int4, no kernel: blocks"} | ours <= set(rows)
    assert all(len(row["seconds"]) == 2 and row["ms"] > 0 for row in rows.values())
    assert all(row["over float32"]["ratio"] > 0 for row in rows.values())
    assert rows["float32"]["over float32"]["ratio"] == 1
    for name in ours:
        assert 0 < rows[name]["relative_error"] < 2e-2
    assert rows["ours int4"]["gigabytes_per_second"] > 0
    assert rows["ours int4"]["over reading its bytes"]["ratio"] > 0


def test_a_ratio_is_the_geometric_mean_of_the_turns(bench):
    found = bench.ratio([2.0, 8.0], [1.0, 1.0])
    assert found["ratio"] == pytest.approx(4) and found["lo"] <= 4 <= found["hi"]


def test_a_race_repeats_what_is_short_and_gives_seconds_of_one(bench, monkeypatch):
    now, calls = [0.0], {"short": 0, "long": 0}
    monkeypatch.setattr(bench, "time", SimpleNamespace(process_time=lambda: now[0]))

    def work(name, seconds):
        calls[name] += 1
        now[0] += seconds

    works = {"short": lambda: work("short", 2**-16), "long": lambda: work("long", 2**-7)}
    times = bench.race(works, 3, 2**-9)
    assert calls == {"short": 2 + 3 * 2**7, "long": 2 + 3}  # warming up, a first look, three turns
    assert times == {"short": [2**-16] * 3, "long": [2**-7] * 3}


def test_the_blocks_of_the_bench_are_those_of_a_torch_without_kernels(bench):
    layer = bench.without_kernel(bench.RECIPES["int4"]("", torch.randn(64, 64)))
    assert layer.kernel == BLOCKS
    assert bench.available.__name__ == "available" and bench.packed(bench.RECIPES["int4"], torch.eye(64))


def test_compressed_copies_leave_the_model_alone_and_share_nothing_large(bench):
    config = bench.WIDE | {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    model = bench.wide(config | {"num_attention_heads": 4, "num_key_value_heads": 4})
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    small = bench.compressed(model, bench.RECIPES["int4"])
    assert sum(isinstance(m, CompressedLinear) for m in small.modules()) == 7
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    rows = bench.generation(model, "small", 2, 1e-4)
    assert rows["decode"]["float32"]["bytes"] > rows["decode"]["ours int8"]["bytes"]
    assert rows["decode"]["ours int8"]["bytes"] > rows["decode"]["ours int4"]["bytes"]
    assert all(math.isfinite(row["tokens_per_second"]) for row in rows["decode"].values())
    assert set(rows["prompt"]) < set(rows["decode"])


def test_seconds_are_of_both_methods(bench, monkeypatch):
    model = tiny("llama", hidden_size=128, intermediate_size=128)
    monkeypatch.setattr(bench, "load", lambda name: (copy.deepcopy(model), None))
    monkeypatch.setattr(bench, "calibration_ids", lambda tokenizer, rows, length: random_ids(rows, length))
    found = bench.quantizing("any", 2, 16)
    assert set(found) == {"gptq", "awq"} and min(found.values()) > 0


def test_what_is_slower_than_required_is_named(bench, monkeypatch):
    monkeypatch.setattr(bench, "available", lambda kernel: True)
    fast, slow = ({"ratio": r, "lo": r, "hi": r} for r in (3.0, 0.5))
    row = lambda r: {"over float32": r, "over torch's kernel": fast}
    results = {f"{bench.SIZES[-1]}, 1": {"ours int8": row(fast), "ours int4": row(slow)}}
    decode = {"ours int8": row(slow), "ours int4": row(fast)}
    assert bench.slower(results, decode) == [
        "int8: tokens of the wide model", "int4, one token: over float32"
    ]  # fmt: skip
    monkeypatch.setattr(bench, "available", lambda kernel: False)
    assert bench.slower(results, decode) == []


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_our_side_of_the_comparison_leaves_weights_that_load(tmp_path, method):
    peers = load_script("quantization_peers")
    model = tiny("llama", hidden_size=128, intermediate_size=128)
    model.save_pretrained(tmp_path)
    np.save(tmp_path / "ids.npy", random_ids(4, 24).numpy())
    threads = torch.get_num_threads()
    try:
        peers.one_run("ours", method, tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / f"ours_{method}.json").read_text()).keys() == {"seconds", "wall"}
    weights = load_file(tmp_path / f"ours_{method}.safetensors")
    assert weights.keys() == dict(model.named_parameters()).keys()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert {name for name in weights if name.endswith("_proj.weight")} <= changed
