"""Eq. 11: the identity behind it, its completion for GQA, and what it refuses."""

import numpy as np
import pytest
import torch

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache import KVCache
from refimpl.kvcache.h2o import H2O
from refimpl.kvcache.importance import drop_error, token_importance, value_norm


def drawn(*shape, seed=0, scale=2.0):
    draw = torch.Generator().manual_seed(seed)
    B, G, R, T, S, D = shape
    weights = (scale * torch.randn(B, G, R, T, S, generator=draw, dtype=torch.float64)).softmax(-1)
    return weights, torch.randn(B, G, S, D, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("p", [1, 2])
def test_the_formula_typed_again_in_numpy(p):
    weights, v = drawn(2, 3, 2, 4, 7, 5)
    a, values = weights.numpy(), v.numpy()
    expected = np.zeros((2, 3, 7))
    for b, g, i in np.ndindex(2, 3, 7):
        norm = (np.abs(values[b, g, i]) ** p).sum() ** (1 / p)
        expected[b, g, i] = sum(a[b, g, r, t, i] * norm for r in range(2) for t in range(4))
    np.testing.assert_allclose(token_importance(weights, v, p).numpy(), expected, rtol=1e-12)
    survey = token_importance(weights, v, p).sum(1)  # over all heads, as it is printed
    np.testing.assert_allclose(survey.numpy(), expected.sum(1), rtol=1e-12)


def test_dropping_a_token_moves_the_output_by_its_importance():
    """Before the weights are normalised anew exactly by Eq. 11, after that exactly by drop_error."""
    weights, v = drawn(1, 1, 1, 1, 9, 6)
    o = (weights @ v[:, :, None])[0, 0, 0, 0]
    for i in range(9):
        rest = weights[0, 0, 0, 0].clone()
        rest[i] = 0
        before, after = rest @ v[0, 0], (rest / rest.sum()) @ v[0, 0]
        assert (before - o).norm().item() == pytest.approx(
            token_importance(weights, v)[0, 0, i].item(), abs=1e-12
        )
        assert (after - o).norm().item() == pytest.approx(
            drop_error(weights, v)[0, 0, 0, 0, i].item(), abs=1e-7
        )


def test_the_exact_score_is_the_upper_baseline():
    """Dropping what drop_error ranks last costs least; Eq. 11 comes close, a random token does not."""
    weights, v = drawn(400, 1, 1, 1, 16, 8, scale=1.0)
    moved = drop_error(weights, v)[:, 0, 0, 0]
    cost = {
        "exact": moved.amin(-1),
        "I": moved.gather(-1, token_importance(weights, v)[:, 0].argmin(-1, keepdim=True)),
        "mass": moved.gather(-1, weights[:, 0, 0, 0].argmin(-1, keepdim=True)),
        "random": moved.mean(-1),
    }
    exact, I, mass, chance = (float(c.mean()) for c in cost.values())
    assert exact <= I < mass < chance


def test_a_token_with_all_the_weight_cannot_be_dropped():
    weights = torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 2)
    moved = drop_error(weights, torch.ones(1, 1, 2, 3))
    assert moved.flatten().tolist() == [torch.inf, 0.0]


def test_scaling_the_values_leaves_the_ranking():
    weights, v = drawn(2, 2, 2, 3, 11, 4)
    for p in (1, 2):
        a, b = token_importance(weights, v, p), token_importance(weights, 7 * v, p)
        assert torch.equal(a.argsort(-1), b.argsort(-1))
    plain = weights.sum((2, 3))
    assert not torch.equal(plain.argsort(-1), token_importance(weights, v).argsort(-1))


def test_half_precision_is_summed_in_float32():
    weights, v = drawn(1, 2, 2, 300, 8, 4)
    got = token_importance(weights.to(torch.bfloat16), v.to(torch.bfloat16))
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), token_importance(weights, v), rtol=0.02)


def test_it_is_the_score_of_the_shells():
    model = tiny("llama", max_position_embeddings=128)
    scores = []

    class Recorded(H2O):
        def observe(self, v):
            super().observe(v)
            scores.append((self.score(v), token_importance(v.attn, v.v, 1), v.layer))

    cache = KVCache(model, Recorded(20, 20, p=1))
    with torch.no_grad():
        model(random_ids(2, 30), past_key_values=cache)
    for score, expected, _ in scores:
        assert torch.allclose(score, expected, atol=1e-5)


def test_nan_stays_visible():
    weights, v = drawn(1, 1, 1, 1, 3, 2)
    weights[..., 1] = torch.nan
    assert token_importance(weights, v).isnan().tolist() == [[[False, True, False]]]


@pytest.mark.parametrize("change", [
    lambda w, v: (w[0], v), lambda w, v: (w, v[0]), lambda w, v: (w, v[:, :, :-1]),
    lambda w, v: (w.long(), v), lambda w, v: (w[..., :0], v[:, :, :0]), lambda w, v: (w, v.numpy()),
    lambda w, v: (w, v[..., :0]),
])  # fmt: skip
def test_shapes_that_do_not_fit(change):
    weights, v = change(*drawn(2, 1, 1, 2, 4, 3))
    for function in (token_importance, drop_error):
        with pytest.raises(ValueError, match="allowed"):
            function(weights, v)


@pytest.mark.parametrize("p", [0, 3, True, None, "2", float("inf")])
def test_other_norms(p):
    weights, v = drawn(1, 1, 1, 1, 4, 3)
    with pytest.raises(ValueError, match="p: .*allowed: 1 .VATP., 2"):
        token_importance(weights, v, p)
    with pytest.raises(ValueError, match="p: "):
        value_norm(v, p)
