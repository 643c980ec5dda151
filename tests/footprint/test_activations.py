"""Saved activations (footprint spec A2): the closed form equals the hooks, line by line and to the byte."""

import importlib.metadata
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
import transformers
from torch import nn

from refimpl.checks.tiny import random_ids, tiny
from refimpl.footprint import Arch, Run
from refimpl.footprint.activations import korthikanti, per_layer, rules, saved, saved_bytes
from refimpl.footprint.saved_tensors import record, saved_tensors
from refimpl.ledger import of_tensors

GPT2 = Arch("gpt2", 50257, 1024, 768, 3072, 12, 12, 12, 64, tied=True)
LLAMA = Arch("llama", 4096, 1024, 256, 688, 8, 8, 4, 32, tied=True)
FUSED = {"activation_function": "gelu_pytorch_tanh"}
MODELS = {
    "gpt2": ("gpt2", {}),
    "gpt2 untied, fused GELU": ("gpt2", FUSED | {"tie_word_embeddings": False}),
    "gpt2 of 1 head": ("gpt2", {"num_attention_heads": 1}),
    "llama tied, 2 of 4 KV heads": ("llama", {}),
    "llama untied, 4 of 4": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama, 1 of 4, wide heads": ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama, heads too wide for the shared kernel": ("llama", {"head_dim": 264}),
    "mistral below its window": ("mistral", {"sliding_window": 32}),
    "qwen2": ("qwen2", {}),
}  # fmt: skip


def step(model, batch, length, amp=False):
    ids = random_ids(batch, length)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    return forward, ids


def predicted(model, batch, length, attention, dtype="float32", amp=False):
    run = Run(batch, length, dtype, amp, attention)
    fused = getattr(model.config, "activation_function", "") == "gelu_pytorch_tanh"
    return saved(Arch.from_config(model.config), run, fused_gelu=fused)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_closed_form_equals_the_hooks_item_by_item(name, attention):
    family, changes = MODELS[name]
    for layers, sizes in {1: [(2, 8), (1, 7)], 2: [(3, 31)], 3: [(2, 8)]}.items():
        model = tiny(family, attention=attention, num_hidden_layers=layers, **changes)
        for batch, length in sizes:
            measured = saved_tensors(step(model, batch, length)[0], model)
            difference = predicted(model, batch, length, attention) - measured
            assert not difference.items, f"L={layers}, B={batch}, S={length}: {difference.items}"


