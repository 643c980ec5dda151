"""Bonsai: priors, masks and their regression, and models pruned with forward passes alone."""

import copy

import pytest
import torch

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.pruning.bonsai import bonsai, weights_left
from refimpl.quantization.pruning.bonsai_masks import candidates, priors, sample_pair
from refimpl.quantization.pruning.bonsai_regression import regress
from refimpl.quantization.pruning.gating import gated
from refimpl.quantization.pruning.slicing import load_sliced, save_sliced, slice_model

IDS = random_ids(4, 16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def ones(bb):
    return torch.ones(bb.n_layers, bb.H), torch.ones(bb.n_layers, bb.F)


def block_weights(model):
    inside = [p for name, p in model.named_parameters() if ".layers." in name or ".h." in name]
    return sum(p.numel() for p in inside if p.ndim == 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_to_remove_is_the_plain_model(family):
    model = tiny(family)
    before = logits(model)
    report = bonsai(model, IDS, sparsity=0.0, generator=generator())
    assert report.sparsity == 0 and report.heads.all() and report.neurons.all() and report.fits == ()
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("regression", ["l1", "ridge", None])
def test_the_pruned_model_is_the_gated_one_and_as_small_as_it_was_asked_for(family, regression, tmp_path):
    model, plain = tiny(family), tiny(family)
    settings = {"sparsity": 0.2, "step": 0.1, "masks": 10, "block": 2, "regression": regression}
    report = bonsai(model, IDS, generator=generator(), **settings)
    bb = Backbone(plain)
    with gated(bb, report.heads.float(), report.neurons.float()):
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    total, smallest = float(weights_left(bb, *ones(bb))), 2 * (2 if bb.is_gpt2 else 3) * bb.d
    assert 0.2 - smallest / total < report.sparsity <= 0.2 + 1e-9
    assert 2 <= len(report.fits) <= 3 if regression else report.fits == ()
    assert all(p.requires_grad for p in model.parameters())
    save_sliced(model, tmp_path / "pruned.safetensors")
    load_sliced(plain, tmp_path / "pruned.safetensors")
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted_as_slicing_leaves_them(family):
    bb = Backbone(tiny(family))
    heads = torch.rand(bb.n_layers, bb.H, generator=generator()) > 0.4
    neurons = torch.rand(bb.n_layers, bb.F, generator=generator()) > 0.3
    heads[1] = True
    assert float(weights_left(bb, *ones(bb))) == block_weights(bb.model)
    counted = float(weights_left(bb, heads, neurons))
    slice_model(bb.model, heads, neurons)
    assert counted == block_weights(bb.model)


def test_priors_are_the_mean_contribution_to_the_output():
    bb = Backbone(tiny("gpt2"))
    module, inputs = bb.layer(1).o, []
    with torch.no_grad(), module.register_forward_pre_hook(lambda _, x: inputs.append(x[0])):
        bb.model(IDS)
    score = (dense_weight(module).abs() * inputs[0].square().mean((0, 1)).sqrt()).mean(0)
    with torch.no_grad():
        heads, neurons = priors(bb, IDS, ones(bb), batch=3)
        keep = ones(bb)
        keep[0][1, 2] = keep[1][2, 5] = 0
        gone = priors(bb, IDS, keep)
    torch.testing.assert_close(heads[1], score.view(4, 8).mean(1).double(), rtol=1e-4, atol=1e-6)
    assert gone[0][1, 2] == 0 == gone[1][2, 5]
    torch.testing.assert_close(gone[0][0], heads[0])


@pytest.mark.parametrize("sampling", ["model", "module"])
def test_masks_leave_out_what_is_likely_and_complements_the_rest(sampling):
    rho = torch.rand(3, 8, generator=generator()), torch.rand(3, 40, generator=generator(1))
    found = candidates(rho, (torch.ones(3, 8), torch.ones(3, 40)), 0.2, block=2)
    assert found.drop == (2, 2, 2, 4, 4, 4)
    assert found.columns.tolist() == [1.0] * 12 + [2.0] * 24
    draws, counts = generator(), []
    for _ in range(200):
        mask, other = sample_pair(found, draws, sampling)
        assert torch.equal(mask + other, torch.ones(36).double()) and int((mask == 0).sum()) == 18
        counts.append((mask == 0).double())
    taken = torch.stack(counts)
    by_module = torch.stack([taken[:, found.modules == k].sum(1) for k in range(6)])
    assert bool((by_module == torch.tensor(found.drop)[:, None]).all()) == (sampling == "module")
    heads = found.modules < 3
    assert torch.corrcoef(torch.stack((taken.mean(0)[heads], found.prior[heads])))[0, 1] < -0.3
    gates = found.gates(mask, (torch.ones(3, 8), torch.ones(3, 40)))
    assert int((gates[1] == 0).sum()) == 2 * int((mask[12:] == 0).sum())


def test_priors_that_are_all_equal_draw_uniformly():
    found = candidates((torch.ones(1, 4), torch.ones(1, 10)), (torch.ones(1, 4), torch.ones(1, 10)), 0.3)
    drawn = torch.stack([sample_pair(found, generator(s), "module")[0] for s in range(60)])
    assert bool((drawn.mean(0) < 1).all())


@pytest.mark.parametrize("kind", ["l1", "ridge"])
def test_the_regression_ranks_masks_it_has_not_seen(kind):
    draws = generator()
    masks = torch.randint(2, (60, 30), generator=draws).double()
    masks = torch.stack((masks, 1 - masks), 1).flatten(0, 1)
    worth = torch.randn(30, generator=draws).double() * (torch.arange(30) < 10)
    utilities = masks @ worth + 0.1 * torch.randn(120, generator=draws).double()
    fit = regress(masks, utilities, torch.rand(30, generator=draws).double(), kind)
    assert fit.tau > 0.7 > 0.5 > fit.prior_tau
    assert torch.corrcoef(torch.stack((fit.beta, worth)))[0, 1] > 0.9
    noise = regress(masks, torch.randn(120, generator=draws).double(), torch.ones(30).double(), kind)
    assert abs(noise.tau) < 0.3
    constant = regress(masks, torch.ones(120).double(), torch.ones(30).double(), kind)
    assert constant.tau == 0 and bool((constant.beta.abs() < 1e-9).all())


def test_ridge_falls_back_on_the_prior_where_masks_say_little():
    draws = generator()
    worth = torch.rand(40, generator=draws).double()
    masks = torch.randint(2, (5, 40), generator=draws).double()
    masks = torch.stack((masks, 1 - masks), 1).flatten(0, 1)
    fit = regress(masks, masks @ worth, worth, "ridge")
    assert torch.corrcoef(torch.stack((fit.beta, worth)))[0, 1] > 0.99


def test_in_masks_drawn_by_module_no_module_has_a_worth():
    """The sums over a module are constant, so that adding to all of its coefficients predicts the same."""
    rho = torch.rand(2, 10, generator=generator()), torch.rand(2, 10, generator=generator(1))
    found = candidates(rho, (torch.ones(2, 10), torch.ones(2, 10)), 0.2)
    draws = generator()
    for sampling, known in (("module", False), ("model", True)):
        masks = torch.stack([m for _ in range(40) for m in sample_pair(found, draws, sampling)])
        sums = torch.stack([masks[:, found.modules == k].sum(1) for k in range(4)], 1)
        spread = sums - sums[:, :1]  # between modules
        assert bool(spread[::2].std(0)[1:].any()) == known


def test_bad_input_is_refused_before_anything_changes():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    for changes, error, message in [
        ({"sparsity": 1.0}, ValueError, "sparsity must be a number, 0 <= s < 1"),
        ({"sparsity": -0.1}, ValueError, "sparsity must be"),
        ({"sparsity": float("nan")}, ValueError, "sparsity must be"),
        ({"step": 0.0}, ValueError, "step must be a number"),
        ({"step": 0.6}, ValueError, "step must be a number"),
        ({"step": 0.001}, ValueError, "step must be at least a block of 1 neurons"),
        ({"masks": 11}, ValueError, "masks must be an even integer >= 10"),
        ({"masks": 8}, ValueError, "masks must be an even"),
        ({"block": 0}, ValueError, "block must be an integer from 1 to 40"),
        ({"prior": "sparse"}, ValueError, "prior must be 'wanda' or 'random'"),
        ({"regression": "l2"}, ValueError, "regression must be 'l1', 'ridge' or None"),
        ({"sampling": "layer"}, ValueError, "sampling must be 'model' or 'module'"),
        ({"batch": 0}, ValueError, "batch must be"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator"),
        ({"ids": IDS[:0]}, ValueError, "ids: expected a non-empty"),
        ({"ids": IDS[:, :1]}, ValueError, "rows of 2 tokens"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "Linear"),
    ]:
        given = {"model": model, "ids": IDS, "generator": generator()} | changes
        with pytest.raises(error, match=message):
            bonsai(given.pop("model"), given.pop("ids"), **given)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    bonsai(model, IDS, sparsity=0.1, generator=generator(), regression=None)
    with pytest.raises(ValueError, match="sliced"):
        bonsai(model, IDS, sparsity=0.1, generator=generator())
    with pytest.raises(ValueError, match="masks must be"):
        regress(torch.ones(9, 2).double(), torch.ones(9).double(), torch.ones(2).double(), "l1")
    with pytest.raises(ValueError, match="kind must be"):
        regress(torch.ones(10, 2).double(), torch.ones(10).double(), torch.ones(2).double(), "l2")
