"""ASER: smoothing that changes nothing, a residual that holds the outliers, and rounded activations."""

import pytest
import torch
from quantization_runs import IDS, logits, through_a_file

from refimpl.checks.tiny import tiny
from refimpl.quantization import (
    GPTQ,
    RTN,
    compress_model,
    compressed_names,
    output_distortion,
    stats_of,
)
from refimpl.quantization.aser import ASER, AserLinear, round_tokens, smoothing
from refimpl.quantization.repair import Repair, input_metric, low_rank


def layer_with_outliers(d_out=24, d_in=48, tokens=300):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(d_out, d_in, generator=generator)
    X = torch.randn(tokens, d_in, generator=generator) @ torch.randn(d_in, d_in, generator=generator)
    X[:, [3, 30]] *= torch.tensor([60.0, 25.0])
    W[:, [3, 30]] /= torch.tensor([60.0, 25.0])
    return W, X, stats_of(X, keep=10)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_full_rank_and_whole_activations_it_is_the_plain_model(family):
    model = tiny(family)
    before = logits(model)
    full = lambda name, W, stats: ASER(rank=min(W.shape), activation_bits=None)(name, W, stats)
    compress_model(model, full, IDS)
    assert (logits(model) - before).norm() < 5e-3 * before.norm()
    for name in compressed_names(model):
        assert isinstance(model.get_submodule(name), AserLinear)


def test_neutral_settings_are_the_base_behind_rounded_activations():
    W, X, stats = layer_with_outliers()
    plain, layer = RTN(4, "restricted")("fc", W), ASER(rank=0, outliers=0)("fc", W, stats)
    assert torch.equal(layer.weight, plain.weight) and layer.nbytes() == plain.nbytes()
    assert torch.equal(layer(X), plain(round_tokens(X, 8)))
    whole = ASER(rank=0, outliers=0, activation_bits=None)("fc", W, stats)
    assert torch.equal(whole(X), plain(X))
    # Smoothing alone changes nothing either: with 8 bits in the weight and none of its columns taken out.
    repaired = ASER(rank=3, outliers=0, activation_bits=None)("fc", W, stats)
    expected = Repair(RTN(4, "restricted"), 3)("fc", W, stats)
    torch.testing.assert_close(repaired.weight, expected.weight)


def test_outliers_are_chosen_by_inputs_and_weights_and_smoothed_to_the_least_of_them():
    W, X, stats = layer_with_outliers()
    channels, m = smoothing(W, stats.absmean, 5)
    score = stats.absmean * W.double().abs().mean(0)
    assert set(channels.tolist()) == set(score.argsort(descending=True)[:5].tolist())
    sizes = stats.absmean[channels.long()]
    assert m.min() == 1 and channels.dtype == torch.int16
    torch.testing.assert_close(sizes / m.double(), sizes.min().expand(5), rtol=1e-3, atol=0)
    # A fold moves size from weights to inputs and does not change the choice.
    fold = torch.ones(48).index_fill(0, torch.tensor([8, 15]), 64.0)
    assert torch.equal(smoothing(W / fold, stats.absmean * fold, 5)[0], channels)
    # A large weight on a small input counts as well.
    W[:, 11] = 1e4
    assert 11 in smoothing(W, stats.absmean, 1)[0]
    # The layer's own way to smooth: the largest activations of the f channels are alike afterwards.
    layer = ASER(outliers=5)("fc", layer_with_outliers()[0], stats)
    smoothed = layer._divided(X).abs().mean(0)[channels.long()]
    torch.testing.assert_close(smoothed, smoothed[:1].expand(5), rtol=2e-3, atol=0)


def test_the_residual_holds_the_outlier_columns_and_its_error_is_that_of_the_singular_values():
    W, X, stats = layer_with_outliers()
    for rank in (2, 6, 12):
        layer = ASER(rank=rank, outliers=4, activation_bits=None)("fc", W, stats)
        channels, factors = smoothing(W, stats.absmean, 4)
        assert not bool(layer.base().weight[:, channels.long()].any())
        m = torch.ones(48).double()
        m[channels.long()] = factors.double()
        H = stats.H / torch.outer(m, m)
        _, _, sigma = low_rank(W * m - layer.base().weight, rank, input_metric(H, "whitened", damp=1e-12))
        lost = output_distortion(W, layer.weight, stats.H)
        assert lost == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-2)
    outputs = X @ W.T
    assert (layer(X) - outputs).square().sum() * 2 / len(X) == pytest.approx(lost, rel=1e-2)


