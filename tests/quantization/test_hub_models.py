"""Every method of a whole model on the shapes of two hub families that no study of the chapter runs on.

Mistral: a window, and heads wider than d / H; Qwen2: biases of q, k and v. Weights are random, the calls
those of the studies. What each method should do is tested in its own file.
"""

import pytest
import torch
from quantization_runs import IDS, logits
from torch import nn

from refimpl.checks.tiny import random_ids, tiny
from refimpl.ledger import of_model
from refimpl.quantization import (
    RTN,
    CompressedLinear,
    EntropyRTN,
    Grid,
    compress_model,
    compressed_names,
    qlora,
)
from refimpl.quantization.catalogue import METHODS
from refimpl.quantization.catalogue import compress as by_name
from refimpl.quantization.distillation import distil, half_depth
from refimpl.quantization.edge_llm import compress, make_policy
from refimpl.quantization.edge_llm_tuning import EarlyExits, tune, vote
from refimpl.quantization.evopress import evolve
from refimpl.quantization.evopress_database import layer_database
from refimpl.quantization.gptq import GPTQ
from refimpl.quantization.hwpq import HWPQ
from refimpl.quantization.hybrid import Hybrid, hybrid
from refimpl.quantization.mixllm import MixLLM, mixllm
from refimpl.quantization.mixllm_rows import row_salience, top_rows
from refimpl.quantization.peqa import peqa, tune_scales
from refimpl.quantization.pruning.bonsai import bonsai
from refimpl.quantization.pruning.head_gates import close_gates, train_head_gates
from refimpl.quantization.pruning.head_sensitivity import head_importance, pruning_masks
from refimpl.quantization.pruning.nuteprune import nuteprune
from refimpl.quantization.pruning.slicing import slice_model
from refimpl.quantization.pruning.subset_pruning import train_subset
from refimpl.quantization.spqr import SpQR
from refimpl.training import TrainConfig, train

BOTH = pytest.mark.parametrize("family", ["mistral", "qwen2"])
CATALOGUE = (
    "rtn 3 g32", "gptq 3 g32", "awq 3 g32", "nf4", "w8a8 per token", "llm.int8()",
    "smoothquant 0.5 per tensor", "gptvq 2 d2", "quip 2", "quip# 2", "aqlm 2x4 g4",
    "rtn 3 row, whitened rank 8", "aser w4a8", "slim 4 2:4", "magnitude 0.5", "wanda 0.5", "sparsegpt 0.5",
    "sparsegpt 2:4", "sparsegpt 0.5 + 4 g32", "aggressive 0.7",
)  # fmt: skip
RECIPES = {
    "hwpq": HWPQ(0.5), "hwpq 2:4": HWPQ("2:4"), "spqr": SpQR(3, 8, 0.5, meta_group=8),
    "hybrid, joint": Hybrid("2:4", Grid(4, group=32), "joint"),
}  # fmt: skip
BLOCK = {"num_hidden_layers": 1}  # what they do block after block: `test_compressed_model`
CONFIG = TrainConfig(steps=3, batch=4, lr=3e-3, warmup=1)


def small(family, **changes):
    """Groups of 32 divide all widths, as in the models of the studies."""
    return tiny(family, **({"num_hidden_layers": 2, "intermediate_size": 64} | changes))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(step):
    return random_ids(4, 16, seed=step)


