"""Folding a scale leaves the function alone, and refuses what has no such identity."""

import copy

import pytest
import torch

from refimpl.backbone import Backbone
from refimpl.checks.tiny import random_ids, tiny
from refimpl.quantization import RTN, compress_model, consumers, fold
from refimpl.quantization.fold import SITES


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "qwen2"])
@pytest.mark.parametrize("site", SITES)
def test_the_logits_stay_and_the_weights_do_not(kind, site):
    model, ids = tiny(kind), random_ids(2, 12)
    bb = Backbone(model)
    before = model(ids).logits
    if (site == "up-down" and kind == "gpt2") or (site == "v-o" and bb.G != bb.H):
        with pytest.raises(ValueError, match=site):
            consumers(bb, 1, site)
        return
    old = copy.deepcopy(model)
    for name in consumers(bb, 1, site):
        n = old.get_submodule(name).weight.shape[0 if kind == "gpt2" else 1]
    s = torch.rand(n, generator=torch.Generator().manual_seed(0)) * 4 + 0.1
    fold(bb, 1, site, s)
    torch.testing.assert_close(model(ids).logits, before, atol=2e-5, rtol=1e-5)
    for name in consumers(bb, 1, site):
        changed = model.get_submodule(name).weight - old.get_submodule(name).weight
        assert changed.abs().max() > 1e-3


def test_bad_input_changes_nothing():
    model, ids = tiny("llama"), random_ids(1, 8)
    bb, before = Backbone(model), model(ids).logits
    n = bb.d
    for bad in (torch.ones(n + 1), torch.zeros(n), -torch.ones(n), torch.full((n,), torch.nan)):
        with pytest.raises(ValueError, match="s must be"):
            fold(bb, 0, "ln1", bad)
    with pytest.raises(ValueError, match="site must be one of"):
        fold(bb, 0, "ln3", torch.ones(n))
    assert torch.equal(model(ids).logits, before)
    compress_model(model, RTN(8), ids)
    compressed = model(ids).logits
    with pytest.raises(TypeError):
        fold(bb, 0, "ln1", torch.full((n,), 2.0))
    assert torch.equal(model(ids).logits, compressed)
