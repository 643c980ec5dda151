"""Checks for the exercises of the notebook on eviction."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close


@check
def check_heavy_hitters(heavy_hitters: Callable[[Sequence[float], int, int], Sequence[int]]) -> None:
    """`heavy_hitters(acc, heavy, recent)`: sorted indices of the slots that H2O keeps of one head.

    `acc` is the accumulated attention of each slot, in order of arrival, all different.
    """
    draw = torch.Generator().manual_seed(0)
    for n, heavy, recent in ((10, 3, 3), (10, 0, 4), (10, 4, 0), (9, 2, 5), (4, 3, 3), (6, 3, 3), (12, 1, 1)):
        acc = torch.rand(n, generator=draw).tolist()
        old = range(max(0, n - recent))
        best = sorted(old, key=lambda i: -acc[i])[:heavy]
        expected = sorted([*best, *range(max(0, n - recent), n)])
        got = [int(i) for i in heavy_hitters(acc, heavy, recent)]
        where = f"{n} slots, heavy {heavy}, recent {recent}"
        require(got == sorted(got), f"{where}: {got} is not sorted")
        require(len(got) <= heavy + recent, f"{where}: {len(got)} slots kept, at most {heavy + recent}")
        newest = set(range(max(0, n - recent), n))
        require(newest <= set(got), f"{where}: the newest slots {sorted(newest - set(got))} are gone")
        require(
            len(got) == len(expected), f"{where}: {len(got)} slots kept instead of {len(expected)}: "
            "the recent ones must not use up places of heavy hitters",
        )  # fmt: skip
        require(got == expected, f"{where}: kept {got} instead of {expected}")


@check
def check_grouped_importance(grouped_importance: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`grouped_importance(alpha, v)` -> [G, S]: Eq. 11 for each KV head, of one query.

    alpha [H, S], the weights of H query heads, the first H/G share KV head 0, and so on; v [G, S, D].
    """
    draw = torch.Generator().manual_seed(1)
    for H, G, S, D in ((4, 2, 5, 3), (6, 2, 4, 2), (3, 3, 4, 5), (4, 1, 3, 2)):
        alpha = (2 * torch.randn(H, S, generator=draw)).softmax(-1)
        v = torch.randn(G, S, D, generator=draw)
        expected = torch.zeros(G, S)
        for h in range(H):
            g = h // (H // G)
            for i in range(S):
                expected[g, i] += alpha[h, i] * float((v[g, i] ** 2).sum()) ** 0.5
        got = grouped_importance(alpha, v)
        where = f"{H} query heads on {G} KV heads"
        require(tuple(got.shape) == (G, S), f"{where}: shape {list(got.shape)} instead of [{G}, {S}]")
        require_close(got, expected, 1e-5, where)


@check
def check_tova_keeps(tova_keeps: Callable[[Tensor, int], Sequence[int]]) -> None:
    """`tova_keeps(alpha, budget)`: sorted slots that all heads keep; alpha [H, S], of one query."""
    draw = torch.Generator().manual_seed(2)
    dropped_newest = False
    for H, S, budget in ((4, 8, 3), (2, 6, 6), (3, 9, 1), (8, 12, 5), (4, 5, 7)):
        alpha = (2 * torch.randn(H, S, generator=draw)).softmax(-1)
        total = alpha.sum(0).tolist()
        expected = sorted(sorted(range(S), key=lambda i: -total[i])[:budget])
        dropped_newest |= S - 1 not in expected
        got = sorted(int(i) for i in tova_keeps(alpha, budget))
        where = f"{H} heads, {S} slots, budget {budget}"
        require(len(set(got)) == len(expected), f"{where}: {len(set(got))} slots instead of {len(expected)}")
        if got != expected and S - 1 in got and S - 1 not in expected:
            raise AssertionError(f"{where}: TOVA does not protect the newest token, slot {S - 1}")
        require(got == expected, f"{where}: kept {got} instead of {expected}")
    assert dropped_newest


@check
def check_pyramid_slots(pyramid_slots: Callable[[int, float, float], Sequence[float]]) -> None:
    """`pyramid_slots(n_layers, average, beta)`: slots of each layer besides the window, not rounded.

    In equal steps from the first layer to the last, which gets average / beta; `average` on average.
    """
    for L, average, beta in ((6, 40, 20), (12, 16, 20), (3, 10, 1), (2, 8, 4)):
        last = average / beta
        first = 2 * average - last
        expected = [first + l * (last - first) / (L - 1) for l in range(L)]
        got = [float(x) for x in pyramid_slots(L, average, beta)]
        where = f"{L} layers, {average} on average, beta {beta}"
        require(len(got) == L, f"{where}: {len(got)} budgets for {L} layers")
        mean = sum(got) / L
        require(abs(mean - average) < 1e-6, f"{where}: {mean:.3f} on average instead of {average}")
        if beta > 1:
            require(got[0] > got[-1], f"{where}: the first layer must get most, it gets {got[0]:.2f}")
        require(
            abs(got[-1] - last) < 1e-6,
            f"{where}: the last layer gets {got[-1]:.3f} instead of average / beta = {last:.3f}",
        )
        require(
            all(abs(a - b) < 1e-6 for a, b in zip(got, expected, strict=True)),
            f"{where}: {got} instead of {expected}: the steps must be equal",
        )
