"""The check of rounding to nearest on uniform grids (quantization spec, sections 1 to 3)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"rtn": "refimpl.quantization.rtn:RTN"}
SCHEMES = ("restricted", "full", "no-clip", "asymmetric")


@check
def check_rtn(RTN: Callable) -> None:
    """`RTN(bits, scheme, group=)` with `quantize(W)` -> (codes, scale, zero), called as `(name, W, stats)` ->
    a layer with `weight()` and `nbytes()`."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 48, generator=generator) + 0.7  # skewed, so that a zero point matters
    W[2] = W[2].abs() + 0.5  # a row of one sign: zero belongs to its range all the same
    W[4, 16:32] = 0
    for bits in (2, 3, 4, 8):
        for scheme in SCHEMES:
            for group in ("tensor", "row", 16):
                what = f"{bits} bits, {scheme}, group {group}"
                recipe = RTN(bits, scheme, group=group)
                codes, scale, _ = recipe.quantize(W)
                expected, steps = _reference(W, bits, scheme, group)
                got = f"{codes.dtype} {list(codes.shape)}"
                fits = codes.dtype == torch.uint8 and codes.shape == W.shape
                require(fits, f"{what}: codes must be uint8 {list(W.shape)}, got {got}")
                require(int(codes.max()) < 2**bits, f"{what}: a code {int(codes.max())} needs more bits")
                require_close(scale.flatten().float(), steps, 1e-6, f"{what}: the stored scales")
                layer = recipe("fc", W, None)
                require_close(layer.weight, expected, 1e-5, f"{what}: the layer's weight")
                held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.buffers()}
                zeros = math.ceil(len(steps) * bits / 8) if scheme == "asymmetric" else 0
                wanted = W.numel() * bits // 8 + 2 * len(steps) + zeros
                slack = 3 if bits == 3 else 0  # a last unit of eight codes that is not full
                require(wanted <= sum(held.values()) <= wanted + slack,
                        f"{what}: {sum(held.values())} bytes are held, not {wanted}: {bits} bits for a "
                        "weight and a float16 scale for a group")  # fmt: skip
                require(layer.nbytes() == sum(held.values()), f"{what}: nbytes() is not what is held")


def _reference(W: Tensor, bits: int, scheme: str, group: int | str) -> tuple[Tensor, Tensor]:
    """The dequantized matrix and the scales, group by group."""
    parts = {"tensor": [W.reshape(-1)], "row": list(W)}.get(group)
    parts = [p for row in W for p in row.split(group)] if parts is None else parts
    out, scales = [], []
    half = 2 ** (bits - 1)
    for part in parts:
        lo, hi = min(0.0, part.min().item()), max(0.0, part.max().item())
        scale = {"restricted": max(-lo, hi) / (half - 1), "full": max(-lo, hi) / (half - 0.5),
                 "no-clip": max(-lo / half, hi / (half - 1)),
                 "asymmetric": (hi - lo) / (2 * half - 1)}[scheme]  # fmt: skip
        scale = float(torch.tensor(scale).half()) or 1.0
        zero = round(-lo / scale) if scheme == "asymmetric" else half
        lowest = 1 if scheme == "restricted" else 0
        steps = ((part / scale).round() + zero).clamp(lowest, 2 * half - 1) - zero
        out.append(steps * scale)
        scales.append(scale)
    return torch.cat(out).view(W.shape), torch.tensor(scales)
