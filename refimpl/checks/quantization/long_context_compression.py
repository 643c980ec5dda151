"""The checks of compression in long contexts (spec, section 35; arXiv 2406.06773)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {
    "long_context_compression": "refimpl.quantization.evaluation.long_context:position_gap",
    "largest_groups": "refimpl.quantization.evaluation.long_context:LargestGroups",
}


@check
def check_long_context_compression(position_gap: Callable) -> None:
    """`position_gap(new, old)` of nats [documents, positions] -> `.gaps`, `.slope` in nats per 1000 positions
    with an interval over documents, `.bins`, (first, last) position -> mean gap."""
    draw = np.random.default_rng(0)
    documents, positions = 12, 200
    p = np.arange(1, positions + 1)
    old = draw.normal(3, 1, (documents, positions))
    same = position_gap(old, old.copy())
    nothing = same.slope.value == same.slope.lo == same.slope.hi == 0 and not np.abs(same.gaps).any()
    require(nothing, f"a model against itself has a gap, slope {same.slope.value:.3g}")
    # Documents differ in their gap, not in its growth; single gaps are often negative.
    planted = 0.002 * p - 0.1 + draw.normal(0, 0.5, (documents, 1))
    found = position_gap(old + planted, old)
    require(
        abs(found.slope.value - 2) < 1e-6, f"slope {found.slope.value:.4f} where 2 nats per 1000 are planted"
    )
    wide = found.slope.hi - found.slope.lo
    require(wide < 1e-6, f"the slope's interval is {wide:.3g} wide, though it is the same in every document")
    new = old + planted + draw.normal(0, 0.3, (documents, positions))
    found = position_gap(new, old)
    gaps = new - old
    require(np.allclose(found.gaps, gaps), "gaps are not the compressed model's nats minus the other's")
    slopes = np.array([np.polyfit(p, row, 1)[0] for row in gaps]) * 1000
    require(
        abs(found.slope.value - slopes.mean()) < 1e-6,
        f"slope {found.slope.value:.4f}, least-squares lines have {slopes.mean():.4f}",
    )
    expected = slopes.std() / np.sqrt(documents) * 2 * 1.96
    got = found.slope.hi - found.slope.lo
    require(
        0.6 < got / expected < 1.6, f"the slope's interval is {got:.3f} wide, documents say {expected:.3f}"
    )
    for (first, last), gap in found.bins.items():
        mean = gaps[:, first - 1 : last].mean()
        require(
            abs(gap.value - mean) < 1e-9, f"positions {first} to {last}: gap {gap.value:.4f}, not {mean:.4f}"
        )
    covered = sorted(i for first, last in found.bins for i in range(first, last + 1))
    require(covered == p.tolist(), "the bins do not hold every position once")


@check
def check_largest_groups(LargestGroups: Callable) -> None:
    """`LargestGroups(low, high, share=, group=, generator=)` called with (name, W) -> a layer with `weight`
    and `nbytes()`: groups of largest |w| on grids of `high` bits, the others of `low`."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(20, 64, generator=generator)
    W[torch.randperm(20, generator=generator)[:6], ::9] *= 6
    group, count = 16, 8  # 10 % of 80 groups
    parts = W.view(-1, group)
    size = parts.abs().amax(1)
    largest = size >= size.sort(descending=True).values[count - 1]
    for low in (3, 4):
        expected = torch.where(largest[:, None], _rounded(parts, 8), _rounded(parts, low)).view_as(W)
        layer = LargestGroups(low, 8, share=0.1, group=group)("fc", W.clone())
        require_close(layer.weight, expected, 1e-6, f"{low} bits, the largest groups in 8")
        chance = LargestGroups(low, 8, share=0.1, group=group, generator=torch.Generator().manual_seed(3))
        control = chance("fc", W.clone())
        fine = (control.weight.view(-1, group) - _rounded(parts, 8)).abs().amax(1) < 1e-6
        require(
            int(fine.sum()) == count and not torch.equal(fine, largest),
            f"the control has {int(fine.sum())} groups in 8 bits, of {count} at random",
        )
        sizes = layer.nbytes(), control.nbytes()
        require(sizes[0] == sizes[1], f"the control takes {sizes[1]} bytes, the remedy {sizes[0]}")
        # Codes, 16-bit scales, zero points as wide as codes, one bit a group; parts end in whole bytes.
        bits = 72 * (low * (group + 1) + 16) + 8 * (8 * (group + 1) + 16) + 80
        found = 8 * sizes[0]
        require(bits <= found <= bits + 80, f"{low} bits: {found} bits stored, where {bits} are needed")


def _rounded(parts: Tensor, bits: int) -> Tensor:
    """Rows of `parts` [n, group] rounded to asymmetric grids with scales of 16 bits."""
    lo, hi = parts.amin(1, True).clamp(max=0), parts.amax(1, True).clamp(min=0)
    scale = ((hi - lo) / (2**bits - 1)).half().float()
    zero = (-lo / scale).round()
    return (((parts / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale
