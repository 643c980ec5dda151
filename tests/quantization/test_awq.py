"""AWQ: what it keeps, what it searches, and the same scales as torchao and llm-compressor."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from data_scripts import load_script
from quantization_runs import IDS, logits, shallow, through_a_file
from torch import nn

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, tiny
from refimpl.quantization import (
    RTN,
    GridLinear,
    calibrate,
    compress_model,
    compressed_names,
    stats_of,
)
from refimpl.quantization.awq import ScaledLinear, awq
from refimpl.quantization.awq_search import RATIOS, clip_groups, search_scale
from refimpl.quantization.grids import Grid, dequantize
from refimpl.quantization.linear import dense_weight

HERE = Path(__file__).resolve().parent
golden = load_script("quantization_golden_awq")


def matrix(rows=24, columns=32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# --- identity and effect --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_without_scales_and_clipping_it_is_rounding(family):
    model, rounded = shallow(family), shallow(family)
    report = awq(model, IDS, 3, 8, ratios=(0,), clip=False)
    compress_model(rounded, RTN(3, group=8), IDS)
    assert torch.equal(logits(model), logits(rounded))
    assert all(s.ratio == 0 and s.loss == s.plain and bool((s.scale == 1).all()) for s in report.searches)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_enough_bits_the_scales_change_nothing(family):
    model, before = shallow(family), logits(shallow(family))
    report = awq(model, IDS, 8, 4, clip=False)
    assert any(search.ratio > 0 for search in report.searches)
    assert (logits(model) - before).std() < 0.02 * before.std()
    assert {row.name for row in report.rows} == set(compressed_names(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_the_original_layers_and_bytes_those_stored(family):
    """Undone scales, by the outputs for the same inputs; the first block's inputs are the same as before."""
    model, plain = shallow(family), shallow(family)
    report = awq(model, IDS, 3, 8)
    stats = calibrate(plain, IDS)
    by_name = {row.name: row for row in report.rows}
    for search in report.searches:
        assert search.loss <= search.plain
        if search.site in ("ln1", "ln2"):
            group = [n for n in stats if stats[n].H.shape[0] == 32 and f".{search.layer}." in n]
            group = [n for n in group if ("mlp" in n) == (search.site == "ln2") and not n.endswith("o_proj")]
            for name in (n for n in group if n.endswith(("q_proj", "gate_proj"))):
                layer, W = model.get_submodule(name), dense_weight(plain.get_submodule(name))
                e = (W - layer.weight / search.scale).double()
                torch.testing.assert_close(
                    by_name[name].weight_error, float(e.square().sum()), rtol=1e-4, atol=0
                )
                found = float(((e @ stats[name].H) * e).sum())
                torch.testing.assert_close(by_name[name].output_error, found, rtol=1e-3, atol=0)
    for row in report.rows:
        layer = model.get_submodule(row.name)
        assert row.nbytes == layer.nbytes() and row.bits == layer.bits_per_weight
        exact = Grid(3, group=8).bits_per_weight(*row.shape)
        own = 16 / row.shape[0] if isinstance(layer, ScaledLinear) else 0
        assert abs(row.bits - exact - own) < 1e-9
    shared = Backbone(plain).H != Backbone(plain).G
    assert {s.site for s in report.searches} == {"ln1", "ln2", "up-down"} | (set() if shared else {"v-o"})


def test_it_protects_the_channels_that_carry_much():
    """The paper's ablation: one float channel of 32, chosen by activation, by weight, or none."""
    W, X = matrix(), torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    X[:, 5] *= 30
    W[:, 9] *= 1.5
    stats, grid = stats_of(X), Grid(3, group=32)
    rounded = dequantize(grid.quantize(W))

    def error(W_hat):
        return float(((W_hat - W) @ X.T).square().mean())

    def kept(channel):
        part = rounded.clone()
        part[:, channel] = W[:, channel]
        return error(part)

    by_activation, by_weight = kept(int(stats.absmean.argmax())), kept(int(W.norm(dim=0).argmax()))
    assert by_activation < 0.5 * min(by_weight, kept(20), error(rounded))
    ratio, s, plain, loss = search_scale(W, stats, grid)
    assert ratio > 0 and int(s.argmax()) == 5 and loss < 0.5 * plain
    np.testing.assert_allclose(plain, error(rounded), rtol=1e-4)
    np.testing.assert_allclose(loss, error(dequantize(grid.quantize(W * s)) / s), rtol=1e-4)
    assert (s.max() * s.min()).item() == pytest.approx(1, rel=1e-5)


def test_clipping_never_costs_more_and_leaves_most_weights_alone():
    W, X = matrix(seed=2), torch.randn(100, 32, generator=torch.Generator().manual_seed(3))
    W[:, ::7] *= 4
    H, grid = stats_of(X).H, Grid(2, group=8)
    clipped = clip_groups(W, H, grid)
    changed = clipped != W
    assert 0 < changed.sum() < 0.3 * W.numel() and bool((clipped.abs() <= W.abs()).all())
    e, plain = (dequantize(grid.quantize(M)) - W for M in (clipped, W))
    for j in range(0, 32, 8):
        block = H[j : j + 8, j : j + 8].float()
        costs = [((d[:, j : j + 8] @ block) * d[:, j : j + 8]).sum(1) for d in (e, plain)]
        assert bool((costs[0] <= costs[1] * (1 + 1e-5)).all()) and costs[0].sum() < costs[1].sum()


