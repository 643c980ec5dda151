"""NF4 layers are the bytes and codes of bitsandbytes; QLoRA trains factors and nothing beneath them."""

import copy
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from refimpl.checks.tiny import FAMILIES, random_ids
from refimpl.checks.tiny import tiny as deep
from refimpl.footprint.qlora import nf4_levels, nf4_quantize
from refimpl.lora import add_lora, load_lora, merge_lora, save_lora
from refimpl.quantization import (
    RTN,
    compress_model,
    compressed_names,
    load_compressed,
    save_compressed,
)
from refimpl.quantization.frozen import compress_frozen
from refimpl.quantization.linear import frozen_product
from refimpl.quantization.nf4 import NF4, NF4Linear, qlora
from refimpl.quantization.packing import unpack_codes
from refimpl.training import TrainConfig, lm_loss, train

IDS = random_ids(4, 12)
GOLDEN = Path(__file__).resolve().parent / "golden" / "nf4.npz"


def tiny(family, seed=0):
    return deep(family, seed=seed, num_hidden_layers=1)


def normal(*shape, seed=0, std=0.1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# --- the format -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [64, 256])
def test_levels_codes_and_absmaxima_equal_bitsandbytes(block):
    stored = np.load(GOLDEN)
    assert hashlib.sha256(stored["W"].tobytes()).hexdigest() in str(stored["about"])
    W = torch.from_numpy(stored["W"])
    assert np.abs(nf4_levels().numpy() - stored["levels"]).max() < 1e-6
    plain, double = NF4(block, False)("", W), NF4(block)("", W)
    for layer in (plain, double):
        assert np.array_equal(layer.codes.numpy(), stored[f"{block}_codes"])
    assert np.array_equal(plain.absmax.numpy(), stored[f"{block}_absmax"])
    assert np.array_equal(double.scale.numpy(), stored[f"{block}_scale"])
    assert double.mean.item() == pytest.approx(stored[f"{block}_mean"].item(), rel=1e-6)
    # The 8-bit code of bitsandbytes is not always the nearest one; then it is a neighbour, and not nearer.
    ours, theirs = double.absmax.int(), torch.from_numpy(stored[f"{block}_absmax_codes"]).int()
    other = ours != theirs
    assert (ours - theirs).abs().max() <= 1 and other.float().mean() < 0.07
    table = torch.from_numpy(stored["map"])
    step = double.scale.repeat_interleave(256)[: len(ours)]
    miss = lambda codes: (table[codes] * step + double.mean - plain.absmax).abs()
    assert (miss(ours) <= miss(theirs) + 1e-7).all()
    same = ~other.repeat_interleave(block).view(W.shape)
    Q = torch.from_numpy(stored[f"{block}_Q"])
    torch.testing.assert_close(double.weight[same], Q[same], rtol=1e-5, atol=1e-6)


def test_it_is_the_nf4_of_chapter_1_at_its_block():
    W = normal(72, 100)
    layer, first = NF4()("", W), nf4_quantize(W)
    for name in ("codes", "absmax", "scale", "mean"):
        assert torch.equal(getattr(layer, name), getattr(first, name))


def test_bits_are_4_127_to_the_byte():
    d_out, d_in = 128, 64 * 16  # whole blocks of 256 blocks of 64
    layer = NF4()("fc", normal(d_out, d_in))
    assert 8 * (layer.nbytes() - layer.mean.nbytes) == d_out * d_in * (4 + 8 / 64 + 32 / (64 * 256))
    assert round(8 * (layer.nbytes() - 4) / (d_out * d_in), 3) == 4.127
    for recipe in (NF4(), NF4(64, False), NF4(256), NF4(48)):
        for shape in ((d_out, d_in), (7, 9), (1, 1)):
            layer = recipe("fc", normal(*shape))
            held = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in layer.buffers()}
            assert sum(held.values()) == layer.nbytes() == recipe.nbytes(*shape)


