"""The table of published configurations: counts exact, and those of the models that transformers builds."""

import json
from math import prod

import pytest
import torch

from refimpl.footprint import Arch
from refimpl.footprint.published import Deepseek, LlamaVariant, arch, config, count, names, of_config


def on_meta(fields):
    """A model of these fields without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    configuration = AutoConfig.for_model(**fields)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return AutoModelForCausalLM.from_config(configuration)


@pytest.mark.parametrize("name", names())
def test_the_count_is_the_published_one(name):
    assert arch(name).parameters() == count(name)


@pytest.mark.parametrize("name", names())
def test_tensors_are_those_of_the_transformers_model(name):
    """Names and shapes with four layers, a layer of each sort among them; then the whole by arithmetic."""
    layers = "n_layer" if "n_layer" in config(name) else "num_hidden_layers"
    short = config(name) | {layers: 4}
    built = {n: tuple(p.shape) for n, p in on_meta(short).named_parameters()}
    assert dict(of_config(short).tensors()) == built
    per_layer = [sum(prod(s) for _, s in of_config(short | {layers: n}).tensors()) for n in (4, 5)]
    depth = config(name)[layers]
    assert arch(name).parameters() == per_layer[0] + (depth - 4) * (per_layer[1] - per_layer[0])


@pytest.mark.parametrize(
    "name",
    ["openai-community/gpt2-xl", "meta-llama/Llama-3.2-3B", "Qwen/Qwen3-8B", "deepseek-ai/DeepSeek-V2-Lite"],
)
def test_whole_models_on_meta(name):
    assert sum(p.numel() for p in on_meta(config(name)).parameters()) == count(name)


def test_deepseek_v3_holds_671_billion_of_which_a_token_uses_37():
    v3 = arch("deepseek-ai/DeepSeek-V3")
    assert v3.parameters() == 671_026_404_352
    assert v3.used() == 37_552_282_624
    biases = 256 * (v3.layers - v3.dense_layers)  # of the router: buffers here, tensors in the checkpoint
    assert v3.parameters() + biases == 671_026_419_200


def test_mixtral_uses_two_of_eight_experts():
    mixtral = arch("mistralai/Mixtral-8x7B-v0.1")
    all_used = LlamaVariant(mixtral.base, 8, 8)
    assert all_used.used() == mixtral.parameters() > 3 * mixtral.used()


def test_the_neutral_variant_is_the_plain_decoder():
    base = arch("mistralai/Mistral-7B-v0.1")
    assert isinstance(base, Arch) and LlamaVariant(base).tensors() == base.tensors()


def test_a_configuration_reads_alike_as_object_dictionary_and_file(tmp_path):
    from transformers import AutoConfig

    for name in ("openai-community/gpt2", "Qwen/Qwen2.5-0.5B", "deepseek-ai/DeepSeek-V2-Lite"):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config(name)))
        as_object = AutoConfig.for_model(**config(name))
        assert of_config(path) == of_config(str(path)) == of_config(as_object) == arch(name)
    assert isinstance(arch(name), Deepseek)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: arch("gpt5"), "no published configuration 'gpt5'; known: openai-community/gpt2"),
        (lambda: config(""), "no published configuration ''"),
        (lambda: of_config({"model_type": "bert"}), "model_type must be one of gpt2, llama"),
        (lambda: of_config({}), "got None"),
        (lambda: of_config({"model_type": "llama"}), "no field 'num_attention_heads'"),
        (lambda: of_config({"model_type": "deepseek_v3"}), "no field 'vocab_size'"),
        (
            lambda: LlamaVariant(arch("openai-community/gpt2"), 4, 5),
            "active must lie in 1 ... experts (4), got 5",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
