"""Sensitivities and policies of blocks, tuning in windows with early exits, and their vote."""

import pytest
import torch
from quantization_runs import through_a_file
from torch import nn

from refimpl.backbone import Backbone
from refimpl.checks.tiny import random_ids, tiny
from refimpl.footprint.saved_tensors import saved_tensors
from refimpl.quantization import GridLinear, compressed_names, stats_of
from refimpl.quantization.edge_llm import (
    Policy,
    PruneRound,
    bit_widths,
    compress,
    make_policy,
    pruning_ratios,
    sensitivities,
)
from refimpl.quantization.edge_llm_tuning import EarlyExits, schedule, tune, vote
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.pruning.sparsegpt import SparseGPT
from refimpl.quantization.sparse import SparseLinear

IDS, OTHER = random_ids(12, 16), random_ids(4, 10, seed=1)
BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(model, ids=OTHER):
    with torch.no_grad():
        return model(ids).logits


def exits_of(family, stride, **changes):
    return EarlyExits(tiny(family, **changes), stride, rank=2, alpha=4, generator=generator())


# --- layer-wise unified compression ---------------------------------------------------------------


@pytest.mark.parametrize("target", [0.0, 0.2, 0.5, 0.7, 0.9, 0.95])
def test_ratios_have_the_target_as_mean_and_fall_with_sensitivity(target):
    for seed in range(5):
        s = torch.rand(8, generator=generator(seed)) ** 3
        ratio = torch.tensor(pruning_ratios(s, target), dtype=torch.float64)
        assert abs(float(ratio.mean()) - target) < 1e-9
        assert 0 <= ratio.min() and ratio.max() <= 0.95
        assert bool((ratio[s.argsort()].diff() <= 1e-12).all())


def test_ratios_where_the_official_formula_breaks():
    official = torch.tensor([1.0, 1.0, 0.0]) / 2 * 3 * 0.8
    assert official.max() > 1  # 1.2: more than all weights
    assert pruning_ratios(torch.tensor([0.0, 0.0, 5.0]), 0.8) == pytest.approx((0.95, 0.95, 0.5))
    assert pruning_ratios(torch.full((4,), 3.0), 0.3) == pytest.approx((0.3,) * 4)  # 0 / 0 there


def test_bits_by_the_mean_or_by_number():
    s = torch.tensor([5.0, 1.0, 2.0, 3.0, 30.0])
    assert bit_widths(s, 4, 8) == (4, 4, 4, 4, 8)
    assert bit_widths(s, 3, 6, 2) == (6, 3, 3, 6, 6)
    assert bit_widths(s, 3, 6, 0) == (6,) * 5 and bit_widths(s, 3, 6, 5) == (3,) * 5


@BOTH
def test_the_sensitivity_is_the_mean_squared_error_of_outputs(family):
    model = tiny(family)
    before = logits(model)
    found = sensitivities(model, IDS, sparsities=(0.3, 0.6), bits=3)
    inputs = {}
    for name, module in model.named_modules():
        keep = lambda _, x, name=name: inputs.__setitem__(name, x[0].flatten(0, 1).double())
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(keep)
    logits(model, IDS)
    for block in range(3):
        errors = []
        for name in dict.fromkeys(ref.name for ref in Backbone(model).linears() if ref.layer == block):
            W = dense_weight(model.get_submodule(name)).double()
            rounded = PruneRound(0.0, 3)(name, W.float(), None).weight.double()
            errors.append((inputs[name] @ (W - rounded).T).square().mean())
        assert float(found.rounding[block]) == pytest.approx(float(sum(errors) / len(errors)), rel=1e-3)
    more = sensitivities(model, IDS, sparsities=(0.6,), bits=2)
    assert bool((more.pruning > found.pruning).all()) and bool((more.rounding > found.rounding).all())
    assert torch.equal(logits(model), before)


def test_a_block_that_matters_more_is_pruned_less_and_gets_more_bits():
    model = tiny("llama")
    with torch.no_grad():
        for ref in Backbone(model).linears():
            if ref.layer == 1:
                ref.weight.mul_(3)
    policy = make_policy(model, IDS, sparsity=0.4, low=2, high=4)
    assert policy.sparsity[1] == 0 and min(policy.sparsity[0], policy.sparsity[2]) > 0.4
    assert policy.bits == (2, 4, 2)


