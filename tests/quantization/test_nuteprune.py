"""NutePrune: masks on heads, neurons and hidden dimensions, their training, teachers, and the cut."""

import copy

import pytest
import torch
import torch.nn.functional as F

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.gates import HardConcrete
from refimpl.quantization.pruning.bonsai import weights_left
from refimpl.quantization.pruning.hidden import Masks, cut_masks, masked, slice_hidden
from refimpl.quantization.pruning.nuteprune import at_inference, nuteprune
from refimpl.quantization.pruning.nuteprune_teachers import Snapshot, Teachers, distillation, outputs, taught
from refimpl.quantization.pruning.slicing import load_sliced, save_sliced

IDS = random_ids(4, 12)
LLAMAS = [family for family in FAMILIES if family != "gpt2"]
FAST = {
    "steps": 30,
    "warmup": 6,
    "batch": 2,
    "interval": 0.03,
    "ahead": 2,
    "masks_lr": 0.5,
    "lambdas_lr": 20.0,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def drawn(bb, hidden=True):
    """Masks with gates of 0 and gates in between."""
    gates = [
        torch.rand(s, generator=generator(7)) for s in ((bb.n_layers, bb.H), (bb.n_layers, bb.F), (bb.d,))
    ]
    gates = [g.masked_fill(g < 0.3, 0) for g in gates]
    return Masks(gates[0], gates[1], gates[2] if hidden else None)


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_open_masks_are_the_plain_model(family):
    bb = Backbone(tiny(family))
    plain = logits(bb.model)
    masks = Masks(torch.ones(3, 4), torch.ones(3, bb.F), None if bb.is_gpt2 else torch.ones(bb.d))
    with masked(bb, masks):
        torch.testing.assert_close(logits(bb.model), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bb.model.modules())
    cut_masks(bb.model, masks)
    torch.testing.assert_close(logits(bb.model), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", LLAMAS)
def test_cut_masks_give_the_masked_logits_and_fewer_weights(family, tied, tmp_path):
    bb = Backbone(tiny(family, tie_word_embeddings=tied))
    masks = drawn(bb)
    with masked(bb, masks):
        expected = logits(bb.model)
    plain = tiny(family, tie_word_embeddings=tied)
    assert (expected - logits(plain)).abs().max() > 0.1
    hard = [(gates > 0).float() for gates in (masks.heads, masks.neurons, masks.hidden)]
    counted = float(weights_left(bb, *hard))
    cut_masks(bb.model, masks)
    torch.testing.assert_close(logits(bb.model), expected, rtol=1e-3, atol=1e-3)
    left = sum(p.numel() for n, p in bb.model.named_parameters() if ".layers." in n and p.ndim == 2)
    assert left == counted
    assert (bb.model.lm_head.weight is bb.model.get_input_embeddings().weight) == tied
    save_sliced(bb.model, tmp_path / "pruned.safetensors")
    slice_hidden(plain, masks.hidden > 0)
    load_sliced(plain, tmp_path / "pruned.safetensors")
    assert torch.equal(logits(plain), logits(bb.model))
    assert plain.generate(IDS[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_a_gpt2_is_cut_without_hidden_dimensions():
    bb = Backbone(tiny("gpt2"))
    masks = drawn(bb, hidden=False)
    with masked(bb, masks):
        expected = logits(bb.model)
    cut_masks(bb.model, masks)
    torch.testing.assert_close(logits(bb.model), expected, rtol=1e-4, atol=1e-4)


def test_every_mask_has_a_gradient():
    bb = Backbone(tiny("llama"))
    gates = [g.requires_grad_() for g in vars(drawn(bb)).values()]
    with masked(bb, Masks(*gates)):
        bb.model(IDS, labels=IDS).loss.backward()
    assert all(bool((g.grad != 0).any()) for g in gates)
    left = [torch.rand(s, generator=generator()).requires_grad_() for s in ((3, 4), (3, 40), (32,))]
    weights_left(bb, *left).backward()
    assert all(bool((g.grad > 0).all()) for g in left)


def test_at_inference_as_many_gates_close_as_are_expected_to():
    log_a = 4 * torch.randn(3, 50, generator=generator())
    gates, p_open = at_inference(log_a), HardConcrete(2 / 3).p_open(log_a)
    for row, p, at in zip(gates, p_open, log_a, strict=True):
        assert int((row == 0).sum()) == round(50 - float(p.sum()))
        assert at[row == 0].max() < at[row > 0].min()
        torch.testing.assert_close(row[row > 0], torch.sigmoid(at[row > 0] * 1.2))
    draws = HardConcrete(2 / 3).sample(log_a[0].expand(4000, 50), generator())
    assert ((draws > 0).double().mean(0) - p_open[0]).abs().max() < 0.04


# --- teachers -------------------------------------------------------------------------------------


def test_teachers_are_denser_and_end_with_the_dense_model():
    school, s = Teachers(0.25, 0.01, ahead=10), 0.0
    for left in range(100, 60, -1):
        s += 0.007
        teacher = school.now(left)
        if school.reached is None:
            assert (teacher is None) == (len(school.snapshots) < 10)
            assert teacher is None or s - 0.13 < teacher < s - 0.085
        school.record(s, left, lambda s=s: s)
    assert len(school.snapshots) == 24 and school.reached is not None
    back = [school.now(left) or 0.0 for left in range(60, -1, -1)]
    assert back == sorted(back, reverse=True) and back[0] > 0.1 and back[-1] == 0.0


def test_a_teacher_speaks_with_its_own_masks_and_factors():
    from refimpl.lora import add_lora, lora_state_dict

    bb = Backbone(tiny("llama"))
    plain = logits(bb.model)
    add_lora(bb.model, ("q_proj", "v_proj"), 2, 2.0, generator())
    own = {
        name: torch.randn(t.shape, generator=generator(3)) for name, t in lora_state_dict(bb.model).items()
    }
    masks = drawn(bb)
    with torch.no_grad():
        for name, tensor in lora_state_dict(bb.model).items():
            tensor.copy_(own[name])
        with masked(bb, masks):
            expected = outputs(bb.model, IDS)[0]
        for tensor in lora_state_dict(bb.model).values():
            tensor.zero_().add_(0.3)
    found = taught(bb, IDS, Snapshot(0.1, masks, own))
    torch.testing.assert_close(found[0], expected)
    assert len(found[1]) == 3 and not found[0].requires_grad
    torch.testing.assert_close(taught(bb, IDS, None)[0], plain)
    assert all(bool((t == 0.3).all()) for t in lora_state_dict(bb.model).values())


def test_distillation_is_a_kl_summed_over_tokens_and_a_mean_square_where_states_are_not_0():
    draws = generator()
    logits_s, logits_t = torch.randn(2, 3, 5, generator=draws), torch.randn(2, 3, 5, generator=draws)
    states_s, states_t = torch.randn(2, 3, 4, generator=draws), torch.randn(2, 3, 4, generator=draws)
    states_s[..., 1] = 0
    p, q = F.softmax(logits_t * 1.5, -1), F.softmax(logits_s * 1.5, -1)
    kl = (p * (p / q).log()).sum() / 2
    mse = (states_s - states_t)[..., [0, 2, 3]].square().mean()
    found = distillation((logits_s, (states_s,) * 2), (logits_t, (states_t,) * 2))
    torch.testing.assert_close(found, 0.1 * kl / 1.5**2 + 0.9 * 2 * mse)
    assert float(distillation((logits_t, (states_t,)), (logits_t, (states_t,)))) == pytest.approx(0, abs=1e-6)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_model_gets_sparser_and_is_cut_at_the_end(family):
    model = tiny(family)
    hidden = family != "gpt2"
    names = [name for name, _ in model.named_parameters()]
    report = nuteprune(model, IDS, sparsity=0.3, generator=generator(), hidden=hidden, **FAST)
    assert report.expected[0] < 0.01 < 0.25 < report.expected[-1] and report.sparsity > 0.2
    assert (report.masks.hidden is None) == (not hidden)
    assert {name for name, _ in model.named_parameters()} <= set(names)  # layers may lose all heads
    assert all(p.requires_grad for p in model.parameters())
    assert {len(x) for x in (report.target, report.teacher, report.losses, report.lambdas)} == {30}
    assert max(report.teacher) > 0 and logits(model).isfinite().all()


def test_without_a_target_next_to_nothing_is_pruned():
    model = tiny("llama")
    before = logits(model)
    report = nuteprune(
        model, IDS, sparsity=0.0, generator=generator(), **(FAST | {"steps": 4, "lora_lr": 1e-9})
    )
    assert report.sparsity < 0.02 and report.teacher == [0.0] * 4
    assert (logits(model) - before).std() < 0.1 * before.std()


def test_without_teachers_the_language_model_s_loss_is_minimised():
    model = tiny("llama")
    with torch.no_grad():
        loss = float(model(IDS[:1], labels=IDS[:1]).loss)
    report = nuteprune(
        model, IDS[:1], sparsity=0.1, generator=generator(), teachers=None, **(FAST | {"steps": 1})
    )
    assert report.losses[0] == pytest.approx(loss, rel=0.1)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_changes():
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    for changes, error, message in [
        ({"sparsity": 1.0}, ValueError, "sparsity must be a number, 0 <= s < 1"),
        ({"sparsity": float("nan")}, ValueError, "sparsity must be"),
        ({"steps": 0}, ValueError, "steps must be an integer >= 1"),
        ({"warmup": 0}, ValueError, "warmup must be an integer >= 1"),
        ({"batch": 0}, ValueError, "batch must be"),
        ({"teachers": "many"}, ValueError, "teachers must be 'numerous', 'dense' or None"),
        ({"interval": 0.0}, ValueError, "interval must be"),
        ({"ahead": 0}, ValueError, "ahead must be"),
        ({"masks_lr": 0.0}, ValueError, "gates_lr must be|masks_lr must be"),
        ({"lambdas_lr": -1.0}, ValueError, "lambdas_lr must be"),
        ({"rank": 0}, ValueError, "rank must be"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator"),
        ({"ids": IDS.float()}, ValueError, "ids: expected a non-empty"),
        ({"ids": IDS[:, :1]}, ValueError, "rows of 2 tokens"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "Linear"),
        ({"model": tiny("gpt2")}, ValueError, "hidden: not for a GPT-2"),
    ]:
        given = {"model": model, "ids": IDS, "generator": generator(), "steps": 2} | changes
        with pytest.raises(error, match=message):
            nuteprune(given.pop("model"), given.pop("ids"), **given)
    assert model.state_dict().keys() == before.keys() and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for keep in (torch.ones(31).bool(), torch.zeros(32).bool(), torch.ones(32)):
        with pytest.raises(ValueError, match="keep must be a BoolTensor"):
            slice_hidden(model, keep)
    with (
        pytest.raises(ValueError, match="hidden: expected"),
        masked(Backbone(model), Masks(None, None, torch.ones(3))),
    ):
        pass
    slice_hidden(model, torch.arange(32) < 30)
    with pytest.raises(ValueError, match="sliced already"):
        slice_hidden(model, torch.arange(32) < 30)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(Teachers, "record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nuteprune(model, IDS, generator=generator(), steps=2)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items())
    assert all(p.requires_grad for p in model.parameters())