def test_weights_at_the_levels_come_back_and_blocks_differ():
    absmax = torch.linspace(0.1, 2, 8)[:, None]
    W = nf4_levels().repeat(8, 4) * absmax
    assert torch.equal(NF4(64, False)("", W).weight, W)
    assert (NF4()("", W).weight - W).abs().max() < 0.03
    outlier = normal(8, 256)
    outlier[0, 0] = 50
    fine, coarse = (((NF4(b)("", outlier).weight - outlier)[1:]).square().sum() for b in (64, 2048))
    assert coarse > 10 * fine  # an outlier spoils its own block only
    assert torch.equal(NF4()("", torch.zeros(4, 16)).weight, torch.zeros(4, 16))


def test_nf4_is_not_the_least_squares_grid_even_for_normal_weights():
    # "Information-theoretically optimal" means equally used levels, not the least error.
    W = normal(256, 512)
    error = lambda recipe: float((recipe("", W).weight - W).square().mean())
    assert error(RTN(4, group=64, clip_norm=2.0)) < error(NF4())
    usage = unpack_codes(NF4()("", W).codes, 4, W.shape).flatten().bincount(minlength=16) / W.numel()
    rtn = RTN(4, group=64).quantize(W).codes.flatten().bincount(minlength=16) / W.numel()
    entropy = lambda p: float(-(p * p.log2()).sum())
    assert entropy(usage) > entropy(rtn) + 0.1


# --- the layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_and_gradients_are_those_of_the_dense_weight(dtype):
    layer = NF4()("fc", normal(40, 96).to(dtype))
    layer.bias = nn.Parameter(normal(40, seed=3).to(dtype))
    assert layer.weight.dtype is dtype
    x, grad = normal(2, 5, 96, seed=1, std=1).to(dtype).requires_grad_(), normal(2, 5, 40, seed=2).to(dtype)
    W = layer.weight.requires_grad_()
    y = layer(x)
    expected = nn.functional.linear(x, W, layer.bias)
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y, (x, layer.bias), grad)
    wanted = torch.autograd.grad(expected, (x, layer.bias), grad)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-4)


def test_no_dense_weight_waits_for_the_backward_pass():
    def kept(make):
        found = []
        x = normal(3, 64, seed=1).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.shape) or t, lambda t: t):
            make(x)
        return found

    layer = NF4()("fc", normal(64, 64))
    assert kept(layer) == []
    assert torch.Size([64, 64]) in [*kept(lambda x: nn.functional.linear(x, layer.weight))]
    calls = []
    x = torch.ones(1, 64)
    make = lambda: calls.append(1) or layer.weight
    y = frozen_product(x, make, torch.zeros(64, requires_grad=True))
    y.sum().backward()
    assert len(calls) == 1  # where x needs no gradient W^ is not made again


def test_it_works_under_autocast():
    layer = NF4()("fc", normal(16, 32))
    x = normal(4, 32, seed=1, std=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 16) @ layer.weight, rtol=0.05, atol=0.05)


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_model_is_saved_and_loaded_exactly(family, tmp_path):
    model, plain = tiny(family), logits(tiny(family))
    report = compress_model(model, NF4(), IDS)
    assert all(isinstance(model.get_submodule(row.name), NF4Linear) for row in report.rows)
    before = logits(model)
    assert 0 < (before - plain).std() < 0.5 * plain.std()
    # Saving, loading, moving and casting keep the codes of the absmaxima and their scales as they are.
    save_compressed(model, tmp_path / "m.safetensors")
    again = tiny(family, seed=1)
    assert set(load_compressed(again, tmp_path / "m.safetensors")) == {row.name for row in report.rows}
    assert torch.equal(logits(again), before)
    layer = again.get_submodule(report.rows[0].name)
    weight = layer.weight
    layer.half()
    assert torch.equal(layer.weight, weight)
    free = tiny(family)
    assert compress_frozen(free, NF4()) == compressed_names(model)
    assert torch.equal(logits(free), before) and not any(p.requires_grad for p in free.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_qlora_starts_from_the_quantized_model_and_trains_only_factors(family):
    model, quantized = tiny(family), tiny(family)
    compress_frozen(quantized, NF4())
    report = qlora(model, rank=2, alpha=4, generator=generator())
    assert torch.equal(logits(model), logits(quantized))  # B = 0
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"A", "B"}
    assert len(trained) == 2 * len(report.names)
    assert report.trainable == sum(p.numel() for p in trained.values())
    assert report.bytes_after < report.bytes_before
    frozen = {key: t.clone() for key, t in model.state_dict().items() if ".lora." not in key}
    config = TrainConfig(steps=15, batch=4, lr=0.05, warmup=2, weight_decay=0.0)
    losses = train(model, lambda step: IDS, config, progress=False).losses
    assert losses[-1] < 0.7 * losses[0]
    now = model.state_dict()
    assert all(torch.equal(t, now[key]) for key, t in frozen.items())


