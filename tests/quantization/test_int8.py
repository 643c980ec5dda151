"""LLM.int8(): which columns are separated, what happens to them, and the same codes as bitsandbytes."""

import copy
import hashlib
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from data_scripts import load_script
from quantization_runs import IDS, logits, shallow, through_a_file

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES
from refimpl.quantization import calibrate, compress_model, consumers
from refimpl.quantization.activations import W8A8, int8_weight, quantize_activations
from refimpl.quantization.int8 import LLMInt8, LLMInt8Linear
from refimpl.quantization.outliers import inject_outliers

HERE = Path(__file__).resolve().parent
golden = load_script("quantization_golden_bitsandbytes")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the layer ------------------------------------------------------------------------------------


def test_threshold_zero_is_the_float_product_and_infinity_the_integer_one():
    W, x = draw(12, 40), draw(2, 7, 40, seed=1)
    torch.testing.assert_close(LLMInt8(0, keep_weight=True)("fc", W)(x), x @ W.T, atol=1e-5, rtol=1e-5)
    without = LLMInt8(0)("fc", W)
    torch.testing.assert_close(without(x), x @ without.weight.T, atol=1e-5, rtol=1e-5)
    for keep in (False, True):
        assert torch.equal(LLMInt8(inf, keep)("fc", W)(x), W8A8("row", "token")("fc", W)(x))


def test_outliers_leave_the_other_columns_their_digits():
    W, x = draw(32, 64), draw(20, 64, seed=1)
    x[:, [3, 17]] *= 60
    expected = x @ W.T
    error = lambda recipe: float((recipe("fc", W)(x) - expected).square().mean())
    assert error(LLMInt8(keep_weight=True)) < 0.01 * error(W8A8())
    layer = LLMInt8()("fc", W)
    assert layer.outlier_columns(x).tolist() == [3, 17]
    torch.testing.assert_close(layer(x[:, None])[:, 0], layer(x))
    assert layer(x[0]).shape == (32,) and layer(x.bfloat16()).dtype is torch.bfloat16


def test_columns_are_those_of_the_call():
    """One token's outlier changes what is done to the others."""
    layer = LLMInt8()("fc", draw(12, 40))
    x = draw(6, 40, seed=1).clamp(-3, 3)
    with_outlier = x.clone()
    with_outlier[0, 9] = -6.0
    assert layer.outlier_columns(x).tolist() == [] and layer.outlier_columns(with_outlier).tolist() == [9]
    assert not torch.equal(layer(with_outlier)[1:], layer(x)[1:])
    assert torch.equal(layer(x), W8A8()("fc", draw(12, 40))(x))
    with_outlier[0, 9] = 5.99
    assert layer.outlier_columns(with_outlier).tolist() == []


def test_what_is_stored():
    W = draw(16, 64)
    layer, kept = LLMInt8()("fc", W), LLMInt8(keep_weight=True)("fc", W)
    assert layer.nbytes() == W.numel() + 4 * 16 and layer.bits_per_weight == 8.5
    assert kept.bits_per_weight == 40.5 and torch.equal(kept.weight, layer.weight)
    assert "threshold=6.0" in repr(layer)


