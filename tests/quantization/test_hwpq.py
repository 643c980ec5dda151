"""HWPQ, as reconstructed: its metric, the moving thresholds, FP8, linear memory and work, both families."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quantization_runs import IDS, logits, shallow, through_a_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, tiny
from refimpl.quantization import compress_model, compressed_names, stats_of
from refimpl.quantization.hwpq import HWPQ, FP8Linear, contribution, ewma_mask, ewma_score
from refimpl.quantization.pruning.sparsegpt import SparseGPT
from refimpl.quantization.pruning.unstructured import Magnitude, highest
from refimpl.quantization.sparse import SparseLinear


def layer(d_out=48, d_in=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_out, d_in, generator=generator) * 0.05
    X = torch.randn(100, d_in, generator=generator) * torch.rand(d_in, generator=generator)
    return W, stats_of(X)


def test_the_contribution_is_half_the_square_less_the_share_of_the_input():
    W, stats = layer()
    share = stats.sqnorm / stats.sqnorm.sum()
    assert torch.allclose(contribution(W, stats.sqnorm), (W.double() ** 2 * (1 - share) / 2).float())
    assert torch.allclose(contribution(W, 7 * stats.sqnorm), contribution(W, stats.sqnorm))
    equal = contribution(W, torch.ones(256))
    assert torch.equal(equal.flatten().argsort(), W.abs().flatten().argsort())
    # It falls where the input grows, unlike Wanda's.
    more = stats.sqnorm.clone()
    more[3] *= 10
    assert bool((contribution(W, more)[:, 3] < contribution(W, stats.sqnorm)[:, 3]).all())


def test_moving_thresholds_agree_with_sorting():
    W, stats = layer(64, 512)
    L = contribution(W, stats.sqnorm)
    for sparsity in (0.3, 0.5, 0.7):
        ours, sorted_mask = ewma_mask(L, sparsity), highest(L.flatten(), sparsity).view(L.shape)
        agreement = float((ours == sorted_mask).float().mean())
        assert 0.9 < agreement < 1
        assert int((~ours).sum()) == int(L.numel() * sparsity)


def test_a_slow_average_compares_rows_with_themselves():
    W, stats = layer()
    W *= torch.logspace(-2, 1, 48)[:, None]
    keep = ewma_mask(contribution(W, stats.sqnorm), 0.5, beta=0.999)
    assert float(keep.float().mean(1).min()) > 0.4  # magnitude would empty the small rows
    assert float(Magnitude(0.5).mask(W).float().mean(1).min()) == 0
    assert torch.allclose(ewma_score(4 * W.square()), ewma_score(W.square()), rtol=1e-3, atol=1e-4)


def test_the_start_of_a_row_is_not_favoured():
    W, stats = layer(256, 256)
    kept = ewma_mask(contribution(W, torch.ones(256)), 0.5).float().mean(0)
    assert abs(float(kept[:32].mean()) - float(kept[-32:].mean())) < 0.05


def test_equal_contributions_are_all_kept():
    assert bool(ewma_mask(torch.ones(3, 8), 0.5).all())
    assert bool(ewma_mask(torch.zeros(3, 8), 0.5).all())


@pytest.mark.parametrize("fp8", [False, True])
def test_no_sparsity_keeps_the_weights(fp8):
    W, stats = layer()
    made = HWPQ(0, fp8=fp8)("fc", W.half().float(), stats)
    assert made.sparsity == 0
    if fp8:
        assert float(((made.weight - W).abs() / W.abs()).max()) < 1 / 14  # half a step of 3 bits, and float16
        assert made.bits_per_weight == 8 + 32 / 256  # no mask
    else:
        assert torch.equal(made.weight, W.half().float())


def test_two_of_four_is_exact():
    W, stats = layer()
    made = HWPQ("2:4")("fc", W, stats)
    assert isinstance(made, FP8Linear) and made.sparsity == 0.5
    assert bool(((made.weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())
    assert torch.equal(made.keep.unflatten(1, (-1, 4)).sum(-1), torch.full((48, 64), 2))
    assert made.bits_per_weight == 1 + 4 + 32 / 256
    assert HWPQ("2:4", fp8=False)("fc", W, stats).bits_per_weight == 9


def test_fp8_keeps_outliers_and_small_weights_of_a_row():
    W, stats = layer()
    W[5, 9] = 300.0
    made = HWPQ(0)("fc", W, stats)
    assert float((made.weight[5] - W[5]).abs().max()) < 300 / 16
    big = W[5].abs() > 300 / 28672
    assert float(((made.weight[5] - W[5]).abs() / W[5].abs())[big].max()) < 1 / 15
    assert bool(made.weight.isfinite().all())
    zeros = FP8Linear.pack(torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool))
    assert torch.equal(zeros.weight, torch.zeros(2, 4))


def test_it_needs_no_hessian():
    W, stats = layer()
    alone = HWPQ(0.5)("fc", W, SimpleNamespace(sqnorm=stats.sqnorm))
    assert torch.equal(alone.weight, HWPQ(0.5)("fc", W, stats).weight)


class Touched(TorchDispatchMode):
    """Counts the numbers that all tensor operations read and write."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers += sum(
            t.numel() for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)
        )
        return out


def test_its_work_grows_no_faster_than_the_columns():
    generator, sizes = torch.Generator().manual_seed(0), (64, 512)
    slopes = []
    for recipe in (HWPQ(0.5), SparseGPT(0.5)):
        work = []
        for d_in in sizes:
            W, stats = torch.randn(8, d_in, generator=generator), stats_of(torch.ones(1, d_in))
            with Touched() as touched:
                recipe("fc", W, stats)
            work.append(touched.numbers)
        slopes.append(np.log(work[1] / work[0]) / np.log(sizes[1] / sizes[0]))
    assert slopes[0] < 1.2 < 1.5 < slopes[1], slopes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", [HWPQ(0.5), HWPQ("2:4"), HWPQ(0), HWPQ(0.3, fp8=False)], ids=str)
def test_models_are_compressed_saved_and_loaded(family, recipe, tmp_path):
    model = tiny(family, num_hidden_layers=1)
    report = compress_model(model, recipe, IDS)
    assert report.bits < 13
    through_a_file(model, tiny(family, seed=1, num_hidden_layers=1), tmp_path)


def test_more_pruning_costs_more():
    plain, errors = tiny("llama", num_hidden_layers=1), []
    for sparsity in (0, 0.2, 0.5, 0.8):
        model = copy.deepcopy(plain)
        compress_model(model, HWPQ(sparsity), IDS)
        with torch.no_grad():
            errors.append(float((model(IDS).logits - plain(IDS).logits).square().mean()))
    assert errors == sorted(errors) and errors[0] < 0.05 * errors[-1]


def test_casts_leave_the_bytes_alone():
    W, stats = layer()
    made = HWPQ(0.5)("fc", W, stats)
    before = made.weight
    assert torch.equal(made.to(torch.bfloat16).weight, before) and made.values.dtype is torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("change", "word"),
    [({"sparsity": 1.0}, "sparsity"), ({"sparsity": "4:2"}, "sparsity"), ({"sparsity": True}, "sparsity"),
     ({"beta": 0.0}, "beta"), ({"beta": 1.0}, "beta"), ({"dtype": torch.int8}, "dtype")],
)  # fmt: skip
def test_bad_values_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        HWPQ(**change)


def test_bad_inputs_are_named():
    W, stats = layer()
    for sqnorm in (torch.ones(5), -torch.ones(256), torch.zeros(256), torch.full((256,), float("nan"))):
        with pytest.raises(ValueError, match="sqnorm"):
            contribution(W, sqnorm)
    with pytest.raises(ValueError, match="W must"):
        contribution(W / 0, stats.sqnorm)
    with pytest.raises(TypeError, match="W must"):
        contribution(W.int(), stats.sqnorm)
    with pytest.raises(ValueError, match="multiple of 4"):
        HWPQ("2:4")("fc", W[:, :30], stats_of(torch.randn(9, 30)))
    with pytest.raises(ValueError, match="NaN"):
        ewma_mask(torch.full((2, 2), float("nan")), 0.5)
    with pytest.raises(ValueError, match="keep"):
        FP8Linear.pack(W, torch.ones(2, 2, dtype=torch.bool))
    assert isinstance(HWPQ(0.5, fp8=False)("fc", W, stats), SparseLinear)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_sparsity_and_fp8_it_is_the_model_of_half_precision_weights(family):
    model, half = shallow(family), shallow(family)
    compress_model(model, HWPQ(0, fp8=False), IDS)
    with torch.no_grad():
        for ref in Backbone(half).linears():
            ref.weight.copy_(ref.weight.half().float())
    assert torch.equal(logits(model), logits(half))
    assert not torch.equal(logits(model), logits(shallow(family)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("fault", ["nan", "dead inputs", "width", "ids"])
def test_a_refused_model_is_as_it_was(family, fault):
    """The fault is met in the last layer, after all others were replaced, but for that of the ids."""
    changes = {"n_inner": 42} if family == "gpt2" else {"intermediate_size": 42}
    model = shallow(family, **(changes if fault == "width" else {}))
    bb = Backbone(model)
    down, up = bb.layer(0).down, bb.layer(0).up
    with torch.no_grad():
        if fault == "nan":
            down.weight[3, 5] = torch.nan
        if fault == "dead inputs":
            up.weight.zero_()
            if up.bias is not None:
                up.bias.zero_()
    before = copy.deepcopy(model.state_dict())
    recipe = HWPQ("2:4" if fault == "width" else 0.5)
    words = {"nan": "W must", "dead inputs": "sqnorm", "width": "multiple of 4", "ids": "ids"}
    with pytest.raises(ValueError, match=words[fault]):
        compress_model(model, recipe, IDS[:0] if fault == "ids" else IDS)
    after = model.state_dict()
    assert after.keys() == before.keys() and not compressed_names(model)
    assert all(torch.equal(v.nan_to_num(9.0), before[k].nan_to_num(9.0)) for k, v in after.items())
