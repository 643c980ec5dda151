"""Block-wise rounding to the 256 values of the dynamic map."""

import numpy as np
import pytest
import torch

from refimpl.footprint.blockwise import (
    dequantise_blockwise,
    dynamic_map,
    linear_map,
    n_blocks,
    quantise_blockwise,
)

SIGNED, UNSIGNED = dynamic_map(True), dynamic_map(False)


def heavy_tailed(n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=rng) * torch.randn(n, generator=rng).mul(2).exp()


@pytest.mark.parametrize("signed", [True, False])
def test_every_value_of_the_map_is_what_its_bits_say(signed):
    values = {0.0, 1.0}
    width = 7 if signed else 8
    for pattern in range(2**width):
        bits = f"{pattern:0{width}b}"
        zeros = len(bits) - len(bits.lstrip("0"))
        fraction = bits[zeros + 1 :]
        if zeros > 6:
            continue
        linear = (int(fraction or "0", 2) + 0.5) / 2 ** len(fraction)
        value = 10.0**-zeros * (0.1 + 0.9 * linear)
        values |= {value, -value} if signed else {value}
    np.testing.assert_allclose(dynamic_map(signed).numpy(), sorted(values), rtol=1e-7)


@pytest.mark.parametrize("table", [SIGNED, UNSIGNED, linear_map(True), linear_map(False)])
@pytest.mark.parametrize("block", [1, 7, 256, 10_000, None])
def test_codes_are_those_of_the_nearest_value(table, block):
    x = heavy_tailed(1000)
    x = x if table[0] < 0 else x.square()
    codes, absmax = quantise_blockwise(x, table, block)
    size = block or 1000
    for b in range(n_blocks(1000, block)):
        part = slice(b * size, (b + 1) * size)
        units = (x[part] / x[part].abs().max()).double()
        distance = (units[:, None] - table.double()).abs()
        taken = distance.gather(1, codes[part, None].long())[:, 0]
        assert (taken <= distance.min(dim=1).values + 1e-7).all()
        assert absmax[b] == x[part].abs().max()


@pytest.mark.parametrize(("table", "bound"), [(SIGNED, 0.45 / 64), (UNSIGNED, 0.45 / 128)])
def test_error_of_a_block_is_at_most_half_a_step_of_its_absmax(table, bound):
    x = heavy_tailed(256 * 40)
    x = x if table[0] < 0 else x.square()
    error = (dequantise_blockwise(*quantise_blockwise(x, table), table) - x).abs().view(40, 256)
    worst = error.amax(dim=1) / x.abs().view(40, 256).amax(dim=1)
    assert worst.max() <= bound * (1 + 1e-5)
    assert worst.max() > bound / 2  # the bound is tight


def test_small_values_keep_their_leading_digit_where_int8_loses_them():
    x = torch.logspace(-5, 0, 256)
    relative = {}
    for name, table in (("dynamic", UNSIGNED), ("linear", linear_map(False))):
        relative[name] = ((dequantise_blockwise(*quantise_blockwise(x, table), table) - x).abs() / x).median()
    assert relative["dynamic"] < 0.03 and relative["linear"] > 0.25


def test_an_outlier_coarsens_its_own_block_only():
    x = heavy_tailed(1024)
    spoiled = x.clone()
    spoiled[5] = 1e6
    one, other = (dequantise_blockwise(*quantise_blockwise(t, SIGNED), SIGNED) for t in (x, spoiled))
    assert torch.equal(one[256:], other[256:]) and not torch.equal(one[:256], other[:256])


def test_values_of_the_map_zeros_and_shapes_come_back_exactly():
    x = torch.cat([SIGNED * 3, torch.zeros(256)]).view(2, 256)
    codes, absmax = quantise_blockwise(x, SIGNED)
    assert torch.equal(dequantise_blockwise(codes, absmax, SIGNED), x) and codes.shape == x.shape
    tiny = torch.full((3,), 1e-40)  # subnormal
    assert torch.equal(dequantise_blockwise(*quantise_blockwise(tiny, UNSIGNED), UNSIGNED), tiny)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dynamic_map(1), TypeError, "signed must be True or False, got 1"),
        (lambda: linear_map("no"), TypeError, "signed"),
        (lambda: n_blocks(0), ValueError, "numel must be an integer >= 1, got 0"),
        (lambda: quantise_blockwise(torch.ones(3), SIGNED, 0), ValueError, "block must be an integer >= 1"),
        (lambda: quantise_blockwise(torch.ones(0), SIGNED), ValueError, "x must not be empty"),
        (lambda: quantise_blockwise(torch.ones(3).int(), SIGNED), TypeError, "floating-point.*int32"),
        (lambda: quantise_blockwise([1.0], SIGNED), TypeError, "floating-point tensor, got list"),
        (lambda: quantise_blockwise(torch.tensor([1.0, torch.nan]), SIGNED), ValueError, "finite"),
        (lambda: quantise_blockwise(torch.tensor([1.0, -0.5]), UNSIGNED), ValueError, "its least is -0.5"),
        (lambda: quantise_blockwise(torch.ones(3), SIGNED[:9]), ValueError, r"table must be .* \[256\]"),
        (lambda: quantise_blockwise(torch.ones(3), SIGNED.flip(0)), ValueError, "ascending"),
        (lambda: dequantise_blockwise(torch.ones(3), torch.ones(1), SIGNED), TypeError, "codes must be"),
        (
            lambda: dequantise_blockwise(torch.ones(300).byte(), torch.ones(1), SIGNED),
            ValueError,
            r"absmax must have shape \[2\].*got \[1\]",
        ),
        (
            lambda: dequantise_blockwise(torch.ones(3).byte(), torch.ones(1).double(), SIGNED),
            TypeError,
            "absmax must be a float32 tensor, got torch.float64",
        ),
        (lambda: dequantise_blockwise(torch.ones(0).byte(), torch.ones(1), SIGNED), ValueError, "codes"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