def test_the_gradient_passes():
    layer, x = LLMInt8()("fc", draw(6, 16)), 5 * draw(4, 16, seed=1)
    plain = layer(x)
    x.requires_grad_()
    y = layer(x)
    assert torch.equal(y.detach(), plain)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 16))


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_stays_close_and_comes_back_from_a_file(tmp_path, family):
    model = shallow(family)
    before = logits(model)
    exact = copy.deepcopy(model)
    compress_model(exact, LLMInt8(0, keep_weight=True), IDS)
    torch.testing.assert_close(logits(exact), before, atol=1e-4, rtol=1e-4)
    report = compress_model(model, LLMInt8(2.0), IDS)
    assert 0 < (logits(model) - before).std() < 0.05 * before.std()
    assert all(type(model.get_submodule(row.name)) is LLMInt8Linear for row in report.rows)
    for one in (model, exact):
        through_a_file(one, shallow(family, seed=1), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_injected_channels_are_found_and_repaired(family):
    model = shallow(family)
    before = logits(model)
    calm = max(float(s.absmax.max()) for s in calibrate(model, IDS).values())
    bb, factor = Backbone(model), 1000.0
    injected = inject_outliers(model, torch.Generator().manual_seed(0), 2, factor)
    # Above all that the plain model has, and below what 1000 times a typical value is.
    threshold = 2 * calm
    plain_errors = {}
    for name, recipe in (("tokens", W8A8()), ("mixed", LLMInt8(threshold, keep_weight=True))):
        compressed = copy.deepcopy(model)
        compress_model(compressed, recipe, IDS)
        plain_errors[name] = float((logits(compressed) - before).std())
    assert plain_errors["mixed"] < 0.1 * plain_errors["tokens"]
    for (layer, site), channels in injected.items():
        name = consumers(bb, layer, site)[0]
        found = compressed.get_submodule(name)
        columns = []
        hook = found.register_forward_pre_hook(
            lambda m, x, columns=columns: columns.extend(m.outlier_columns(x[0]).tolist())
        )
        logits(compressed)
        hook.remove()
        assert tuple(columns) == channels


# --- bitsandbytes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer():
    stored = np.load(HERE / "golden" / "bitsandbytes_int8.npz")
    digest = hashlib.sha256(stored["W"].tobytes() + stored["x"].tobytes()).hexdigest()
    assert digest in str(stored["about"])
    return {name: torch.from_numpy(stored[name]) for name in stored.files if name != "about"}


def test_codes_of_weights_and_inputs_equal_those_of_bitsandbytes(peer):
    codes, scale = int8_weight(peer["W"])
    assert torch.equal(scale[:, 0], peer["W_absmax"] / 127)
    x_codes, x_scale = quantize_activations(peer["x"])
    assert torch.equal(x_scale[:, 0], peer["plain_absmax"] / 127)
    for ours, theirs in ((codes, peer["W_codes"]), (x_codes, peer["plain_codes"])):
        assert (ours == theirs).float().mean() >= 0.999  # they multiply by 127 / absmax: halves differ
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_outlier_columns_equal_those_of_bitsandbytes_and_scales_where_only_columns_matter(peer):
    x, layer = peer["x"], LLMInt8(golden.THRESHOLD)("fc", peer["W"].float())
    columns = layer.outlier_columns(x)
    assert torch.equal(columns, peer["mixed_columns"]) and columns.tolist() == list(golden.OUTLIERS)
    rest = x.index_fill(-1, columns, 0)
    codes, scale = quantize_activations(rest)
    # They zero the outlier entries, we the outlier columns, before the maximum of a token is taken.
    entries = x.masked_fill(x.abs() >= golden.THRESHOLD, 0).float().abs().amax(1)
    assert torch.equal(entries, peer["mixed_absmax"])
    same = entries == rest.float().abs().amax(1)
    assert 10 <= int(same.sum()) < len(x)
    assert (codes[same] == peer["mixed_codes"][same]).float().mean() >= 0.999
    assert bool((scale[~same, 0] * 127 < entries[~same]).all())


@pytest.mark.parametrize(("name", "threshold"), [("plain", inf), ("mixed", golden.THRESHOLD)])
def test_outputs_are_within_one_per_cent_of_bitsandbytes(peer, name, threshold):
    y = LLMInt8(threshold)("fc", peer["W"].float())(peer["x"].float())
    theirs = peer[f"{name}_output"].float()
    assert (y - theirs).norm() < 0.01 * theirs.norm()
    exact = peer["x"].float() @ peer["W"].float().T
    assert (theirs - exact).norm() > 0.002 * exact.norm()  # theirs is rounded as well


def test_bad_input_is_refused():
    for threshold in (-1, float("nan")):
        with pytest.raises(ValueError, match="threshold must be a number >= 0"):
            LLMInt8(threshold)
    layer = LLMInt8()("fc", draw(4, 8))
    with pytest.raises(ValueError, match=r"x must be \[..., 8\]"):
        layer(draw(2, 9))
    with pytest.raises(ValueError, match="x must be finite"):
        layer(draw(2, 8) * torch.nan)
    with pytest.raises(ValueError, match="W must be finite"):
        LLMInt8()("fc", draw(4, 8) * torch.inf)
    with pytest.raises(TypeError, match="x must be floating point"):
        layer(torch.ones(2, 8, dtype=torch.int32))
