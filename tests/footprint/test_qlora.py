"""NF4 is 4.127 bits per weight to the byte and close to the weight; its float weight is a temporary."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.footprint.qlora import (
    NF4Linear,
    ledger_of,
    nf4_bytes,
    nf4_dequantize,
    nf4_levels,
    nf4_quantize,
    quantize_model,
)
from refimpl.footprint.tracker import LiveTracker
from refimpl.ledger import of_tensors
from refimpl.lora import add_lora
from refimpl.packing import unpack_4bit


def normal(*shape, seed=0, std=0.02):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def test_levels_are_normal_quantiles_with_zero_and_both_ends():
    levels = nf4_levels()
    assert (levels[0], levels[7], levels[15]) == (-1, 0, 1) and levels.diff().min() > 0
    quantile = NormalDist().inv_cdf
    tail = (1 / 32 + 1 / 30) / 2
    top = quantile(1 - tail)
    above = [quantile(0.5 + (0.5 - tail) * i / 8) / top for i in range(1, 9)]
    below = [-quantile(0.5 + (0.5 - tail) * i / 7) / top for i in range(7, 0, -1)]
    assert levels.tolist() == pytest.approx(below + [0.0] + above, abs=1e-7)


def test_levels_equal_the_published_table():
    # arXiv 2305.14314, appendix E, to the six digits that the derivation fixes.
    table = [-1, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050, 0]
    table += [0.079580, 0.160930, 0.246112, 0.337915, 0.440710, 0.562617, 0.722957, 1]
    assert nf4_levels().tolist() == pytest.approx(table, abs=6e-7)


def test_equation_4_as_printed_has_no_finite_end():
    # q_i = (Q(i/17) + Q((i+1)/17)) / 2 for i = 0 ... 15 begins with Q(0) = -inf.
    assert torch.special.ndtri(torch.tensor(0.0)) == -math.inf


@pytest.mark.parametrize("shape", [(64, 64), (688, 256), (37, 100), (1, 1), (3, 64 * 257)])
def test_bytes_equal_the_formula(shape):
    quantized = nf4_quantize(normal(*shape))
    measured = {name: of_tensors([(name, getattr(quantized, name))], "weight")
                for name in ("codes", "absmax", "scale", "mean")}  # fmt: skip
    for view in ("payload", "resident"):
        assert {name: ledger.total(view=view) for name, ledger in measured.items()} == nf4_bytes(
            math.prod(shape)
        )


def test_bits_per_weight_are_4_127():
    numel = 64 * 256 * 10
    bits = 8 * (sum(nf4_bytes(numel).values()) - 4)  # the mean, 4 bytes per tensor, is not in the formula
    assert bits == numel * (4 + 8 / 64 + 32 / (64 * 256)) and round(bits / numel, 3) == 4.127


def test_weight_comes_back_to_the_nearest_level():
    weight = normal(64, 256)
    blocks = weight.view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[:, :, None] / absmax[:, :, None] - nf4_levels()).abs().argmin(2)
    quantized = nf4_quantize(weight)
    assert torch.equal(unpack_4bit(quantized.codes, (256, 64)).long(), nearest)
    exact = nf4_levels()[nearest] * absmax
    error = (nf4_dequantize(quantized) - exact.view(64, 256)).abs().max()
    assert 0 < error < 0.02 * absmax.max()  # all that the second quantisation adds
    assert (nf4_dequantize(quantized) - weight).norm() < 0.1 * weight.norm()


def test_blocks_of_zeros_and_of_one_value_are_kept():
    weight = torch.zeros(4, 64)
    weight[1] = 0.5
    assert torch.equal(nf4_dequantize(nf4_quantize(torch.zeros(2, 64))), torch.zeros(2, 64))
    torch.testing.assert_close(nf4_dequantize(nf4_quantize(weight)), weight, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_computes_with_its_dequantised_weight_both_ways(dtype):
    plain = nn.Linear(96, 40)
    with torch.no_grad():
        plain.weight.copy_(normal(40, 96, std=0.2))
    plain.to(dtype)
    layer = NF4Linear(plain)
    x = normal(5, 96, seed=1, std=1.0).to(dtype).requires_grad_()
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, plain.bias)) and y.dtype is dtype
    grad = normal(5, 40, seed=2).to(dtype)
    y.backward(grad)
    assert torch.equal(x.grad, grad @ layer.weight)
    assert not any(p.requires_grad for p in layer.parameters())
    relative = (layer.weight - plain.weight).norm() / plain.weight.norm()
    assert 0.05 < relative < 0.15


def saved_bytes(layers, x):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layers(x)
    own = {t.untyped_storage().data_ptr() for t in (*layers.parameters(), *layers.buffers())}
    return sum(t.nbytes for t in kept if t.untyped_storage().data_ptr() not in own), y


def test_dequantised_weights_are_temporaries_not_residents():
    layers = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    quantize_model(layers)
    x = normal(1, 256).requires_grad_()
    assert saved_bytes(layers, x)[0] == 0
    naive = lambda x: [x := nn.functional.linear(x, layer.weight) for layer in layers][-1]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        naive(x)
    assert sum(t.nbytes for t in kept) == 4 * 4 * 256 * 256  # what a plain matmul would hold until backward

    peaks = []
    for n in (1, 4):
        part = layers[:n]
        with LiveTracker() as tracker:
            tracker.watch(part)
            before = tracker.live
            y = part(x)
            after = tracker.live - before
            y.sum().backward()
        peaks.append(tracker.peak - before)
        assert after < 4 * 256 * 256 / 8  # no float weight is alive between forward and backward
        x.grad = None
    assert peaks[1] - peaks[0] < 4 * 256 * 256 / 8  # one float weight at a time, however many layers


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_every_family_stay_close_and_train_with_lora(family):
    model, ids = tiny(family, hidden_size=64), random_ids(2, 8)
    with torch.no_grad():
        before = model(ids).logits
    matrices = {name: m.weight.numel() for name, m in model.named_modules()
                if type(m).__name__ in ("Linear", "Conv1D") and name != "lm_head"}  # fmt: skip
    names = quantize_model(model)
    assert set(names) == set(matrices)
    with torch.no_grad():
        after = model(ids).logits
    assert 1e-3 < (after - before).norm() / before.norm() < 0.6
    ledger = ledger_of(model)
    assert ledger.total("meta") == sum(sum(nf4_bytes(n).values()) - n // 2 for n in matrices.values())
    targets = ["c_attn"] if family == "gpt2" else ["q_proj"]
    add_lora(model, targets, 4, 8.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, after)
    model(ids, labels=ids).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 6 and all(name.endswith((".lora.A", ".lora.B")) for name in trained)


def test_a_file_keeps_the_layer(tmp_path):
    from safetensors.torch import load_file, save_file

    layer = NF4Linear(nn.Linear(64, 64))
    save_file(layer.state_dict(), tmp_path / "nf4")
    other = NF4Linear(nn.Linear(64, 64))
    other.load_state_dict(load_file(tmp_path / "nf4"))
    assert torch.equal(other.weight, layer.weight)


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="weight must be floating point"):
        nf4_quantize(torch.ones(4, dtype=torch.int64))
    for weight in (torch.zeros(0), torch.tensor([1.0, math.nan]), torch.tensor([math.inf])):
        with pytest.raises(ValueError, match="weight must be finite and not empty"):
            nf4_quantize(weight)
    with pytest.raises(ValueError, match="numel"):
        nf4_bytes(0)
    with pytest.raises(TypeError, match="layer must be an nn.Linear or Conv1D, got Embedding"):
        NF4Linear(nn.Embedding(4, 4))
    with pytest.raises(TypeError, match="got NF4Linear"):
        NF4Linear(NF4Linear(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="model has no nn.Linear or Conv1D"):
        quantize_model(nn.ModuleDict({"lm_head": nn.Linear(4, 4)}))
    with pytest.raises(ValueError, match="no NF4Linear layers"):
        ledger_of(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="must stay float32, got torch.bfloat16"):
        NF4Linear(nn.Linear(64, 4)).to(torch.bfloat16)(torch.zeros(1, 64))


def test_a_weight_that_is_not_finite_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="finite"):
        quantize_model(model)
    assert all(type(layer) is nn.Linear for layer in model) and model[0].weight.requires_grad
