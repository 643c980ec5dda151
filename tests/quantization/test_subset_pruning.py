"""The relaxed top K, its annealing, and the training of a subset of heads."""

import copy

import pytest
import torch

from refimpl.backbone import Backbone
from refimpl.checks.tiny import random_ids, tiny
from refimpl.quantization.pruning.slicing import slice_model
from refimpl.quantization.pruning.subset_pruning import (
    annealed,
    gumbel,
    hard_top_k,
    soft_top_k,
    train_subset,
)

IDS = random_ids(4, 10)
BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scores(n=48, seed=0):
    return torch.randn(n, generator=generator(seed), dtype=torch.float64) + gumbel((n,), generator(seed + 1))


# --- the relaxation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1000.0, 10.0, 1.0, 0.1, 1e-3, 1e-8])
@pytest.mark.parametrize("k", [1, 8, 24, 48])
def test_the_mask_sums_to_k_at_every_temperature_with_finite_gradients(k, temperature):
    r = scores().requires_grad_()
    mask = soft_top_k(r, k, temperature)
    assert mask.sum().item() == pytest.approx(k, abs=1e-9) and mask.min().item() >= 0
    (mask * torch.arange(48.0)).sum().backward()
    assert bool(r.grad.isfinite().all())


@pytest.mark.parametrize("seed", range(5))
def test_a_cold_mask_is_the_hard_one_and_a_hot_one_is_even(seed):
    r = scores(seed=seed)
    assert float((soft_top_k(r, 8, 1e-8) - hard_top_k(r, 8)).abs().max()) == 0
    torch.testing.assert_close(
        soft_top_k(r, 8, 1e6), torch.full((48,), 8 / 48).double(), rtol=1e-3, atol=1e-4
    )
    assert torch.equal(soft_top_k(r, 48, 1e-8), torch.ones(48).double())


def test_single_entries_may_exceed_one_in_between():
    assert max(float(soft_top_k(scores(seed=s), 8, 1.0).max()) for s in range(10)) > 1.05


def test_the_gradient_is_the_finite_difference():
    r = scores(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_top_k(x, 3, 0.7), (r,))


def test_noise_on_scores_draws_subsets_with_the_odds_of_the_scores():
    w = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    noise = gumbel((20_000, 4), generator())
    first = torch.stack([soft_top_k(w + row, 1, 1e-8) for row in noise[:4000]]).mean(0)
    torch.testing.assert_close(first, w.softmax(0), rtol=0, atol=0.03)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.03)  # Euler's constant
    assert bool(noise.isfinite().all())


def test_the_straight_through_mask_is_hard_forward_and_the_identity_backward():
    w = scores().requires_grad_()
    mask = hard_top_k(w, 5)
    assert sorted(mask.tolist()) == pytest.approx([0.0] * 43 + [1.0] * 5, abs=1e-12)
    (mask * torch.arange(48.0)).sum().backward()
    assert torch.equal(w.grad, torch.arange(48.0, dtype=torch.float64))
    assert torch.equal(hard_top_k(torch.zeros(4).double(), 4), torch.ones(4).double())
    assert float(hard_top_k(torch.zeros(4).double(), 2).sum()) == 2  # ties


def test_the_temperature_falls_geometrically_and_stays():
    found = [annealed(step, 100) for step in (0, 25, 50, 100, 500)]
    assert found == pytest.approx([1e3, 1e3 * 10 ** (-11 / 4), 10**-2.5, 1e-8, 1e-8])


# --- training ---------------------------------------------------------------------------------------------


@BOTH
def test_all_heads_are_the_plain_model(family):
    model = tiny(family)
    settings = {"generator": generator(), "steps": 6, "cooldown": 1, "batch": 1, "weights_lr": None}
    report = train_subset(model, IDS[:1], 12, **settings)
    with torch.no_grad():
        loss = float(model(IDS[:1], labels=IDS[:1]).loss)
    assert bool(report.heads.all()) and report.losses[1:] == pytest.approx([loss] * 5, rel=1e-4)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("k", [1, 5, 11])
