"""Checks for the exercises of the notebook on rounding."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close


@check
def check_whole_model_ratio(whole_model_ratio: Callable[[int, int, float], float]) -> None:
    """`whole_model_ratio(compressed, kept, bits)`: bytes before over after, where `kept` stay float32."""
    for compressed, kept, bits in ((1000, 0, 4.0), (1000, 1000, 4.625), (7, 93, 2.0), (10**7, 10**6, 8.5)):
        got = whole_model_ratio(compressed, kept, bits)
        where = f"{compressed} weights in {bits} bits, {kept} in float32"
        right = 32 * (compressed + kept) / (bits * compressed + 32 * kept)
        if kept:
            require(
                not math.isclose(got, 32 / bits),
                f"{where}: {got:.3f} is the ratio of the compressed layers alone; the others are stored too",
            )
            require(
                not math.isclose(got, 1 / right, rel_tol=1e-6),
                f"{where}: {got:.3f} is after over before, not before over after",
            )
        require(math.isclose(got, right, rel_tol=1e-6), f"{where}: {got:.4f} instead of {right:.4f}")


@check
def check_pack_three_bits(pack_three_bits: Callable[[Tensor], Tensor]) -> None:
    """`pack_three_bits(codes)`: uint8 [8 m] below 8 -> uint8 [3 m], first code in the highest bits."""
    for seed, m in enumerate((1, 2, 5, 100)):
        draw = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 8, (8 * m,), generator=draw, dtype=torch.uint8)
        before = codes.clone()
        got = pack_three_bits(codes)
        where = f"{8 * m} codes"
        require(torch.equal(codes, before), f"{where}: the codes were changed")
        require(
            isinstance(got, Tensor) and got.dtype is torch.uint8,
            f"{where}: not a uint8 tensor, so not packed",
        )
        require(len(got) == 3 * m, f"{where}: {len(got)} bytes; {3 * m} hold them without a gap")
        string = "".join(f"{code:03b}" for code in codes.tolist())
        expected = torch.tensor([int(string[i : i + 8], 2) for i in range(0, len(string), 8)])
        require_close(got.float(), expected.float(), 0, f"{where}: the bytes")


@check
def check_zero_point_product(zero_point_product: Callable[[Tensor, int, Tensor], Tensor]) -> None:
    """`zero_point_product(x_codes, zero, w_codes)`: sum_j (x_tj - zero) w_oj, int64 [T, d_out]."""
    for seed, (T, d_in, d_out, zero) in enumerate(((3, 8, 5, 0), (4, 16, 2, 131), (1, 64, 7, 255))):
        draw = torch.Generator().manual_seed(seed)
        x = torch.randint(0, 256, (T, d_in), generator=draw, dtype=torch.uint8)
        w = torch.randint(-127, 128, (d_out, d_in), generator=draw, dtype=torch.int8)
        got = zero_point_product(x, zero, w)
        where = f"{T} x {d_in} codes with zero point {zero}"
        require(isinstance(got, Tensor) and not got.is_floating_point(), f"{where}: not an integer tensor")
        expected = torch.tensor(
            [[sum((a - zero) * b for a, b in zip(r, s, strict=True)) for s in w.tolist()] for r in x.tolist()]
        )
        require_close(got.double(), expected.double(), 0, f"{where}: the product (overflow, or zero point?)")


@check
def check_best_shrink(best_shrink: Callable[[Tensor, int], float]) -> None:
    """`best_shrink(w, bits)`: of 1, 0.99, ..., 0.21 the share of max|w| with the least squared error."""
    for seed, (n, bits) in enumerate(((512, 2), (512, 3), (64, 4), (4, 2))):
        draw = torch.Generator().manual_seed(seed)
        w = torch.randn(n, generator=draw, dtype=torch.float64)
        top = 2 ** (bits - 1) - 1

        def error(share: float, w: Tensor = w, top: int = top) -> float:
            s = share * w.abs().max() / top
            return float((w - s * (w / s).round().clamp(-top, top)).square().sum())

        got = float(best_shrink(w, bits))
        where = f"{n} weights, {bits} bits"
        least = min(error(1 - i / 100) for i in range(80))
        require(0.2 < got <= 1, f"{where}: {got:.3f} is not one of 1, 0.99, ..., 0.21")
        require(
            error(got) <= least * (1 + 1e-9),
            f"{where}: with {got:.2f} the squared error is {error(got):.4f}; {least:.4f} is possible",
        )
