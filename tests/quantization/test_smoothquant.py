"""SmoothQuant: the function stays, the ranges meet, and eight bits are enough again."""

import copy
import hashlib
from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch
from data_scripts import load_script
from quantization_runs import IDS, logits, shallow, through_a_file
from torch import nn

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES
from refimpl.quantization import (
    GPTQ,
    RTN,
    calibrate,
    compress_model,
    compressed_names,
    consumers,
)
from refimpl.quantization.activations import W8A8
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.outliers import inject_outliers
from refimpl.quantization.smoothquant import smooth, smoothing_factor, smoothquant

HERE = Path(__file__).resolve().parent
golden = load_script("quantization_golden_smoothquant")


def injected(family, layers=1):
    model = shallow(family, num_hidden_layers=layers)
    inject_outliers(model, torch.Generator().manual_seed(0), channels=2)
    return model


def ranges(model, layer, site, stats):
    """Per channel: the largest input, and the largest weight of all that read it."""
    names = consumers(Backbone(model), layer, site)
    W = torch.cat([dense_weight(model.get_submodule(name)) for name in names])
    return stats[names[0]].absmax, W.abs().amax(0).double()


# --- smoothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_function_stays_and_the_ranges_are_those_of_the_formula(family, alpha):
    model = injected(family)
    before, stats, plain = logits(model), calibrate(model, IDS), copy.deepcopy(model)
    factors = smooth(model, IDS, alpha)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    after = calibrate(model, IDS)
    assert len(factors) == 2
    for (layer, site), s in factors.items():
        a, w = ranges(plain, layer, site, stats)
        torch.testing.assert_close(s, a**alpha / w ** (1 - alpha), rtol=1e-5, atol=0)
        a_new, w_new = ranges(model, layer, site, after)
        one = torch.ones_like(a)
        if alpha == 0.5:
            torch.testing.assert_close(a_new, (a * w).sqrt(), rtol=1e-3, atol=0)
            torch.testing.assert_close(w_new, a_new, rtol=1e-3, atol=0)
        elif alpha == 1:
            torch.testing.assert_close(a_new, one, rtol=1e-3, atol=0)
        elif alpha == 0:
            torch.testing.assert_close(w_new, one, rtol=1e-3, atol=0)
    for name, p in plain.named_parameters():  # o and down, embeddings and the last norm
        if any(part in name for part in ("o_proj", "down_proj", "c_proj", "embed", "wte", "norm.w", "ln_f")):
            same = torch.equal(p, model.get_parameter(name))
            assert same or "layernorm" in name


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_smoothing_again_changes_nothing(alpha):
    model = injected("gpt2")
    first = smooth(model, IDS, alpha)
    again = smooth(model, IDS, alpha)
    for key, s in again.items():
        assert (first[key] - 1).abs().max() > 0.1
        torch.testing.assert_close(s, torch.ones_like(s), rtol=1e-3, atol=1e-3)


def test_a_factor_is_never_zero():
    absmax, W = torch.tensor([0.0, 4.0]), torch.tensor([[0.0, 0.0]])
    s = smoothing_factor(absmax, [W])
    assert s.tolist() == pytest.approx([1e-5, 2 / 1e-5**0.5])


def test_factors_equal_those_of_torchao():
    stored = np.load(HERE / "golden" / "smoothquant.npz")
    W, x = (torch.from_numpy(stored[key]) for key in ("W", "x"))
    assert hashlib.sha256(stored["W"].tobytes() + stored["x"].tobytes()).hexdigest() in str(stored["about"])
    absmax = x.flatten(0, 1).abs().amax(0)
    for alpha in golden.ALPHAS:
        theirs = torch.from_numpy(stored[f"factor_{alpha}"]).double()
        torch.testing.assert_close(smoothing_factor(absmax, [W], alpha), theirs, rtol=3e-6, atol=0)
        # One layer in two halves: they share the factor of the whole.
        torch.testing.assert_close(smoothing_factor(absmax, W.split(10), alpha), theirs, rtol=3e-6, atol=0)


# --- with eight bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_outliers_break_one_scale_for_all_and_smoothing_repairs_it(family):
    model = injected(family)
    before, broken, repaired = logits(model), copy.deepcopy(model), copy.deepcopy(model)
    recipe = W8A8("tensor", "tensor")
    compress_model(broken, recipe, IDS)
    result = smoothquant(repaired, IDS, 0.5, recipe)
    error = lambda m: float((logits(m) - before).std() / before.std())
    assert error(repaired) < 0.2 * error(broken) and error(repaired) < 0.1
    assert len(compressed_names(repaired)) == len(result.report.rows)
    assert "factors from" in str(result) and "bits per weight" in str(result)


