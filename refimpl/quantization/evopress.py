"""EvoPress: search for the level at which each part of a model is compressed, under a budget kept exactly.

Implements arXiv 2410.14649, Algorithm 1, a (1 + lambda) evolutionary search: one parent, children by mutation
only, and the parent stays unless a child is better on the same tokens. A mutation switches levels: one part
goes down by one and another of the same group, where a level costs the same, goes up by one, so every
candidate costs what the first one does. Children are compared in stages, on more and more tokens and fewer
and fewer of them; each stage draws its tokens anew, the same for all that it compares.

Which levels there are (bits, sparsities, kept or dropped) is the business of a `Problem`: for models see
`refimpl.quantization.evopress_database`.

Where this differs from the authors' code: a switch never takes and gives at one and the same part; the parent
joins the last stage only, not every stage with as many survivors as the last; a stage may not ask for more
tokens than there are (the code would not end).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from refimpl.quantization.evopress_levels import Levels, mutate, random_levels

__all__ = ["Found", "Problem", "evolve", "random_search"]

Propose = Callable[[Levels, torch.Generator], Levels]
QUANTIZATION_STAGES = ((16, 2048), (4, 16384), (1, 131072))


class Problem(Protocol):
    """What is searched.

    - groups: the indices of the parts, each in one group; a level up costs the same everywhere in a group.
    - n_levels: how many levels each part has, 0 .. n - 1.
    - fitness: losses of candidates, lower is better, on `tokens` tokens that the generator draws anew at each
      call, the same for all candidates of the call.
    """

    groups: Sequence[Sequence[int]]
    n_levels: Sequence[int]

    def fitness(
        self, candidates: Sequence[Levels], tokens: int, generator: torch.Generator
    ) -> Sequence[float]: ...


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    - levels: the last parent. parents: that of every generation; fitness: its loss in the last stage. Losses
      of two generations are those of different tokens and cannot be compared. With few tokens there a parent
      is replaced by what was lucky, and the loss on a fixed text can rise over the generations.
    - tokens: sum over all candidates of the tokens they were run on.
    """

    levels: Levels
    parents: tuple[Levels, ...]
    fitness: tuple[float, ...]
    tokens: int


def evolve(
    problem: Problem,
    start: Levels,
    generator: torch.Generator,
    *,
    generations: int = 150,
    offspring: int = 128,
    stages: Sequence[tuple[int, int]] = QUANTIZATION_STAGES,
    initial: tuple[int, int] | None = None,
) -> Found:
    """Search with mutations of the best candidate so far.

    Parameters
    ----------
    problem : see `Problem`.
    start : the first parent, whose cost is the budget; usual: one level for all.
    generator : draws mutations and, inside `problem`, tokens.
    generations, offspring, stages : each generation has `offspring` children, different from each other and
        from the parent (fewer where there are not as many); a stage (survivors, tokens) keeps the best
        `survivors` on that many tokens; the last keeps 1, and the parent takes part in it. The paper's:
        bits 150, 128, ((16, 2048), (4, 16384), (1, 131072));
        sparsity 400, 64, ((8, 2048), (2, 16384), (1, 65536));
        depth k (n - k) / 1.5 for k of n blocks, 32, ((2, 2048), (1, 32768)).
    initial : (candidates, tokens): begin with the best of so many `random_levels` (depth: (64, 2048)).

    Returns a `Found`. Raises ValueError, before anything is run, for levels that the problem does not have
    and for counts or stages out of range, and whatever `problem.fitness` raises.

    Examples
    --------
    >>> class Toy:
    ...     groups, n_levels = [range(6)], (3,) * 6
    ...     def fitness(self, candidates, tokens, generator):
    ...         return [sum((2 - level) ** 2 * i for i, level in enumerate(c)) for c in candidates]
    >>> settings = {"generations": 20, "offspring": 4, "stages": ((2, 1), (1, 4))}
    >>> evolve(Toy(), (1,) * 6, torch.Generator().manual_seed(0), **settings).levels
    (0, 0, 1, 1, 2, 2)
    """

    def child(parent: Levels, generator: torch.Generator) -> Levels:
        return mutate(parent, problem.groups, problem.n_levels, generator)

    return _search(problem, start, generator, child, generations, offspring, stages, initial)