def check(model, plain):
    """It speaks, it is not the plain model any more, and it takes less room."""
    after, before = logits(model), logits(plain)
    assert after.shape == before.shape and bool(after.isfinite().all())
    assert (after - before).std() > 1e-4 * before.std()
    assert of_model(model).total() < of_model(plain).total()
    prompt = IDS[:1, :8]  # longer than Mistral's window
    said = model.generate(prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert said.shape == (1, 10) and torch.equal(said[:, :8], prompt)
    end = model.config.eos_token_id  # which min_new_tokens forbids
    assert int(said[0, 8]) == int(
        logits(model, prompt)[0, -1].index_fill(0, torch.tensor(end), -torch.inf).argmax()
    )


def dense_twin(model, twin):
    """`twin` as a plain model with the weights, norms and biases that the compressed layers say they have."""
    stored = model.state_dict()
    state = {key: stored.get(key, old) for key, old in twin.state_dict().items()}
    for name in compressed_names(model):
        layer = model.get_submodule(name)
        state[f"{name}.weight"] = layer.weight
        if layer.bias is not None and f"{name}.bias" not in state:
            linear = twin.get_submodule(name)
            linear.bias = nn.Parameter(layer.bias.detach().clone())
            state[f"{name}.bias"] = layer.bias
    twin.load_state_dict(state)
    return twin


def compressed_all(model):
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(compressed_names(model)) == names - {"lm_head"}
    assert all(isinstance(model.get_submodule(name), CompressedLinear) for name in compressed_names(model))


# --- methods of one call --------------------------------------------------------------------------


def test_a_setting_of_every_method_of_the_catalogue_is_here():
    called = lambda names: {METHODS[name].settings.partition("(")[0] for name in names}
    assert called(CATALOGUE) == called(METHODS)
    assert {METHODS[name].kind for name in CATALOGUE} == {method.kind for method in METHODS.values()}


@BOTH
@pytest.mark.parametrize("name", CATALOGUE)
def test_the_catalogue(family, name):
    model, plain = (small(family, **BLOCK) for _ in range(2))
    report = by_name(name, model, IDS)
    compressed_all(model)
    check(model, plain)
    assert report.bits < 12 and report.bytes_after == of_model(model).total() < report.bytes_before
    assert report.bytes_before == of_model(plain).total()
    twin = logits(dense_twin(model, plain))
    rounds_inputs = METHODS[name].kind == "activations" or "w4a8" in name
    assert (logits(model) - twin).std() < (0.1 if rounds_inputs else 1e-4) * twin.std()


@BOTH
@pytest.mark.parametrize("name", RECIPES)
def test_other_recipes(family, name):
    model, plain = (small(family, **BLOCK) for _ in range(2))
    report = compress_model(model, RECIPES[name], IDS)
    compressed_all(model)
    check(model, plain)
    assert report.bits < 16 and report.bytes_after == of_model(model).total() < report.bytes_before
    twin = logits(dense_twin(model, plain))
    torch.testing.assert_close(logits(model), twin, rtol=1e-4, atol=1e-4 * float(twin.std()))


@BOTH
def test_entropy_coded_weights(family):
    narrow = BLOCK | {"hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
    model, packed = (small(family, **narrow) for _ in range(2))
    report = compress_model(model, EntropyRTN(4, group=8), IDS)
    compress_model(packed, RTN(4, group=8), IDS)
    assert torch.equal(logits(model), logits(packed))
    compressed_all(model)
    check(model, small(family, **narrow))
    assert report.bytes_after == of_model(model).total() < report.bytes_before


@BOTH
def test_mixllm(family):
    model, grid = small(family, **BLOCK), Grid(2, group=32)
    salience = row_salience(model, IDS, grid)
    chosen = top_rows(salience, 0.2)
    report = compress_model(model, MixLLM(chosen, 2, 8, 32), IDS)
    compressed_all(model)
    check(model, small(family, **BLOCK))
    assert 2 < report.bits < 8
    one_call = small(family, **BLOCK)
    done = mixllm(one_call, IDS, 0.2, low=2, group=32)
    assert all(torch.equal(done.rows[name], which) for name, which in chosen.items())
    assert torch.equal(logits(one_call), logits(model))


@BOTH
def test_searched_levels(family):
    model = small(family)
    recipes = [GPTQ(bits, "full", group=32) for bits in (2, 3, 4)]
    database = layer_database(model, recipes, IDS[:4], IDS[4:], base=1)
    start = (1,) * len(database.parts)
    assert torch.equal(logits(model), logits(small(family)))
    found = evolve(database, start, generator(), generations=3, offspring=4, stages=((2, 24), (1, 48)))
    assert database.nbytes(found.levels) == database.nbytes(start)
    database.install(found.levels)
    compressed_all(model)
    check(model, small(family))


@BOTH
def test_compression_by_blocks_and_tuning_in_windows(family):
    model = small(family)
    policy = make_policy(model, IDS, sparsity=0.4, low=3, high=4)
    report = compress(model, policy, IDS)
    compressed_all(model)
    check(model, small(family))
    assert report.bytes_after < report.bytes_before and set(policy.bits) <= {3, 4}
    exits = EarlyExits(model, 1, rank=2, alpha=4, generator=generator())
    before = exits(IDS)
    tuned = tune(exits, IDS, steps=4, generator=generator(), lr=1e-2)
    assert tuned.exit == (0, 0, 1, 1) and bool(torch.tensor(tuned.loss).isfinite().all())
    after = exits(IDS)
    assert all(bool(b.isfinite().all()) and not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert vote(after).shape == after[0].shape


# --- training on a compressed model ---------------------------------------------------------------


@BOTH
def test_qlora(family):
    model = small(family, **BLOCK)
    report = qlora(model, rank=2, alpha=4, generator=generator())
    start = logits(model)
    assert report.bytes_after < report.bytes_before
    train(model, rows, CONFIG, progress=False)
    assert not torch.equal(logits(model), start)
    check(model, small(family, **BLOCK))


@BOTH
def test_tuned_scales(family):
    model = small(family, **BLOCK)
    peqa(model, bits=4, group=32)
    start = logits(model)
    tune_scales(model, rows, steps=3, batch=4, lr=1e-3)
    assert not torch.equal(logits(model), start)
    check(model, small(family, **BLOCK))


@BOTH
def test_the_hybrid_pipeline(family):
    teacher = small(family, **BLOCK)
    recipe = Hybrid(grid=Grid(4, group=32))
    model, report = hybrid(teacher, IDS, rows, recipe=recipe, neurons=32, steps=3, batch=4, lr=1e-3)
    check(model, teacher)
    assert report.bytes_after < report.bytes_before and report.trained > 0
    assert torch.equal(logits(teacher), logits(small(family, **BLOCK)))


@BOTH
def test_students_of_half_the_layers(family):
    teacher = small(family)
    student = half_depth(teacher)
    start = logits(student)
    distil(teacher, student, rows, CONFIG)
    assert student.config.num_hidden_layers == 1 and not torch.equal(logits(student), start)
    check(student, teacher)
    assert torch.equal(logits(teacher), logits(small(family)))


# --- heads and neurons that go --------------------------------------------------------------------


@BOTH
def test_bonsai(family):
    model = small(family)
    report = bonsai(model, IDS, sparsity=0.2, step=0.1, masks=10, block=2, generator=generator())
    assert 0.15 < report.sparsity <= 0.2
    check(model, small(family))


@BOTH
def test_nuteprune(family):
    model = small(family)
    settings = {"steps": 8, "warmup": 2, "batch": 2, "masks_lr": 1.0, "lambdas_lr": 40.0}
    report = nuteprune(model, IDS, sparsity=0.25, generator=generator(), **settings)
    assert 0 < report.sparsity < 1 and bool(torch.tensor(report.losses).isfinite().all())
    check(model, small(family))


@BOTH
def test_heads_that_the_loss_feels_least(family):
    model = small(family)
    importance = head_importance(model, IDS)
    (kept,) = pruning_masks(model, IDS, [3])
    assert importance.shape == (2, 4) and float(importance[~kept].max()) <= float(importance[kept].min())
    slice_model(model, kept, torch.ones(2, 64).bool())
    check(model, small(family))


@BOTH
def test_a_trained_subset_of_heads(family):
    model = small(family)
    report = train_subset(model, IDS, 5, generator=generator(), steps=3)
    assert int(report.heads.sum()) == 5
    slice_model(model, report.heads, torch.ones(2, 64).bool())
    check(model, small(family))


@BOTH
def test_trained_gates_on_heads(family):
    model = small(family)
    report = train_head_gates(model, IDS, 0.5, generator=generator(), steps=6, gates_lr=0.5)
    assert report.gates.shape == (2, 4) and 0 < report.expected_open[-1] < report.expected_open[0]
    gates = report.gates.clone()
    gates[0, 1] = 0  # at least one is closed, whatever was learned
    close_gates(model, gates)
    check(model, small(family))
