"""The codebook is what the paper says, and the search is exact. test_quip.py has the codes of the authors."""

import pytest
import torch

from refimpl.quantization.e8p import CODEBOOKS, Codebook, decode, e8_ball, nearest, patterns

POINTS = decode(torch.arange(65536))


def gaussian(n, seed=0, dtype=torch.float64):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_table_has_227_and_29_rows():
    norms = patterns().square().sum(1)
    assert int((norms <= 10).sum()) == 227 and int((norms == 12).sum()) == 29
    assert len(patterns().unique(dim=0)) == 256
    assert bool((patterns() % 1 == 0.5).all()) and bool((patterns() > 0).all())


def test_all_points_differ_and_are_in_a_shift_of_e8():
    assert len(POINTS.unique(dim=0)) == 65536
    down = POINTS[:, 0] % 1 == 0.25  # 1/2 - 1/4 modulo 1
    half = POINTS - torch.where(down, -0.25, 0.25)[:, None]
    assert bool((half % 1 == 0.5).all()) and bool((half.sum(1) % 2 == 0).all())
    assert int(down.sum()) == 32768
    assert torch.equal(POINTS.sort(0).values, (-POINTS).sort(0).values)  # with x also -x


def test_codes_are_their_own_nearest():
    codes = torch.arange(0, 65536, 17)
    assert torch.equal(nearest(POINTS[codes]), codes)


@pytest.mark.parametrize("spread", (0.5, 1.03, 3.0))
def test_the_search_equals_brute_force(spread):
    x = gaussian(180) * spread
    points = POINTS.double()
    expected = (x @ points.T - points.square().sum(1) / 2).argmax(1)
    assert torch.equal(nearest(x), expected)
    assert torch.equal(nearest(x.view(2, 3, 30, 8)), expected.view(2, 3, 30))


def test_gaussian_numbers_lose_what_they_should():
    """Mean squared error at unit variance: above the bound 4^-b of any code, below scalar grids."""
    x = gaussian(10000, dtype=torch.float32)
    error = {}
    for bits, book in CODEBOOKS.items():
        values, codes = book.encode(x * book.scale)
        error[bits] = float((values / book.scale - x).square().mean())
        assert codes.dtype is torch.uint8 and codes.shape == (10000, bits)
        assert torch.equal(book.decode(codes), values)
        assert error[bits] > 4.0**-bits
    assert abs(error[2] - 0.0911) < 0.0015  # uniform grid of 4 values: 0.1188; 4 values of Lloyd: 0.1175
    assert error[3] < 0.032 and error[4] < 0.0105  # Lloyd: 0.0345; 0.0095, which 4 bits do not reach
    worse = [(CODEBOOKS[2].encode(x[:4000] * s)[0] / s - x[:4000]).square().mean() for s in (0.9, 1.2)]
    assert min(worse) > error[2]


def test_the_small_ball():
    ball = e8_ball()
    assert ball.shape == (256, 8) and len(ball.unique(dim=0)) == 256
    whole = (ball % 1 == 0).all(1)
    assert bool((whole | (ball % 1 == 0.5).all(1)).all()) and bool((ball.sum(1) % 2 == 0).all())
    assert int(whole.sum()) == 1 + 112 + 15


def test_bad_input_is_refused():
    for x in (torch.ones(3, 4), torch.ones(8, dtype=torch.long), torch.full((8,), float("nan"))):
        with pytest.raises(ValueError, match="x must be finite"):
            nearest(x)
    for codes in (torch.tensor([-1]), torch.tensor([65536]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="codes must be integers from 0 to 65535"):
            decode(codes)
    for codes in (torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"codes must be uint8 \[..., 2\]"):
            CODEBOOKS[2].decode(codes)
    assert Codebook(2, 1.0).decode(torch.zeros(0, 2, dtype=torch.uint8)).shape == (0, 8)
