"""The reading adapter: its rows, its loss, its script on a small model; what ships does what was stored."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from refimpl.evaluate import wilson
from refimpl.lora import add_lora, load_lora, merge_lora, without_lora
from refimpl.models import evaluation, load, revision, tokenizer_from
from refimpl.paths import data_file
from refimpl.results import changed_sources
from refimpl.world.documents import people, read_passage
from refimpl.world.formats import BY_NAME
from refimpl.world.gates import Subject, format_items
from refimpl.world.rng import Rng
from refimpl.world.tokens import EOT, PAD

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = data_file("adapters", "reading-llama-mini.safetensors")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reading_adapter", ROOT / "data" / "reading_adapter.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reading_adapter"] = module  # where a forked worker looks for its function
    spec.loader.exec_module(module)
    yield module
    del sys.modules["reading_adapter"]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_from(data_file("models", "tokenizer.json"))


@pytest.fixture(scope="module")
def rows(script):
    return script.make_rows(4, data_file("models", "tokenizer.json"), workers=1)


# --- rows ---------------------------------------------------------------------------------------------------


def test_lines_of_a_document_mix_two_wordings_and_answers_stay(script):
    form, seen = BY_NAME["document_qa"], set()
    for i in range(60):
        facts = form.sample(Rng("mixed", i), "train")
        lines = script.reading_document(form, Rng("mixed", i)).split("\n")
        asked = [line.removeprefix("Answer: ") for line in lines if line.startswith("Answer: ")]
        assert asked == [answer for _, answer in facts["qa"]]
        assert lines[0] == "Context:" and not set(people("eval")) & set(" ".join(lines).split())
        for line in lines:
            if line.startswith("["):
                seen.add(read_passage(line.split("] ", 1)[1])[1])
    assert seen == {"train", "more"}


def test_rows_are_whole_documents(script, rows, tokenizer):
    reading, ordinary = rows
    assert reading.shape == ordinary.shape == (4, script.ROW) and reading.dtype == np.uint16
    assert (reading[:, 0] == EOT).all() and (ordinary[:, 0] == EOT).all()
    for row in reading:
        text = tokenizer.decode([int(t) for t in row if t != PAD])
        documents = [d for d in text.split("<|endoftext|>") if d]
        assert documents and all(d.startswith("Context:\n") and d.endswith("\n") for d in documents)
    assert (reading == PAD).mean() < 0.3
    again = script.make_rows(4, data_file("models", "tokenizer.json"), workers=2)
    assert np.array_equal(reading, again[0]) and np.array_equal(ordinary, again[1])


def test_pack_cuts_nothing_and_says_when_there_is_too_little(script):
    rows = script.pack([[5] * 600, [6] * 500, [7] * 2000, [8] * 300], 1)
    assert rows[0, 1:601].tolist() == [5] * 600 and rows[0, 601] == EOT and set(rows[0, 602:]) == {PAD}
    with pytest.raises(ValueError, match="fewer than 3"):
        script.pack([[5] * 600, [6] * 500], 3)


def test_answers_are_what_follows_the_word_to_the_end_of_the_line(script, rows, tokenizer):
    ids = tokenizer("\nQuestion: Who?\nAnswer: Bal Bert\nQuestion: What?\nAnswer: unknown\n")["input_ids"]
    mask = script.answer_mask(torch.tensor([ids]), script.answer_marks(tokenizer))[0]
    assert tokenizer.decode(torch.tensor(ids)[mask]) == " Bal Bert\n unknown\n"
    reading = torch.from_numpy(rows[0].astype(np.int64))
    found = script.answer_mask(reading, script.answer_marks(tokenizer))
    for row, marked in zip(reading, found, strict=True):
        text = tokenizer.decode(row)
        wanted = [line.removeprefix("Answer:") for line in text.split("\n") if line.startswith("Answer:")]
        assert tokenizer.decode(row[marked]).split("\n")[:-1] == wanted


# --- training -----------------------------------------------------------------------------------------------


def test_loss_is_that_of_the_answers_plus_the_divergence(script, rows, tokenizer):
    model, _ = load("llama-pocket")
    batches = script.Batches(*rows, batch=2, marks=script.answer_marks(tokenizer))
    batch = batches(0)
    add_lora(model, ("q_proj", "v_proj"), 2, 4.0, torch.Generator().manual_seed(0))
    loss = script.ReadingLoss(0.7)
    with torch.no_grad():
        at_first = loss(model, batch)
        ids, mask = batch["input_ids"], batch["answers"]
        logits = model(input_ids=ids).logits
        nll = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        assert at_first.item() == pytest.approx(nll[mask[0, 1:]].mean().item(), rel=1e-5)  # KL is 0
        for name, parameter in model.named_parameters():
            if name.endswith("lora.B"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        moved = model(input_ids=ids).logits
        with without_lora(model):
            base = model(input_ids=ids).logits
        assert torch.equal(base, logits)
        p, q = base[1].softmax(-1), moved[1].log_softmax(-1)
        there = ids[1] != PAD
        kl = (p * (p.log() - q)).sum(-1)[there].mean()
        nll = F.cross_entropy(moved[0, :-1], ids[0, 1:], reduction="none")
        wanted = nll[mask[0, 1:]].mean() + 0.7 * kl
        assert kl > 1e-3
        assert loss(model, batch).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_the_script_trains_writes_and_measures(script, tmp_path, monkeypatch):
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--tiny", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["reading_adapter.py", *arguments])
    assert script.main() == 0
    (file,) = tmp_path.glob("*/reading-llama-nano.safetensors")
    log = json.loads(file.with_suffix(".json").read_text())
    assert log["command"].startswith("python data/reading_adapter.py --out DIR ")
    assert [record["step"] for record in log["records"]] == [1, 2] and log["settings"]["steps"] == 2
    assert log["revision"] == revision("llama-nano") and not changed_sources(log, ROOT)
    assert [gate["metric"] for gate in log["gates"]] == ["qa"] and log["gates"][0]["n"] == 200
    assert "| question answering | must | 0.95 |" in file.with_suffix(".md").read_text()
    model, _ = load("llama-nano")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layers = load_lora(model, file)
    assert len(layers) == 7 * model.config.num_hidden_layers
    merge_lora(model)
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert len(changed) == len(layers)


# --- what ships ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    if not ADAPTER.exists():
        pytest.skip("data/adapters/reading-llama-mini.safetensors does not exist yet")
    return json.loads(ADAPTER.with_suffix(".json").read_text())


def test_what_ships_is_small_of_this_model_and_halves_what_the_model_misses(shipped):
    """It misses the two gates that llama-mini misses by less than their intervals, and costs no other."""
    assert ADAPTER.stat().st_size <= 3 * 2**20 and shipped["settings"]["rank"] <= 8
    assert shipped["revision"] == revision("llama-mini")
    gates = {gate["metric"]: gate for gate in shipped["gates"]}
    before = {gate["metric"]: gate for gate in evaluation("llama-mini")["gates"]}
    missed = {m for m, gate in gates.items() if gate["level"] == "must" and gate["passed"] is False}
    assert missed == {"qa", "false_unknown"}
    assert before["qa"]["value"] + 0.015 < gates["qa"]["value"] and gates["qa"]["hi"] > 0.95
    assert gates["false_unknown"]["value"] < 0.6 * before["false_unknown"]["value"]
    assert gates["false_unknown"]["hi"] < before["false_unknown"]["lo"]
    assert gates["false_unknown"]["lo"] < 0.05
    tried = json.loads(data_file("results", "reading_adapter.json").read_text())["trainings"]
    (ours,) = (run for run in tried if run["shipped"])
    assert ours["gates"]["question answering"]["value"] == gates["qa"]["value"] and len(tried) == 4


def test_sixty_questions_of_both_gates_agree_with_what_was_stored(shipped):
    model, tokenizer = load("llama-mini")
    load_lora(model, ADAPTER)
    gates = {gate["metric"]: gate for gate in shipped["gates"]}
    subject = Subject(model, tokenizer, max_tokens=2048)
    hits = subject.exact(format_items("document_qa", 60, "qa"))
    items = [item for item in format_items("document_unknown", 120, "unknown") if item[1] != " unknown"][:60]
    said = subject.exact([(prompt, " unknown") for prompt, _ in items])
    assert len(hits) == 60 and len(said) >= 50
    for metric, found in (("qa", hits), ("false_unknown", said)):
        now = wilson(int(found.sum()), len(found))
        assert now.lo <= gates[metric]["hi"] and gates[metric]["lo"] <= now.hi, (metric, now)
