"""Plausible but wrong EvoPress that its checks must reject."""

import torch

from refimpl.quantization import evopress
from refimpl.quantization.evopress import Found, random_search
from refimpl.quantization.evopress_database import Database, drop_database
from refimpl.quantization.evopress_levels import mutate


def off(problem, start, generator, *, generations, offspring, stages):
    """The uniform start, evaluated and never left."""
    used = 0
    for _ in range(generations):
        for _, tokens in stages:
            problem.fitness([start], tokens, generator)
            used += tokens
    return Found(start, (start,) * generations, (0.0,) * generations, used)


def _evolve(problem, start, generator, generations, offspring, stages, child, elitist=True, fresh=True):
    parent, parents, used = start, [], 0
    for _ in range(generations):
        alive = {}
        while len(alive) < offspring:
            one = child(parent, generator)
            if one != parent:
                alive[one] = None
        alive = list(alive)
        state = generator.get_state()
        for number, (keep, tokens) in enumerate(stages, 1):
            if number == len(stages) and elitist:
                alive.append(parent)
            if not fresh:
                generator.set_state(state)
            losses = problem.fitness(alive, tokens, generator)
            used += tokens * len(alive)
            alive = [alive[i] for i in torch.tensor(losses).argsort()[:keep].tolist()]
        parent = alive[0]
        parents.append(parent)
    return Found(parent, tuple(parents), (), used)


def no_elitism(problem, start, generator, **settings):
    child = lambda parent, g: mutate(parent, problem.groups, problem.n_levels, g)
    return _evolve(problem, start, generator, **settings, child=child, elitist=False)


def same_tokens(problem, start, generator, **settings):
    child = lambda parent, g: mutate(parent, problem.groups, problem.n_levels, g)
    return _evolve(problem, start, generator, **settings, child=child, fresh=False)


def across_groups(problem, start, generator, **settings):
    everything = [tuple(range(len(start)))]
    child = lambda parent, g: mutate(parent, everything, problem.n_levels, g)
    return _evolve(problem, start, generator, **settings, child=child)


def always_three(problem, start, generator, **settings):
    child = lambda parent, g: mutate(parent, problem.groups, problem.n_levels, g, switches=3)
    return _evolve(problem, start, generator, **settings, child=child)


def one_stage(problem, start, generator, *, generations, offspring, stages):
    return evopress.evolve(
        problem, start, generator, generations=generations, offspring=offspring, stages=stages[-1:]
    )


class Reversed(Database):
    """KL(candidate || dense)."""

    def _kl(self, rows, length):
        with torch.no_grad():
            q = self.bb.model(self.ids[rows, :length]).logits.log_softmax(-1)
        return (q.exp() * (q - self.dense[rows, :length].log())).sum((1, 2))


class NotRestored(Database):
    def restore(self):
        pass


class OneGroup(Database):
    def __init__(self, *args):
        super().__init__(*args)
        self.groups = (tuple(range(len(self.n_levels))),)


def _with(cls):
    def make(model, ids, parts="sub-blocks"):
        plain = drop_database(model, ids, parts)
        kinds = [part.split()[1] for part in plain.parts]
        return cls(model, ids, dict(zip(plain.parts, plain.choices, strict=True)), kinds)

    return make


MUTANTS = [
    ("evopress", "the uniform levels are returned", off),
    ("evopress", "random search: children have nothing of their parent", random_search),
    ("evopress", "the parent does not take part in the last stage", no_elitism),
    ("evopress", "all stages of a generation see the same tokens", same_tokens),
    ("evopress", "levels are switched between groups", across_groups),
    ("evopress", "three switches in every child", always_three),
    ("evopress", "one stage on all tokens", one_stage),
    ("evopress_database", "KL the other way round", _with(Reversed)),
    ("evopress_database", "a candidate's weights stay in the model", _with(NotRestored)),
    ("evopress_database", "attention and MLP in one group", _with(OneGroup)),
]
