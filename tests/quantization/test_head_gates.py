"""Training gates on heads, and making them part of the model."""

import copy

import pytest
import torch

from refimpl.backbone import Backbone
from refimpl.checks.tiny import random_ids, tiny
from refimpl.gates import HardConcrete
from refimpl.quantization.pruning.gating import gated
from refimpl.quantization.pruning.head_gates import close_gates, train_head_gates

IDS = random_ids(4, 10)
BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@BOTH
def test_open_gates_without_penalty_and_with_frozen_weights_are_the_plain_model(family):
    model = tiny(family)
    plain = logits(model)
    report = train_head_gates(
        model, IDS[:1], 0.0, generator=generator(), steps=3, batch=2, weights_lr=None, initial=20.0
    )
    assert report.open == 12 and report.polarised == 1.0
    with torch.no_grad():
        loss = float(model(IDS[:1], labels=IDS[:1]).loss)
    assert report.losses == pytest.approx([loss] * 3, rel=1e-5)
    close_gates(model, report.gates)
    torch.testing.assert_close(logits(model), plain)


@BOTH
def test_a_larger_coefficient_leaves_fewer_heads(family):
    opened = []
    for coefficient in (0.0, 0.1, 3.0):
        settings = {"steps": 12, "batch": 1, "gates_lr": 1.0, "weights_lr": None, "initial": 1.0}
        report = train_head_gates(tiny(family), IDS, coefficient, generator=generator(), **settings)
        opened.append(report.open)
    assert opened[0] >= opened[1] >= opened[2] == 0 and opened[0] > 0
    assert report.expected_open[-1] < 1 < report.expected_open[0] and report.polarised == 1.0


def test_frozen_weights_stay_and_have_no_gradients_others_change():
    frozen, trained = tiny("llama"), tiny("llama")
    before = copy.deepcopy(frozen.state_dict())
    train_head_gates(frozen, IDS, 0.1, generator=generator(), steps=2, weights_lr=None)
    train_head_gates(trained, IDS, 0.1, generator=generator(), steps=2)
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    assert all(p.grad is None for p in frozen.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert not any(m._forward_pre_hooks for m in trained.modules())


def test_the_draws_follow_the_generator():
    one, same, other = (
        train_head_gates(tiny("llama"), IDS, 0.1, generator=generator(seed), steps=3) for seed in (0, 0, 1)
    )
    assert one.losses == same.losses and torch.equal(one.log_a, same.log_a)
    assert one.losses != other.losses


def test_the_distribution_can_be_another():
    gate = HardConcrete(2 / 3)
    report = train_head_gates(tiny("llama"), IDS, 0.1, generator=generator(), steps=2, gate=gate)
    assert report.expected_open[0] == pytest.approx(12 * float(gate.p_open(torch.zeros(1))), rel=1e-5)


@BOTH
def test_closed_gates_are_cut_out_and_the_others_go_into_the_matrix(family):
    bb = Backbone(tiny(family))
    gates = torch.rand(bb.n_layers, bb.H, generator=generator())
    gates[0], gates[1, :3], gates[2, 1] = 0.0, 0.0, 1.0
    with gated(bb, gates):
        expected = logits(bb.model)
    before = bb.model.num_parameters()
    close_gates(bb.model, gates)
    torch.testing.assert_close(logits(bb.model), expected, rtol=0, atol=1e-4)
    assert bb.model.num_parameters() < before


def test_bad_input_is_refused_and_nothing_changes():
    model = tiny("llama")
    before = logits(model)
    good = {"generator": generator(), "steps": 2}
    for changes, error, words in (
        ({"coefficient": -0.1}, ValueError, "coefficient"),
        ({"coefficient": float("nan")}, ValueError, "coefficient"),
        ({"steps": 0}, ValueError, "steps"),
        ({"batch": 1.5}, ValueError, "batch"),
        ({"gates_lr": 0.0}, ValueError, "gates_lr"),
        ({"weights_lr": -1.0}, ValueError, "weights_lr"),
        ({"ids": IDS[:, :1]}, ValueError, "2 tokens"),
        ({"ids": IDS + 1000}, ValueError, "vocabulary"),
        ({"ids": IDS[:0]}, ValueError, "ids"),
        ({"initial": float("nan")}, ValueError, "log_a"),
        ({"generator": 0}, TypeError, "generator"),
    ):
        with pytest.raises(error, match=words):
            train_head_gates(**({"model": model, "ids": IDS, "coefficient": 0.1} | good | changes))
    for gates in (
        torch.ones(3, 5),
        torch.full((3, 4), 1.5),
        torch.full((3, 4), torch.nan),
        torch.ones(3, 4).bool(),
    ):
        with pytest.raises(ValueError, match="gates"):
            close_gates(model, gates)
    assert torch.equal(logits(model), before)
    with pytest.raises(TypeError, match="not supported"):
        train_head_gates(torch.nn.Linear(2, 2), IDS, 0.1, **good)
    close_gates(model, torch.ones(3, 4))
    with pytest.raises(ValueError, match="sliced"):
        train_head_gates(model, IDS, 0.1, **good)
