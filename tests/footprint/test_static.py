"""The static terms of Eq. 1: prediction equals measurement to the byte."""

import numpy as np
import pytest
import torch

from refimpl.checks.tiny import random_ids, tiny
from refimpl.footprint import Arch, Run
from refimpl.footprint.adam8bit import AdamW8bit
from refimpl.footprint.static import measure_static, static, static_bytes
from refimpl.ledger import of_file
from refimpl.paths import data_file

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
}
MODELS = {
    "gpt2 tied": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama tied, GQA": ("llama", {}),
    "llama untied, MHA": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama MQA": ("llama", {"num_key_value_heads": 1}),
    "mistral, wide heads": ("mistral", {}),
    "qwen2, biases": ("qwen2", {}),
}
WIDE = (
    "llama",
    {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 101, "tie_word_embeddings": False},
)
LLAMA2_70B = {
    "model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip


def _model(name, dtype="float32"):
    """Built in `dtype`, as `from_pretrained(dtype=...)` does, so that RoPE's frequencies stay float32."""
    import transformers as hf

    family, changes = WIDE if name == "llama, wide" else MODELS[name]
    config = tiny(family, **changes).config
    with torch.random.fork_rng(devices=[]):
        return hf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def _step(model, optimizer):
    ids = random_ids(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_prediction_is_what_one_real_step_leaves_tensor_by_tensor(name, dtype, optimizer):
    model = _model(name, dtype)
    trainer = OPTIMIZERS[optimizer](model.parameters())
    _step(model, trainer)
    predicted = static(Arch.from_config(model.config), Run(dtype=dtype, optimizer=optimizer))
    measured = measure_static(model, trainer)
    assert (predicted - measured).items == ()
    for view in ("payload", "resident"):
        assert predicted.by_kind(view) == measured.by_kind(view)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_payload_of_the_safetensors_file(name, tmp_path):
    model = _model(name, "bfloat16")
    model.save_pretrained(tmp_path)
    predicted = static(Arch.from_config(tmp_path / "config.json"), Run(dtype="bfloat16", optimizer="sgd"))
    assert of_file(tmp_path / "model.safetensors").total() == predicted.total("weight")


@pytest.mark.parametrize("name", ["gpt2-mini", "llama-mini"])
def test_weights_of_the_bundled_models_are_the_payload_of_their_files(name):
    arch = Arch.from_config(data_file("models", name, "config.json"))
    held = of_file(data_file("models", name, "model.safetensors")).total()
    assert static(arch, Run(dtype="bfloat16")).total("weight") == held == 2 * arch.parameters()


@pytest.mark.parametrize(
    ("config", "parameters", "tensors", "buffer"),
    [({"model_type": "gpt2"}, 124_439_808, 148, 0), (LLAMA2_70B, 68_976_648_192, 723, 2 * 64 * 4)],
    ids=["GPT-2", "Llama-2-70B"],
)
@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_published_models_on_the_meta_device(config, parameters, tensors, buffer, dtype, width):
    import transformers as hf

    changes = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        built = hf.AutoConfig.for_model(config["model_type"], **changes)
        model = hf.AutoModelForCausalLM.from_config(built, dtype=getattr(torch, dtype))
    trainer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    trainer.step()  # makes the states of 70 billion parameters without memory
    predicted, measured = static(Arch.from_config(built), Run(dtype=dtype)), measure_static(model, trainer)
    assert (predicted - measured).items == ()
    assert predicted.by_kind("resident") == measured.by_kind("resident")
    assert predicted.total("weight") == parameters * width
    assert predicted.total("optim") == 2 * parameters * width + 4 * tensors
    assert predicted.total("buffer", "resident") == buffer


@pytest.mark.parametrize("name", MODELS)
def test_equation_1_typed_again_in_numpy(name):
    """P in closed form; then M_model + M_gradients + M_optimizer = (4 + 4 + 8) P + 4 per tensor."""
    arch = Arch.from_config(_model(name).config)
    V, S, h, f, L = np.array([arch.vocab, arch.positions, arch.hidden, arch.ffn, arch.layers])
    a, kv, d = np.array([arch.heads, arch.kv_heads, arch.head_dim])
    heads = 1 if arch.tied else 2
    if arch.kind == "gpt2":
        P, tensors = heads * V * h + S * h + L * (12 * h**2 + 13 * h) + 2 * h, 3 + heads + 12 * L
    else:
        P = heads * V * h + L * (2 * a * d * h + 2 * kv * d * h + 3 * h * f + 2 * h) + h
        P += L * (a + 2 * kv) * d * arch.qkv_bias
        tensors = 1 + heads + (9 + 3 * arch.qkv_bias) * L
    assert static(arch, Run()).total() == 16 * P + 4 * tensors


def test_a_tie_is_counted_once():
    tied, untied = (Arch.from_config(_model(f"gpt2 {word}").config) for word in ("tied", "untied"))
    saved = static(untied, Run()) - static(tied, Run())
    assert saved.total() == 16 * 48 * 32 + 4
    assert {item.name.removesuffix(".weight") for item in saved.items if item.kind != "optim"} == {"lm_head"}


def test_autocast_accumulation_and_batch_move_no_static_byte():
    arch = Arch.from_config({"model_type": "gpt2"})
    plain = static(arch, Run())
    assert static(arch, Run(batch=64, length=8, amp=True, accumulate=4, checkpoint_every=1, world=8)) == plain


def test_8_bit_states_are_codes_scales_and_two_maps():
    """By hand: 64 x 100 = 6400 codes are 25 blocks; 64 x 63 = 4032 elements stay float32."""
    arch = Arch("llama", 100, 16, 64, 100, 1, 1, 1, 63, tied=False)
    ledger = static(arch, Run(optimizer="adamw8bit", dtype="bfloat16"))
    sizes = {}
    for item in ledger.items:
        if item.kind == "optim" and not item.name.endswith("_map"):
            tensor = item.name.rpartition(".")[0]
            sizes[tensor] = sizes.get(tensor, 0) + item.payload
    assert sizes["model.layers.0.mlp.up_proj.weight"] == 2 * (6400 + 25 * 4)
    assert sizes["lm_head.weight"] == 2 * (6400 + 25 * 4)
    assert sizes["model.embed_tokens.weight"] == 2 * 6400 * 4  # an embedding
    assert sizes["model.layers.0.self_attn.q_proj.weight"] == 2 * 4032 * 4  # too small
    assert ledger.total("optim") == sum(sizes.values()) + 2 * 256 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama, wide", *MODELS])
def test_8_bit_prediction_is_what_adamw8bit_holds_with_embeddings_in_float32(name, dtype):
    model = _model(name, dtype)
    embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    others = [p for p in model.parameters() if p not in embeddings]
    trainer = AdamW8bit([{"params": list(embeddings), "bits": 32}, {"params": others}])
    _step(model, trainer)
    predicted = static(Arch.from_config(model.config), Run(dtype=dtype, optimizer="adamw8bit"))
    assert (predicted - measure_static(model, trainer)).items == ()
    assert predicted.total("optim") == trainer.ledger().total()
    assert ("m_map" in {item.name for item in predicted.items}) is (name == "llama, wide" or "gpt2" in name)


def test_8_bit_states_approach_2_03125_bytes_per_parameter():
    arch = Arch.from_config(LLAMA2_70B)
    embedding = 32000 * 8192
    rest = static(arch, Run(optimizer="adamw8bit")).total("optim") - 8 * embedding
    assert rest / (arch.parameters() - embedding) == pytest.approx(2 * (1 + 4 / 256), abs=1e-6)


def test_nothing_but_weights_before_the_first_backward_and_no_gradients_after_zero_grad():
    model = _model("llama tied, GQA")
    trainer = OPTIMIZERS["adamw"](model.parameters())
    assert set(measure_static(model, trainer).by_kind("resident")) == {"weight", "buffer"}
    _step(model, trainer)
    trainer.zero_grad()
    assert set(measure_static(model, trainer).by_kind()) == {"weight", "buffer", "optim"}


def test_frozen_weights_have_neither_gradients_nor_states():
    model = _model("llama tied, GQA")
    model.requires_grad_(False)
    gain = model.model.norm.weight.requires_grad_(True)
    trainer = OPTIMIZERS["adamw"]([gain])
    _step(model, trainer)
    measured = measure_static(model, trainer)
    assert (measured.total("grad"), measured.total("optim")) == (32 * 4, 2 * 32 * 4 + 4)


def test_casting_a_model_halves_its_rope_buffers_too():
    built, cast = _model("llama tied, GQA", "bfloat16"), _model("llama tied, GQA").to(torch.bfloat16)
    resident = [measure_static(model).total("buffer", "resident") for model in (built, cast)]
    assert resident == [2 * 4 * 4, 2 * 4 * 2]


def test_static_bytes_counts_residents():
    config = tiny("llama").config
    assert static_bytes(config, "bfloat16", "momentum") == static(
        Arch.from_config(config), Run(dtype="bfloat16", optimizer="momentum")
    ).by_kind("resident")
    assert static_bytes(config)["buffer"] == 32


def test_bad_input_is_named():
    arch = Arch.from_config({"model_type": "gpt2"})
    with pytest.raises(TypeError, match="arch must be an Arch, got GPT2Config"):
        static(tiny("gpt2").config, Run())
    with pytest.raises(TypeError, match="run must be a Run, got str"):
        static(arch, "adamw")
    with pytest.raises(ValueError, match="run.lora_rank must be None .* got 8"):
        static(arch, Run(lora_rank=8))
    with pytest.raises(ValueError, match="run.zero_stage must be 0 .* got 2"):
        static(arch, Run(zero_stage=2, world=2))
    with pytest.raises(ValueError, match="optimizer must be one of .* got 'adam'"):
        static_bytes({"model_type": "gpt2"}, optimizer="adam")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        measure_static({})
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got str"):
        measure_static(torch.nn.LayerNorm(2), "adamw")
    other = torch.nn.LayerNorm(2)
    with pytest.raises(ValueError, match="optimizer trains 2 of 2 tensors that model does not have"):
        measure_static(torch.nn.LayerNorm(2), torch.optim.AdamW(other.parameters()))
