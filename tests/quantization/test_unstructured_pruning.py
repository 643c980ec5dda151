"""Magnitude, Wanda and SparseGPT: masks, weights, theorems, and what is refused."""

import copy
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from data_scripts import load_script
from quantization_runs import IDS, logits, shallow
from torch import nn
from torch.nn.utils import prune

from refimpl.checks.tiny import tiny
from refimpl.quantization import RTN, compress_model, compressed_names, stats_of
from refimpl.quantization.feedback import damped
from refimpl.quantization.gptq import GPTQ
from refimpl.quantization.grids import Grid
from refimpl.quantization.outliers import inject_outliers
from refimpl.quantization.pruning.sparsegpt import SparseGPT, refit
from refimpl.quantization.pruning.unstructured import Magnitude, Wanda, highest
from refimpl.quantization.sparse import SparseLinear

HERE = Path(__file__).resolve().parent
golden = load_script("quantization_golden_pruning")

METHODS = (Magnitude, Wanda, SparseGPT)
FLOAT = {"dtype": torch.float32}


def problem(rows=16, columns=64, tokens=300, rank=12, seed=0):
    """W and the statistics of correlated inputs of different size."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=g)
    X = torch.randn(tokens, rank, generator=g) @ torch.randn(rank, columns, generator=g)
    X += 0.3 * torch.randn(tokens, columns, generator=g)
    return W, stats_of(X * torch.linspace(0.5, 2, columns))


def objective(W, Q, H):
    E = W.double() - Q.double()
    return float(((E @ H) * E).sum())


# --- peers ----------------------------------------------------------------------------------------


def arrays():
    stored = np.load(HERE / "golden" / "pruning.npz")
    W, H, sqnorm = (stored[name] for name in ("W", "H", "sqnorm"))
    assert hashlib.sha256(W.tobytes() + H.tobytes() + sqnorm.tobytes()).hexdigest() in str(stored["about"])
    return stored, *(torch.from_numpy(a) for a in (W, H, sqnorm))


@pytest.mark.parametrize("case", golden.CASES)
def test_masks_and_weights_equal_llm_compressor(case):
    stored, W, H, sqnorm = arrays()
    sparsity = case if ":" in case else float(case)
    stats = stats_of(torch.ones(1, len(sqnorm)))
    stats.sqnorm = sqnorm.double()
    assert np.array_equal(Wanda(sparsity, **FLOAT).mask(W, stats).numpy(), stored[f"wanda_{case}"])
    result = SparseGPT(sparsity, **FLOAT).solve(W, H)
    theirs = torch.from_numpy(stored[f"sparsegpt_{case}"])
    assert torch.equal(result.keep, theirs != 0)
    torch.testing.assert_close(result.Q.float(), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
def test_magnitude_is_torchs_l1_unstructured(sparsity):
    W, _ = problem()
    layer = nn.Linear(64, 16, bias=False)
    layer.weight.data.copy_(W)
    prune.l1_unstructured(layer, "weight", amount=math.floor(W.numel() * sparsity))
    assert torch.equal(Magnitude(sparsity).mask(W), layer.weight_mask.bool())


# --- what a share means ---------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.29, 0.5, 0.7, 0.99])
def test_the_share_is_exact(sparsity):
    W, stats = problem(columns=100)
    gone = {cls: ~cls(sparsity).mask(W, stats) for cls in (Magnitude, Wanda)}
    assert int(gone[Magnitude].sum()) == math.floor(W.numel() * sparsity + 1e-9)
    assert (gone[Wanda].sum(1) == math.floor(100 * sparsity + 1e-9)).all()
    keep = SparseGPT(sparsity, block=40).solve(W, stats.H).keep
    for block in (~keep).split(40, dim=1):
        assert int(block.sum()) == math.floor(block.numel() * sparsity + 1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_n_of_m_holds_in_every_group(method, pattern):
    W, stats = problem()
    layer = method(pattern)("fc", W, stats)
    n, m = map(int, pattern.split(":"))
    assert ((layer.weight != 0).view(16, -1, m).sum(-1) == n).all()
    assert layer.settings["storage"] == ("2:4" if pattern == "2:4" else "bitmap")
    assert layer.bits_per_weight == 1 + 16 * n / m


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nothing_left_out_is_the_plain_model(method, family):
    model = shallow(family)
    before = logits(model)
    compress_model(model, method(0.0, **FLOAT), IDS)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    half = shallow(family)
    report = compress_model(half, method(0.5), IDS)
    assert (logits(half) - before).std() > 0.05 * before.std()
    assert report.bits == pytest.approx(9, abs=0.01) and len(compressed_names(half)) == len(report.rows)
    assert all(half.get_submodule(r.name).sparsity == pytest.approx(0.5, abs=0.001) for r in report.rows)


# --- theorems -------------------------------------------------------------------------------------


def test_removing_one_weight_costs_what_optimal_brain_surgery_says():
    W, stats = problem(rows=1)
    H = damped(stats.H, 0.01)
    inverse = torch.linalg.inv(H)
    for j in (0, 17, 63):
        keep = torch.ones(1, 64, dtype=torch.bool)
        keep[0, j] = False
        w = W[0].double()
        expected = w - w[j] / inverse[j, j] * inverse[:, j]
        Q = refit(W, stats.H, keep)
        torch.testing.assert_close(Q[0], expected.index_fill(0, torch.tensor(j), 0), rtol=1e-6, atol=1e-8)
        assert objective(W, Q, H) == pytest.approx(float(w[j] ** 2 / inverse[j, j]), rel=1e-6)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, "2:4"])
def test_a_refit_is_the_best_on_its_mask_and_feedback_lies_between(sparsity):
    W, stats = problem()
    H = damped(stats.H, 0.01)
    result = SparseGPT(sparsity, **FLOAT).solve(W, stats.H)
    best, plain = refit(W, stats.H, result.keep), W * result.keep
    errors = [objective(W, Q, H) for Q in (best, result.Q, plain)]
    assert errors[0] <= errors[1] < errors[2]
    assert result.loss == pytest.approx(errors[1], rel=1e-9)
    assert not best[~result.keep].any()
    for cls in (Magnitude, Wanda):
        keep = cls(sparsity).mask(W, stats)
        assert objective(W, refit(W, stats.H, keep), H) < objective(W, W * keep, H)


def test_feedback_wins_where_columns_matter_alike_and_not_always():
    """With one mask for each 128 columns every block must give its share, however important its columns."""
    W, stats = problem(rows=32, columns=256, tokens=2000)
    even = {cls: objective(W, cls(0.5, **FLOAT)("fc", W, stats).weight, stats.H) for cls in METHODS}
    assert even[SparseGPT] < even[Wanda] < even[Magnitude]
    g = torch.Generator().manual_seed(1)
    sizes = torch.cat((torch.full((128,), 10.0), torch.full((128,), 0.1)))
    uneven = stats_of(torch.randn(2000, 256, generator=g) * sizes)
    errors = {cls: objective(W, cls(0.5, **FLOAT)("fc", W, uneven).weight, uneven.H) for cls in METHODS}
    assert errors[Wanda] < 0.1 * errors[SparseGPT]


def test_the_rounding_of_the_stored_values_is_fed_back():
    W, stats = problem()
    coarse = SparseGPT(0.5, torch.bfloat16).solve(W, stats.H)
    fine = SparseGPT(0.5, torch.float32).solve(W, stats.H)
    later = fine.Q.bfloat16().double()
    assert objective(W, coarse.Q, stats.H) < objective(W, later, stats.H) * 1.001
    assert torch.equal(coarse.Q, coarse.Q.bfloat16().double())


def test_wanda_does_not_see_how_a_channel_is_scaled_and_magnitude_does():
    for family in ("gpt2", "llama"):
        plain, injected = shallow(family), shallow(family)
        inject_outliers(injected, torch.Generator().manual_seed(0), channels=4, factor=64.0)
        masks = {}
        for cls in (Wanda, Magnitude):
            models = copy.deepcopy(plain), copy.deepcopy(injected)
            for m in models:
                compress_model(m, cls(0.5, **FLOAT), IDS, sequential=False)
            names = compressed_names(models[0])
            a, b = ([m.get_submodule(name).keep for name in names] for m in models)
            masks[cls] = all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            if cls is Wanda:
                torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-4, atol=1e-4)
        assert masks == {Wanda: True, Magnitude: False}


# --- mask and grid at once ------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["row", 16])
@pytest.mark.parametrize("scheme", ["full", "asymmetric"])
def test_nothing_left_out_on_a_grid_is_gptq(scheme, group):
    W, stats = problem()
    result = SparseGPT(0.0, grid=Grid(3, scheme, group)).solve(W, stats.H)
    gptq = GPTQ(3, scheme, group).solve(W, stats.H)
    assert torch.equal(result.quantized.codes, gptq.codes)
    assert torch.equal(result.quantized.scale, gptq.scale)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4"])
def test_mask_and_grid_in_one_pass_beat_pruning_and_then_rounding(sparsity):
    errors = []
    for seed in range(3):
        W, stats = problem(columns=128, seed=seed)
        pruned = SparseGPT(sparsity, **FLOAT).solve(W, stats.H)
        later = RTN(3)("fc", pruned.Q).weight * pruned.keep
        both = SparseGPT(sparsity, grid=Grid(3))("fc", W, stats).weight
        errors.append([objective(W, Q, stats.H) for Q in (both, later)])
        assert errors[-1][0] < errors[-1][1]
    both, later = np.sum(errors, 0)
    assert both < 0.9 * later


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("group", ["row", 16])
def test_what_the_solver_returns_is_what_the_layer_stores(sparsity, group):
    W, stats = problem(columns=128)
    recipe = SparseGPT(sparsity, grid=Grid(3, group=group))
    layer, result = recipe("fc", W, stats), recipe.solve(W, stats.H)
    torch.testing.assert_close(layer.weight.double(), result.Q, rtol=1e-6, atol=1e-7)
    assert result.loss == pytest.approx(objective(W, result.Q, damped(stats.H, 0.01)), rel=1e-9)
    groups = 1 if group == "row" else 8
    assert layer.bits_per_weight == 1 + 3 * 0.5 + 19 * groups / 128


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_whole_model_on_a_grid(family):
    model, pruned = shallow(family), shallow(family)
    before = logits(model)
    report = compress_model(model, SparseGPT(0.0, grid=Grid(8, group=8)), IDS)
    assert (logits(model) - before).std() < 0.02 * before.std()
    assert report.bits == 1 + 8 + 3  # a mask, codes, 16 + 8 bits for each 8
    report = compress_model(pruned, SparseGPT(0.5, grid=Grid(8, group=8), block=32), IDS)
    assert report.bits == pytest.approx(1 + 4 + 3, abs=0.05)
    assert all(isinstance(pruned.get_submodule(row.name), SparseLinear) for row in report.rows)


# --- bad input ------------------------------------------------------------------------------------


def test_inputs_that_never_occurred_go_first():
    W, stats = problem()
    stats.H[3], stats.H[:, 3], stats.sqnorm[3] = 0, 0, 0
    for cls in (Wanda, SparseGPT):
        assert not cls(0.5)("fc", W, stats).weight[:, 3].any()


def test_bad_numbers_are_refused():
    for cls in METHODS:
        for sparsity in (1, 1.5, -0.1, math.nan, "half", "4:4", "2:", "0:4", True):
            with pytest.raises(ValueError, match="sparsity must be a number, 0 <= s < 1, or 'n:m'"):
                cls(sparsity)
        with pytest.raises(ValueError, match="dtype must be one of"):
            cls(0.5, torch.int8)
    with pytest.raises(ValueError, match="block must be a multiple of 4"):
        SparseGPT("2:4", block=6)
    with pytest.raises(ValueError, match="damp must be"):
        SparseGPT(0.5, damp=-1)
    with pytest.raises(ValueError, match="sparsity must be"):
        highest(torch.ones(3), 1.0)
    with pytest.raises(ValueError, match="score must have no NaN"):
        highest(torch.tensor([math.nan]), 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_bad_matrices_are_refused(method):
    W, stats = problem()
    nan = W.clone()
    nan[0, 0] = math.nan
    for bad, error, message in [
        (W[0], ValueError, "W must be a finite matrix"),
        (W[:0], ValueError, "W must be a finite matrix"),
        (nan, ValueError, "W must be a finite matrix"),
        (W.long(), TypeError, "W must be floating point"),
    ]:
        with pytest.raises(error, match=message):
            method(0.5)("fc", bad, stats)
    with pytest.raises(ValueError, match="multiple of 5"):
        method("1:5", **({"block": 10} if method is SparseGPT else {}))("fc", W, stats)
    if method is not Magnitude:
        with pytest.raises(ValueError, match="H must be|stats must be"):
            method(0.5)("fc", W[:, :32], stats)
    with pytest.raises(ValueError, match="keep bool"):
        refit(W, stats.H, torch.ones(16, 64))
    model = tiny("llama")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="multiple of 16"):
        compress_model(model, method("8:16"), IDS)  # d_in = 40 comes last
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
