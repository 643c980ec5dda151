"""The hard concrete distribution: its masses at 0 and 1, its gradient, its gate at test."""

import math

import pytest
import torch

from refimpl.gates import HardConcrete

LOCATIONS = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("gate", [HardConcrete(), HardConcrete(2 / 3), HardConcrete(0.5, -0.3, 1.2)])
def test_the_masses_at_0_and_1_are_those_of_the_formulas(gate):
    n = 40_000
    drawn = gate.sample(LOCATIONS.expand(n, -1), generator())
    assert 0 <= float(drawn.min()) and float(drawn.max()) <= 1
    error = 4 * 0.5 / math.sqrt(n)  # four standard errors, at most
    torch.testing.assert_close((drawn > 0).float().mean(0), gate.p_open(LOCATIONS), rtol=0, atol=error)
    at_one = torch.sigmoid(LOCATIONS - gate.temperature * math.log((1 - gate.low) / (gate.high - 1)))
    torch.testing.assert_close((drawn == 1).float().mean(0), at_one, rtol=0, atol=error)


def test_p_open_at_the_published_settings():
    assert HardConcrete().p_open(LOCATIONS).tolist() == pytest.approx(
        [0.099, 0.448, 0.688, 0.857, 0.978], abs=1e-3
    )


def test_the_interior_is_a_stretched_logistic_at_any_quantile():
    gate = HardConcrete(0.7)
    drawn = gate.sample(torch.full((40_000,), 0.4), generator())
    for u in (0.3, 0.5, 0.7):
        at = torch.sigmoid((torch.tensor(u).logit() + 0.4) / 0.7) * 1.2 - 0.1
        assert float((drawn <= at).float().mean()) == pytest.approx(u, abs=0.01)


def test_a_low_temperature_makes_gates_of_0_and_1():
    zeros = torch.zeros(20_000)
    binary = [
        float(((g == 0) | (g == 1)).float().mean())
        for g in (HardConcrete(t).sample(zeros, generator()) for t in (0.05, 0.33, 2.0))
    ]
    assert binary[0] > 0.93 and binary[0] > binary[1] > binary[2]


def test_a_gate_strictly_between_has_a_gradient_a_clipped_one_has_none():
    log_a = torch.zeros(1000, requires_grad=True)
    drawn = HardConcrete().sample(log_a, generator())
    drawn.sum().backward()
    inside = (drawn > 0) & (drawn < 1)
    assert bool((log_a.grad[inside] > 0).all()) and not log_a.grad[~inside].any()
    assert 0 < int(inside.sum()) < 1000


def test_the_penalty_has_a_gradient_everywhere():
    log_a = torch.linspace(-5, 5, 11, requires_grad=True)
    HardConcrete().p_open(log_a).sum().backward()
    assert bool((log_a.grad > 0).all())


def test_the_gate_at_test_has_no_noise_and_no_temperature():
    log_a = torch.tensor([-20.0, -2.4, -2.3, 0.0, 2.3, 2.4, 20.0])
    gates = HardConcrete().at_test(log_a)
    torch.testing.assert_close(gates, (torch.sigmoid(log_a) * 1.2 - 0.1).clamp(0, 1))
    assert (gates[:2] == 0).all() and (gates[-2:] == 1).all() and gates[3] == 0.5
    assert torch.equal(gates, HardConcrete(0.9).at_test(log_a))


def test_draws_follow_the_generator_and_keep_shape_and_type():
    gate, log_a = HardConcrete(), torch.zeros(3, 4, dtype=torch.float64)
    first = gate.sample(log_a, generator())
    assert torch.equal(first, gate.sample(log_a, generator())) and first.shape == (3, 4)
    assert first.dtype == torch.float64 and not torch.equal(
        first, gate.sample(log_a, generator().manual_seed(1))
    )
    extreme = HardConcrete(eps=1e-9).sample(torch.zeros(100_000), generator())  # 1 - eps is 1 in float32
    assert bool(extreme.isfinite().all())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"low": 0.0}, "low must be < 0"),
        ({"high": 1.0}, "high > 1"),
        ({"eps": 0.5}, "eps"),
    ],
)
def test_parameters_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        HardConcrete(**settings)


def test_bad_locations_are_refused():
    gate = HardConcrete()
    for call in (gate.p_open, gate.at_test, lambda x: gate.sample(x, generator())):
        with pytest.raises(TypeError, match="log_a"):
            call(torch.zeros(2, dtype=torch.long))
        with pytest.raises(ValueError, match="log_a"):
            call(torch.tensor([0.0, math.nan]))
        with pytest.raises(ValueError, match="log_a"):
            call(torch.zeros(0))
