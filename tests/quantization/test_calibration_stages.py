"""One pass through a block, stage by stage, sees what running the whole block for every group sees."""

from collections import Counter

import pytest
import torch

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.quantization import RTN
from refimpl.quantization.calibrate import Hidden, input_groups
from refimpl.quantization.linear import dense_weight, replace_linear

IDS = random_ids(4, 20)


def fields(stats):
    return [stats.H, stats.absmax, stats.absmean, stats.sqnorm, stats.X, torch.tensor(stats.tokens)]


def round_coarsely(model, name):
    old = model.get_submodule(name)
    new = RTN(2, group=8)(name, dense_weight(old), None)
    new.bias = old.bias
    replace_linear(model, name, new)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_equal_a_run_of_the_block_for_every_group(family):
    models = tiny(family), tiny(family)
    naive, staged = (Hidden(Backbone(model), IDS, batch=3) for model in models)
    for layer in range(2):
        groups = input_groups(staged.bb, layer)
        for group, found in zip(groups, staged.stages(layer, keep=5), strict=True):
            expected = naive.stats(layer, [group], keep=5)
            assert tuple(found) == group
            for name in group:
                pairs = zip(fields(found[name]), fields(expected[name]), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
                for model in models:
                    round_coarsely(model, name)
        naive.advance(layer)
        assert all(torch.equal(a, b) for a, b in zip(staged.rows, naive.rows, strict=True))


def test_a_block_is_run_once_and_its_inner_mlp_twice():
    model = tiny("llama")
    calls = Counter()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, inputs, name=name: calls.update([name.split(".")[-1]]))
    for _ in Hidden(Backbone(model), IDS, batch=4).stages(0):
        pass
    got = {name: calls[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")}
    once = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 1)
    assert got == once | {"gate_proj": 2, "up_proj": 2} and calls["down_proj"] == 1
