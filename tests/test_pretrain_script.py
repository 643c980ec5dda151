"""`python data/pretrain.py` without a step does all of them, and nothing twice."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("pretrain_script", ROOT / "data" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    done = []

    def run(args):
        args.out.mkdir(parents=True, exist_ok=True)
        done.append((args.what, args.name) if args.name else args.what)
        names = {"prepare": "prepared.json", "pocket": "pocket.npy", "train": "model.safetensors"}
        (args.out / names.get(args.what, "evaluation.json")).write_text("{}")

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", str(tmp_path / "rows")])
    return module, done


def test_all_steps_run_once_and_a_second_call_does_nothing(script):
    module, done = script
    module.main()
    assert done[:2] == ["prepare", "pocket"]
    assert ("train", "llama-mini") in done and ("measure", "gpt2-mini") in done
    assert ("measure", "llama-pocket") not in done and len(done) == 2 + 5 + 4
    module.main()
    assert len(done) == 11