def test_gradients_of_the_factors_are_those_on_the_dense_weight():
    model = tiny("llama")
    names = qlora(model, rank=2, alpha=4, generator=generator()).names
    dense = tiny("llama")
    for name in names:
        dense.get_submodule(name).weight.data = model.get_submodule(name).weight
    add_lora(dense, names, rank=2, alpha=4, generator=generator())
    for m in (model, dense):
        for name in names:
            m.get_submodule(name).lora.B.data.fill_(0.05)
        lm_loss(m, IDS).backward()
    for name in names:
        for factor in "AB":
            a, b = (getattr(m.get_submodule(name).lora, factor).grad for m in (model, dense))
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_factors_are_saved_but_neither_merged_nor_lost(tmp_path):
    model = tiny("llama")
    names = qlora(model, rank=2, alpha=4, generator=generator()).names
    model.get_submodule(names[0]).lora.B.data.fill_(0.1)
    before = logits(model)
    save_lora(model, tmp_path / "task.safetensors")
    with pytest.raises(TypeError, match="dequantise"):
        merge_lora(model)
    again = tiny("llama")
    compress_frozen(again, NF4())
    load_lora(again, tmp_path / "task.safetensors")
    assert torch.equal(logits(again), before)
    # W^ + B A rounded to NF4 again loses most of a small update: it moves few weights to another level.
    W = model.get_submodule(names[0]).weight
    update = normal(*W.shape, seed=4, std=0.01 * float(W.std()))
    lost = NF4()("", W + update).weight - W - update
    assert lost.norm() > 0.8 * update.norm()


def test_a_bfloat16_model_trains_in_bfloat16():
    model = tiny("llama").to(torch.bfloat16)
    names = qlora(model, rank=2, alpha=4, generator=generator()).names
    assert model.get_submodule(names[0]).lora.A.dtype is torch.bfloat16
    lm_loss(model, IDS).backward()
    assert model.get_submodule(names[0]).lora.B.grad.abs().max() > 0


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"block": 0}, {"block": 64.0}, {"block": True}, {"double_quant": 1}])
def test_bad_settings_are_named(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        NF4(**changes)


@pytest.mark.parametrize(
    ("W", "error"),
    [
        (torch.zeros(0, 4), ValueError),
        (torch.zeros(4), ValueError),
        (torch.full((2, 2), torch.nan), ValueError),
        (torch.full((2, 2), torch.inf), ValueError),
        (torch.ones(2, 2, dtype=torch.int8), TypeError),
    ],
)
def test_bad_weights_are_refused(W, error):
    with pytest.raises(error, match="weight must be"):
        NF4()("fc", W)


def test_a_refused_model_is_as_it_was():
    bad = {"rank": (0, 99), "alpha": (0.0,)}
    for key, values in bad.items():
        for value in values:
            model = tiny("gpt2")
            before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
            with pytest.raises(ValueError, match=key):
                qlora(model, **({"rank": 2, "alpha": 4} | {key: value}), generator=generator())
            assert flags == [p.requires_grad for p in model.parameters()] and not compressed_names(model)
            assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    with pytest.raises(TypeError, match="generator"):
        qlora(tiny("llama"), 2, 4, 0)
    with pytest.raises(TypeError, match="not supported"):
        qlora(nn.Linear(4, 4), 2, 4, generator())
    model = tiny("llama")
    qlora(model, 2, 4, generator())
    with pytest.raises(ValueError, match="LoRA factors"):
        compress_frozen(model, NF4())
    compressed = tiny("llama")
    compress_frozen(compressed, NF4())
    with pytest.raises(TypeError, match="NF4Linear"):
        qlora(compressed, 2, 4, generator())