def random_search(
    problem: Problem,
    start: Levels,
    generator: torch.Generator,
    *,
    generations: int = 150,
    offspring: int = 128,
    stages: Sequence[tuple[int, int]] = QUANTIZATION_STAGES,
    initial: tuple[int, int] | None = None,
) -> Found:
    """The baseline: as `evolve`, with the same evaluations, but children are `random_levels` of the same
    budget and have nothing of their parent."""

    def child(parent: Levels, generator: torch.Generator) -> Levels:
        return random_levels(parent, problem.groups, problem.n_levels, generator)

    return _search(problem, start, generator, child, generations, offspring, stages, initial)


def _search(
    problem: Problem,
    start: Levels,
    generator: torch.Generator,
    propose: Propose,
    generations: int,
    offspring: int,
    stages: Sequence[tuple[int, int]],
    initial: tuple[int, int] | None,
) -> Found:
    _check(problem, start, generator, generations, offspring, stages, initial)
    parent, parents, fitness, used = tuple(start), [], [], 0
    if initial is not None:
        draw = lambda like, g: random_levels(like, problem.groups, problem.n_levels, g)
        candidates = _different(draw, parent, initial[0], generator, taken=set())
        [parent], _ = _select(problem, candidates, 1, initial[1], generator)
        used += len(candidates) * initial[1]
    for _ in range(generations):
        alive = _different(propose, parent, offspring, generator, taken={parent})
        for number, (survivors, tokens) in enumerate(stages, 1):
            if number == len(stages):
                alive.append(parent)
            used += len(alive) * tokens
            alive, losses = _select(problem, alive, survivors, tokens, generator)
        parent = alive[0]
        parents.append(parent)
        fitness.append(losses[0])
    return Found(parent, tuple(parents), tuple(fitness), used)


def _select(
    problem: Problem, candidates: list[Levels], survivors: int, tokens: int, generator: torch.Generator
) -> tuple[list[Levels], list[float]]:
    losses = [float(loss) for loss in problem.fitness(candidates, tokens, generator)]
    best = np.argsort(losses, kind="stable")[:survivors]
    return [candidates[i] for i in best], [losses[i] for i in best]


def _different(
    propose: Propose, parent: Levels, count: int, generator: torch.Generator, taken: set[Levels]
) -> list[Levels]:
    """Up to `count` different proposals that are not taken; a small problem may not have as many."""
    found: dict[Levels, None] = {}
    for _ in range(20 * count):
        child = propose(parent, generator)
        if child not in taken:
            found[child] = None
        if len(found) == count:
            break
    return list(found)


def _check(
    problem: Problem,
    start: Levels,
    generator: torch.Generator,
    generations: int,
    offspring: int,
    stages: Sequence[tuple[int, int]],
    initial: tuple[int, int] | None,
) -> None:
    n_levels = problem.n_levels
    parts = sorted(i for group in problem.groups for i in group)
    if parts != list(range(len(n_levels))):
        raise ValueError(f"groups must have each of the {len(n_levels)} parts once, got {parts}")
    if len(start) != len(n_levels) or any(
        type(l) is not int or not 0 <= l < n for l, n in zip(start, n_levels, strict=True)
    ):
        raise ValueError(f"start must be {len(n_levels)} levels below {tuple(n_levels)}, got {tuple(start)}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    numbers = [("generations", generations), ("offspring", offspring)]
    numbers += [("initial", n) for n in initial or ()] + [("stages", n) for stage in stages for n in stage]
    for name, number in numbers:
        if type(number) is not int or number < 1:
            raise ValueError(f"{name}: counts must be integers >= 1, got {number!r}")
    kept = [offspring, *(survivors for survivors, _ in stages)]
    if not stages or kept[-1] != 1 or any(a < b for a, b in pairwise(kept)):
        raise ValueError(f"stages must keep fewer and fewer of {offspring}, the last 1, got {kept[1:]}")