@BOTH
def test_compress_stores_what_the_policy_says(family, tmp_path):
    model = tiny(family)
    before = logits(model)
    policy = Policy((0.0, 0.75, 0.5), (8, 4, 3))
    compress(model, policy, IDS)
    assert len(compressed_names(model)) == (12 if family == "gpt2" else 21)
    for ref in Backbone(model).linears():
        layer = ref.module
        assert isinstance(layer, GridLinear if ref.layer == 0 else SparseLinear)
        assert layer.settings["bits"] == policy.bits[ref.layer]
        if ref.layer:
            assert layer.sparsity == pytest.approx(policy.sparsity[ref.layer], abs=0.01)
    through_a_file(model, tiny(family, seed=4), tmp_path, IDS)
    neutral = tiny(family)
    compress(neutral, Policy.uniform(3, 0.0, 8), IDS)
    assert (logits(neutral) - before).std() < 0.05 * before.std() < (logits(model) - before).std()


def test_pruned_weights_are_rounded_to_nearest_on_their_mask():
    W = torch.randn(6, 16, generator=generator())
    X = torch.randn(64, 16, generator=generator(1))
    stats = stats_of(X)
    layer = PruneRound(0.5, 4)("fc", W, stats)
    pruned = SparseGPT(0.5, torch.float32).solve(W, stats.H)
    scale = (pruned.Q.abs().amax(1, keepdim=True) / 7).half().double()
    expected = (pruned.Q / scale).round().clamp(-8, 7) * scale
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-4, atol=1e-5)
    assert layer.nbytes() == 6 * 16 // 8 + 6 * 8 // 2 + 6 * 2  # bitmap, half of the codes, scales


# --- windows and exits ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
def test_untrained_exits_leave_the_model_as_it_was_and_the_last_is_the_model(family):
    before = logits(tiny(family))
    exits = exits_of(family, 1)
    assert torch.equal(logits(exits.model), before)
    torch.testing.assert_close(exits(OTHER)[-1], before, rtol=1e-4, atol=1e-4)
    assert len(exits_of(family, 3)(OTHER)) == 1


@BOTH
def test_a_step_trains_its_window_and_head_only(family):
    exits = exits_of(family, 1)
    before = {name: p.detach().clone() for name, p in exits.named_parameters()}
    mine = {
        name for name, p in exits.named_parameters() for e in (0, 1) if any(p is q for q in exits.trained(e))
    }
    report = tune(exits, IDS, steps=3, generator=generator(), lr=1e-2)
    assert report.exit == (0, 1, 2) and all(p.grad is None for p in exits.parameters())
    moved = {name for name, p in exits.named_parameters() if not torch.equal(p, before[name])}
    last = {name for name, p in exits.named_parameters() if any(p is q for q in exits.trained(2))}
    assert moved <= mine | last and "heads.0.weight" in moved
    assert not any(name.endswith(".A") for name in moved)  # B is 0 at the first step: A has no gradient
    assert {name.split(".lora")[0].split(".")[3] for name in moved if ".lora." in name} == set("012")


def test_a_window_keeps_its_share_of_the_activations():
    """One block of three: a third of the bytes in front of the head, whatever the exit."""
    full = exits_of("llama", 3)
    whole = saved_tensors(lambda: full.hidden(OTHER, 0), full).total()
    exits = exits_of("llama", 1)
    for e in range(3):
        share = saved_tensors(lambda e=e: exits.hidden(OTHER, e), exits).total() / whole
        assert 0.3 < share <= 1 / 3
    assert (
        saved_tensors(lambda: exits.loss(OTHER, 0), exits).total()
        < saved_tensors(lambda: full.loss(OTHER, 0), full).total()
    )


@BOTH
def test_tuning_lowers_the_loss_of_every_exit_of_a_compressed_model(family):
    model = tiny(family)
    compress(model, Policy.uniform(3, 0.25, 4), IDS)
    exits = EarlyExits(model, 1, rank=4, generator=generator())
    text = IDS[:2]
    before = [float(exits.loss(text, e).detach()) for e in range(3)]
    tune(exits, text, steps=30, generator=generator(), batch=2, lr=2e-2, clip=1.0)
    after = [float(exits.loss(text, e).detach()) for e in range(3)]
    assert all(b < a - 0.5 for a, b in zip(before, after, strict=True))


def test_the_mask_says_which_tokens_are_learned():
    exits = exits_of("llama", 1)
    mask = torch.zeros(4, 10, dtype=torch.long)
    mask[:, 4:6] = 1
    changed = OTHER.clone()
    changed[:, 6:] = 5  # behind what is to be predicted
    loss = exits.loss(OTHER, 1, mask)
    torch.testing.assert_close(loss, exits.loss(changed, 1, mask))
    log_p = exits(OTHER)[1].log_softmax(-1)
    expected = -torch.stack([log_p[b, t - 1, OTHER[b, t]] for b in range(4) for t in (4, 5)]).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-4)


