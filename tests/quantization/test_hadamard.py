"""The fast transforms are orthogonal, incoherent, and undone exactly."""

import pytest
import torch

from refimpl.quantization.hadamard import (
    RandomHadamard,
    RandomKronecker,
    hadamard_factors,
    incoherence,
    kronecker,
    rescaling,
    rotate,
)

SIZES = (1, 2, 8, 12, 20, 24, 32, 40, 44, 60, 64, 96, 7, 36, 100, 9)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", SIZES)
def test_every_size_has_an_orthogonal_transform(n):
    M = kronecker(torch.eye(n, dtype=torch.float64), hadamard_factors(n)).T
    torch.testing.assert_close(M @ M.T, torch.eye(n).double())
    dense = torch.ones(1, 1, dtype=torch.float64)
    for factor in hadamard_factors(n):
        dense = torch.kron(dense, factor)
    torch.testing.assert_close(M, dense)
    # A Hadamard matrix where there is one, else sqrt(2) above its magnitudes.
    if n in (7, 36, 100, 9):
        assert float(M.abs().max()) <= (2 / n) ** 0.5 + 1e-9
    else:
        torch.testing.assert_close(M.abs() * n**0.5, torch.ones(n, n).double())


def test_the_sizes_of_our_models_are_hadamard():
    for n in (64, 128, 256, 384, 768, 1024):
        for factor in hadamard_factors(n):
            torch.testing.assert_close(factor.abs() * len(factor) ** 0.5, torch.ones_like(factor))
            assert len(factor) <= 16


@pytest.mark.parametrize("n", (1, 5, 16, 24, 40, 63))
@pytest.mark.parametrize("kind", ("hadamard", "kronecker"))
def test_random_transforms_keep_products_and_are_undone(n, kind):
    draw = RandomHadamard.draw if kind == "hadamard" else RandomKronecker
    transform, other = draw(n, generator()), draw(n, generator(1))
    x = torch.randn(3, 4, n, generator=generator(2), dtype=torch.float64)
    torch.testing.assert_close(transform.inverse(transform(x)), x)
    torch.testing.assert_close(transform(transform.inverse(x)), x)
    torch.testing.assert_close(transform(x) @ transform(x).mT, x @ x.mT)
    assert torch.equal(draw(n, generator())(x), transform(x))
    if n > 5:
        assert not torch.allclose(other(x), transform(x))
    assert transform(x.float()).dtype is torch.float32 and transform(x).shape == x.shape


def test_haar_factors_are_dense():
    transform = RandomKronecker(256, generator())
    assert [len(f) for f in transform.factors] == [16, 16]
    for factor in transform.factors:
        assert 0.3 < float(factor.abs().max()) < 0.95


def test_rotation_keeps_the_loss():
    W, dW = torch.randn(2, 12, 24, generator=generator(), dtype=torch.float64)
    X = torch.randn(50, 24, generator=generator(1), dtype=torch.float64)
    left, right = RandomHadamard.draw(12, generator()), RandomKronecker(24, generator())
    W2, H2 = rotate(W + dW, X.T @ X, left, right)
    W1, _ = rotate(W, X.T @ X, left, right)
    torch.testing.assert_close(((W2 - W1) @ H2 * (W2 - W1)).sum(), (dW @ X.T).square().sum())
    torch.testing.assert_close(left.inverse((right.inverse(W1)).T).T, W)


def test_a_spike_is_spread():
    W = torch.randn(64, 96, generator=generator())
    W[5, 7], W[:, 3] = 60, W[:, 3] * 20
    before = incoherence(W)
    for draw in (RandomHadamard.draw, RandomKronecker):
        rotated, _ = rotate(W, torch.eye(96), draw(64, generator()), draw(96, generator()))
        assert incoherence(rotated) < 0.5 * before
        torch.testing.assert_close(rotated.norm(), W.double().norm())


def test_rescaling_balances_columns_and_survives_zeros():
    W, H = torch.randn(8, 16, generator=generator()), torch.eye(16).double() * 4
    W[:, 2] *= 16
    s = rescaling(W, H)
    assert s.dtype is torch.float16 and s.argmin() == 2
    ratio = (W * s.float()).square().sum(0) / (H.diagonal().float() / s.float().square())
    torch.testing.assert_close(ratio, ratio.mean().expand(16), rtol=0.01, atol=0)
    W[:, 4], H[5, 5] = 0, 0
    assert bool((rescaling(W, H) > 0).all()) and bool(rescaling(torch.zeros(8, 16), 0 * H).eq(1).all())


def test_bad_input_is_refused():
    for n in (0, -4, 2.0):
        with pytest.raises(ValueError, match="n must be an integer >= 1"):
            hadamard_factors(n)
        with pytest.raises(ValueError, match="n must be an integer >= 1"):
            RandomKronecker(n, generator())
    for signs in (torch.zeros(4), torch.ones(2, 2), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="signs must be"):
            RandomHadamard(signs)
    with pytest.raises(ValueError, match="x must have 8 numbers"):
        kronecker(torch.ones(3, 4), hadamard_factors(8))
    for W in (torch.zeros(2, 2), torch.ones(4), torch.full((2, 2), float("nan"))):
        with pytest.raises(ValueError, match="finite matrix that is not all zero"):
            incoherence(W)