@pytest.mark.parametrize(
    ("family", "activations"), [("gpt2", "static"), ("llama", "tensor"), ("qwen2", "token")]
)
def test_it_comes_back_from_a_file(tmp_path, family, activations):
    model = injected(family)
    smoothquant(model, IDS, 0.5, W8A8("tensor", activations))
    loaded = through_a_file(model, shallow(family, seed=1), tmp_path)
    generated = model.generate(IDS[:1, :5], max_new_tokens=3, do_sample=False)
    assert torch.equal(loaded.generate(IDS[:1, :5], max_new_tokens=3, do_sample=False), generated)


def test_static_scales_are_those_of_the_smoothed_model():
    model = injected("llama")
    smoothed = copy.deepcopy(model)
    smooth(smoothed, IDS, 0.5)
    stats = calibrate(smoothed, IDS)
    smoothquant(model, IDS, 0.5, W8A8("row", "static"))
    for name in compressed_names(model):
        scale = model.get_submodule(name).x_scale.double()
        torch.testing.assert_close(scale, stats[name].absmax.max()[None] / 127, rtol=1e-6, atol=0)


def test_any_recipe_can_follow():
    model = injected("gpt2")
    before = logits(model)
    smoothquant(model, IDS, 0.5, GPTQ(8, "restricted"))
    assert (logits(model) - before).std() < 0.05 * before.std()


def test_bad_input_changes_nothing():
    model = injected("llama", layers=3)
    before = {key: t.clone() for key, t in model.state_dict().items()}

    def fails(name, weight, stats):
        if "layers.2.mlp" in name:
            raise RuntimeError("the recipe gave up")
        return RTN(8)(name, weight)

    broken = injected("llama", layers=3)
    broken.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    W = torch.ones(2, 3)
    for call, error, message in [
        (lambda: smoothquant(nn.Linear(2, 2), IDS), TypeError, "Linear is not"),
        (lambda: smoothquant(model, IDS[:0]), ValueError, "non-empty LongTensor"),
        (lambda: smoothquant(model, IDS.float()), ValueError, "non-empty LongTensor"),
        (lambda: smoothquant(model, IDS, 1.5), ValueError, "alpha must be a number from 0 to 1, got 1.5"),
        (lambda: smooth(model, IDS, float("nan")), ValueError, "alpha must be a number from 0 to 1"),
        (lambda: smooth(model, IDS, -0.1), ValueError, "alpha must be a number from 0 to 1"),
        (lambda: smoothquant(model, IDS, recipe=fails), RuntimeError, "the recipe gave up"),
        (lambda: smoothing_factor(torch.ones(3), []), ValueError, "weights must be one or more"),
        (lambda: smoothing_factor(torch.ones(4), [W]), ValueError, r"\[d_out, 4\], got \[2, 3\]"),
        (lambda: smoothing_factor(torch.ones(3), [W * torch.nan]), ValueError, "must be finite"),
    ]:
        with pytest.raises(error, match=message):
            call()
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(t, before[key]) for key, t in after.items())
    norm = broken.model.layers[0].input_layernorm.weight.clone()
    with pytest.raises(ValueError, match="W must be finite"):
        smoothquant(broken, IDS)
    assert torch.equal(broken.model.layers[0].input_layernorm.weight, norm) and not compressed_names(broken)
    smoothquant(model, IDS)
    compressed = logits(model)
    with pytest.raises(TypeError, match="got Int8Linear"):
        smoothquant(model, IDS)
    assert torch.equal(logits(model), compressed)


# --- a trained model ------------------------------------------------------------------------------


def test_on_a_trained_model_with_injected_outliers_perplexity_comes_back(bundled):
    from refimpl.quantization.texts import calibration_ids, document_nll, evaluation_ids

    model, tokenizer = bundled("llama-nano")
    ids, test = calibration_ids(tokenizer, 4, 64), evaluation_ids(tokenizer, 4, 64)
    outliers = copy.deepcopy(model)
    inject_outliers(outliers, torch.Generator().manual_seed(0))
    found = {"plain": model}
    for name in ("tensor", "token"):
        found[name] = copy.deepcopy(outliers)
        compress_model(found[name], W8A8("tensor", name), ids)
    found["smooth"] = copy.deepcopy(outliers)
    smoothquant(found["smooth"], ids, 0.5, W8A8("tensor", "tensor"))
    ppl = {name: exp(document_nll(m, test).mean()) for name, m in found.items()}
    assert ppl["smooth"] < 1.05 * ppl["plain"] < ppl["token"] < ppl["tensor"], ppl
