"""Mixed precision: master weights keep what 16 bits lose; where Eq. 2 holds and where not."""

import numpy as np
import pytest
import torch
from torch import nn

from refimpl.checks.tiny import random_ids, tiny
from refimpl.footprint import Arch, Run
from refimpl.footprint.precision import (
    REGIMES,
    MasterWeights,
    actual_saving,
    bytes_per_parameter,
    cast_bytes,
    eq2_saving,
)
from refimpl.footprint.static import measure_static, static


def _adamw(weights, lr=1e-3):
    return torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)


def _losses(family, regime, steps=25, lr=3e-4):
    """Losses of a tiny model that learns one batch by heart, and what trained it."""
    model, ids, amp = tiny(family), random_ids(2, 16), regime == "autocast"
    if regime == "bfloat16":
        model.to(torch.bfloat16)
    if regime in ("master", "float16"):
        dtype, scale = (torch.bfloat16, None) if regime == "master" else (torch.float16, 2.0**16)
        trainer = MasterWeights(model, lambda masters: _adamw(masters, lr), dtype, scale)
    else:
        trainer = _adamw(model.parameters(), lr)
    losses = []
    for _ in range(steps):
        trainer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(input_ids=ids, labels=ids).loss
        if isinstance(trainer, MasterWeights):
            trainer.backward(loss)
        else:
            loss.backward()
        trainer.step()
        losses.append(loss.item())
    return torch.tensor(losses), model, trainer


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_master_weights_and_autocast_learn_like_float32_and_pure_bfloat16_lags(family):
    plain = _losses(family, "float32")[0]
    fall = plain[0] - plain[-1]
    assert fall > 0.8
    for regime in ("master", "autocast", "float16"):
        assert (_losses(family, regime)[0] - plain).abs().max() < 0.01 * fall, regime
    assert _losses(family, "bfloat16")[0][-1] - plain[-1] > 0.2 * fall


