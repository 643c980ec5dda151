"""Levels of the parts of a model, and their changes that keep a budget: the moves of EvoPress.

Levels are a tuple with a number for each part. Parts form groups in which one level more costs the same
everywhere, so that the sum of levels in each group is the budget (arXiv 2410.14649, section 3). Small
problems can be enumerated, which shows how good a search is, and that the errors of parts do not add up.
"""

from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np
import torch

__all__ = ["Levels", "every", "mutate", "not_monotone", "random_levels"]

Levels = tuple[int, ...]


def mutate(
    parent: Levels,
    groups: Sequence[Sequence[int]],
    n_levels: Sequence[int],
    generator: torch.Generator,
    switches: int | None = None,
) -> Levels:
    """Switch levels: one part down by one, another of its group up by one.

    Parameters: `parent`, a level of each part; `groups`, `n_levels`, as in `Problem`; `switches`, how many;
    None: the smaller of two draws from 1, 2, 3. Groups are drawn in proportion to their parts. Returns the
    child; several switches may undo each other. Raises ValueError where no switch is possible.

    >>> mutate((1, 1, 5), [(0, 1), (2,)], (3, 3, 9), torch.Generator().manual_seed(0), switches=1)
    (2, 0, 5)
    """
    child = list(parent)
    if switches is None:
        switches = 1 + min(_draw(3, generator), _draw(3, generator))
    for _ in range(switches):
        options = []
        for group in groups:
            downs = [i for i in group if child[i] > 0]
            ups = [i for i in group if child[i] < n_levels[i] - 1]
            pairs = [(i, j) for i in downs for j in ups if i != j]
            if pairs:
                options += [pairs] * len(group)
        if not options:
            raise ValueError(f"parent: no two parts of a group can exchange a level in {tuple(child)}")
        pairs = options[_draw(len(options), generator)]
        down, up = pairs[_draw(len(pairs), generator)]
        child[down] -= 1
        child[up] += 1
    return tuple(child)


def random_levels(
    like: Levels, groups: Sequence[Sequence[int]], n_levels: Sequence[int], generator: torch.Generator
) -> Levels:
    """Levels at random with the sums that `like` has in each group: all begin at 0, and parts that are not at
    their highest level go up, one at a time. With two levels every choice has the same probability.

    >>> sum(random_levels((1, 1, 1, 0), [(0, 1, 2, 3)], (2, 2, 2, 2), torch.Generator().manual_seed(0)))
    3
    """
    levels = [0] * len(like)
    for group in groups:
        for _ in range(sum(like[i] for i in group)):
            room = [i for i in group if levels[i] < n_levels[i] - 1]
            levels[room[_draw(len(room), generator)]] += 1
    return tuple(levels)


def every(start: Levels, groups: Sequence[Sequence[int]], n_levels: Sequence[int]) -> list[Levels]:
    """All levels with the sums of `start` in each group, by enumeration; at most 2^20 are looked at.

    Raises ValueError for a larger problem.

    >>> every((0, 1, 1), [(0, 1, 2)], (2, 2, 2))
    [(0, 1, 1), (1, 0, 1), (1, 1, 0)]
    """
    if prod(n_levels) > 2**20:
        raise ValueError(f"n_levels: {prod(n_levels)} combinations are too many to enumerate")
    sums = [sum(start[i] for i in group) for group in groups]
    return [
        levels
        for levels in product(*map(range, n_levels))
        if all(sum(levels[i] for i in group) == total for group, total in zip(groups, sums, strict=True))
    ]


def not_monotone(sums: Sequence[float], losses: Sequence[float]) -> tuple[int, int] | None:
    """Two candidates i, j with sums[i] < sums[j] and losses[i] > losses[j], the pair of largest difference in
    loss; None where the loss grows with the sum of the errors of the parts.

    >>> not_monotone([1.0, 2.0, 3.0], [0.5, 0.4, 0.1]), not_monotone([1.0, 2.0], [0.1, 0.2])
    ((0, 2), None)
    """
    s, loss = np.asarray(sums, float), np.asarray(losses, float)
    if s.ndim != 1 or s.shape != loss.shape or not (np.isfinite(s).all() and np.isfinite(loss).all()):
        raise ValueError(f"sums and losses must be finite numbers [n], got {s.shape} and {loss.shape}")
    if len(s) == 0:
        return None
    excess = np.where(s[:, None] < s[None, :], loss[:, None] - loss[None, :], 0)
    i, j = np.unravel_index(excess.argmax(), excess.shape)
    return (int(i), int(j)) if excess[i, j] > 0 else None


def _draw(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator, device=generator.device))
