"""Eq. 6, Eq. 7 and Algorithm 2 typed again, the printed form failing, and the properties of grids."""

import itertools

import numpy as np
import pytest
import torch

from refimpl.quantization.grids import SCHEMES, Grid, Quantized, dequantize
from refimpl.quantization.symmetric import algorithm_2, distortion, output_distortion, symmetric_codes

EVERY = list(itertools.product((2, 3, 4, 8), SCHEMES, ("tensor", "row", 16)))


def normal(*shape, seed=0, **kw):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **kw)


# --- the survey's formulas ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equation_6_and_algorithm_2_in_numpy(bits):
    W = normal(20, 30)
    w = W.numpy()
    s = np.abs(w).max() / np.float32(2 ** (bits - 1) - 1)
    codes, scale = algorithm_2(W, bits)
    assert scale.item() == s
    printed = s * np.clip(np.round(w / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)  # Eq. 6, "W_q"
    assert np.array_equal((scale * codes).numpy(), printed.astype(np.float32))
    # A smaller scale, with which the clip acts on both sides.
    clipped = np.clip(np.round(w / (s / 2)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert np.array_equal(symmetric_codes(W, float(s / 2), bits).numpy(), clipped)
    assert codes.dtype is torch.int8 and clipped.min() == -(2 ** (bits - 1))


def test_equation_7_in_numpy():
    W = normal(5, 7)
    codes, scale = algorithm_2(W, 3)
    expected = np.linalg.norm(W.double().numpy() - (scale * codes).double().numpy()) ** 2
    assert distortion(W, scale * codes) == pytest.approx(expected, rel=1e-12)


def test_output_distortion_is_what_the_outputs_lose():
    W, X = normal(5, 7, dtype=torch.float64), normal(40, 7, seed=1, dtype=torch.float64)
    W_hat = dequantize(Grid(2).quantize(W)).double()
    lost = 2 / 40 * (X @ (W - W_hat).T).square().sum()
    assert output_distortion(W, W_hat, 2 / 40 * X.T @ X) == pytest.approx(float(lost), rel=1e-12)


def test_the_printed_form_fails_where_ours_does_not():
    def printed(W, b):
        s = np.abs(W).max() / (2 ** (b - 1) - 1)
        W_q = np.clip(np.round(W / s), -(2 ** (b - 1)), 2 ** (b - 1) - 1)
        return s * W_q

    W = normal(64, 512).numpy()
    # 1. Its output is as large as its input: floats.
    assert printed(W, 4).nbytes == W.nbytes and algorithm_2(torch.from_numpy(W), 4)[0].nbytes == W.nbytes // 4
    # 2. One code is never used, and the clip never acts: three codes of four at two bits.
    codes = np.round(W / (np.abs(W).max() / 1))
    assert set(np.unique(codes)) == {-1, 0, 1}
    assert len(Grid(2, "full").quantize(torch.from_numpy(W)).codes.unique()) == 4
    # 3. One bit divides by zero; zeros give NaN.
    with np.errstate(divide="ignore", invalid="ignore"):
        assert np.isnan(printed(W, 1)).any() and np.isnan(printed(np.zeros((2, 2)), 4)).all()
        # 4. The bound as printed, "2^(b-1) 1", read as a product, clips nothing at the top.
        assert np.clip(9.0, -8, 2 ** (4 - 1) * 1) == 8 != 2 ** (4 - 1) - 1
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
        algorithm_2(torch.from_numpy(W), 1)
    codes, scale = algorithm_2(torch.zeros(2, 2), 4)
    assert torch.equal(scale * codes, torch.zeros(2, 2))


def test_two_bits_per_tensor_leave_almost_only_zeros():
    W = normal(64, 512)
    codes, scale = algorithm_2(W, 2)
    assert (codes == 0).float().mean() > 0.95
    assert distortion(W, scale * codes) / W.numel() > 0.8
    assert distortion(W, dequantize(Grid(2, "full", clip_norm=2).quantize(W))) / W.numel() < 0.2


def test_the_restricted_grid_is_algorithm_2():
    W = normal(6, 32)
    for bits, per in itertools.product((2, 3, 4, 8), ("tensor", "row")):
        codes, scale = algorithm_2(W, bits, per)
        q = Grid(bits, "restricted", per, scale_dtype=torch.float32).quantize(W)
        assert torch.equal(q.codes.int() - 2 ** (bits - 1), codes.int()) and torch.equal(q.scale, scale)


# --- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "scheme", "group"), EVERY)
def test_no_weight_moves_more_than_half_a_step_unless_it_is_clipped(bits, scheme, group):
    W = normal(12, 64) + 0.3
    grid = Grid(bits, scheme, group)
    q = grid.quantize(W)
    step = q.scale.float().flatten().repeat_interleave(W.numel() // q.scale.numel())
    moved = (dequantize(q) - W).abs().flatten()
    inside = (q.codes > (scheme == "restricted")).flatten() & (q.codes < 2**bits - 1).flatten()
    assert bool((moved <= step / 2 * (1 + 1e-5) + 1e-7)[inside].all())
    ends = 1.001 if scheme in ("full", "asymmetric") else 0.501 + 2**-9 * 2**bits
    assert bool((moved <= step * ends).all())  # what is clipped: half a step more, or the scale's rounding


@pytest.mark.parametrize(("bits", "scheme", "group"), EVERY)
def test_quantizing_twice_is_quantizing_once(bits, scheme, group):
    grid = Grid(bits, scheme, group)
    W = normal(12, 64)
    q = grid.quantize(W)
    assert torch.equal(grid.encode(dequantize(q), q.scale, q.zero), q.codes)
    assert len(q.codes.unique()) <= 2**bits and int(q.codes.max()) < 2**bits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_bits_and_finer_groups_lose_less_on_average(scheme):
    W = normal(64, 256)
    error = lambda *grid: distortion(W, dequantize(Grid(*grid).quantize(W)))
    by_bits = [error(bits, scheme, "row") for bits in (2, 3, 4, 5, 6, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_group = [error(4, scheme, group) for group in ("tensor", "row", 64, 32, 16)]
    assert by_group == sorted(by_group, reverse=True)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("p", [2.0, 2.4])
def test_the_clip_search_never_loses_and_gains_at_two_bits(scheme, p):
    W = normal(32, 64)
    restored = lambda norm: dequantize(Grid(2, scheme, 16, norm).quantize(W))
    moved = lambda norm: (restored(norm) - W).abs().pow(p).view(32, 4, 16).sum(-1)
    plain, searched = moved(None), moved(p)
    assert bool((searched <= plain * (1 + 1e-6)).all()) and searched.sum() < 0.95 * plain.sum()


def test_asymmetric_grids_keep_zero_and_skewed_groups():
    W = normal(8, 64).abs() + 1
    W[0, 3] = W[5, 60] = 0
    for bits in (2, 4):
        q = Grid(bits, "asymmetric", 16).quantize(W)
        assert dequantize(q)[W == 0].tolist() == [0.0, 0.0]
        symmetric = dequantize(Grid(bits, "full", 16).quantize(W))
        assert distortion(W, dequantize(q)) < 0.5 * distortion(W, symmetric)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_and_numbers_below_the_smallest_scale_give_zeros(scheme):
    W = torch.zeros(3, 8)
    W[1] = 1e-12
    assert torch.equal(dequantize(Grid(4, scheme, 4).quantize(W)), torch.zeros(3, 8))


def test_the_dequantized_matrix_is_exact_in_float32():
    q = Grid(8, "asymmetric", 16).quantize(normal(16, 64))
    exact = dequantize(Quantized(q.codes, q.scale.double(), q.zero))
    assert exact.dtype is torch.float64 and torch.equal(dequantize(q).double(), exact)


def test_a_product_of_integers_with_the_zero_point_taken_out_afterwards():
    W, X = normal(6, 32), normal(5, 32, seed=1)
    q, a = Grid(8, "asymmetric", "row").quantize(W), Grid(8, "full", "row").quantize(X)
    w, x = q.codes.int(), a.codes.int() - 128
    product = x @ w.T - x.sum(1, keepdim=True, dtype=torch.int32) * q.zero.int().T  # all in int32
    assert product.dtype is torch.int32
    scaled = product * a.scale.float() * q.scale.float().T
    torch.testing.assert_close(scaled, dequantize(a) @ dequantize(q).T, atol=1e-4, rtol=1e-5)


def test_half_precision_weights_count_in_float32():
    W = normal(8, 32)
    for dtype in (torch.bfloat16, torch.float16):
        q = Grid(4, group=16).quantize(W.to(dtype))
        assert torch.equal(q.codes, Grid(4, group=16).quantize(W.to(dtype).float()).codes)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group", ["tensor", "row", 16])
def test_bits_per_weight_count_what_is_there(scheme, group):
    W = normal(12, 64)
    grid = Grid(3, scheme, group)
    q = grid.quantize(W)
    bits = 3 * W.numel() + 16 * q.scale.numel() + (0 if isinstance(q.zero, int) else 3 * q.zero.numel())
    assert grid.bits_per_weight(12, 64) == bits / W.numel()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"bits": 1}, "bits must be"), ({"bits": 9}, "bits must be"), ({"bits": 4.0}, "bits must be"),
    ({"scheme": "symmetric"}, "scheme must be one of restricted"), ({"group": 0}, "group must be"),
    ({"group": "column"}, "group must be"), ({"clip_norm": 0}, "clip_norm must be"),
    ({"scale_dtype": torch.int8}, "scale_dtype must be"),
])  # fmt: skip
def test_grids_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Grid(**arguments)


def test_matrices_that_cannot_be_quantized_are_refused():
    W = normal(4, 24)
    for call, error, message in [
        (lambda: Grid(4, group=16).quantize(W), ValueError, "group must divide d_in = 24, got 16"),
        (lambda: Grid(4).quantize(W.int()), TypeError, "W must be floating point"),
        (lambda: Grid(4).quantize(W[0]), ValueError, "W must be a matrix"),
        (lambda: Grid(4).quantize(W[:0]), ValueError, "W must be a matrix"),
        (lambda: Grid(4).quantize(W / 0), ValueError, "W must be finite, got 96"),
        (lambda: Grid(4).quantize(W * 1e9), ValueError, "too large for scales in torch.float16"),
        (lambda: algorithm_2(W, 4, per="group"), ValueError, "per must be"),
        (lambda: algorithm_2(W[0], 4), ValueError, "W must be a matrix"),
        (lambda: symmetric_codes(W, 0.0, 4), ValueError, "scale must be > 0"),
        (lambda: symmetric_codes(W.int(), 1.0, 4), TypeError, "W must be floating point"),
    ]:
        with pytest.raises(error, match=message):
            call()
