"""Low-rank repair: Eckart and Young's identity in every metric, what is stored, and layers inside layers."""

import json

import pytest
import torch
from quantization_runs import IDS, logits, shallow, through_a_file

from refimpl.checks.tiny import tiny
from refimpl.quantization import (
    GPTQ,
    RTN,
    compress_model,
    compressed_names,
    output_distortion,
    stats_of,
)
from refimpl.quantization.repair import (
    METRICS,
    Repair,
    RepairedLinear,
    input_metric,
    low_rank,
    rank_for_share,
)


def correlated(d_out=20, d_in=32, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_out, d_in, generator=generator)
    X = torch.randn(tokens, d_in, generator=generator) @ torch.randn(d_in, d_in, generator=generator)
    return W, X * torch.linspace(0.2, 3, d_in), generator


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rank", [0, 1, 7, 20])
def test_the_error_is_exactly_the_singular_values_that_are_left(metric, rank):
    E, X, _ = correlated()
    S = input_metric(stats_of(X).H, metric, damp=1e-12)
    L, R, sigma = low_rank(E, rank, S)
    assert L.shape == (20, rank) and R.shape == (rank, 32) and len(sigma) == 20
    left = E.double() - L @ R
    weighted = left if S is None else left * S if S.ndim == 1 else left @ S
    torch.testing.assert_close(weighted.norm(), sigma[rank:].square().sum().sqrt(), rtol=1e-8, atol=1e-8)
    if metric == "whitened":  # in units of the outputs themselves: 2/N ||(E - L R) X||^2
        outputs = 2 / len(X) * (left @ X.double().T).square().sum()
        torch.testing.assert_close(outputs, sigma[rank:].square().sum(), rtol=1e-6, atol=1e-6)


def test_it_is_the_papers_product_with_the_inverse():
    E, X, _ = correlated()
    S = input_metric(stats_of(X).H, "whitened")
    U, sigma, Vt = torch.linalg.svd(E.double() @ S, full_matrices=False)
    product = (U[:, :5] * sigma[:5]) @ Vt[:5] @ torch.linalg.inv(S)
    L, R, _ = low_rank(E, 5, S)
    torch.testing.assert_close(L @ R, product, rtol=1e-7, atol=1e-7)


def test_each_metric_is_best_in_its_own_norm_and_whitened_in_the_outputs():
    W, X, generator = correlated()
    H = stats_of(X).H
    E = W - RTN(3)("fc", W).weight
    metrics = {name: input_metric(H, name, damp=1e-12) for name in METRICS}
    lost = {name: output_distortion(E, torch.zeros_like(E), H) for name in ["none"]}
    found = {name: low_rank(E, 4, S)[:2] for name, S in metrics.items()}
    lost |= {name: output_distortion(E, L @ R, H) for name, (L, R) in found.items()}
    assert lost["none"] > lost["plain"] > lost["whitened"] and lost["diagonal"] > lost["whitened"]
    for own, S in metrics.items():
        norm = lambda D, S=S: float((D if S is None else D * S if S.ndim == 1 else D @ S).norm())
        errors = {name: norm(E.double() - L @ R) for name, (L, R) in found.items()}
        assert min(errors, key=errors.get) == own
        L, R = found[own]  # and no neighbour of it is better
        for _ in range(5):
            move = torch.randn(L.shape, generator=generator, dtype=torch.float64) * 0.01
            assert norm(E.double() - (L + move) @ R) > errors[own]


def test_with_fewer_tokens_than_inputs_damping_keeps_it_defined():
    W, X, _ = correlated(tokens=5)
    stats = stats_of(X)
    L, R, _ = low_rank(W, 5, input_metric(stats.H, "whitened"))
    assert bool(R.isfinite().all()) and output_distortion(W, L @ R, stats.H) < 1e-4 * float(stats.H.trace())


def test_a_share_of_the_singular_values_gives_the_rank():
    sigma = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [rank_for_share(sigma, a) for a in (0.1, 0.4, 0.41, 0.7, 0.71, 0.95)] == [1, 1, 2, 2, 3, 4]
    E, X, _ = correlated()
    S = input_metric(stats_of(X).H, "whitened")
    L, _, sigma = low_rank(E, 0.8, S)
    r = L.shape[1]
    assert sigma[:r].sum() >= 0.8 * sigma.sum() > sigma[: r - 1].sum()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rank_zero_is_the_base_and_full_rank_the_plain_model(family):
    model = shallow(family)
    before = logits(model)
    base, zero = shallow(family), shallow(family)
    compress_model(base, RTN(2, group=8), IDS)
    report = compress_model(zero, Repair(RTN(2, group=8), 0), IDS)
    torch.testing.assert_close(logits(zero), logits(base))
    assert report.bits == 16 / 8 + 2 + 2 / 8
    sizes = []
    for rank in (0, 2, 8, 32):
        model = shallow(family)
        compress_model(model, Repair(RTN(2, group=8), rank), IDS) if rank < 32 else compress_model(
            model, lambda n, W, s: Repair(RTN(2, group=8), min(W.shape))(n, W, s), IDS
        )
        sizes.append(float((logits(model) - before).norm() / before.norm()))
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 5e-3 < 0.05 < sizes[0]


