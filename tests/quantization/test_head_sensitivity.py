"""Importance of heads by gradients, the order it gives, and the ablation it stands for."""

import copy

import numpy as np
import pytest
import torch

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.quantization.pruning.gating import gated
from refimpl.quantization.pruning.head_sensitivity import head_ablation, head_importance, pruning_masks
from refimpl.quantization.pruning.slicing import slice_model

IDS = random_ids(6, 12)
BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])


def row_losses(model, ids=IDS):
    with torch.no_grad():
        return torch.stack([model(row[None], labels=row[None]).loss for row in ids])


def planted(family):
    """A model whose heads (0, 1), (1, 3) and (2, 0) are cut off from the output."""
    model = tiny(family)
    bb = Backbone(model)
    for ref in bb.linears():
        if ref.role == "o":
            head = (1, 3, 0)[ref.layer]
            with torch.no_grad():
                ref.weight[:, head * bb.D : (head + 1) * bb.D] = 0
    return model


@BOTH
def test_importance_is_the_finite_difference_of_each_rows_loss(family):
    bb = Backbone(tiny(family))
    found = head_importance(bb.model, IDS, normalise=False)
    for l, h in ((0, 0), (1, 2), (2, 3)):
        ends = []
        for step in (0.02, -0.02):
            gates = torch.ones(bb.n_layers, bb.H)
            gates[l, h] += step
            with gated(bb, gates):
                ends.append(row_losses(bb.model))
        expected = ((ends[0] - ends[1]) / 0.04).abs().mean()
        assert float(found[l, h]) == pytest.approx(float(expected), rel=1e-2, abs=1e-4)


def test_absolute_values_are_taken_row_by_row_whatever_the_batch():
    model = tiny("llama")
    whole = head_importance(model, IDS, batch=6)
    torch.testing.assert_close(head_importance(model, IDS, batch=1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head_importance(model, IDS, batch=4), whole, rtol=1e-5, atol=1e-6)
    single = torch.stack([head_importance(model, row[None], normalise=False) for row in IDS]).mean(0)
    torch.testing.assert_close(head_importance(model, IDS, normalise=False), single, rtol=1e-5, atol=1e-7)


@BOTH
def test_heads_that_reach_nothing_have_no_importance_and_go_first(family):
    model = planted(family)
    importance = head_importance(model, IDS)
    assert importance[0, 1] == importance[1, 3] == importance[2, 0] == 0
    assert int((importance > 0).sum()) == 9
    torch.testing.assert_close(importance.norm(dim=1), torch.ones(3, dtype=torch.float64))
    (mask,) = pruning_masks(model, IDS, [3])
    assert not mask[0, 1] and not mask[1, 3] and not mask[2, 0] and int(mask.sum()) == 9
    with gated(Backbone(model), mask.float()):
        torch.testing.assert_close(row_losses(model), pruned := row_losses(planted(family)))
    slice_model(model, mask, torch.ones(3, Backbone(model).F).bool())
    torch.testing.assert_close(row_losses(model), pruned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
def test_masks_are_nested_and_remove_what_was_asked(exact):
    model = tiny("gpt2")
    masks = pruning_masks(model, IDS, [0, 2, 5, 5, 12], exact=exact)
    assert [int((~mask).sum()) for mask in masks] == [0, 2, 5, 5, 12]
    assert all(bool((later <= earlier).all()) for earlier, later in zip(masks, masks[1:], strict=False))
    importance = head_importance(model, IDS)
    assert float(importance[~masks[1]].max()) <= float(importance[masks[1]].min())


def test_the_exact_variant_looks_again_at_the_pruned_model():
    model = tiny("llama")
    first, second = pruning_masks(model, IDS, [4, 5], exact=True)
    again = head_importance(model, IDS, heads=first)
    assert not again[~first].any()
    (gone,) = (first & ~second).nonzero().tolist()
    assert float(again[gone[0], gone[1]]) == float(again[first].min())
    plain, exact = (pruning_masks(model, IDS, range(13), exact=e) for e in (False, True))
    assert any(not torch.equal(a, b) for a, b in zip(plain, exact, strict=True))


def test_importance_of_a_pruned_model_is_that_of_a_model_without_these_heads():
    heads = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    torch.testing.assert_close(
        head_importance(
            tiny("llama"), IDS, heads=torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]]).bool()
        ),
        head_importance(planted("llama"), IDS, heads=heads),
    )


