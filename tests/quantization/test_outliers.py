"""Injected outliers leave the function alone and make the inputs large where they say."""

import copy

import pytest
import torch
from torch import nn

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.quantization import RTN, calibrate, compress_model, consumers
from refimpl.quantization.activations import W8A8
from refimpl.quantization.outliers import inject_outliers

IDS = random_ids(4, 24)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_stay_and_the_channels_grow(family):
    model = tiny(family)
    before, calm = logits(model), calibrate(model, IDS)
    found = inject_outliers(model, seeded())
    torch.testing.assert_close(logits(model), before, atol=1e-3, rtol=1e-3)
    bb, large = Backbone(model), calibrate(model, IDS)
    assert list(found) == [(layer, site) for layer in range(3) for site in ("ln1", "ln2")]
    injected = set()
    for (layer, site), channels in found.items():
        assert len(set(channels)) == 4 and list(channels) == sorted(channels)
        gain = torch.ones(bb.d, dtype=torch.float64)
        gain[list(channels)] = 60
        for name in consumers(bb, layer, site):
            torch.testing.assert_close(large[name].absmax, calm[name].absmax * gain, rtol=1e-3, atol=1e-4)
            injected.add(name)
    for name in calm.keys() - injected:  # o and down
        torch.testing.assert_close(large[name].absmax, calm[name].absmax, rtol=1e-3, atol=1e-4)
    assert len(set(found.values())) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_power_of_two_changes_no_bit_of_the_logits(family):
    model = tiny(family)
    before = logits(model)
    inject_outliers(model, seeded(), factor=64)
    assert torch.equal(logits(model), before)


def test_factor_one_changes_nothing_and_the_seed_decides():
    model = tiny("llama")
    plain = {key: t.clone() for key, t in model.state_dict().items()}
    first = inject_outliers(model, seeded(), factor=1)
    assert all(torch.equal(t, plain[key]) for key, t in model.state_dict().items())
    assert inject_outliers(tiny("llama"), seeded()) == first
    assert inject_outliers(tiny("llama"), seeded(1)) != first


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_they_hurt_activations_and_tensors_more_than_tokens(family):
    plain = tiny(family)
    before, model = logits(plain), copy.deepcopy(plain)
    inject_outliers(model, seeded(), channels=2)
    errors = {}
    for name, one, recipe in [
        ("plain", plain, W8A8("row", "tensor")),
        ("tensor", model, W8A8("row", "tensor")),
        ("token", model, W8A8("row", "token")),
    ]:
        compressed = copy.deepcopy(one)
        compress_model(compressed, recipe, IDS)
        errors[name] = float((logits(compressed) - before).std())
    assert errors["tensor"] > 5 * errors["plain"] and errors["tensor"] > 1.1 * errors["token"]


def test_bad_input_changes_nothing():
    model = tiny("llama")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    for call, error, message in [
        (lambda: inject_outliers(nn.Linear(2, 2), seeded()), TypeError, "Linear is not"),
        (lambda: inject_outliers(model, 0), TypeError, "generator must be a torch.Generator, got int"),
        (lambda: inject_outliers(model, seeded(), 0), ValueError, "channels must be an integer from 1 to 32"),
        (lambda: inject_outliers(model, seeded(), 33), ValueError, "channels must be an integer from 1"),
        (lambda: inject_outliers(model, seeded(), 1.5), ValueError, "channels must be an integer from 1"),
        (lambda: inject_outliers(model, seeded(), 4, 0.0), ValueError, "factor must be a finite number > 0"),
        (lambda: inject_outliers(model, seeded(), 4, float("inf")), ValueError, "factor must be a finite"),
        (lambda: inject_outliers(model, seeded(), 4, float("nan")), ValueError, "factor must be a finite"),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    # Compressed in the last block only: the first ones stay as they are.
    name = "model.layers.2.mlp.up_proj"
    model.model.layers[2].mlp.up_proj = RTN(8)(name, model.get_submodule(name).weight)
    before = logits(model)
    with pytest.raises(TypeError, match="got GridLinear"):
        inject_outliers(model, seeded())
    assert torch.equal(logits(model), before)
