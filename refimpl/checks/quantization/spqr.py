"""The check of SpQR (quantization spec, section 30; arXiv 2306.03078)."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"spqr": "refimpl.quantization.spqr:SpQR"}
ROWS, COLUMNS, GROUP, META_GROUP, META_BITS, DAMP = 16, 32, 8, 8, 3, 0.01


@check
def check_spqr(SpQR: Callable) -> None:
    """`SpQR(bits, group=, threshold=, meta_bits=, meta_group=, act_order=)(name, W, stats)` -> layer with
    `weight` and `nbytes()`; of the statistics it needs `H`."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    W[torch.arange(6), torch.arange(6) * 5] *= 7
    X = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(6, COLUMNS, generator=generator, dtype=torch.float64)
    X += 0.3 * torch.randn(300, COLUMNS, generator=generator, dtype=torch.float64)
    X *= torch.linspace(0.4, 1.4, COLUMNS)
    stats = SimpleNamespace(H=2 / len(X) * X.T @ X)
    for bits, threshold, act_order in (
        (3, float("inf"), False), (3, 0.5, False), (2, 1.0, False), (3, 0.3, True)
    ):  # fmt: skip
        what = f"{bits} bits, threshold {threshold}, act_order={act_order}"
        recipe = SpQR(
            bits, group=GROUP, threshold=threshold, meta_bits=META_BITS, meta_group=META_GROUP,
            act_order=act_order,
        )  # fmt: skip
        layer = recipe("fc", W, stats)
        expected, outliers = _reference(W, stats.H, bits, threshold, act_order)
        count = int(outliers.sum())
        kept = layer.weight.double()[outliers]
        require_close(kept, expected[outliers], 1e-5, f"{what}: the {count} outliers, as float16")
        require_close(layer.weight.double(), expected, 1e-4, f"{what}: W^ beside the outliers")
        # Codes; two codes per group; two float16 for both levels per 8 groups; CSR; the order.
        cells = ROWS * COLUMNS // GROUP
        size = (ROWS * COLUMNS * bits + 2 * cells * META_BITS) / 8 + 8 * cells / META_GROUP
        size += (4 * count + 4 * (ROWS + 1)) * (count > 0) + 2 * COLUMNS * act_order
        require(
            layer.nbytes() == size, f"{what}: {layer.nbytes()} bytes are stored and {size:.0f} are needed"
        )
    everything = SpQR(2, group=GROUP, threshold=0.0, meta_bits=META_BITS, meta_group=META_GROUP)(
        "fc", W, stats
    )
    require_close(everything.weight.double(), W, 2e-3, "threshold 0: all weights stay float16")


def _reference(W: Tensor, H: Tensor, bits: int, threshold: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """By the inverse of what is left of H, at every column; 1 / sqrt of its corner is 1 / U_jj."""
    order = H.diagonal().argsort(descending=True) if act_order else torch.arange(COLUMNS)
    W, H = W[:, order].clone(), H[order][:, order]
    H = H + DAMP * H.diagonal().mean() * torch.eye(COLUMNS)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(COLUMNS)]
    u2 = torch.stack([inverse[0, 0] for inverse in inverses])
    tau = threshold * (W.var(0) / u2).mean() if threshold < float("inf") else float("inf")
    Q, outliers = torch.zeros_like(W), torch.zeros(W.shape, dtype=torch.bool)
    for j, inverse in enumerate(inverses):
        if j % GROUP == 0:
            part = slice(j, j + GROUP)
            likely = _leave_one_out(W[:, part], u2[part], bits) > tau
            mean = (W[:, part] * ~likely).sum(1) / (~likely).sum(1).clamp(min=1)
            raw = _range(torch.where(likely, mean[:, None], W[:, part]), bits)
            scale, zero = (_second_level(value) for value in raw)
        q = scale * (((W[:, j] / scale + zero).round()).clamp(0, 2**bits - 1) - zero)
        outliers[:, j] = (W[:, j] - q).square() / u2[j] > tau
        Q[:, j] = torch.where(outliers[:, j], W[:, j].half().double(), q)
        W[:, j:] -= ((W[:, j] - Q[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    back = order.argsort()
    return Q[:, back], outliers[:, back]


def _leave_one_out(w: Tensor, u2: Tensor, bits: int) -> Tensor:
    def error(columns: list[int]) -> Tensor:
        x = w[:, columns]
        scale, zero = (value[:, None] for value in _range(x, bits))
        q = scale * (((x / scale + zero).round()).clamp(0, 2**bits - 1) - zero)
        return ((x - q).square() / u2[columns]).sum(1)

    everything = list(range(GROUP))
    alone = [error([k for k in everything if k != j]) for j in everything]
    return error(everything)[:, None] - torch.stack(alone, 1)


def _range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    lo, hi = x.amin(1), x.amax(1)
    empty = lo == hi
    lo, hi = lo.masked_fill(empty, -1), hi.masked_fill(empty, 1)
    scale = (hi - lo) / (2**bits - 1)
    return scale, -lo / scale


def _second_level(values: Tensor) -> Tensor:
    """Scales or zero points of all rows, each of 8 neighbours on a grid of 3 bits and two float16."""
    rows = values.view(-1, META_GROUP)
    step, zero = (value[:, None] for value in _range(rows, META_BITS))
    minimum, step = (-zero * step).half().double(), step.half().double()
    codes = ((rows - minimum) / step).round().clamp(0, 2**META_BITS - 1)
    return (minimum + step * codes).flatten()