def test_the_state_dict_has_everything():
    exits, other = exits_of("llama", 1), exits_of("llama", 1, seed=3)
    tune(exits, IDS, steps=3, generator=generator(), lr=1e-2)
    other.load_state_dict(exits.state_dict())
    assert all(map(torch.equal, exits(OTHER), other(OTHER)))


def test_steps_go_from_shallow_to_deep():
    assert schedule(8, 4) == [0, 0, 1, 1, 2, 2, 3, 3] and schedule(11, 4) == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3]


def test_a_sure_exit_outvotes_unsure_ones():
    unsure, sure = torch.tensor([0.4, 0.35, 0.25]).log(), torch.tensor([0.0, 0.05, 0.95]).log()
    assert int(vote([unsure, unsure, sure]).argmax()) == 2
    torch.testing.assert_close(vote([unsure, unsure, sure]).sum(), torch.tensor(1.0))


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_changes():
    model, exits = tiny("llama"), exits_of("llama", 1)
    before = {name: t.clone() for name, t in (*model.state_dict().items(), *exits.state_dict().items())}
    nan, three = torch.tensor([1.0, torch.nan]), torch.arange(3.0)
    steps = {"steps": 3, "generator": generator()}
    short = torch.ones(12, 4, dtype=torch.long)
    for call, error, message in [
        (lambda: pruning_ratios(nan, 0.5), ValueError, "sensitivity must be finite"),
        (lambda: pruning_ratios(torch.ones(0), 0.5), ValueError, "sensitivity must be finite"),
        (lambda: pruning_ratios(three, 0.96), ValueError, "target must be a number"),
        (lambda: pruning_ratios(three, -0.1), ValueError, "target must be a number"),
        (lambda: bit_widths(three, 1, 4), ValueError, "low and high must be integers"),
        (lambda: bit_widths(three, 4, 3), ValueError, "low and high must be integers"),
        (lambda: bit_widths(three, 4, 8, 4), ValueError, "n_low must be an integer from 0 to 3"),
        (lambda: PruneRound(1.0, 4), ValueError, "sparsity must be a number"),
        (lambda: PruneRound(0.5, 1), ValueError, "bits"),
        (lambda: sensitivities(model, IDS, sparsities=()), ValueError, "sparsities must not be empty"),
        (lambda: sensitivities(model, IDS[:0]), ValueError, "ids: expected"),
        (lambda: sensitivities(nn.Linear(2, 2), IDS), TypeError, "Linear is not supported"),
        (lambda: compress(model, Policy.uniform(2, 0.5, 4), IDS), ValueError, "policy must be of 3 blocks"),
        (lambda: compress(model, Policy.uniform(3, 0.5, 9), IDS), ValueError, "bits"),
        (lambda: EarlyExits(model, 2, generator=generator()), ValueError, "divisor of the 3 blocks"),
        (lambda: EarlyExits(model, 1, rank=99, generator=generator()), ValueError, "rank must be"),
        (lambda: EarlyExits(exits.model, 1, generator=generator()), ValueError, "LoRA factors already"),
        (lambda: tune(exits, IDS, steps=2, generator=generator()), ValueError, "steps must be .* >= 3"),
        (lambda: tune(exits, IDS.float(), **steps), ValueError, "ids: expected"),
        (lambda: tune(exits, IDS[:, :1], **steps), ValueError, "2 tokens or more"),
        (lambda: tune(exits, IDS, mask=short, **steps), ValueError, "mask must be"),
        (lambda: tune(exits, IDS, mask=torch.zeros_like(IDS), **steps), ValueError, "token to predict"),
        (lambda: tune(exits, IDS, lr=0.0, **steps), ValueError, "lr must be positive"),
        (lambda: tune(exits, IDS, clip=float("inf"), **steps), ValueError, "clip must be positive"),
        (lambda: tune(exits, IDS, batch=0, **steps), ValueError, "batch must be"),
        (lambda: vote([]), ValueError, "logits must be of one shape"),
        (lambda: vote([torch.ones(2), torch.ones(3)]), ValueError, "logits must be of one shape"),
    ]:
        with pytest.raises(error, match=message):
            call()
        after = dict((*model.state_dict().items(), *exits.state_dict().items()))
        assert after.keys() == before.keys() and all(
            torch.equal(t, before[name]) for name, t in after.items()
        )
