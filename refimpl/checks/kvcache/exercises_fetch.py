"""Checks for the exercises of the notebook on merging, shrinking and fetching."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close


@check
def check_quantised_share(quantised_share: Callable[[int, int, int], float]) -> None:
    """`quantised_share(bits, group, dtype_bits)`: size of a code with its part of scale and zero point."""
    for bits, group, wide in ((2, 32, 16), (2, 16, 16), (4, 64, 32), (1, 8, 16), (8, 128, 32)):
        got = quantised_share(bits, group, wide)
        where = f"{bits} bits, groups of {group}, {wide}-bit numbers"
        right = bits / wide + 2 / group
        require(
            not math.isclose(got, bits / wide),
            f"{where}: {got:.4f}, the scale and the zero point are missing",
        )
        require(
            not math.isclose(got, bits / wide + 1 / group),
            f"{where}: {got:.4f}, a group has a scale and a zero point, not one of them",
        )
        require(math.isclose(got, right), f"{where}: {got:.4f} instead of {right:.4f}")


@check
def check_useless_rank(useless_rank: Callable[[int, int], int]) -> None:
    """`useless_rank(n, d)`: the smallest rank r with n d <= r (n + d + 1)."""
    for n, d in ((512, 32), (32, 32), (4096, 32), (100, 128), (7, 3), (1, 1), (2, 2), (3, 7)):
        got = useless_rank(n, d)
        expected = next(r for r in range(1, n * d + 1) if r * (n + d + 1) >= n * d)
        require(got == expected, f"{n} x {d}: rank {got} instead of {expected}, the first that saves nothing")
    # A whole quotient, 2 · 3 / (2 + 3 + 1) = 1:
    require(
        useless_rank(2, 3) == 1,
        f"2 x 3: rank {useless_rank(2, 3)} instead of 1, where the ratio is exactly 1",
    )


@check
def check_page_bound(page_bound: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`page_bound(q, keys)`: upper bound of q · k over a page [p, D] from its least and largest channels."""
    for seed, (p, D) in enumerate(((16, 32), (4, 8), (1, 5), (16, 2))):
        draw = torch.Generator().manual_seed(seed)
        q, keys = torch.randn(D, generator=draw), torch.randn(p, D, generator=draw)
        got = page_bound(q, keys)
        best = max(float(q @ k) for k in keys)
        where = f"a page of {p} keys of {D} channels"
        require(
            float(got) >= best - 1e-4, f"{where}: the bound {float(got):.3f} is below a product, {best:.3f}"
        )
        expected = 0.0
        for c in range(D):
            column = [float(x) for x in keys[:, c]]
            expected += max(float(q[c]) * min(column), float(q[c]) * max(column))
        require_close(torch.as_tensor(got), torch.tensor(expected), 1e-4, f"{where}: the bound")


@check
def check_merge_parts(merge_parts: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`merge_parts(outputs, logs)`: attention to all keys from that to disjoint sets, [m, D] and [m]."""
    for seed, sizes in enumerate(((3, 5), (1, 1, 9), (4, 4, 4, 4))):
        for shift in (0.0, 1000.0):
            draw = torch.Generator().manual_seed(seed)
            scores = torch.randn(sum(sizes), generator=draw, dtype=torch.float64) * 2 + shift
            values = torch.randn(sum(sizes), 6, generator=draw, dtype=torch.float64)
            outputs, logs = [], []
            for s, v in zip(scores.split(sizes), values.split(sizes), strict=True):
                outputs.append(s.softmax(0) @ v)
                logs.append(s.logsumexp(0))
            got = merge_parts(torch.stack(outputs), torch.stack(logs))
            where = f"sets of {', '.join(map(str, sizes))} keys, scores around {shift:.0f}"
            require(
                bool(torch.isfinite(got).all()), f"{where}: not finite; exponentials of large logs overflow"
            )
            require_close(got, scores.softmax(0) @ values, 1e-6, f"{where}: the merged attention")
