"""The static terms of LoRA and QLoRA runs equal what a real training step holds, to the byte."""

import pytest
import torch

from refimpl.checks.tiny import random_ids, tiny
from refimpl.footprint.adam8bit import AdamW8bit
from refimpl.footprint.adapters import lora_static, qlora_static
from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.qlora import ledger_of, quantize_model
from refimpl.footprint.static import measure_static
from refimpl.ledger import Ledger
from refimpl.lora import add_lora, merge_lora

IDS = random_ids(2, 8)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
}
CASES = [
    ("gpt2", ("c_attn",), 4, "adamw"),
    ("gpt2", ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"), 2, "momentum"),
    ("llama", ("q_proj", "v_proj"), 8, "adamw"),
    ("llama", ("q_proj", "down_proj"), 3, "adafactor"),
    ("mistral", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 4, "adamw"),
    ("qwen2", ("v_proj",), 4, "sgd"),
]


def stepped(family, targets, rank, optimizer, *, quantised=False, **changes):
    """A model after one real step of its factors, and the optimizer."""
    model = tiny(family, **changes)
    if quantised:
        quantize_model(model)
    add_lora(model, targets, rank, 2.0 * rank, torch.Generator().manual_seed(0))
    optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    return model, optimizer


def held(model, optimizer, kinds):
    return Ledger(tuple(item for item in measure_static(model, optimizer).items if item.kind in kinds))


def tensors(ledger, view):
    """Bytes by kind and name; a tied head, counted with the embedding, is left out."""
    return {(item.kind, item.name): getattr(item, view) for item in ledger.items if item.numel}


@pytest.mark.parametrize("view", ["payload", "resident"])
@pytest.mark.parametrize(("family", "targets", "rank", "optimizer"), CASES)
def test_lora_static_equals_a_real_step(family, targets, rank, optimizer, view):
    model, real = stepped(family, targets, rank, optimizer)
    run = Run(lora_rank=rank, lora_targets=targets, optimizer=optimizer)
    predicted = lora_static(Arch.from_config(model.config), run)
    measured = measure_static(model, real)
    assert predicted.by_kind(view) == measured.by_kind(view)
    assert tensors(predicted, view) == tensors(measured, view)


def test_gradients_and_adam_are_r_times_m_plus_n():
    model, optimizer = stepped("llama", ("q_proj", "v_proj"), 8, "adamw")
    numel = 3 * 8 * ((32 + 32) + (32 + 16))  # 3 layers, q [32, 32] and v [16, 32]
    assert held(model, optimizer, {"grad"}).total() == 4 * numel
    assert held(model, optimizer, {"optim"}).total() == 2 * 4 * numel + 4 * 12  # a step count per factor


def test_8bit_states_of_the_factors():
    model = tiny("llama", hidden_size=1024, num_hidden_layers=1)
    add_lora(model, ("q_proj", "v_proj"), 8, 8.0, torch.Generator().manual_seed(0))
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad])
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    run = Run(lora_rank=8, optimizer="adamw8bit")
    predicted = lora_static(Arch.from_config(model.config), run)
    for view in ("payload", "resident"):
        assert predicted.by_kind(view) == measure_static(model, optimizer).by_kind(view)


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 160, "num_hidden_layers": 2}])
@pytest.mark.parametrize(("family", "targets", "rank", "optimizer"), CASES)
def test_qlora_static_equals_a_real_step(family, targets, rank, optimizer, changes):
    model, real = stepped(family, targets, rank, optimizer, quantised=True, **changes)
    run = Run(lora_rank=rank, lora_targets=targets, optimizer=optimizer)
    predicted = qlora_static(Arch.from_config(model.config), run)
    measured = ledger_of(model) + held(model, real, {"grad", "optim"})
    for view in ("payload", "resident"):
        assert predicted.by_kind(view) == measured.by_kind(view)
        assert tensors(predicted, view) == tensors(measured, view)


def test_an_untied_head_can_be_a_target_and_stays_float():
    model, optimizer = stepped("llama", ("lm_head",), 4, "adamw", tie_word_embeddings=False)
    run = Run(lora_rank=4, lora_targets=("lm_head",))
    arch = Arch.from_config(model.config)
    assert lora_static(arch, run).by_kind() == measure_static(model, optimizer).by_kind()
    heads = [i.payload for i in qlora_static(arch, run).items if i.name == "lm_head.weight"]
    assert heads == [4 * 48 * 32]


def test_a_quantised_model_cannot_be_merged():
    model, _ = stepped("llama", ("q_proj",), 4, "sgd", quantised=True)
    with pytest.raises(TypeError, match="NF4Linear without a weight"):
        merge_lora(model)


def test_70b_without_a_tensor():
    arch = Arch("llama", 32000, 4096, 8192, 28672, 80, 64, 8, 128, tied=False)
    run = Run(dtype="bfloat16", lora_rank=16)
    full, small = lora_static(arch, run), qlora_static(arch, run)
    assert full.total("weight") > 2 * arch.parameters() and small.total() / 2**30 < 36
    assert full.total("optim") == small.total("optim") < full.total("weight") / 1000


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (Run(), "run.lora_rank must be an integer >= 1"),
        (Run(lora_rank=4, lora_targets=("c_attn",)), "no 'c_attn' in a llama; allowed: down_proj"),
        (Run(lora_rank=4, lora_targets=("embed_tokens",)), "no 'embed_tokens'"),
        (Run(lora_rank=17), "must be <= 16 for model.layers.0.self_attn.v_proj, got 17"),
        (Run(lora_rank=4, lora_targets=()), "lora_targets must name"),
        (Run(lora_rank=4, zero_stage=1, world=2), "zero_stage"),
    ],
)
def test_bad_input_is_refused(run, message):
    arch = Arch.from_config(tiny("llama").config)
    for function in (lora_static, qlora_static):
        with pytest.raises(ValueError, match=message):
            function(arch, run)
