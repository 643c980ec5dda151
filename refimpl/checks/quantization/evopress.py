"""The checks of EvoPress (quantization spec, section 25; arXiv 2410.14649)."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import LAYERS, random_ids, tiny

IMPLEMENTATION = {
    "evopress": "refimpl.quantization.evopress:evolve",
    "evopress_database": "refimpl.quantization.evopress_database:drop_database",
}
STAGES = ((5, 10), (2, 30), (1, 90))


class _Problem:
    """Two groups with a known best choice, a loss that does not add up, and a record of every call."""

    def __init__(self, sizes: tuple[int, int] = (5, 4), noise: float = 0.0) -> None:
        n = sum(sizes)
        self.groups = [tuple(range(sizes[0])), tuple(range(sizes[0], n))]
        self.n_levels = (3,) * n
        generator = torch.Generator().manual_seed(1)
        self.price = torch.rand(n, generator=generator, dtype=torch.float64)
        pairs = torch.rand(n, n, generator=generator, dtype=torch.float64)
        self.pairs = (pairs + pairs.T) / n
        self.noise, self.calls = noise, []

    def loss(self, levels: tuple[int, ...]) -> float:
        lost = 2 - torch.tensor(levels, dtype=torch.float64)
        return float(lost.square() @ self.price + lost @ self.pairs @ lost)

    def fitness(self, candidates: list, tokens: int, generator: torch.Generator) -> list[float]:
        draw = float(torch.rand(1, generator=generator, dtype=torch.float64))
        found = [self.loss(c) + self.noise * draw * sum(c[::2]) for c in candidates]
        self.calls.append((list(candidates), tokens, draw, found))
        return found


@check
def check_evopress(evolve: Callable) -> None:
    """`evolve(problem, start, generator, generations=, offspring=, stages=)` -> levels, parents, fitness,
    tokens."""
    problem, start = _Problem(noise=0.5), (1,) * 9
    settings = {"generations": 6, "offspring": 12, "stages": STAGES}
    found = evolve(problem, start, torch.Generator().manual_seed(0), **settings)
    expected = 6 * (12 * 10 + 5 * 30 + 3 * 90)
    require(len(problem.calls) == 18, f"{len(problem.calls)} evaluations instead of 3 stages x 6 generations")
    require(found.tokens == expected, f"tokens are {found.tokens} instead of {expected}")
    draws = [draw for _, _, draw, _ in problem.calls]
    require(len(set(draws)) == 18, "two stages were evaluated on the same draw of tokens")
    parent = start
    for generation in range(6):
        calls = problem.calls[3 * generation : 3 * generation + 3]
        for (candidates, tokens, _, _), (_, wanted), size in zip(calls, STAGES, (12, 5, 3), strict=True):
            what = f"generation {generation}, stage of {wanted} tokens"
            require(tokens == wanted, f"{what}: evaluated on {tokens} tokens")
            require(len(set(candidates)) == len(candidates), f"{what}: a candidate occurs twice")
            for candidate in candidates:
                sums = [sum(candidate[i] for i in group) for group in problem.groups]
                require(sums == [5, 4], f"{what}: the sums of the groups are {sums}, the budget is [5, 4]")
                require(0 <= min(candidate) and max(candidate) <= 2, f"{what}: no such level in {candidate}")
                moved = sum(abs(a - b) for a, b in zip(candidate, parent, strict=True)) // 2
                require(moved <= 3, f"{what}: {moved} levels of the parent were switched at once, not 1 to 3")
            require(len(candidates) == size, f"{what}: {len(candidates)} candidates instead of {size}")
        require(parent not in calls[0][0], f"generation {generation}: the parent is among its children")
        last = calls[-1][0]
        require(parent in last, f"generation {generation}: the parent is not in the last stage (no elitism)")
        for (candidates, _, _, losses), (after, *_), (keep, _) in zip(calls, calls[1:], STAGES, strict=False):
            ranked = [c for _, c in sorted(zip(losses, candidates, strict=True))][:keep]
            require(
                set(after) - {parent} == set(ranked), "a stage did not keep the candidates of lowest loss"
            )
        parent = last[min(range(len(last)), key=lambda i: calls[-1][3][i])]
        require(found.parents[generation] == parent, f"generation {generation}: the parent is not the best")
    _check_result(evolve)
    _check_switches(evolve)


def _check_result(evolve: Callable) -> None:
    """Without noise the loss never rises, and the best of all candidates is found."""
    problem = _Problem()
    settings = {"generations": 30, "offspring": 12, "stages": ((4, 1), (1, 1))}
    found = evolve(problem, (1,) * 9, torch.Generator().manual_seed(3), **settings)
    losses = [problem.loss(levels) for levels in ((1,) * 9, *found.parents)]
    require(all(b <= a for a, b in zip(losses, losses[1:], strict=False)), "the parent's loss went up")
    allowed = [c for c in product(range(3), repeat=9) if sum(c[:5]) == 5 and sum(c[5:]) == 4]
    best = min(map(problem.loss, allowed))
    reached = problem.loss(found.levels)
    require(reached <= best + 1e-9, f"the loss is {reached:.4g}, the best of all candidates has {best:.4g}")


def _check_switches(evolve: Callable) -> None:
    """The number of switches is the smaller of two draws from 1, 2, 3: 14/9 on average."""
    problem = _Problem((16, 16))
    evolve(
        problem, (1,) * 32, torch.Generator().manual_seed(0), generations=1, offspring=400, stages=((1, 1),)
    )
    moved = [sum(abs(level - 1) for level in c) / 2 for c in problem.calls[0][0] if c != (1,) * 32]
    mean = sum(moved) / len(moved)
    require(1.35 < mean < 1.7, f"children are {mean:.2f} switches from their parent on average, not 1.55")


@check
def check_evopress_database(drop_database: Callable) -> None:
    """`drop_database(model, ids, "sub-blocks" | "blocks")` -> groups, n_levels, nbytes(levels),
    fitness(candidates, tokens, generator), losses(levels), install(levels); level 0 is dropped."""
    ids = random_ids(4, 10)
    for family in ("llama", "gpt2"):
        model = tiny(family)
        before = {key: t.clone() for key, t in model.state_dict().items()}
        database = drop_database(model, ids, "sub-blocks")
        n = 2 * LAYERS
        require(tuple(database.n_levels) == (2,) * n, f"{family}: n_levels are {tuple(database.n_levels)}")
        groups = sorted(tuple(group) for group in database.groups)
        require(groups == [(0, 2, 4), (1, 3, 5)], f"{family}: attention and MLP are not apart: {groups}")
        dense = _log_probs(model, ids)
        for levels in ((1, 1, 0, 1, 1, 1), (1, 1, 1, 0, 1, 1), (0, 1, 1, 1, 1, 0)):
            what = f"{family}, levels {levels}"
            expected = _kl(dense, _log_probs(_dropped(family, levels), ids))
            require_close(database.losses(levels), expected, 1e-4, f"{what}: KL(dense || dropped) per row")
            [loss] = database.fitness([levels], 40, torch.Generator().manual_seed(0))
            require(abs(loss - float(expected.mean())) < 1e-4, f"{what}: the fitness is {loss:.5g}")
            same = all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
            require(same, f"{what}: the model has not its own weights back after it was evaluated")
        levels = (1, 1, 0, 1, 1, 1)
        less = database.nbytes((1,) * n) - database.nbytes(levels)
        size = sum(p.nbytes for p in _sub_blocks(model)[2].parameters())
        require(less == size, f"{family}: an attention of {size} bytes was dropped and {less} were saved")
        database.install(levels)
        wanted = _log_probs(_dropped(family, levels), ids)
        require_close(_log_probs(model, ids), wanted, 1e-4, f"{family}: the model with the levels installed")


def _sub_blocks(model: nn.Module) -> list[nn.Module]:
    """Attention and MLP of every block in turn."""
    if hasattr(model, "transformer"):
        return [part for block in model.transformer.h for part in (block.attn, block.mlp)]
    return [part for block in model.model.layers for part in (block.self_attn, block.mlp)]


def _dropped(family: str, levels: tuple[int, ...]) -> nn.Module:
    """The tiny model with the outputs of sub-blocks at level 0 set to zero."""

    def zero(_: nn.Module, inputs: object, output: Tensor | tuple) -> Tensor | tuple:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    model = tiny(family)
    for part, level in zip(_sub_blocks(model), levels, strict=True):
        if level == 0:
            part.register_forward_hook(zero)
    return model


def _log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.double().log_softmax(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1).mean(1)
