"""Aggressive compression: the threshold, its bounds, two passes, and what is refused."""

import math

import pytest
import torch
from quantization_runs import shallow, through_a_file

from refimpl.checks.tiny import random_ids, tiny
from refimpl.quantization import calibrate, compress_model
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.pruning.aggressive import aggressive_ptc, allocate, obs_errors
from refimpl.quantization.pruning.sparsegpt import SparseGPT

IDS = random_ids(8, 32)


def errors(seed=0, layers=5, n=4000):
    """Lognormal errors, each layer's around another centre."""
    g = torch.Generator().manual_seed(seed)
    return {f"{i}": (2 * torch.randn(n + 500 * i, generator=g) + 0.4 * i).exp() for i in range(layers)}


def uneven(family):
    model = shallow(family, num_hidden_layers=2)
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    with torch.no_grad():
        for i, block in enumerate(blocks):
            norm = block.ln_2 if family == "gpt2" else block.post_attention_layernorm
            norm.weight *= 0.5 + i
    return model


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_buckets_find_the_threshold_of_a_sort(sparsity):
    found = allocate(errors().items(), sparsity, spread=sparsity if sparsity < 0.5 else 0.99 - sparsity)
    everything = torch.cat(list(errors().values())).sort().values
    exact = float(everything[round(sparsity * len(everything))])
    assert found.threshold == pytest.approx(exact, rel=0.01)
    for name, e in errors().items():
        assert found.sparsities[name] == pytest.approx(float((e < exact).double().mean()), abs=0.003)


@pytest.mark.parametrize("spread", [0.0, 0.03, 0.15, 0.25])
def test_bounds_hold_and_the_total_is_exact(spread):
    found = allocate(errors().items(), 0.7, spread)
    sizes = {name: e.numel() for name, e in errors().items()}
    total = sum(found.sparsities[name] * n for name, n in sizes.items()) / sum(sizes.values())
    assert total == pytest.approx(0.7, abs=1e-9)
    shares = list(found.sparsities.values())
    assert 0.7 - spread - 1e-12 <= min(shares) and max(shares) <= 0.7 + spread + 1e-12
    assert shares == sorted(shares, reverse=True)  # where errors are larger, fewer weights go


def test_weights_that_cost_nothing_are_counted():
    found = allocate({"a": torch.zeros(100), "b": torch.rand(100) + 1}.items(), 0.5, 0.3)
    assert found.sparsities == pytest.approx({"a": 0.8, "b": 0.2})


def test_errors_are_those_of_the_prices_of_what_is_left():
    g = torch.Generator().manual_seed(0)
    W, X = torch.randn(4, 8, generator=g), torch.randn(50, 8, generator=g).double()
    X[:, 2] = 0
    H = X.T @ X
    found = obs_errors(W, H, damp=0.1)
    H = H + 0.1 * float(H.diagonal().sum() + 1) / 8 * torch.eye(8).double()
    H[2, 2] += 1
    for j in range(8):
        price = 1 / torch.linalg.inv(H[j:, j:])[0, 0]
        expected = torch.zeros(4).double() if j == 2 else W[:, j].double() ** 2 * price
        torch.testing.assert_close(found[:, j], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("bits", [None, 4])
def test_two_passes_are_an_allocation_and_sparsegpt(tmp_path, family, bits):
    model, plain = uneven(family), uneven(family)
    result = aggressive_ptc(model, IDS, sparsity=0.7, bits=bits)
    stats = calibrate(plain, IDS)
    found = allocate(
        [(name, obs_errors(dense_weight(plain.get_submodule(name)), s.H)) for name, s in stats.items()], 0.7
    )
    assert result.allocation == found
    shares = found.sparsities.values()
    assert min(shares) < 0.69 and max(shares) > 0.71
    assert result.sparsity == pytest.approx(0.7, abs=0.001)
    for name, share in found.sparsities.items():
        assert model.get_submodule(name).sparsity == pytest.approx(share, abs=0.001)
    # 1 bit for the mask and the values that are left, not these alone; a scale and a zero point for each row.
    each, row = (16, 0) if bits is None else (4, 20)
    shapes = [r.shape for r in result.report.rows]
    numel = sum(d_out * d_in for d_out, d_in in shapes)
    expected = 1 + 0.3 * each + row * sum(d_out for d_out, _ in shapes) / numel
    assert result.report.bits == pytest.approx(expected, abs=0.02)
    through_a_file(model, shallow(family, seed=1, num_hidden_layers=2), tmp_path, IDS)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_spread_is_sparsegpt_and_nothing_left_out_the_plain_model(family):
    a, b, c = (uneven(family) for _ in range(3))
    with torch.no_grad():
        before = c(IDS).logits
        aggressive_ptc(a, IDS, sparsity=0.7, bits=None, spread=0)
        compress_model(b, SparseGPT(0.7), IDS)
        torch.testing.assert_close(a(IDS).logits, b(IDS).logits)
        aggressive_ptc(c, IDS, sparsity=0, bits=None, spread=0)
        assert (c(IDS).logits - before).std() < 0.01 * before.std()
        assert (a(IDS).logits - before).std() > 0.1 * before.std()


def test_bad_input_is_refused_and_nothing_changes():
    model = tiny("llama")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    for call, error, message in [
        (lambda: aggressive_ptc(model, IDS, sparsity=0.9), ValueError, r"sparsity \+ spread must be"),
        (lambda: aggressive_ptc(model, IDS, sparsity=0.1), ValueError, "sparsity - spread"),
        (lambda: aggressive_ptc(model, IDS, sparsity=math.nan), ValueError, "sparsity = nan"),
        (lambda: aggressive_ptc(model, IDS, spread=-0.1), ValueError, "spread = -0.1"),
        (lambda: aggressive_ptc(model, IDS, bits=1), ValueError, "bits must be"),
        (lambda: aggressive_ptc(model, IDS, group=7), ValueError, "group must divide"),
        (lambda: aggressive_ptc(model, IDS, damp=-1), ValueError, "damp must be"),
        (lambda: aggressive_ptc(model, IDS, batch=0), ValueError, "batch must be"),
        (lambda: aggressive_ptc(model, IDS[:0]), ValueError, "ids"),
        (lambda: aggressive_ptc(torch.nn.Linear(2, 2), IDS), TypeError, "Linear is not"),
        (lambda: allocate([], 0.5), ValueError, "at least one layer"),
        (lambda: allocate([("a", -torch.ones(3))], 0.5), ValueError, "errors of a must be finite numbers"),
        (lambda: allocate([("a", torch.ones(0))], 0.5), ValueError, "errors of a must be finite numbers"),
        (lambda: allocate([("a", torch.tensor([math.nan]))], 0.5), ValueError, "errors of a"),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    aggressive_ptc(model, IDS)
    with pytest.raises(TypeError, match="got SparseLinear"):
        aggressive_ptc(model, IDS)