def test_exactly_k_heads_stay(k, straight_through):
    model = tiny("llama")
    report = train_subset(model, IDS, k, generator=generator(), steps=4, straight_through=straight_through)
    assert int(report.heads.sum()) == k and report.heads.shape == (3, 4)
    top = torch.zeros(12).bool().index_fill(0, report.scores.flatten().topk(k).indices, True)
    assert torch.equal(report.heads.flatten(), top)
    slice_model(model, report.heads, torch.ones(3, 40).bool())
    assert bool(model(IDS).logits.isfinite().all())


def with_heads_that_hurt(family, bad):
    """Every value is 1; bad heads write it against the embedding of token 7, others nothing."""
    model = tiny(family, **({} if family == "gpt2" else {"attention_bias": True}))
    bb = Backbone(model)
    direction = -0.4 / bb.D * model.get_input_embeddings().weight[7].detach()
    with torch.no_grad():
        for ref in bb.linears():
            if ref.role == "v":
                ref.weight.zero_()
                ref.bias.fill_(1.0)
            if ref.role == "o":
                ref.weight.copy_(direction[:, None] * bad[ref.layer].repeat_interleave(bb.D))
    return model


@pytest.mark.parametrize(("family", "straight_through"), [("gpt2", True), ("gpt2", False), ("llama", False)])
def test_heads_that_hurt_are_left_out(family, straight_through):
    bad = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 0]]).bool()
    model = with_heads_that_hurt(family, bad)
    settings = {"weights_lr": None, "straight_through": straight_through, "steps": 25, "batch": 1}
    text = torch.full((1, 10), 7)
    report = train_subset(model, text, 8, generator=generator(), **settings)
    assert torch.equal(report.heads, ~bad)


def test_pipelined_leaves_the_weights_joint_does_not():
    frozen, trained = tiny("llama"), tiny("llama")
    before = copy.deepcopy(frozen.state_dict())
    train_subset(frozen, IDS, 4, generator=generator(), steps=2, weights_lr=None)
    train_subset(trained, IDS, 4, generator=generator(), steps=2)
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    assert all(p.grad is None for p in frozen.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in trained.state_dict().items())


def test_the_draws_follow_the_generator():
    one, same, other = (
        train_subset(tiny("llama"), IDS, 4, generator=generator(seed), steps=3) for seed in (0, 0, 1)
    )
    assert one.losses == same.losses and torch.equal(one.scores, same.scores) and one.losses != other.losses


def test_bad_input_is_refused_and_nothing_changes():
    r = scores(4)
    for function in (lambda x, k: soft_top_k(x, k, 1.0), hard_top_k):
        with pytest.raises(TypeError, match="float64"):
            function(r.float(), 2)
        for k in (0, 5, 2.0):
            with pytest.raises(ValueError, match="k must"):
                function(r, k)
        for bad in (r[None], r[:0], r * torch.nan):
            with pytest.raises(ValueError, match="scores"):
                function(bad, 1)
    for temperature in (0.0, -1.0, torch.inf):
        with pytest.raises(ValueError, match="temperature"):
            soft_top_k(r, 2, temperature)
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    for changes, error, words in (
        ({"k": 0}, ValueError, "k must"),
        ({"k": 13}, ValueError, "from 1 to 12"),
        ({"steps": 0}, ValueError, "steps"),
        ({"cooldown": 5}, ValueError, "cooldown"),
        ({"batch": 0}, ValueError, "batch"),
        ({"scores_lr": -1.0}, ValueError, "lr"),
        ({"weights_lr": 0.0}, ValueError, "weights_lr"),
        ({"ids": IDS[:, :1]}, ValueError, "ids"),
        ({"generator": None}, TypeError, "generator"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "not supported"),
    ):
        good = {"model": model, "ids": IDS, "k": 4, "generator": generator(), "steps": 2}
        with pytest.raises(error, match=words):
            train_subset(**(good | changes))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    slice_model(model, torch.ones(3, 4).bool(), torch.ones(3, 40).bool())
    with pytest.raises(ValueError, match="sliced"):
        train_subset(model, IDS, 4, generator=generator(), steps=2)