def test_small_updates_vanish_without_master_weights():
    """1 - 0.001 rounds to 1 in bfloat16, whose spacing below 1 is 1/256."""
    kept, lost = nn.ParameterList([torch.ones(1)]), nn.ParameterList([torch.ones(1, dtype=torch.bfloat16)])
    trainer = MasterWeights(kept, lambda masters: torch.optim.SGD(masters, lr=1e-3))
    plain = torch.optim.SGD(lost.parameters(), lr=1e-3)
    for _ in range(100):
        trainer.zero_grad()
        trainer.backward(kept[0].sum())
        trainer.step()
        lost[0].grad = None
        lost[0].sum().backward()
        plain.step()
    assert lost[0].item() == 1.0
    assert trainer.masters[0].item() == pytest.approx(0.9, abs=1e-5)
    assert kept[0].item() == torch.tensor(trainer.masters[0].item(), dtype=torch.bfloat16).item()


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
def test_float32_weights_make_it_the_plain_optimizer(family):
    ids, (plain, mixed) = random_ids(2, 8), (tiny(family), tiny(family))
    optimizer, trainer = _adamw(plain.parameters()), MasterWeights(mixed, _adamw, torch.float32, 1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        plain(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        trainer.zero_grad()
        trainer.backward(mixed(input_ids=ids, labels=ids).loss)
        trainer.step()
    for expected, got in zip(plain.parameters(), mixed.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bytes_are_2_and_2_and_4_and_8(family, dtype):
    model = tiny(family)
    parameters, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    trainer, ids, during = MasterWeights(model, _adamw, dtype), random_ids(2, 8), []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: during.append(sum(m.grad.nbytes for m in optimizer.param_groups[0]["params"]))
    )
    trainer.backward(model(input_ids=ids, labels=ids).loss)
    assert trainer.step()
    row, ledger = bytes_per_parameter("master"), trainer.ledger()
    assert ledger.total("weight") == row["weight"] * parameters
    assert ledger.total("grad") == row["grad"] * parameters
    assert ledger.total("optim") == (row["master"] + row["moments"]) * parameters + 4 * tensors
    assert ledger.total() == 16 * parameters + 4 * tensors
    assert during == [4 * parameters]  # what makes it 20 for the time of a step
    assert all(master.grad is None for master in trainer.masters)
    assert ledger.total("buffer", "resident") == measure_static(tiny(family)).total("buffer", "resident")


def _saved(model, ids, amp):
    """Storages that autograd keeps from forward to backward, those of the model left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(input_ids=ids, labels=ids).loss
    return list(saved.values()), loss


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_autocast_keeps_a_bfloat16_copy_of_every_weight_of_a_product(family, tied):
    model = tiny(family, tie_word_embeddings=tied)
    saved, loss = _saved(model, random_ids(2, 8), amp=True)
    halves = [tensor for tensor in saved if tensor.dtype == torch.bfloat16 and tensor.ndim == 2]
    found = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            copy = module.weight.detach().bfloat16()
            assert any(torch.equal(half, c) for half in halves for c in (copy, copy.T)), module
            found += copy.nbytes
    assert found == cast_bytes(Arch.from_config(model.config))
    loss.backward()
    assert (
        {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_autocast_wins_beyond_the_batch_whose_activations_outweigh_the_casts(family, attention):
    """Saved bytes, autocast minus float32 = casts - B · (what a sequence saves): exactly, for B >= 2."""
    model = tiny(family, attention=attention)

    def difference(batch):
        sizes = []
        for amp in (True, False):
            sizes.append(
                sum(t.untyped_storage().nbytes() for t in _saved(model, random_ids(batch, 4), amp)[0])
            )
        return sizes[0] - sizes[1]

    casts, per_sequence = cast_bytes(Arch.from_config(model.config)), difference(2) - difference(3)
    crossover = casts / per_sequence
    assert 3 < crossover < 40
    for batch in (2, int(crossover), int(crossover) + 1, 48):
        assert difference(batch) == casts - batch * per_sequence
    assert difference(int(crossover)) >= 0 > difference(int(crossover) + 1)


def test_the_table_is_what_float32_and_pure_bfloat16_hold():
    arch = Arch.from_config(tiny("llama").config)
    totals = {}
    for dtype in ("float32", "bfloat16"):
        row, ledger = bytes_per_parameter(dtype), static(arch, Run(dtype=dtype))
        steps = 4 * len(arch.tensors())
        assert ledger.total("weight") == row["weight"] * arch.parameters()
        assert ledger.total("grad") == row["grad"] * arch.parameters()
        assert ledger.total("optim") - steps == row["moments"] * arch.parameters()
        totals[dtype] = ledger.total() - steps
    assert totals["float32"] == 2 * totals["bfloat16"]


def test_totals_of_the_table():
    totals = [sum(bytes_per_parameter(regime).values()) for regime in REGIMES]
    assert dict(zip(REGIMES, totals, strict=True)) == dict(
        float32=16, autocast=18, master=16, master_grad32=18, bfloat16=8, bfloat16_moments32=12
    )


def test_equation_2_holds_without_master_weights_and_with_float32_moments_only():
    printed = eq2_saving(4, 4)
    held = {regime: actual_saving(regime)["all"] == printed for regime in REGIMES}
    assert [regime for regime in held if held[regime]] == ["bfloat16_moments32"]
    assert actual_saving("autocast") == {"model and gradients": -2, "all": -2}
    assert actual_saving("master") == {"model and gradients": 0, "all": 0}
    assert actual_saving("master_grad32") == {"model and gradients": -2, "all": -2}
    # Pure bfloat16 saves what Eq. 2 says on the two terms that it names, and as much again on the third.
    assert actual_saving("bfloat16") == {"model and gradients": 4, "all": 8}


def test_equation_2_holds_for_sgd_without_master_weights():
    arch = Arch.from_config({"model_type": "gpt2"})
    plain, half = (static(arch, Run(dtype=dtype, optimizer="sgd")) for dtype in ("float32", "bfloat16"))
    assert plain.total() - half.total() == eq2_saving(plain.total("weight"), plain.total("grad"))


def test_equation_2_typed_again_in_numpy():
    M_model, M_gradients = np.random.default_rng(0).uniform(0, 1e9, (2, 10))
    for model, gradients, M_saved in zip(M_model, M_gradients, 1 / 2 * (M_model + M_gradients), strict=True):
        assert eq2_saving(model, gradients) == pytest.approx(M_saved, rel=1e-12)


def _one_weight(scale, interval=2000):
    model = nn.ParameterList([torch.ones(1)])
    return model, MasterWeights(model, lambda m: torch.optim.SGD(m, lr=0.5), torch.float16, scale, interval)


def test_a_loss_scale_keeps_gradients_that_float16_cannot_hold():
    """The smallest float16 is 2^-24: a gradient of 2^-26 arrives as 0, or with S = 2^16 as 2^-10."""
    for scale, moved in ((None, 0.0), (2.0**16, -0.5 * 2.0**-26)):
        model = nn.ParameterList([torch.zeros(1)])
        trainer = MasterWeights(model, lambda m: torch.optim.SGD(m, lr=0.5), torch.float16, scale)
        trainer.backward(model[0].float().sum() * 2.0**-26)
        trainer.step()
        assert trainer.masters[0].item() == moved


def test_an_overflow_leaves_weights_and_states_alone_and_halves_the_scale():
    model, trainer = _one_weight(2.0**16)
    trainer.backward(model[0].sum() * 4)
    assert not trainer.step()
    assert (model[0].item(), trainer.masters[0].item(), trainer.loss_scale) == (1.0, 1.0, 2.0**15)
    assert not trainer.optimizer.state
    trainer.zero_grad()
    trainer.backward(model[0].sum())
    assert trainer.step()
    assert (model[0].item(), trainer.masters[0].item()) == (0.5, 0.5)


def test_the_scale_doubles_after_an_interval_without_overflow():
    model, trainer = _one_weight(4.0, interval=3)
    scales = []
    for _ in range(7):
        trainer.zero_grad()
        trainer.backward(model[0].sum())
        trainer.step()
        scales.append(trainer.loss_scale)
    assert scales == [4, 4, 8, 8, 8, 16, 16]


def test_a_gradient_that_no_scale_can_mend_is_an_error_that_changes_nothing():
    model, trainer = _one_weight(1.0)
    trainer.backward(model[0].sum() * float("nan"))
    with pytest.raises(OverflowError, match="not finite even at loss scale 1"):
        trainer.step()
    assert (model[0].item(), trainer.loss_scale, trainer.good_steps) == (1.0, 1.0, 0)


def test_ties_frozen_weights_and_buffers():
    model = tiny("llama")
    model.model.norm.weight.requires_grad_(False)
    trainer = MasterWeights(model, _adamw)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert "model.norm.weight" not in trainer.names and len(trainer.masters) == len(trainer.names)


def test_bad_input_is_named_and_changes_nothing():
    for function in (bytes_per_parameter, actual_saving):
        with pytest.raises(ValueError, match="regime must be one of float32, .* got 'fp8'"):
            function("fp8")
    with pytest.raises(ValueError, match="gradients must be bytes >= 0, got -1"):
        eq2_saving(1, -1)
    with pytest.raises(ValueError, match="model must be bytes >= 0, got nan"):
        eq2_saving(float("nan"), 1)
    with pytest.raises(TypeError, match="arch must be an Arch, got dict"):
        cast_bytes({"model_type": "gpt2"})
    layer = nn.LayerNorm(4)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        MasterWeights([layer], _adamw)
    with pytest.raises(ValueError, match="dtype must be torch.bfloat16, .* got torch.int8"):
        MasterWeights(layer, _adamw, torch.int8)
    for scale in (0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="loss_scale must be None or a finite number >= 1, got"):
            MasterWeights(layer, _adamw, torch.float16, scale)
    with pytest.raises(ValueError, match="interval must be an integer >= 1, got 0"):
        MasterWeights(layer, _adamw, torch.float16, 2.0, 0)
    with pytest.raises(RuntimeError, match=r"step\(\) needs gradients"):
        MasterWeights(nn.LayerNorm(4), _adamw).step()
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        MasterWeights(nn.LayerNorm(4).requires_grad_(False), _adamw)
    with pytest.raises(ValueError, match="model must have float32 weights, weight is torch.bfloat16"):
        MasterWeights(nn.LayerNorm(4).bfloat16(), _adamw)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    layer(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ValueError, match="model must have no gradients yet, weight has one"):
        MasterWeights(layer, _adamw)
