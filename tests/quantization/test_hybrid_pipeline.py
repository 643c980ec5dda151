"""Hybrid compression: what stays exactly as it is, what each order loses, and what the repair moves."""

import copy

import pytest
import torch
from quantization_runs import through_a_file

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.ledger import of_model
from refimpl.quantization import (
    GPTQ,
    RTN,
    compress_model,
    compressed_names,
    load_compressed,
    save_compressed,
    stats_of,
)
from refimpl.quantization.distillation import repair
from refimpl.quantization.grids import Grid, dequantize
from refimpl.quantization.hybrid import ORDERS, Hybrid, hybrid, quantize_kept, slice_neurons
from refimpl.quantization.nf4 import NF4
from refimpl.quantization.pruning.slicing import slice_model
from refimpl.quantization.pruning.sparsegpt import SparseGPT
from refimpl.quantization.repair import RepairedLinear
from refimpl.quantization.sparse import SparseLinear
from refimpl.quantization.symmetric import output_distortion

IDS = random_ids(12, 24)
GRID = Grid(4, group=8)


def small(family, **changes):
    return tiny(family, num_hidden_layers=1, **changes)


def batches(step):
    return random_ids(4, 12, seed=step)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def kl(model, teacher):
    p, q = logits(teacher).log_softmax(-1), logits(model).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def case(seed=0, shape=(24, 64)):
    """A weight, its statistics, and inputs with strong correlations."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator)
    mix = torch.randn(shape[1] // 4, shape[1], generator=generator)
    X = torch.randn(400, shape[1] // 4, generator=generator) @ mix
    return W, stats_of(X + 0.1 * torch.randn(X.shape, generator=generator))


# --- one layer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["asymmetric", "full"])
@pytest.mark.parametrize("group", ["row", 16])
def test_with_all_weights_kept_it_is_gptq_code_for_code(scheme, group):
    W, stats = case()
    keep = torch.ones(W.shape, dtype=torch.bool)
    ours = quantize_kept(W, stats.H, keep, Grid(3, scheme, group))
    theirs = GPTQ(3, scheme, group).solve(W, stats.H)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    for order in ORDERS:
        q, kept = Hybrid(0.0, Grid(3, scheme, group), order).solve(W, stats.H)
        assert kept.all() and torch.equal(q.codes, theirs.codes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_the_mask_is_as_sparse_as_asked_and_the_bytes_are_those_of_mask_codes_and_scales(order, sparsity):
    W, stats = case()
    layer = Hybrid(sparsity, Grid(4, group=16), order)("fc", W, stats)
    assert isinstance(layer, SparseLinear) and layer.sparsity == 0.5
    assert layer.bits_per_weight == 1 + 4 / 2 + (16 + 4) / 16
    assert not layer.weight[~layer.keep].any()
    if sparsity == "2:4":
        assert (layer.keep.unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_pruning_first_loses_less_than_quantizing_first_and_feedback_less_than_rounding(seed, sparsity):
    W, stats = case(seed)
    grid = Grid(3, group=16)
    lost = {}
    for order in ORDERS:
        layer = Hybrid(sparsity, grid, order)("fc", W, stats)
        lost[order] = output_distortion(W, layer.weight, stats.H)
    pruned = SparseGPT(sparsity, torch.float32).solve(W, stats.H)
    rounded = dequantize(grid.quantize(pruned.Q.float())) * pruned.keep
    lost["rounded"] = output_distortion(W, rounded, stats.H)
    lost["pruned alone"] = output_distortion(W, pruned.Q, stats.H)
    assert lost["pruned alone"] < lost["prune-quantize"] < lost["rounded"]
    assert max(lost["prune-quantize"], lost["joint"]) < 0.7 * lost["quantize-prune"]


def test_joint_is_sparsegpt_with_a_grid():
    W, stats = case()
    ours = Hybrid(0.5, GRID, "joint")("fc", W, stats)
    theirs = SparseGPT(0.5, grid=GRID)("fc", W, stats)
    assert all(torch.equal(b, theirs.get_buffer(name)) for name, b in ours.named_buffers())


# --- the pipeline -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "what"),
    [*((family, "scales") for family in FAMILIES), ("gpt2", "norms"), ("llama", "norms"), ("gpt2", "lora"),
     ("llama", "lora")],
)  # fmt: skip
def test_the_repair_comes_nearer_and_leaves_mask_and_integers_bit_for_bit(family, what, tmp_path):
    teacher = small(family)
    before = {key: t.clone() for key, t in teacher.state_dict().items()}
    rough = copy.deepcopy(teacher)
    compress_model(rough, Hybrid(grid=GRID), IDS)
    lr = {"norms": 5e-3, "scales": 3e-4, "lora": 3e-3}[what]
    settings = {"rank": 2, "generator": torch.Generator().manual_seed(0)} if what == "lora" else {}
    model, report = hybrid(
        teacher, IDS, batches, recipe=Hybrid(grid=GRID), train_what=what, steps=10, batch=4, lr=lr, **settings
    )
    assert all(torch.equal(t, before[key]) for key, t in teacher.state_dict().items())
    assert kl(model, teacher) < 0.98 * kl(rough, teacher)
    names = compressed_names(model)
    assert names == compressed_names(rough)
    moved = False
    for name in names:
        old, new = rough.get_submodule(name), model.get_submodule(name)
        base = new.base() if what == "lora" else new
        for key, tensor in old.named_buffers():
            same = torch.equal(tensor, base.get_buffer(key))
            assert tensor.dtype == base.get_buffer(key).dtype
            assert same or (what == "scales" and key == "scale")
            moved |= not same
        assert (old.bias is None) == (new.bias is None)
    assert moved == (what == "scales")
    norms = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert bool(norms) == (what == "norms") and all("norm" in n or ".ln_" in n for n in norms)
    assert not any(p.requires_grad for p in model.parameters())
    assert report.bytes_before == of_model(teacher).total() and report.bytes_after == of_model(model).total()
    layers = [model.get_submodule(name) for name in names]
    factors = 2 * 2 * sum(layer.in_features + layer.out_features for layer in layers)
    assert report.bytes_after - report.bytes_compressed == (factors if what == "lora" else 0)
    assert report.bytes_compressed == of_model(rough).total() < report.bytes_before
    if what == "lora":
        assert all(isinstance(layer, RepairedLinear) for layer in layers)
        assert report.trained * 2 == factors
    through_a_file(model, small(family, seed=1), tmp_path, IDS)


def test_without_sparsity_it_is_gptq_and_without_training_the_compressed_model():
    teacher, plain = small("llama"), small("llama")
    compress_model(plain, GPTQ(4, group=8), IDS)
    recipe = Hybrid(0.0, GRID)
    model, report = hybrid(
        teacher, IDS, batches, recipe=recipe, train_what="norms", steps=1, batch=4, lr=1e-12
    )
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    eight, _ = hybrid(
        teacher,
        IDS,
        batches,
        recipe=Hybrid(0.0, Grid(8, group=8)),
        train_what="scales",
        steps=1,
        batch=4,
        lr=1e-9,
    )
    assert (logits(eight) - logits(teacher)).std() < 0.05 * logits(teacher).std()
    assert report.trained == sum(p.numel() for n, p in teacher.named_parameters() if "norm" in n)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sliced_neurons_are_gone_and_those_that_stay_contribute_most(family, tmp_path):
    teacher = small(family)
    neurons = 24
    down = "transformer.h.0.mlp.c_proj" if family == "gpt2" else "model.layers.0.mlp.down_proj"
    seen = []
    hook = teacher.get_submodule(down).register_forward_pre_hook(lambda m, x: seen.append(x[0].flatten(0, 1)))
    logits(teacher)
    hook.remove()
    W = teacher.get_submodule(down).weight.detach()
    W = W.T if family == "gpt2" else W
    # The Frobenius norm of what a neuron adds to the residual stream.
    score = torch.stack([torch.outer(seen[0][:, j], W[:, j]).norm() for j in range(W.shape[1])])
    model, report = hybrid(
        teacher, IDS, batches, recipe=GPTQ(4, group=8), neurons=neurons, steps=10, batch=4, lr=3e-4
    )
    assert model.kept[1][0].nonzero()[:, 0].tolist() == sorted(score.topk(neurons).indices.tolist())
    assert model.get_submodule(down).in_features == neurons and "kept" not in vars(teacher)
    rough = copy.deepcopy(teacher)
    slice_neurons(rough, IDS, neurons)
    compress_model(rough, GPTQ(4, group=8), IDS)
    assert kl(model, teacher) < kl(rough, teacher)
    assert report.bytes_after == of_model(rough).total()
    save_compressed(model, tmp_path / "model.safetensors")
    fresh = small(family, seed=1)
    slice_model(fresh, *model.kept)
    load_compressed(fresh, tmp_path / "model.safetensors")
    assert torch.equal(logits(fresh), logits(model))


def test_a_run_that_breaks_leaves_storage_and_no_parameters():
    teacher = small("llama")
    model = copy.deepcopy(teacher)
    compress_model(model, Hybrid(grid=GRID), IDS)
    kinds = [type(model.get_submodule(name)) for name in compressed_names(model)]
    for what, error in (("scales", "batch"), ("lora", "batch")):
        with pytest.raises(ValueError, match=error):
            repair(
                model, teacher, batches, steps=3, batch=5, lr=1e-3, train_what=what, rank=2,
                generator=torch.Generator(),
            )  # fmt: skip
        assert not any(p.requires_grad for p in model.parameters())
        logits(model)
        if what == "scales":
            assert [type(model.get_submodule(name)) for name in compressed_names(model)] == kinds


# --- bad input --------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_changes():
    W, stats = case()
    keep = torch.ones(W.shape, dtype=torch.bool)
    some = keep.clone()
    some[0, 0] = False
    teacher = small("llama")
    model, sparse = copy.deepcopy(teacher), copy.deepcopy(teacher)
    compress_model(model, RTN(4, group=8), IDS)
    compress_model(sparse, SparseGPT(0.5), IDS)
    nf4 = copy.deepcopy(teacher)
    compress_model(nf4, NF4(), IDS)  # its scale is one of scales
    before = logits(model)
    go = {"steps": 2, "batch": 4, "lr": 1e-3}
    nan = W.clone()
    nan[1, 1] = torch.nan
    for call, error, message in [
        (lambda: Hybrid(1.0), ValueError, "sparsity must be"),
        (lambda: Hybrid("5:4"), ValueError, "sparsity must be"),
        (lambda: Hybrid(grid=4), ValueError, "grid must be a Grid, got 4"),
        (lambda: Hybrid(order="both"), ValueError, "one of prune-quantize, quantize-prune, joint, got"),
        (lambda: Hybrid(grid=GRID).solve(nan, stats.H), ValueError, "W must be finite"),
        (lambda: Hybrid(grid=GRID).solve(W.int(), stats.H), TypeError, "floating point"),
        (lambda: Hybrid(grid=Grid(group=7)).solve(W, stats.H), ValueError, "group must divide d_in = 64"),
        (lambda: Hybrid("2:3", GRID), ValueError, "must be a multiple of 3"),
        (lambda: Hybrid(grid=GRID).solve(W, stats.H[1:]), ValueError, "H must be"),
        (lambda: quantize_kept(W, stats.H, some, GRID), ValueError, "W 0 where it is False"),
        (lambda: quantize_kept(W, stats.H, keep[1:], GRID), ValueError, "keep must be bool .24, 64."),
        (lambda: quantize_kept(W, stats.H, keep.int(), GRID), ValueError, "keep must be bool"),
        (lambda: slice_neurons(teacher, IDS, 41), ValueError, "kept must be an integer from 1 to 40, got 41"),
        (lambda: slice_neurons(teacher, IDS, 0), ValueError, "kept must be"),
        (lambda: slice_neurons(teacher, IDS.float(), 8), ValueError, "ids"),
        (lambda: repair(teacher, teacher, batches, **go), ValueError, "no compressed layers"),
        (lambda: repair(model, teacher, batches, train_what="all", **go), ValueError, "one of norms, scales"),
        (lambda: repair(sparse, teacher, batches, **go), ValueError, "no codes with scales; train norms"),
        (lambda: repair(nf4, teacher, batches, **go), ValueError, "no codes with scales"),
        (lambda: repair(model, model, batches, **go), ValueError, "share parameters"),
        (lambda: repair(model, teacher, batches, **go | {"lr": 0.0}), ValueError, "lr must be"),
        (lambda: repair(model, teacher, batches, **go | {"steps": 0}), ValueError, "steps must be"),
        (lambda: repair(model, teacher, batches, train_what="lora", **go), TypeError, "generator must be"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
        assert torch.equal(logits(model), before)
    assert all(p.requires_grad for p in teacher.parameters()) and "kept" not in vars(teacher)
