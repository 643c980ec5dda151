"""Measured steps equal the closed forms to the byte, real or fake; 70 billion parameters cost no memory."""

import subprocess
import sys

import pytest
import torch

from refimpl.checks.tiny import random_ids, tiny
from refimpl.footprint.activations import saved
from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.measure import measure, measure_step, peak, peak_points
from refimpl.footprint.static import static

SMALL = Run(batch=2, length=16, attention="eager")


NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FIELDS = {"gpt2": NO_DROPOUT, "llama": {}, "untied": {"tie_word_embeddings": False}}


def _model(family, run, **changes):
    """A model of the tiny configuration in the dtype that is the default now (`tiny` itself: float32)."""
    import transformers

    config = tiny(family, attention=run.attention, **changes).config
    return getattr(transformers, {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[family])(config)


def _tiny(family, run, fake=True, vocab_size=600):
    """Measure a tiny model; with this vocabulary the logits can be the peak."""
    changes = FIELDS[family] | {"vocab_size": vocab_size}
    family = "llama" if family == "untied" else family
    arch = Arch.from_config(tiny(family, **changes).config)
    model = lambda: _model(family, run, **changes)
    return arch, measure_step(model, lambda: random_ids(run.batch, run.length), run, fake)


@pytest.mark.parametrize(("family", "fake"), [("gpt2", False), ("llama", False), ("llama", True)])
def test_every_term_equals_its_closed_form(family, fake):
    arch, measured = _tiny(family, SMALL, fake)
    predicted = static(arch, SMALL) + saved(arch, SMALL)
    assert predicted.by_kind("resident") == measured.ledger.by_kind("resident")
    assert peak(arch, SMALL, predicted) == measured.peak


@pytest.mark.parametrize(
    ("family", "point", "run"),
    [
        ("llama", "loss", Run(batch=2, length=32, attention="eager")),
        ("llama", "loss", Run(batch=1, length=32, attention="eager")),
        ("llama", "loss", Run(batch=2, length=32, attention="sdpa", accumulate=2)),
        ("llama", "loss", Run(batch=2, length=32, attention="eager", dtype="bfloat16", optimizer="momentum")),
        ("gpt2", "loss", Run(batch=2, length=32, attention="eager", optimizer="sgd")),
        ("gpt2", "embedding", Run(batch=1, length=4, attention="eager", optimizer="sgd")),
        ("llama", "embedding", Run(batch=1, length=4, attention="eager")),
        ("llama", "embedding", Run(batch=1, length=4, attention="eager", dtype="bfloat16")),
        ("llama", "embedding", Run(batch=2, length=8, attention="eager", checkpoint_every=1)),
        ("untied", "loss", Run(batch=2, length=32, attention="eager")),
        ("untied", "embedding", Run(batch=1, length=4, attention="eager", optimizer="sgd")),
        ("untied", "update", Run(batch=1, length=4, attention="eager")),
        ("untied", "update", Run(batch=1, length=4, attention="eager", checkpoint_every=3)),
    ],
    ids=str,
)
def test_peak_equals_its_closed_form_at_each_point(family, point, run):
    arch, measured = _tiny(family, run, fake=False)
    points = peak_points(arch, run, measured.ledger)
    assert max(points, key=points.get) == point
    assert points[point] == peak(arch, run, measured.ledger) == measured.peak
    assert sum(measured.at_peak.values()) == measured.peak


def test_where_a_recomputed_block_is_the_peak_the_closed_form_is_a_lower_bound():
    run = Run(batch=2, length=32, attention="eager", optimizer="sgd", checkpoint_every=3)
    arch, measured = _tiny("llama", run, fake=False, vocab_size=48)
    assert peak(arch, run, measured.ledger) < measured.peak


def test_numbers_of_a_model_of_five_million_parameters():
    """117,168,488 bytes eager, and one copy of the gradients more from the second micro-batch on."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    arch = Arch.from_config(config)
    peaks, ids = {}, torch.zeros(2, 128, dtype=torch.int64)
    for accumulate in (1, 2):
        run = Run(batch=2, length=128, attention="eager", accumulate=accumulate)
        measured = measure_step(lambda: transformers.LlamaForCausalLM(config), lambda: ids, run, fake=False)
        peaks[accumulate] = measured.peak
        assert peak(arch, run, measured.ledger) == measured.peak
    assert arch.parameters() == 5_401_856
    assert peaks == {1: 117_168_488, 2: 117_168_488 + 4 * 5_401_856}


def test_checkpointing_saves_less_and_after_forward_the_graph_is_alive():
    plain = _tiny("llama", SMALL, fake=False)[1]
    run = Run(batch=2, length=16, attention="eager", checkpoint_every=1)
    checkpointed = _tiny("llama", run, fake=False)[1]
    assert checkpointed.ledger.total("activation") < plain.ledger.total("activation") / 2
    assert checkpointed.after_forward < plain.after_forward
    held = plain.ledger.by_kind("resident")
    loss = 4
    assert plain.after_forward == sum(held.values()) - held["grad"] + loss


def test_autocast_keeps_casts_of_weights_and_float32_parameters():
    runs = [Run(batch=2, length=16, attention="eager", amp=on) for on in (True, False)]
    amp, plain = (_tiny("llama", run, fake=False)[1].ledger for run in runs)
    for kind in ("weight", "grad", "optim"):
        assert amp.total(kind) == plain.total(kind)
    assert amp.total("activation") > plain.total("activation")


def test_adafactor_holds_rows_and_columns():
    run = Run(batch=2, length=16, attention="eager", optimizer="adafactor")
    arch, measured = _tiny("llama", run, fake=False)
    assert measured.ledger.total("optim") == static(arch, run).total("optim")
    with pytest.raises(ValueError, match="fake must be False for 'adafactor'"):
        _tiny("llama", run, fake=True)


def test_global_state_is_left_alone():
    before = torch.get_rng_state()
    run = Run(batch=2, length=16, attention="eager", dtype="bfloat16")
    measure(lambda: _model("llama", run), lambda: random_ids(2, 16), run, fake=False)
    with pytest.raises(ZeroDivisionError):
        measure(lambda: 1 / 0, lambda: random_ids(2, 16), run)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (Run(lora_rank=4), "lora_rank=4"),
        (Run(zero_stage=2), "zero_stage=2"),
        (Run(world=2), "world=2"),
        (Run(optimizer="adamw8bit"), "run.optimizer must be one of adamw, .*, got 'adamw8bit'"),
    ],
)
def test_runs_that_others_account_for_are_refused(run, message):
    def unused():
        raise AssertionError("called before the run was refused")

    with pytest.raises(ValueError, match=message):
        measure(unused, unused, run)
    with pytest.raises(ValueError, match=message):
        peak_points(Arch("gpt2", 48, 32, 32, 128, 3, 4, 4, 8, tied=True), run, None)


@pytest.mark.parametrize("run", [Run(amp=True), Run(optimizer="adafactor")])
def test_closed_form_refuses_what_it_does_not_cover(run):
    with pytest.raises(ValueError, match="without adafactor and amp"):
        peak_points(Arch("gpt2", 48, 32, 32, 128, 3, 4, 4, 8, tied=True), run, None)


@pytest.mark.parametrize(
    ("model", "batch", "error", "message"),
    [
        (lambda: "llama", lambda: random_ids(2, 16), TypeError, "make_model must return a module, got str"),
        (lambda: tiny("llama"), lambda: [1, 2], TypeError, "make_batch must return a tensor, got list"),
        (lambda: tiny("llama"), lambda: random_ids(2, 8), ValueError, r"shape \(2, 16\), got .*\(2, 8\)"),
        (lambda: tiny("llama"), lambda: torch.zeros(2, 16), ValueError, "int64 ids .* got torch.float32"),
        (lambda: tiny("llama", attention="sdpa"), lambda: random_ids(2, 16), ValueError, "got 'sdpa'"),
        (lambda: tiny("llama").double(), lambda: random_ids(2, 16), ValueError, "run.dtype 'float32', got"),
    ],
)
def test_what_disagrees_with_the_run_is_refused(model, batch, error, message):
    with pytest.raises(error, match=message):
        measure(model, batch, SMALL, fake=False)


def _fake_llama(layers, checkpoint_every):
    """Measure layers of Llama-2-70B in a process of its own -> (peak, peak of its memory)."""
    program = f"""
import resource, torch, transformers
from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.measure import measure_step, peak
torch.set_num_threads(1)
config = transformers.LlamaConfig(
    vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers={layers},
    num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=4096, attn_implementation="sdpa")
run = Run(batch=1, length=4096, dtype="bfloat16", checkpoint_every={checkpoint_every})
ids = torch.zeros(1, 4096, dtype=torch.int64)
measured = measure_step(lambda: transformers.LlamaForCausalLM(config), lambda: ids, run)
assert peak(Arch.from_config(config), run, measured.ledger) == measured.peak
print(measured.peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    held, memory = done.stdout.split()
    return int(held), int(memory)


def test_a_wide_model_that_would_need_tens_of_gigabytes_costs_no_memory():
    held, memory = _fake_llama(layers=1, checkpoint_every=None)
    assert held > 10e9
    assert memory < 1.5e9


@pytest.mark.slow
def test_70_billion_parameters_without_memory():
    held, memory = _fake_llama(layers=80, checkpoint_every=1)
    assert held == 553_222_507_852  # 8 bytes per parameter and the update's two copies of the largest tensor
    assert memory < 1.5e9
