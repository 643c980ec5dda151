"""Mistakes that a reader of the notebook on what perplexity hides may make, and the right answers."""

import math

import numpy as np


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence_and_flips(old, new):
    p, q = _log_softmax(old), _log_softmax(new)
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    return float(kl), float((old.argmax(-1) != new.argmax(-1)).mean())


def _ranks(x):
    return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])


def rank_agreement(a, b):
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _pairs(nll, exact, width):
    decided = inverted = 0
    for i in range(len(nll)):
        for j in range(i + 1, len(nll)):
            a, b = (width(x[i], x[j]) for x in (nll, exact))
            decided += a * b != 0
            inverted += a * b > 0
    return decided, inverted


def _paired(x, y):
    d = x - y
    error = d.std(ddof=1) / np.sqrt(len(d))
    return float(d.mean()) if abs(d.mean()) > 1.96 * error else 0.0


def _unpaired(x, y):
    error = np.sqrt(x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y))
    return float(x.mean() - y.mean()) if abs(x.mean() - y.mean()) > 1.96 * error else 0.0


def inverted_pairs(nll, exact):
    return _pairs(nll, exact, _paired)


def _swapped(nll, exact):
    decided, inverted = inverted_pairs(nll, exact)
    return decided, decided - inverted


def track_score(ratios, power):
    r = np.array(ratios, float)
    if power <= 0 and r.min() == 0:
        return 0.0
    if power == -math.inf:
        return float(r.min())
    if power == 0:
        return float(np.exp(np.log(r).mean()))
    return float((r**power).mean() ** (1 / power))


def _summed(ratios, power):
    r = np.array(ratios, float)
    if power in (0, -math.inf):
        return track_score(ratios, power)
    return float((r**power).sum() ** (1 / power)) if r.min() else 0.0


SOLUTIONS = {
    "divergence_and_flips": divergence_and_flips,
    "rank_agreement": rank_agreement,
    "inverted_pairs": inverted_pairs,
    "track_score": track_score,
}

MUTANTS = [
    ("divergence_and_flips", "the divergence turned around", lambda old, new: (
        divergence_and_flips(new, old)[0], divergence_and_flips(old, new)[1]
    )),
    ("divergence_and_flips", "logits taken for log-probabilities", lambda old, new: (
        float((np.exp(_log_softmax(old)) * (old - new)).sum(-1).mean()), divergence_and_flips(old, new)[1]
    )),
    ("rank_agreement", "of the values", lambda a, b: float(np.corrcoef(a, b)[0, 1])),
    ("rank_agreement", "equal values in the order they come", lambda a, b: float(
        np.corrcoef(*(np.argsort(np.argsort(x, kind="stable")) for x in (a, b)))[0, 1]
    )),
    ("inverted_pairs", "not paired", lambda nll, exact: _pairs(nll, exact, _unpaired)),
    ("inverted_pairs", "every difference counts", lambda nll, exact: _pairs(
        nll, exact, lambda x, y: float(x.mean() - y.mean())
    )),
    ("inverted_pairs", "concordant pairs counted", _swapped),
    ("track_score", "always the root mean square", lambda ratios, power: track_score(ratios, 2)),
    ("track_score", "a sum instead of a mean", _summed),
]  # fmt: skip
