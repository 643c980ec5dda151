"""Accelerate's stored account of every published configuration, against ours computed anew: to the byte."""

import importlib.util
import json
from math import prod
from pathlib import Path

import pytest

from refimpl.footprint import Arch, Run
from refimpl.footprint.published import arch, config, names
from refimpl.footprint.static import static
from refimpl.results import changed_sources

ROOT = Path(__file__).resolve().parents[2]
RESULT = json.loads((ROOT / "data/results/footprint/accelerate.json").read_text(encoding="utf-8"))
MODELS = RESULT["models"]
SHARE = {"float32": 1, "float16": 2, "int8": 4, "int4": 8}


@pytest.fixture(scope="module")
def script():
    """The script that wrote the file; it needs accelerate only when it runs."""
    spec = importlib.util.spec_from_file_location(
        "footprint_accelerate", ROOT / "data/footprint_accelerate.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layers(name: str) -> dict[str, int]:
    """Float32 bytes by what accelerate takes for a layer: a block, or a module outside the blocks."""
    sizes: dict[str, int] = {}
    for tensor, shape in arch(name).tensors():
        parts = tensor.split(".")
        key = ".".join(parts[:3]) if parts[1] in ("h", "layers") else parts[-2]
        sizes[key] = sizes.get(key, 0) + 4 * prod(shape)
    return sizes


def test_the_result_is_current_and_has_every_published_model():
    assert changed_sources(RESULT, ROOT) == []
    assert tuple(MODELS) == names()
    assert {"accelerate", "torch", "transformers"} <= set(RESULT["versions"])


@pytest.mark.parametrize("name", names())
def test_our_side_computed_anew_is_what_is_stored(name, script):
    own = script.ours(name)
    assert own == MODELS[name]["ours"]
    if isinstance(arch(name), Arch):
        run = Run(length=min(arch(name).positions, 4096))
        assert own["static"] == static(arch(name), run).total() < own["step"]


@pytest.mark.parametrize("name", names())
def test_weights_are_equal_to_the_byte(name):
    """The rest is buffers, of fixed width: rotary frequencies, kept twice, and the routing biases of V3."""
    model, fields = arch(name), config(name)
    rotary = 0 if fields["model_type"] == "gpt2" else fields.get("qk_rope_head_dim")
    if rotary is None:
        rotary = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    biases = fields["n_routed_experts"] * 58 if fields["model_type"] == "deepseek_v3" else 0
    assert MODELS[name]["with_head"] == 4 * (model.parameters() + rotary + biases)


@pytest.mark.parametrize("name", names())
def test_the_command_counts_all_but_a_head_that_is_not_tied(name):
    sizes, model = layers(name), MODELS[name]
    head = sizes.pop("lm_head", 0)
    assert bool(head) is not config(name).get("tie_word_embeddings", True)
    biases = 4 * 256 if config(name)["model_type"] == "deepseek_v3" else 0  # buffers of the largest layer
    for dtype, share in SHARE.items():
        said = model["command"][dtype]
        assert said["total"] * share == model["with_head"] - head
        assert said["largest_layer"] * share == max(sizes.values()) + biases


@pytest.mark.parametrize("name", names())
def test_its_rule_for_adam_counts_no_activations(name):
    said, own = MODELS[name]["command"], MODELS[name]["ours"]
    full = said["float32"]["total"]
    assert [said[dtype]["training"] for dtype in SHARE] == [4 * full, 2 * full, None, None]
    # With the head and without the buffers it is the static terms, but for the step counts.
    tensors = len(arch(name).tensors())
    assert 4 * (full + own["head"] - own["rotary"] - own["router_biases"]) == own["static"] - 4 * tensors
    if own["step"] is not None:
        assert said["float32"]["training"] <= 0.8 * own["step"]  # at least the roots are missing
        assert said["float16"]["training"] <= 0.4 * own["step_amp"]
