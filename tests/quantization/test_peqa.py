"""PEQA: only scales train, exactly; the integers of all tasks are one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from quantization_runs import through_a_file
from torch import nn

from refimpl.checks.tiny import FAMILIES, random_ids
from refimpl.checks.tiny import tiny as deep
from refimpl.quantization import (
    RTN,
    GridLinear,
    compressed_names,
    save_compressed,
)
from refimpl.quantization.frozen import compress_frozen
from refimpl.quantization.grids import Grid
from refimpl.quantization.peqa import PEQALinear, load_scales, peqa, save_scales, tune_scales
from refimpl.training import lm_loss

IDS = random_ids(4, 12)
OTHER = random_ids(4, 12, seed=1)


def tiny(family, seed=0):
    """One block suffices, and the search of scales takes its time."""
    return deep(family, seed=seed, num_hidden_layers=1)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def layer_of(bits=3, group="row", shape=(24, 32)):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.3
    return PEQALinear.pack(
        Grid(bits, group=group, clip_norm=2.0, scale_dtype=torch.float32).quantize(W), bits
    )


def integers_of(model):
    return {key: t.clone() for key, t in model.state_dict().items() if key.endswith(("codes", "zero"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_rounding_with_searched_scales_and_trains_scales_alone(family):
    model, rounded, plain = tiny(family), tiny(family), tiny(family)
    report = peqa(model, bits=4, group=8)
    compress_frozen(rounded, RTN(4, group=8, clip_norm=2.0, scale_dtype=torch.float32))
    assert torch.equal(logits(model), logits(rounded))
    assert report.names == compressed_names(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{name}.scale" for name in report.names]
    sizes = [model.get_submodule(name) for name in report.names]
    assert report.trainable == sum(m.out_features * m.in_features // 8 for m in sizes)
    for layer, name in zip(sizes, report.names, strict=True):
        assert (layer.bias is None) == (plain.get_submodule(name).bias is None)
        bits = 4 + (32 + 4) / 8
        assert layer.bits_per_weight == pytest.approx(bits, abs=8 / layer.in_features)
    assert report.bytes_after < report.bytes_before
    eight = tiny(family)
    peqa(eight, bits=8, group=8)  # neutral: with enough bits it is the plain model
    assert (logits(eight) - logits(plain)).std() < 0.05 * logits(plain).std()


@pytest.mark.parametrize("group", ["row", 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_those_of_autograd_through_the_dense_weight(group, dtype):
    layer = layer_of(group=group)
    layer.bias = nn.Parameter(torch.ones(24, dtype=dtype))
    make = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    x, grad = make(2, 5, 32).requires_grad_(), make(2, 5, 24)
    W = layer.dequantize()
    W.retain_grad()
    inputs = (x, layer.scale, layer.bias)
    y, expected = layer(x), F.linear(x, W.to(dtype), layer.bias)
    assert torch.equal(y, expected) and y.dtype is dtype
    found = torch.autograd.grad(y, inputs, grad)
    expected.backward(grad)
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-4
    for a, tensor in zip(found, inputs, strict=True):
        torch.testing.assert_close(a, tensor.grad, rtol=tolerance, atol=tolerance)
    by_hand = (W.grad * layer.integers()).view(*layer.scale.shape, -1).sum(-1)
    torch.testing.assert_close(found[1], by_hand, rtol=tolerance, atol=tolerance)
    assert torch.equal(layer.integers(), (layer.weight / layer.scale.repeat_interleave(
        32 // layer.scale.shape[1], 1)).round())  # fmt: skip


def test_only_the_input_is_kept_between_the_passes():
    layer, x = layer_of(shape=(64, 64)), torch.randn(3, 64)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        layer(x)
    assert set(shapes) == {x.shape, layer.scale.shape}
    y = layer(x)
    with torch.no_grad():
        layer.scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()  # else the gradient would be that of other scales


def test_training_moves_scales_only_and_its_state_is_eight_bytes_a_scale():
    model = tiny("llama")
    report = peqa(model, bits=3)
    before = copy.deepcopy(model.state_dict())
    history = tune_scales(model, lambda step: IDS, steps=15, batch=4, lr=0.02)
    assert history.losses[-1] < 0.9 * history.losses[0]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) == (not key.endswith(".scale")), key
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    lm_loss(model, IDS).backward()
    optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    assert sum(t.nbytes for t in state) == 2 * 4 * report.trainable


def test_training_recovers_what_few_bits_lost():
    plain, model = tiny("llama"), tiny("llama")
    peqa(model, bits=2)
    with torch.no_grad():
        wanted = plain(IDS).logits.softmax(-1)

    def to_teacher(model, batch):
        return -(wanted * model(batch["rows"]).logits.log_softmax(-1)).sum(-1).mean()

    start = float(to_teacher(model, {"rows": IDS}).detach())
    tune_scales(model, lambda step: {"rows": IDS}, steps=15, batch=4, lr=0.01, loss_fn=to_teacher)
    least = float(-(wanted * wanted.log()).sum(-1).mean())
    assert float(to_teacher(model, {"rows": IDS}).detach()) - least < 0.8 * (start - least)


def test_tasks_are_swapped_by_files_of_scales(tmp_path):
    model = tiny("gpt2")
    report = peqa(model, bits=3)
    integers, begin = integers_of(model), tmp_path / "begin.safetensors"
    save_scales(model, begin)
    files, after = {}, {}
    for name, rows in (("a", IDS), ("b", OTHER)):
        load_scales(model, begin)
        tune_scales(model, lambda step, rows=rows: rows, steps=10, batch=4, lr=0.02)
        files[name], after[name] = tmp_path / f"{name}.safetensors", logits(model)
        size = save_scales(model, files[name])
        assert 4 * report.trainable < size < 4 * report.trainable + 4000
    loss = lambda rows: float(lm_loss(model, rows).detach())
    assert load_scales(model, files["a"]) == report.names
    assert torch.equal(logits(model), after["a"])
    a = loss(IDS), loss(OTHER)
    load_scales(model, files["b"])
    b = loss(IDS), loss(OTHER)
    assert a[0] < b[0] and b[1] < a[1]
    assert all(torch.equal(t, integers[key]) for key, t in integers_of(model).items())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_is_saved_loaded_and_cast_without_loss(family, tmp_path):
    model = tiny(family)
    peqa(model, bits=3, group=8)
    tune_scales(model, lambda step: IDS, steps=2, batch=4, lr=0.01)
    again = through_a_file(model, tiny(family, seed=1), tmp_path, IDS)
    names = compressed_names(model)
    layer = copy.deepcopy(again.get_submodule(names[0])).to(torch.bfloat16)
    assert torch.equal(layer.scale, again.get_submodule(names[0]).scale)
    tune_scales(again, lambda step: IDS, steps=1, batch=4, lr=0.01)  # freezes all else
    assert {name.rpartition(".")[2] for name, p in again.named_parameters() if p.requires_grad} == {"scale"}


def test_bad_input_is_refused_before_anything_changes(tmp_path):
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    for call, error, message in [
        (lambda: peqa(model, bits=1), ValueError, "bits must be"),
        (lambda: peqa(model, group=7), ValueError, "group must divide d_in = 32, got 7"),
        (lambda: peqa(model, group="channel"), ValueError, "group must be"),
        (lambda: peqa(nn.Linear(2, 2)), TypeError, "not supported"),
        (lambda: save_scales(model, tmp_path / "x"), ValueError, "no PEQA layers"),
        (lambda: tune_scales(model, lambda s: IDS, steps=1, batch=4, lr=1), ValueError, "no PEQA layers"),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        peqa(model)
    assert not compressed_names(model)
    model = tiny("llama")
    peqa(model, bits=3)
    with pytest.raises(TypeError, match="PEQALinear"):
        peqa(model, bits=3)
    with pytest.raises(ValueError, match="steps"):
        tune_scales(model, lambda step: IDS, steps=0, batch=4, lr=0.1)


def test_scales_of_other_integers_are_refused(tmp_path):
    models = {}
    for key, bits, seed in (("three", 3, 0), ("four", 4, 0), ("other", 3, 1)):
        models[key] = tiny("llama", seed=seed)
        peqa(models[key], bits=bits)
    file = tmp_path / "three.safetensors"
    save_scales(models["three"], file)
    for key in ("four", "other"):
        before = logits(models[key])
        with pytest.raises(ValueError, match="other integers"):
            load_scales(models[key], file)
        assert torch.equal(logits(models[key]), before)
    save_compressed(models["three"], file)
    with pytest.raises(ValueError, match="not written by save_scales"):
        load_scales(models["three"], file)
    assert isinstance(models["three"].model.layers[0].mlp.up_proj, GridLinear)