@BOTH
def test_the_ablation_table_is_that_of_models_without_the_head(family):
    bb = Backbone(tiny(family))
    table, others = head_ablation(bb.model, IDS, batch=4), head_ablation(bb.model, IDS, others=True)
    assert table.shape == others.shape == (3, 4, 6)
    plain = row_losses(bb.model)
    for changes, keep in ((table, [1, 1, 0, 1]), (others, [0, 0, 1, 0])):
        model = copy.deepcopy(bb.model)
        heads = torch.ones(3, 4).bool()
        heads[1] = torch.tensor(keep).bool()
        slice_model(model, heads, torch.ones(3, bb.F).bool())
        torch.testing.assert_close(changes[1, 2], row_losses(model) - plain, rtol=0, atol=1e-4)


def test_importance_ranks_heads_as_their_ablation_does():
    # One model has 12 heads; rank correlations of several are averaged. Small gates make the loss linear.
    found = []
    for seed in range(4):
        model = tiny("llama", seed=seed)
        with torch.no_grad():
            for ref in Backbone(model).linears():
                if ref.role == "o":
                    ref.weight.mul_(0.1)
        pairs = head_importance(model, IDS, normalise=False), head_ablation(model, IDS).abs().mean(-1)
        ranks = [np.argsort(np.argsort(x.flatten().numpy())) for x in pairs]
        found.append(np.corrcoef(*ranks)[0, 1])
    assert np.mean(found) > 0.8


def test_nothing_of_the_model_changes():
    model = tiny("gpt2")
    before = copy.deepcopy(model.state_dict())
    pruning_masks(model, IDS, [3, 6], exact=True)
    head_ablation(model, IDS[:1])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_input_is_refused():
    model = tiny("llama")
    for function in (head_importance, head_ablation, lambda m, i, **k: pruning_masks(m, i, [1], **k)):
        for ids in (IDS[:, :1], IDS + 1000, IDS[:0], IDS.float()):
            with pytest.raises(ValueError, match="ids"):
                function(model, ids)
        with pytest.raises(ValueError, match="batch"):
            function(model, IDS, batch=0)
        with pytest.raises(TypeError, match="not supported"):
            function(torch.nn.Linear(2, 2), IDS)
    for heads in (torch.ones(3, 4), torch.ones(3, 5).bool(), [[True]]):
        with pytest.raises(ValueError, match="heads"):
            head_importance(model, IDS, heads=heads)
    for counts in ([], [3, 2], [-1], [13], [1.0]):
        with pytest.raises(ValueError, match="removed"):
            pruning_masks(model, IDS, counts)
    slice_model(model, torch.ones(3, 4).bool(), torch.ones(3, 40).bool())
    with pytest.raises(ValueError, match="sliced"):
        head_importance(model, IDS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exact", [False, True])
def test_no_head_removed_is_the_plain_model(family, exact):
    model, ids = tiny(family), IDS[:2]
    with torch.no_grad():
        plain = model(ids).logits
    masks = pruning_masks(model, ids, [0, 0], exact=exact)
    assert all(bool(mask.all()) for mask in masks)
    bb = Backbone(model)
    with torch.no_grad(), gated(bb, masks[0].float()):
        assert torch.equal(model(ids).logits, plain)
    slice_model(model, masks[0], torch.ones(bb.n_layers, bb.F).bool())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_refused_input_leaves_the_model_as_it_was(family):
    model = tiny(family)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    nan = torch.full((3, 4), torch.nan)
    for call, word in (
        (lambda: head_importance(model, IDS[:0]), "ids"),
        (lambda: head_importance(model, IDS * torch.nan), "ids"),
        (lambda: head_importance(model, IDS, heads=nan), "heads"),
        (lambda: head_importance(model, IDS, heads=torch.ones(0, 4).bool()), "heads"),
        (lambda: pruning_masks(model, IDS, []), "removed"),
        (lambda: pruning_masks(model, IDS, [torch.nan]), "removed"),
        (lambda: pruning_masks(model, IDS, [0, 13], exact=True), "removed"),
        (lambda: head_ablation(model, IDS[:0]), "ids"),
        (lambda: head_ablation(model, IDS, batch=0), "batch"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items())
    broken = tiny(family)
    broken.get_input_embeddings().weight.data[0, 0] = torch.nan
    for call in (head_importance, head_ablation, lambda m, ids: pruning_masks(m, ids, [3])):
        with pytest.raises(ValueError, match="model: .* holds NaN"):
            call(broken, IDS)
    assert not frozen.requires_grad and sum(not p.requires_grad for p in model.parameters()) == 1
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
