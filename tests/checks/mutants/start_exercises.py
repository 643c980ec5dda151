"""Mistakes that a reader of chapter 0 may make, and the right answers."""

import math
import re
import string

import torch
import torch.nn.functional as F


def bits_per_byte(nll, n_bytes):
    return nll / math.log(2) / n_bytes


def perplexity(logits, ids):
    return F.cross_entropy(logits[:-1], ids[1:]).exp().item()


def induction_score(pattern, period):
    return pattern.diagonal(offset=1 - period)[2:].mean().item()


def wilson(k, n, z=1.959964):
    p = k / n
    centre, root = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - root) / (1 + z * z / n)), min(1.0, (centre + root) / (1 + z * z / n))


def _normal(text):
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in text.split() if word not in {"a", "an", "the"})


def exact_match(prediction, gold):
    return _normal(prediction) == _normal(gold)


def both_orders(right, first, swapped):
    hits = [f == r and s != r for r, f, s in zip(right, first, swapped, strict=True)]
    return sum(hits) / len(hits)


SOLUTIONS = {
    "bits_per_byte": bits_per_byte,
    "perplexity": perplexity,
    "induction_score": induction_score,
    "wilson": wilson,
    "exact_match": exact_match,
    "both_orders": both_orders,
}


def _off_by_one(logits, ids):
    return F.cross_entropy(logits, ids).exp().item()


def _one_prediction_too_many(logits, ids):
    return math.exp(F.cross_entropy(logits[:-1], ids[1:], reduction="sum").item() / len(ids))


def _mean_of_exp(logits, ids):
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none").exp().mean().item()


def _not_normalised(logits, ids):
    return math.exp(-logits[:-1].gather(1, ids[1:, None]).mean().item())


def _previous_occurrence(pattern, period):
    return pattern.diagonal(offset=-period)[1:].mean().item()


def _first_copy_too(pattern, period):
    return pattern.diagonal(offset=1 - period).sum().item() / (len(pattern) - 1)


def _maximum(pattern, period):
    return pattern.diagonal(offset=1 - period)[2:].max().item()


def _wald(k, n):
    half = 1.959964 * math.sqrt(k / n * (1 - k / n) / n)
    return k / n - half, k / n + half


def _share(hits):
    return sum(hits) / len(hits)


MUTANTS = [
    ("bits_per_byte", "nats per byte", lambda nll, n: nll / n),
    ("bits_per_byte", "multiplies by ln 2", lambda nll, n: nll * math.log(2) / n),
    ("bits_per_byte", "base 10", lambda nll, n: nll / math.log(10) / n),
    ("perplexity", "logits and ids not shifted", _off_by_one),
    ("perplexity", "divides by T instead of T-1", _one_prediction_too_many),
    ("perplexity", "mean of exp instead of exp of mean", _mean_of_exp),
    ("perplexity", "logits taken for log-probabilities", _not_normalised),
    ("perplexity", "base 2 for an NLL in nats", lambda x, ids: 2 ** F.cross_entropy(x[:-1], ids[1:]).item()),
    ("induction_score", "attention to the previous occurrence itself", _previous_occurrence),
    ("induction_score", "the first copy counted in the mean", _first_copy_too),
    ("induction_score", "maximum instead of mean", _maximum),
    ("induction_score", "previous-token score", lambda p, s: p.diagonal(offset=-1)[s:].mean().item()),
    ("induction_score", "switched off", lambda p, s: torch.zeros(()).item()),
    ("wilson", "standard error taken at k/n", _wald),
    ("wilson", "the same, cut to [0, 1]", lambda k, n: (max(0.0, _wald(k, n)[0]), min(1.0, _wald(k, n)[1]))),
    ("wilson", "a 90 % interval", lambda k, n: wilson(k, n, 1.644854)),
    ("wilson", "switched off: only the share", lambda k, n: (k / n, k / n)),
    ("exact_match", "switched off: compares the strings", lambda p, g: p == g),
    ("exact_match", "contains the gold answer", lambda p, g: _normal(g) in _normal(p)),
    ("exact_match", "articles removed inside words",
     lambda p, g: re.sub("the|an|a", "", p.lower().strip(" .")) == re.sub("the|an|a", "", g.lower())),
    ("exact_match", "articles kept", lambda p, g: p.lower().strip(" .") == g.lower()),
    ("both_orders", "first order only", lambda r, f, s: _share([a == b for a, b in zip(r, f, strict=True)])),
    ("both_orders", "mean of the two accuracies",
     lambda r, f, s: (_share([a == b for a, b in zip(r, f, strict=True)])
                      + _share([a != b for a, b in zip(r, s, strict=True)])) / 2),
    ("both_orders", "the letter is not swapped",
     lambda r, f, s: _share([a == b == c for a, b, c in zip(r, f, s, strict=True)])),
    ("both_orders", "agreement of the two answers, right or not",
     lambda r, f, s: _share([b != c for b, c in zip(f, s, strict=True)])),
]
