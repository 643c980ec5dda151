"""Plausible but wrong experiments that the check of LLMC must reject."""

import copy

import numpy as np

from refimpl.evaluate import Estimate
from refimpl.quantization.evaluation.llmc import Variation, vary, with_value


def off(run, recipe, factor, values, seeds=(0,)):
    """Switched off: the recipe runs as it is, whatever the value."""
    recipes = [with_value(recipe, "calib.seed", seed) for seed in seeds]
    return Variation(factor, {value: np.array([run(one) for one in recipes]) for value in values})


def same_text(run, recipe, factor, values, seeds=(0,)):
    """The recipe's calibration is ignored: every value of a factor of it gets the same text."""
    return (off if factor.startswith("calib.") else vary)(run, recipe, factor, values, seeds)


def cumulative(run, recipe, factor, values, seeds=(0,)):
    """The entry is written into the recipe itself."""
    *path, last = factor.split(".")
    place = recipe
    for key in path:
        place = place[key]
    scores = {}
    for value in values:
        place[last] = value
        scores[value] = np.array([run(with_value(recipe, "calib.seed", seed)) for seed in seeds])
    return Variation(factor, scores)


def other_seeds(run, recipe, factor, values, seeds=(0,)):
    """Every value is given seeds of its own."""
    scores = {}
    for i, value in enumerate(values):
        one = with_value(recipe, factor, value)
        scores[value] = np.array([run(with_value(one, "calib.seed", (s + i) % 10)) for s in seeds])
    return Variation(factor, scores)


def two_factors(run, recipe, factor, values, seeds=(0,)):
    """More bits come with a wider group, as people do to keep the bytes."""
    wider = copy.deepcopy(recipe)
    wider["quant"]["weight"]["group_size"] = 64
    return vary(run, wider, factor, values, seeds)


def first_seed_only(run, recipe, factor, values, seeds=(0,)):
    found = vary(run, recipe, factor, values, seeds)
    return Variation(factor, {v: np.repeat(s[:1], len(seeds), 0) for v, s in found.scores.items()})


class Unpaired(Variation):
    def gain(self, value, other, seed=0):
        a, b, rng = self.scores[value].mean(0), self.scores[other].mean(0), np.random.default_rng(seed)
        n = len(a)
        draws = [a[rng.integers(0, n, n)].mean() - b[rng.integers(0, n, n)].mean() for _ in range(500)]
        return Estimate(float(a.mean() - b.mean()), *map(float, np.percentile(draws, [2.5, 97.5])), n)


def unpaired(run, recipe, factor, values, seeds=(0,)):
    return Unpaired(factor, vary(run, recipe, factor, values, seeds).scores)


MUTANTS = [
    ("llmc", "off: nothing is varied", off),
    ("llmc", "off: the calibration text is not varied", same_text),
    ("llmc", "the recipe is changed for good", cumulative),
    ("llmc", "values are compared under different seeds", other_seeds),
    ("llmc", "a second factor changes as well", two_factors),
    ("llmc", "one seed stands for all", first_seed_only),
    ("llmc", "the interval ignores the pairs", unpaired),
]
