"""The calculator of the command line: exit codes, what it prints, and its need against measured peaks."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from refimpl.__main__ import main
from refimpl.checks.tiny import random_ids, tiny
from refimpl.footprint import Arch, Run
from refimpl.footprint.command import nbytes
from refimpl.footprint.instants import Plan, training
from refimpl.footprint.measure import measure_step
from refimpl.footprint.published import names
from refimpl.lora import add_lora

LLAMA = "meta-llama/Meta-Llama-3-8B"
GPT2 = "openai-community/gpt2"


def run(capsys, *arguments):
    code = main(["footprint", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def rows(text):
    """First word of each line of numbers -> the numbers."""
    parts = [line.split() for line in text.splitlines()]
    return {
        p[0]: [float(x.replace(",", "")) for x in p[1:]]
        for p in parts
        if len(p) in (3, 4) and all(x.replace(",", "").replace(".", "").isdigit() for x in p[1:])
    }


def test_the_reader_s_question(capsys):
    """Issue 3: LoRA on Llama-3-8B at 8192 tokens does not fit in 24 GB; QLoRA with checkpoints does."""
    code, out, _ = run(capsys, LLAMA, "--batch", "1", "--length", "8192", "--train", "lora", "--gpu", "24GB")
    assert code == 1 and "8,030,261,248 parameters" in out and "does not fit in 24.00 GB" in out
    table = rows(out)
    assert table["weight"] == [16.07] * 3 and table["temp"][0] == round(8 * 8192 * 128256 / 1e9, 2)
    assert table["total"] == [
        pytest.approx(sum(v[i] for k, v in table.items() if k != "total"), abs=0.04) for i in range(3)
    ]
    helps = [line for line in out.splitlines() if line.endswith("fits")]
    assert helps[0].startswith("QLoRA") and "not included" in out
    code, out, _ = run(capsys, LLAMA, "--length", "8192", "--train", "qlora", "--checkpoint", "--gpu", "24GB")
    assert code == 0 and "fits in 24.00 GB" in out


def test_serving_fits_or_says_what_would(capsys):
    code, out, _ = run(capsys, LLAMA, "--length", "8192", "--gpu", "24GB")
    assert code == 0 and rows(out)["kv"] == [1.07, 1.07]
    code, out, _ = run(capsys, LLAMA, "--length", "8192", "--batch", "16", "--gpu", "24GB")
    assert code == 1 and "largest batch at 8,192 tokens: 3" in out and "at batch 16: 1,024 tokens" in out
    for case in (["--batch", "3", "--length", "8192"], ["--batch", "16", "--length", "1024"]):
        assert run(capsys, LLAMA, *case, "--gpu", "24GB")[0] == 0
    assert run(capsys, LLAMA, "--batch", "4", "--length", "8192", "--gpu", "24GB")[0] == 1


def test_without_a_gpu_it_only_accounts(capsys):
    code, out, _ = run(capsys, "deepseek-ai/DeepSeek-V3", "--length", "8192")
    assert (
        code == 0
        and "1,342.05" in out
        and "(1,250." in out
        and "fit" not in out
        and "latent attention" in out
    )


def test_full_training_lists_the_ways_in_order(capsys):
    code, out, _ = run(capsys, LLAMA, "--train", "full", "--attention", "eager", "--batch", "4",
                       "--length", "2048", "--gpu", "24GB")  # fmt: skip
    ways = ["sdpa", "checkpointing", "batch 1", "LoRA", "QLoRA", "8-bit", "ZeRO 3"]
    places = [out.index(f"\n{way}") for way in ways]
    assert code == 1 and places == sorted(places)


def test_every_published_model_is_served(capsys):
    for name in names():
        assert run(capsys, name, "--length", "512")[0] == 0
    code, out, _ = run(capsys, "list")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == list(names())


def test_a_local_configuration_as_file_and_folder(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4}))
    for where in (path, tmp_path):
        code, out, _ = run(capsys, str(where), "--train", "full", "--dtype", "float32", "--gpu", "1GB",
                           "--length", "128")  # fmt: skip
        assert code == 0 and "parameters" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gpt5"], 1, "unknown model 'gpt5'"),
        (["Llama-3.2"], 1, "did you mean meta-llama/Llama-3.2-1B, meta-llama/Llama-3.2-3B"),
        ([GPT2, "--gpu", "24"], 2, "must be a number > 0 and a unit"),
        ([GPT2, "--gpu", "0GB"], 2, "must be a number > 0 and a unit"),
        ([GPT2, "--train", "half"], 2, "invalid choice: 'half'"),
        ([GPT2, "--gpu", "0.0001KB"], 2, "must be a number > 0 and a unit"),
        ([GPT2, "--batch", "0"], 2, "argument --batch: must be an integer >= 1, got '0'"),
        ([GPT2, "--length", "2048"], 2, "--length must be <= 1024"),
        ([GPT2, "--length", "-1"], 2, "argument --length: must be an integer >= 1, got '-1'"),
        ([GPT2, "--train", "full", "--length", "1"], 2, "--length must be >= 2 to train"),
        ([GPT2, "--zero", "3"], 2, "--zero is for training"),
        ([GPT2, "--optimizer", "sgd"], 2, "--optimizer is for training"),
        ([GPT2, "--attention", "eager"], 2, "--attention is for training"),
        ([GPT2, "--train", "full", "--rank", "4"], 2, "--rank is for --train lora and qlora"),
        ([GPT2, "--train", "lora", "--rank", "0"], 2, "argument --rank: must be an integer >= 1, got '0'"),
        ([LLAMA, "--train", "qlora", "--rank", "1025"], 2, "--rank must be <= 1024, the smaller side of v"),
        ([GPT2, "--train", "lora", "--zero", "1"], 2, "ZeRO is accounted for full training"),
        (
            [GPT2, "--train", "full", "--checkpoint", "40"],
            2,
            "--checkpoint must be <= 12, the model's layers",
        ),
        ([GPT2, "--train", "full", "--world", "8"], 2, "--world 8 needs --zero 1, 2 or 3"),
        (
            [GPT2, "--train", "full", "--zero", "3"],
            2,
            "--zero 3 shards over the GPUs of --world: add --world 2",
        ),
        (
            [GPT2, "--train", "full", "--zero", "1", "--world", "2", "--optimizer", "adafactor"],
            2,
            "with --zero, --optimizer must be one of adamw, momentum, sgd",
        ),
        ([GPT2, "--train", "full", "--amp", "--dtype", "float16"], 2, "leave out --dtype or make it float32"),
        (["Qwen/Qwen3-8B", "--train", "full"], 2, "use --train none"),
        ([], 2, "required: model"),
    ],
)
def test_wrong_usage_and_unknown_models(arguments, code, message, capsys):
    got, out, err = run(capsys, *arguments)
    assert (got, out) == (code, "") and message in err


def test_a_name_like_no_other_and_a_file_of_something_else(capsys, tmp_path):
    code, _, err = run(capsys, "Meta-Lama-3-8b")
    assert code == 1 and "did you mean meta-llama/Meta-Llama-3-8B" in err and "footprint list" in err
    assert "did you mean" not in run(capsys, "nowhere/config.json")[2]
    (tmp_path / "config.json").write_text("layers = 2")
    code, _, err = run(capsys, str(tmp_path))
    assert code == 2 and "config.json is not JSON" in err


def test_a_reader_who_leaves_early_is_no_error():
    process = subprocess.Popen([sys.executable, "-m", "refimpl", "footprint", "list"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 141
    process.stderr.close()


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("0.5 MB", 500_000)])
def test_sizes(text, size):
    assert nbytes(text) == size
    with pytest.raises(argparse.ArgumentTypeError):
        nbytes("-" + text)


def need(arch, plan):
    return max(ledger.total(view="resident") for ledger in training(arch, plan).values())


@pytest.mark.parametrize("checkpoint", [None, 1])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_need_is_the_measured_peak_where_logits_dominate(family, checkpoint):
    """But for the labels that the loss gives back and, with checkpoints, what waits to be used again."""
    drop = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0) if family == "gpt2" else {}
    make = lambda: tiny(family, vocab_size=2000, attention="sdpa", **drop)
    plan = Plan(Run(batch=8, length=32, checkpoint_every=checkpoint))
    arch = Arch.from_config(make().config)
    measured = measure_step(make, lambda: random_ids(8, 32), plan.run, fake=False).peak
    assert abs(need(arch, plan) - measured) <= (8 * 8 * 33 if checkpoint is None else 0.02 * measured)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_saves_no_more_than_the_bound(family):
    model = tiny(family, attention="sdpa")  # in eval mode: no dropout
    arch = Arch.from_config(model.config)
    targets = ("c_attn",) if family == "gpt2" else ("q_proj", "v_proj")
    add_lora(model, targets, rank=2, alpha=2, generator=torch.Generator().manual_seed(0))
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    ids = random_ids(2, 16)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    held = sum(storage.nbytes() for storage in storages.values())
    plan = Plan(Run(batch=2, length=16, lora_rank=2, lora_targets=targets), "lora")
    bound = training(arch, plan)["loss"].total("activation", "resident")
    assert 0.5 * bound < held <= bound


def test_each_way_lowers_the_need_of_a_7b_model():
    arch = Arch("llama", 32000, 4096, 4096, 11008, 32, 32, 32, 128, tied=False)
    base = {"batch": 4, "length": 2048, "dtype": "bfloat16"}
    plain = need(arch, Plan(Run(**base)))
    for better in (
        Plan(Run(**base, checkpoint_every=1)), Plan(Run(**(base | {"batch": 1}))),
        Plan(Run(**base, optimizer="adamw8bit")), Plan(Run(**base, lora_rank=8), "lora"),
        Plan(Run(**base, zero_stage=3, world=8)),
    ):  # fmt: skip
        assert need(arch, better) < plain, better
    lora, qlora = (need(arch, Plan(Run(**base, lora_rank=8), train)) for train in ("lora", "qlora"))
    assert qlora < lora < need(arch, Plan(Run(**base, attention="eager")))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(Run(), "half"), "train must be one of full, lora, qlora, got 'half'"),
        (Plan(Run(lora_rank=8, zero_stage=1), "lora"), "ZeRO is accounted for full training, not for lora"),
        (Plan(Run(lora_rank=8)), "lora_rank must be None"),
        (Plan(Run(), "lora"), "lora_rank must be an integer >= 1"),
    ],
)
def test_bad_plans_are_refused(plan, message):
    with pytest.raises(ValueError) as error:
        training(Arch.from_config({"model_type": "gpt2"}), plan)
    assert message in str(error.value)
