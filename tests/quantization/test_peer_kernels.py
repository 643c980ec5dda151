"""The same int4 products as onnxruntime's MatMulNBits, and the same scales, zero points and W^ as quanto.

`data/quantization_golden_kernels.py` makes the arrays in an environment of the peers and stores the inputs.
"""

import hashlib
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_scripts import load_script

from refimpl.quantization import kernels
from refimpl.quantization.grids import Grid, dequantize
from refimpl.quantization.kernels import PackedInt4
from refimpl.quantization.linear import GridLinear

HERE = Path(__file__).resolve().parent
golden = load_script("quantization_golden_kernels")
GROUPS = pytest.mark.parametrize(("bits", "group"), golden.GROUPS)


def arrays(peer, *given):
    """What is stored, as tensors."""
    stored = np.load(HERE / "golden" / f"{peer}.npz")
    digest = hashlib.sha256(b"".join(stored[name].tobytes() for name in given)).hexdigest()
    assert digest in str(stored["about"])
    return {name: torch.from_numpy(stored[name]) for name in stored.files if name != "about"}


# --- the int4 product -----------------------------------------------------------------------------


@pytest.fixture(params=list(golden.PRODUCTS))
def product(request):
    """Arrays, name, and what refimpl's grid of that name makes of W: the same codes, scales, zero points."""
    stored, name = arrays("matmulnbits", "W", "x"), request.param
    scheme, group = name.split("_")
    q = Grid(4, scheme, int(group) if group.isdigit() else group).quantize(stored["W"])
    assert torch.equal(q.codes, stored[f"{name}_codes"])
    assert torch.equal(q.scale, stored[f"{name}_scale"]) and q.scale.dtype is torch.float16
    assert bool((stored[f"{name}_zero"] == q.zero).all())
    return stored, name, q


def packed(q):
    return PackedInt4(tuple(q.codes.shape), dict(GridLinear.pack(q, 4).named_buffers()), bits=4)


def assert_same_products(layer, stored, name, q):
    """Equal up to the rounding of K products in float32, summed in two orders: sqrt(K) 2^-24 of the sum of
    |x| s (code + z), for s code and s z may be summed apart. Where x is a unit vector, nothing is rounded."""
    x, units = stored["x"], len(golden.UNITS)
    zero = q.zero if isinstance(q.zero, int) else q.zero.repeat_interleave(x.shape[1] // q.zero.shape[1], 1)
    scale = q.scale.double().repeat_interleave(x.shape[1] // q.scale.shape[1], 1)
    tolerance = sqrt(x.shape[1]) * 2**-24 * x.abs().double() @ (scale * (q.codes.double() + zero)).T
    alone = slice(golden.ALONE, golden.ALONE + 1)
    for rows, y in ((slice(None), stored[f"{name}_y"]), (alone, stored[f"{name}_alone"])):
        found = layer(x[rows])
        assert bool(((found - y).abs() <= tolerance[rows]).all())
    assert torch.equal(layer(x[:units]), stored[f"{name}_y"][:units])


def test_products_with_the_dequantized_matrix_equal_onnxruntime(product):
    stored, name, q = product
    assert_same_products(lambda x: F.linear(x, dequantize(q)), stored, name, q)
    assert_same_products(GridLinear.pack(q, 4), stored, name, q)


def test_packed_products_without_a_kernel_equal_onnxruntime(product, monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda kernel: False)
    layer = packed(product[2])
    assert layer.kernel == kernels.BLOCKS
    assert_same_products(layer, *product)


def test_packed_products_equal_onnxruntime_up_to_bfloat16(product):
    stored, name, q = product
    y = stored[f"{name}_y"]
    assert float((packed(q)(stored["x"]) - y).norm() / y.norm()) < 1e-2


# --- the grids of quanto --------------------------------------------------------------------------
# quanto takes a group's range as it is; we put 0 into it. Where a group has both signs, quanto's integer zero
# point is our asymmetric scheme. Where all have one sign, it clips zero point and codes: W^ is off by many
# steps. Its default, a float shift, fits every group but does not keep 0: it is our scheme for W + shift,
# whose least weight is 0. Two and four bits have no symmetric form there; eight have our restricted one.


def in_full(groups, W):
    return groups.repeat_interleave(W.shape[1] // groups.shape[1], 1)


@GROUPS
def test_integer_zero_points_equal_quanto_where_the_range_holds_0(bits, group):
    stored, name = arrays("quanto", "W"), f"zero_{bits}_{group}"
    W, scale, theirs = stored["W"], stored[f"{name}_scale"], stored[f"{name}_Q"]
    q = Grid(bits, "asymmetric", group, scale_dtype=torch.float32).quantize(W)
    groups = W.view(*scale.shape, group)
    both = (groups.amin(-1) <= 0) & (groups.amax(-1) >= 0)
    assert torch.equal(q.scale[both], scale[both]) and torch.equal(q.zero[both], stored[name][both])
    assert torch.equal(dequantize(q)[in_full(both, W)], theirs[in_full(both, W)])
    assert stored[f"{name}_bytes"] == GridLinear.pack(q, bits).codes.nbytes
    one_sign = in_full(~both, W)
    assert one_sign.any() and (q.scale > scale)[~both].all()
    missed = lambda Q, s: ((Q - W).abs() / in_full(s, W))[one_sign].max()
    assert missed(dequantize(q), q.scale) < 0.501 < 2 < missed(theirs, scale)


@GROUPS
def test_float_shifts_of_quanto_are_the_asymmetric_grid_of_the_shifted_weights(bits, group):
    stored, name = arrays("quanto", "W"), f"shift_{bits}_{group}"
    W, scale, theirs = stored["W"], stored[f"{name}_scale"], stored[f"{name}_Q"]
    shift = in_full(stored[name], W)
    shifted = Grid(bits, "asymmetric", group, scale_dtype=torch.float32).quantize(W + shift)
    assert torch.equal(shifted.scale, scale) and not shifted.zero.any()
    assert torch.equal(dequantize(shifted) - shift, theirs)
    # Against the grid of W itself: each is half a step from W, so they are one step apart; ours has 0.
    q = Grid(bits, "asymmetric", group, scale_dtype=torch.float32).quantize(W)
    step = in_full(torch.maximum(q.scale, scale), W)
    assert bool(((dequantize(q) - theirs).abs() < 1.001 * step).all())
    assert not dequantize(q)[W == 0].any() and theirs[W == 0].any()


def test_eight_bits_by_row_are_the_restricted_scheme():
    stored = arrays("quanto", "W")
    q = Grid(8, "restricted", "row", scale_dtype=torch.float32).quantize(stored["W"])
    assert torch.equal(q.scale, stored["int8_scale"])
    assert torch.equal(q.codes.int() - q.zero, stored["int8_codes"].int())
