"""The check of the survey's Algorithm 2 with Eq. 6 (quantization spec, section 1)."""

from collections.abc import Callable

import torch

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {"symmetric": "refimpl.quantization.symmetric:algorithm_2"}


@check
def check_symmetric(quantize: Callable) -> None:
    """`quantize(W, bits, per="tensor" or "row")` -> integer codes and the scale, not their product."""
    W = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 6)[:, None]
    before = W.clone()
    for bits in (2, 3, 4, 8):
        top = 2 ** (bits - 1) - 1
        for per in ("tensor", "row"):
            what = f"{bits} bits per {per}"
            codes, scale = quantize(W, bits, per=per)
            require(torch.equal(W, before), f"{what}: W was changed")
            floats = f"{what}: codes are {codes.dtype}: the dequantized matrix, which compresses nothing"
            require(not codes.is_floating_point(), floats)
            rows = W if per == "row" else W.reshape(1, -1)
            expected = torch.stack([row.abs().max() / top for row in rows])[:, None]
            require_close(scale, expected, 1e-6, f"{what}: the scale is not max|W| / {top}")
            require_close(codes.float(), (W / expected).round(), 0, f"{what}: codes are not round(W / s)")
            require(int(codes.abs().max()) == top, f"{what}: the largest code is not {top}")
            # Half a step is the most that rounding can cost where nothing is clipped.
            error = (scale * codes - W).abs() / scale
            require(float(error.max()) <= 0.5 + 1e-4, f"{what}: a weight is off by {error.max():.2f} steps")
    codes, scale = quantize(torch.zeros(2, 3), 4, per="row")
    require(bool((scale * codes == 0).all()), "a matrix of zeros does not stay zero (0 / 0?)")
    require_error(ValueError, lambda: quantize(W, 1), "one bit, where the scale divides by zero")
