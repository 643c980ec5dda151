"""Mistakes that a reader of the notebook on fetching may make, and the right answers."""

import torch


def quantised_share(bits, group, dtype_bits):
    return (bits + 2 * dtype_bits / group) / dtype_bits


def useless_rank(n, d):
    return -(-n * d // (n + d + 1))


def page_bound(q, keys):
    return torch.maximum(q * keys.amin(0), q * keys.amax(0)).sum()


def merge_parts(outputs, logs):
    return logs.softmax(0) @ outputs


SOLUTIONS = {
    "quantised_share": quantised_share,
    "useless_rank": useless_rank,
    "page_bound": page_bound,
    "merge_parts": merge_parts,
}

MUTANTS = [
    ("quantised_share", "scale and zero point forgotten", lambda b, g, w: b / w),
    ("quantised_share", "no zero point", lambda b, g, w: b / w + 1 / g),
    ("quantised_share", "one pair for each number", lambda b, g, w: b / w + 2),
    ("useless_rank", "rounded down", lambda n, d: n * d // (n + d + 1)),
    ("useless_rank", "too large where the ratio is 1", lambda n, d: n * d // (n + d + 1) + 1),
    ("useless_rank", "full rank", min),
    ("page_bound", "the largest values only", lambda q, k: (q * k.amax(0)).sum()),
    ("page_bound", "mean key", lambda q, k: q @ k.mean(0)),
    ("page_bound", "the best product itself", lambda q, k: (k @ q).max()),
    ("merge_parts", "plain mean", lambda o, l: o.mean(0)),
    ("merge_parts", "exponentials that overflow", lambda o, l: (l.exp()[:, None] * o).sum(0) / l.exp().sum()),
    ("merge_parts", "weighted by the logs", lambda o, l: (l[:, None] * o).sum(0) / l.sum()),
]
