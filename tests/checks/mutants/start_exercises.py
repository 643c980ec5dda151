"""Mistakes that a reader of chapter 0 may make, and the right answers."""

import math

import torch
import torch.nn.functional as F


def bits_per_byte(nll, n_bytes):
    return nll / math.log(2) / n_bytes


def perplexity(logits, ids):
    return F.cross_entropy(logits[:-1], ids[1:]).exp().item()


def induction_score(pattern, period):
    return pattern.diagonal(offset=1 - period)[2:].mean().item()


SOLUTIONS = {"bits_per_byte": bits_per_byte, "perplexity": perplexity, "induction_score": induction_score}


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
]
