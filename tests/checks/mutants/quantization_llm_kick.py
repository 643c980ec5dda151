"""Plausible but wrong ways to compare at equal perplexity that the check must reject."""

import numpy as np

from refimpl.quantization.evaluation.llm_kick import Match, match


def by_eye(nll, values, dense_nll, dense_values, increase):
    """The variant that is nearest."""
    match(nll, values, dense_nll, dense_values, increase)
    points = (np.asarray(nll) - dense_nll).mean(1)
    nearest = int(abs(points - increase).argmin())
    return Match((nearest, nearest), 0.0, 0.0, np.asarray(values)[nearest])


def unordered(nll, values, dense_nll, dense_values, increase):
    """Between neighbours in the order in which the variants were given."""
    match(nll, values, dense_nll, dense_values, increase)
    points = [0.0, *(np.asarray(nll) - dense_nll).mean(1)]
    each = [np.asarray(dense_values), *np.asarray(values)]
    i = next(i for i, point in enumerate(points) if point >= increase)
    weight = (increase - points[i - 1]) / (points[i] - points[i - 1])
    return Match((i - 2, i - 1), weight, 1.0, (1 - weight) * each[i - 1] + weight * each[i])


def in_perplexity(nll, values, dense_nll, dense_values, increase):
    """Weights from the distance in perplexity, which is another curve."""
    found = match(nll, values, dense_nll, dense_values, increase)
    points = [0.0, *(np.asarray(nll) - dense_nll).mean(1)]
    each = [np.asarray(dense_values), *np.asarray(values)]
    low, high = (i + 1 for i in found.between)
    weight = (np.exp(increase) - np.exp(points[low])) / (np.exp(points[high]) - np.exp(points[low]))
    return Match(found.between, weight, found.apart, (1 - weight) * each[low] + weight * each[high])


def held(nll, values, dense_nll, dense_values, increase):
    """Beyond the last variant its values are held."""
    most = float((np.asarray(nll) - dense_nll).mean(1).max())
    return match(nll, values, dense_nll, dense_values, min(increase, most))


MUTANTS = [
    ("llm_kick", "matched by eye: the nearest variant", by_eye),
    ("llm_kick", "variants are not put in the order of their loss", unordered),
    ("llm_kick", "interpolated in perplexity, not in nats", in_perplexity),
    ("llm_kick", "extrapolated beyond what was measured", held),
]