@pytest.mark.parametrize(("dtype", "amp"), [("bfloat16", False), ("float16", False), ("float32", True)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_closed_form_equals_the_hooks_in_16_bits_and_under_autocast(name, attention, dtype, amp):
    family, changes = MODELS[name]
    model = tiny(family, attention=attention, num_hidden_layers=2, **changes).to(getattr(torch, dtype))
    for batch, length in ((2, 8), (1, 7)):
        measured = saved_tensors(step(model, batch, length, amp)[0], model)
        difference = predicted(model, batch, length, attention, dtype, amp) - measured
        assert not difference.items, f"B={batch}, S={length}: {difference.items}"


@pytest.mark.parametrize("arch", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_per_layer_equals_the_formulas_typed_again(arch):
    h, f, a, kv, d, B, S = arch.hidden, arch.ffn, arch.heads, arch.kv_heads, arch.head_dim, 2, 128
    n = B * S
    if arch.kind == "gpt2":
        old = transformers.__version__.startswith(
            ("5.2.", "5.3.")
        )  # scores divided by a tensor of one element
        layer = {"sdpa": n * (28 * h + 4 + a), "eager": n * (28 * h + a * S + 4) + old}
        outside = 4 * (n * (2 * h + 2) + n * arch.vocab) + 16 * n + 8 * S + 4
    else:
        layer = {"sdpa": n * (8 * h + 2 * kv * d + 4 * f + a + 2), "eager": n * (10 * h + 4 * f + a * S + 2)}
        outside = 4 * (n * (3 * h + 1) + 2 * S * d + n * arch.vocab) + 16 * n + 4
    for attention, floats in layer.items():
        run = Run(B, S, attention=attention)
        assert per_layer(arch, run) == 4 * floats
        assert saved(arch, run).total(view="resident") == arch.layers * 4 * floats + outside


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_more_layer_adds_the_predicted_bytes(family):
    for attention in ("eager", "sdpa"):
        models = [tiny(family, attention=attention, num_hidden_layers=layers) for layers in (1, 2)]
        one, two = (saved_tensors(step(m, 2, 16)[0], m).total(view="resident") for m in models)
        assert two - one == per_layer(Arch.from_config(models[0].config), Run(2, 16, attention=attention))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_eager_minus_sdpa_grows_as_the_square_of_the_length(family):
    models = {attention: tiny(family, attention=attention) for attention in ("eager", "sdpa")}

    def gap(length):
        eager, sdpa = (
            saved_tensors(step(models[attention], 2, length)[0], models[attention]).total(view="resident")
            for attention in ("eager", "sdpa")
        )
        return eager - sdpa

    gaps = [gap(length) for length in (8, 16, 24, 32)]
    second = {gaps[i] - 2 * gaps[i + 1] + gaps[i + 2] for i in range(2)}
    # a·S² floats per sequence and layer more in eager (B, a, L = 2, 4, 3); all else is linear in S.
    assert second == {2 * 4 * 3 * 2 * 4 * 8**2}


def test_bytes_of_sums_over_saved_tensors_are_too_many():
    model, naive = tiny("llama"), 0

    def pack(tensor):
        nonlocal naive
        naive += tensor.nbytes
        return tensor.detach()

    forward, _ = step(model, 2, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    weights = sum(p.nbytes for p in model.parameters())
    assert naive > saved_tensors(forward, model).total(view="resident") + weights


def test_lines_tell_module_op_shape_and_dtype():
    model = tiny("gpt2", num_hidden_layers=1)
    lines = record(step(model, 2, 8)[0], model)
    assert [(x.module, x.op, x.tensor, x.dtype) for x in lines if x.op == "softmax"] == [
        ("transformer.h.0.attn", "softmax", "[2, 4, 8, 8]", "float32")
    ]
    roles = rules(Arch.from_config(model.config), Run(2, 8, attention="eager"))
    assert [(x.module, x.op, x.numel) for x in lines] == [(x.module, x.op, x.numel) for x in roles]
    assert not model._forward_hooks and not model._forward_pre_hooks, "hooks are left behind"


def test_batch_is_left_out_where_another_ledger_counts_it():
    model = tiny("llama")
    forward, ids = step(model, 2, 8)
    measured = saved_tensors(forward, model, counted=[ids])
    assert (measured + of_tensors([("ids", ids)], "temp")).total() == saved_tensors(forward, model).total()
    without = saved(Arch.from_config(model.config), Run(2, 8, attention="eager"), ids_counted=True)
    assert not (without - measured).items


def test_branches_that_nothing_holds_are_not_counted():
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)

    def forward():
        layer(x).exp()  # its graph dies at once
        return layer(x).sum()

    assert [item.name for item in saved_tensors(forward, layer).items] == ["(model) linear float32"]


def test_backward_still_works_under_the_hooks():
    model, held = tiny("llama"), []
    forward, _ = step(model, 2, 8)
    forward().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    saved_tensors(lambda: held.append(forward()) or held[0], model)
    held[0].backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_korthikanti_without_dropout_is_the_bfloat16_layer_less_its_statistics():
    B, S, h, a = 2, 32, 32, 4
    models = [tiny("gpt2", num_hidden_layers=layers, **FUSED).bfloat16() for layers in (1, 2)]
    one, two = (saved_tensors(step(m, B, S)[0], m).total(view="resident") for m in models)
    statistics = 8 * S * B  # mean and deviation of two norms in bfloat16, which the paper neglects
    scale = 2 if version("transformers").startswith(("5.2.", "5.3.")) else 0  # then a tensor, of one element
    assert two - one == korthikanti(S, B, h, a, dropout=False) + statistics + scale
    # With dropout the masks take an activation's 2 bytes on the CPU where the paper has 1.
    for m in models:
        m.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, two = (saved_tensors(step(m, B, S)[0], m).total(view="resident") for m in models)
    masks_in_bytes = 2 * S * B * h + a * S * S * B
    assert two - one == korthikanti(S, B, h, a) + masks_in_bytes + statistics + scale


def test_korthikanti_variants():
    s, b, h, a, t = 2048, 1, 6144, 64, 8
    n = s * b * h
    assert korthikanti(s, b, h, a) == n * (34 + 5 * a * s / h)
    assert korthikanti(s, b, h, a, t=t) == n * (10 + 24 / t + 5 * a * s / (h * t))
    assert korthikanti(s, b, h, a, t=t, sequence_parallel=True) == n * (34 + 5 * a * s / h) / t
    assert korthikanti(s, b, h, a, t=t, recompute="selective") == n * (10 + 24 / t)
    assert korthikanti(s, b, h, a, recompute="selective") == 34 * n
    assert korthikanti(s, b, h, a, t=t, recompute="full") == 2 * n
    for bad in ({"t": 0}, {"recompute": "half"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            korthikanti(s, b, h, a, **bad)


@pytest.mark.parametrize("version", ["5.1.0", "5.24.0.dev0", "6.0.0"])
def test_another_release_of_transformers_is_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=f"5.2 to 5.23, found {version}"):
        saved(LLAMA, Run(1, 8))


@pytest.mark.parametrize(
    ("arch", "run", "named"),
    [
        (LLAMA, Run(1, 1), "length"),
        (LLAMA, Run(1, 1025), "length"),
        (LLAMA, Run(1, 8, checkpoint_every=1), "checkpoint_every"),
        (LLAMA, Run(1, 8, lora_rank=4), "lora_rank"),
    ],
)
def test_runs_without_rules_are_refused(arch, run, named):
    with pytest.raises(ValueError, match=named):
        saved(arch, run)


def test_configurations_without_rules_are_refused():
    with pytest.raises(ValueError, match="fused_gelu"):
        saved(LLAMA, Run(1, 8), fused_gelu=True)
    with pytest.raises(ValueError, match="activation_function.*relu"):
        saved_bytes({"model_type": "gpt2", "activation_function": "relu"}, 1, 8)
    with pytest.raises(ValueError, match="reorder_and_upcast_attn"):
        saved_bytes({"model_type": "gpt2", "reorder_and_upcast_attn": True}, 1, 8)
    with pytest.raises(ValueError, match="sliding_window"):
        saved_bytes(tiny("mistral").config, 1, 5)


def test_eager_saves_nothing_for_the_sliding_window():
    model = tiny("mistral")  # window 5
    measured = saved_tensors(step(model, 2, 8)[0], model).total(view="resident")
    assert measured == saved_bytes(model.config, 2, 8, attention="eager")


def test_forward_without_a_graph_is_refused():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="keeps no tensor"), torch.no_grad():
        saved_tensors(lambda: layer(torch.ones(1, 4)), layer)


def test_depth_and_ties_change_nothing_else():
    run = Run(2, 64)
    assert saved(replace(GPT2, tied=False), run) == saved(GPT2, run)
    assert saved(replace(GPT2, layers=1), run).total() < saved(GPT2, run).total()