@pytest.mark.parametrize("bits", [8, 6])
def test_each_part_lowers_the_error_of_the_outputs(bits):
    generator = torch.Generator().manual_seed(1)
    W, X, stats = layer_with_outliers()
    W = torch.randn(W.shape, generator=generator)  # outliers that matter to the outputs
    exact = X @ W.T
    error = lambda recipe: float((recipe("fc", W, stats)(X) - exact).norm() / exact.norm())
    # W4 with rounded activations; with the repair; with smoothing as well.
    base = error(ASER(rank=0, outliers=0, activation_bits=bits))
    repaired = error(ASER(rank=8, outliers=0, activation_bits=bits))
    both = error(ASER(rank=8, outliers=2, activation_bits=bits))
    assert both < 0.8 * repaired and repaired < 0.8 * base


def test_rounded_tokens_are_whole_steps_of_their_own_scale():
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    for bits in (2, 4, 6, 8):
        steps = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        codes = round_tokens(x, bits) / steps
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert codes.abs().max() <= 2 ** (bits - 1) - 1 + 1e-4
        assert bool(((round_tokens(x, bits) - x).abs() <= steps / 2 * 1.0001).all())
    assert torch.equal(round_tokens(torch.zeros(2, 3), 4), torch.zeros(2, 3))
    assert round_tokens(x.bfloat16(), 8).dtype == torch.bfloat16


def test_bytes_and_other_bases():
    W, X, stats = layer_with_outliers()
    layer = ASER(rank=5, outliers=3)("fc", W, stats)
    assert layer.nbytes() == 24 * 48 // 2 + 2 * 24 + 2 * 5 * (24 + 48) + 3 * (2 + 2)
    shared = ASER(rank=0.3, outliers=3)("fc", W, stats)
    assert 1 <= shared.settings["rank"] < 24
    gptq = ASER(GPTQ(4, "full", group=16), rank=5, outliers=3)("fc", W, stats)
    assert gptq.nbytes() == layer.nbytes() + 2 * 24 * (48 // 16 - 1)
    assert output_distortion(W, gptq.weight, stats.H) < output_distortion(W, W * 0, stats.H) * 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_save_and_load(family, tmp_path):
    model = tiny(family)
    report = compress_model(model, ASER(rank=4, outliers=3, activation_bits=6), IDS)
    again = through_a_file(model, tiny(family, seed=1), tmp_path)
    names = compressed_names(model)
    for row in report.rows:
        layer = again.get_submodule(row.name)
        assert row.name in names and layer.nbytes() == row.nbytes
        assert layer.settings["activation_bits"] == 6 and layer.channels.dtype == torch.int16


def test_bad_input_is_refused():
    W, X, stats = layer_with_outliers()
    silent = stats_of(torch.cat((X[:, :2], torch.zeros(300, 46)), 1))
    wide = stats_of(torch.cat((X[:, :47], 1e-9 * X[:, 47:]), 1))
    for call, message in [
        (lambda: ASER(activation_bits=9), "bits must be an integer from 2 to 8"),
        (lambda: ASER(activation_bits=1), "bits must be an integer from 2 to 8"),
        (lambda: ASER(damp=-1), "damp must be a number > 0"),
        (lambda: ASER(outliers=49)("fc", W, stats), "outliers must be an integer from 0 to d_in = 48"),
        (lambda: ASER(outliers=-1)("fc", W, stats), "outliers must be an integer"),
        (lambda: ASER(outliers=2.0)("fc", W, stats), "outliers must be an integer"),
        (lambda: ASER(rank=25)("fc", W, stats), "rank must be an integer from 0 to 24"),
        (lambda: ASER(outliers=3)("fc", W, silent), "outliers must be at most 2"),
        (lambda: ASER(outliers=48)("fc", W, wide), "must not differ by more than 65504"),
        (lambda: ASER()("fc", W * torch.nan, stats), "W must be a finite matrix"),
        (lambda: ASER()("fc", W[0], stats), "W must be a finite matrix"),
        (lambda: ASER()("fc", W[:, :40], stats), "absmean must be .40."),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    model = tiny("llama")
    before = logits(model)
    with pytest.raises(ValueError, match="outliers must be"):
        compress_model(model, ASER(rank=2, outliers=33), IDS)
    assert not compressed_names(model) and torch.equal(logits(model), before)
