"""Plausible but wrong rank correlations that the check must reject."""

import numpy as np

from refimpl.evaluate import Estimate
from refimpl.quantization.evaluation.strategies import rank_correlation, spearman


def _with(statistic, together=True, resample=True):
    def correlation(nll, exact, *, rng, n_boot=1000):
        x, y = np.asarray(nll, float), np.asarray(exact, float)
        value, draws = statistic(-x.mean(1), y.mean(1)), []
        for _ in range(n_boot if resample else 0):
            shape = (1 if together else len(x),)
            i, j = (rng.integers(0, a.shape[1], (*shape, a.shape[1])) for a in (x, y))
            rows = np.arange(len(x))[:, None]
            draws.append(statistic(-x[rows, i].mean(1), y[rows, j].mean(1)))
        lo, hi = np.nanpercentile(draws, [2.5, 97.5]) if draws else (value, value)
        return Estimate(value, float(lo), float(hi), len(x))

    return correlation


def _values(a, b):
    return float(np.corrcoef(a, b)[0, 1]) if a.std() * b.std() else float("nan")


def _first_come(a, b):
    return _values(a.argsort(kind="stable").argsort(), b.argsort(kind="stable").argsort())


def rising(nll, exact, *, rng, n_boot=1000):
    return rank_correlation(-np.asarray(nll), exact, rng=rng, n_boot=n_boot)


MUTANTS = [
    ("quantization_evaluation", "the values are correlated, not their ranks", _with(_values)),
    ("quantization_evaluation", "equal accuracies are ranked as they come", _with(_first_come)),
    ("quantization_evaluation", "rising perplexity: the sign is wrong", rising),
    ("quantization_evaluation", "every variant gets other documents", _with(spearman, together=False)),
    ("quantization_evaluation", "an interval without resampling", _with(spearman, resample=False)),
]