def test_the_adapter_is_counted_and_the_forward_pass_is_the_weight():
    W, X, generator = correlated()
    stats, bias = stats_of(X), torch.randn(20, generator=generator)
    for base in (RTN(3, group=16), GPTQ(3, "full")):
        plain, layer = base("fc", W, stats), Repair(base, 4)("fc", W, stats)
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
        assert layer.nbytes() == plain.nbytes() + 2 * 4 * (20 + 32) + 4 * 20
        expected = torch.nn.functional.linear(X, layer.weight, bias)
        torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer.base().weight, plain.weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_factors_in_few_bits(bits):
    W, X, _ = correlated()
    base = RTN(3)("fc", W)
    L, R, _ = low_rank(W - base.weight, 8)
    whole = RepairedLinear.repair(base, L, R)
    layer = RepairedLinear.repair(base, L, R, bits=bits, tile=4)
    n = 8 * (20 + 32)
    assert layer.nbytes() == base.nbytes() + n * bits // 8 + n // 4 * 2
    for factor, exact in zip(layer.factors(), whole.factors(), strict=True):
        assert float((factor - exact).norm() / exact.norm()) < 2.0**-bits
    torch.testing.assert_close(layer(X), X @ layer.weight.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_inside_layers_survive_a_file(family, tmp_path):
    nested = Repair(Repair(GPTQ(3, group=8), 3, "diagonal"), 2)
    model = shallow(family)
    compress_model(model, nested, IDS)
    names = compressed_names(model)
    assert len(names) == (4 if family == "gpt2" else 7)  # the inner layers are no modules of the model
    json.dumps(model.get_submodule(names[0]).settings)
    again = through_a_file(model, shallow(family, seed=1), tmp_path)
    for name in names:
        old, new = model.get_submodule(name), again.get_submodule(name)
        assert old.settings == new.settings and old.nbytes() == new.nbytes()
        assert torch.equal(old.weight, new.weight)
        assert type(new.base()) is RepairedLinear and new.base().settings["rank"] == 3


def test_a_cast_changes_nothing_and_bfloat16_models_work():
    model = tiny("llama")
    compress_model(model, Repair(RTN(3, group=8), 4), IDS)
    name = compressed_names(model)[0]
    before = model.get_submodule(name).weight
    model.bfloat16()
    assert torch.equal(model.get_submodule(name).weight, before)
    assert logits(model).dtype == torch.bfloat16


def test_bad_input_is_refused():
    W, X, _ = correlated()
    stats, base = stats_of(X), RTN(3)("fc", W)
    H, L, R = stats.H, torch.zeros(20, 2), torch.zeros(2, 32)
    for call, message in [
        (lambda: Repair(RTN(3), 4, "mahalanobis"), "metric must be one of plain, diagonal, whitened"),
        (lambda: Repair(RTN(3), 4, damp=0), "damp must be a number > 0"),
        (lambda: Repair(RTN(3), 21)("fc", W, stats), "rank must be an integer from 0 to 20"),
        (lambda: low_rank(W, -1), "rank must be"),
        (lambda: low_rank(W, True), "rank must be"),
        (lambda: low_rank(W, 1.5), "rank must be"),
        (lambda: low_rank(W[0], 1), "E must be a finite matrix"),
        (lambda: low_rank(W.int(), 1), "E must be a finite matrix"),
        (lambda: low_rank(W * torch.nan, 1), "E must be a finite matrix"),
        (lambda: low_rank(W[:0], 0), "E must be a finite matrix"),
        (lambda: low_rank(W, 1, torch.ones(20)), "S must be None, .32. or .32, 32."),
        (lambda: input_metric(H[:3], "plain"), "H must be finite"),
        (lambda: input_metric(H * torch.inf, "plain"), "H must be finite"),
        (lambda: input_metric(-H, "whitened"), "not positive definite"),
        (lambda: rank_for_share(H.diagonal(), 1), "share must lie between 0 and 1"),
        (lambda: RepairedLinear.repair(base, L[:3], R), "L and R must be .20, r. and .r, 32."),
        (lambda: RepairedLinear.repair(base, L, R + 1e6), "R must be finite and fit float16"),
        (lambda: RepairedLinear.repair(base, L, R, bits=9), "bits must be an integer from 2 to 8"),
        (lambda: RepairedLinear.repair(base, L, R, bits=8, tile=3), "group must divide"),
        (lambda: RepairedLinear((2, 2), {}, base="os:path"), "base must name a CompressedLinear"),
        (lambda: RepairedLinear((2, 2), {}), "base must name a CompressedLinear"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    model = tiny("llama")
    with pytest.raises(ValueError, match="rank must be an integer from 0 to 16"):
        compress_model(model, Repair(RTN(3), 17), IDS)
    assert not compressed_names(model)