def test_losses_are_compared_over_all_batches():
    """Dropping a candidate early changes nothing: batches of one row find what one batch of all finds."""
    one, all_rows = (awq(shallow("llama"), IDS, 3, 8, batch=batch).searches for batch in (1, 6))
    assert [s.ratio for s in one] == [s.ratio for s in all_rows]


def test_outliers_that_were_injected_are_found():
    model = tiny("llama")
    with torch.no_grad():
        layer = model.model.layers[1]
        layer.post_attention_layernorm.weight[7] *= 64
        for reader in (layer.mlp.gate_proj, layer.mlp.up_proj):
            reader.weight[:, 7] /= 64
    search = next(s for s in awq(model, IDS, 3, 8).searches if (s.layer, s.site) == (1, "ln2"))
    assert int(search.scale.argmax()) == 7 and search.loss < 0.7 * search.plain


# --- peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", golden.BITS)
def test_scales_of_a_linear_layer_equal_torchao(bits):
    arrays = golden.linear_inputs()
    stored = np.load(HERE / "golden" / "awq_torchao.npz")
    assert golden.digest(*arrays) in str(stored["about"])
    W, X = map(torch.from_numpy, arrays)
    grid = Grid(bits, group=golden.GROUP, scale_dtype=torch.float32)
    ratio, s, plain, loss = search_scale(W, stats_of(X), grid)
    assert ratio > 0
    np.testing.assert_allclose(s.numpy(), stored[f"scale_{bits}"], rtol=1e-5)


def test_scales_of_a_model_equal_llm_compressor():
    stored = np.load(HERE / "golden" / "awq_llmcompressor.npz")
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**golden.CONFIG)).eval()
    arrays, ids = golden.model_inputs({name: tuple(p.shape) for name, p in model.named_parameters()})
    assert golden.digest(*(arrays[name] for name in sorted(arrays)), ids) in str(stored["about"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[name]))
    ratios = tuple(i / 19 for i in range(20))
    report = awq(
        model, torch.from_numpy(ids), golden.MODEL_BITS, golden.MODEL_GROUP, ratios=ratios, clip=False
    )
    assert len(report.searches) == len(stored.files) - 1
    for search in report.searches:
        theirs = stored[f"{search.layer}_{search.site}"]
        np.testing.assert_allclose(search.scale.numpy(), theirs, rtol=1e-4, err_msg=f"{search}")


# --- storage and bad input ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_file_gives_the_same_model(family, tmp_path):
    model = shallow(family)
    awq(model, IDS, 3, 8)
    other = through_a_file(model, shallow(family, seed=1), tmp_path)
    kinds = {type(other.get_submodule(name)) for name in compressed_names(other)}
    assert kinds == ({GridLinear, ScaledLinear} if family == "gpt2" else {GridLinear})


def test_bad_input_changes_nothing(monkeypatch):
    model = tiny("llama")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    nan = tiny("llama")
    nan.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    for call, error, message in [
        (lambda: awq(nn.Linear(2, 2), IDS), TypeError, "Linear is not"),
        (lambda: awq(model, IDS[:0], 4, 8), ValueError, "non-empty LongTensor"),
        (lambda: awq(model, IDS.float(), 4, 8), ValueError, "non-empty LongTensor"),
        (lambda: awq(model, IDS, 1, 8), ValueError, "bits must be an integer from 2 to 8"),
        (lambda: awq(model, IDS, 4, 128), ValueError, "group must divide d_in = 32"),
        (lambda: awq(model, IDS, 4, "tensor"), ValueError, "got 'tensor'"),
        (lambda: awq(model, IDS, 4, 8, scheme="nf4"), ValueError, "scheme must be one of"),
        (lambda: awq(model, IDS, 4, 8, ratios=()), ValueError, "ratios must be"),
        (lambda: awq(model, IDS, 4, 8, ratios=(0.5, 1)), ValueError, "ratios must be"),
        (lambda: awq(model, IDS, 4, 8, ratios=(0, 1.5)), ValueError, "ratios must be"),
        (lambda: awq(model, IDS, 4, 8, batch=0), ValueError, "batch must be"),
        (lambda: awq(nan, IDS, 4, 8), ValueError, "W must be finite"),
        (lambda: search_scale(matrix(), stats_of(matrix()), Grid(3), ratios=(1,)), ValueError, "ratios"),
        (lambda: search_scale(matrix().int(), stats_of(matrix()), Grid(3)), TypeError, "floating point"),
        (lambda: clip_groups(matrix(), torch.eye(32), Grid(3, group=5)), ValueError, "group must divide"),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    # An interruption in a later block puts everything back, folded norms included.
    stopped = copy.deepcopy(model)
    import sys

    module, real = sys.modules["refimpl.quantization.awq"], clip_groups
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "clip_groups", interrupted)
    with pytest.raises(KeyboardInterrupt):
        awq(stopped, IDS, 4, 8)
    assert not compressed_names(stopped)
    assert all(torch.equal(t, before[key]) for key, t in stopped.state_dict().items())
    monkeypatch.undo()
    awq(model, IDS, 4, 8)
    with pytest.raises(TypeError, match="got GridLinear"):
        awq(model, IDS, 4, 8)
    assert RATIOS[0] == 0 and RATIOS[-1] == 0.95
