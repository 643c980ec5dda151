"""Mistakes that a reader of the notebook on prompt pruning may make, and the right answers."""

import itertools
import math

import torch


def prompt_budget(rate, instruction, documents, question):
    return int(rate * (instruction + sum(documents) + question) + 1e-9) - instruction - question


def keep_words(p, words, budget):
    mean = torch.zeros(int(words[-1]) + 1, dtype=torch.float64).index_add_(0, words, p.double())
    size = words.bincount()
    order = (mean / size).sort(descending=True, stable=True).indices
    taken = order[size[order].cumsum(0) <= budget]
    return torch.isin(words, taken).nonzero()[:, 0].tolist()


def excess_top(student, reference, k, whole=round):
    excess = (student - reference).flatten()
    chosen = torch.zeros(len(excess), dtype=torch.bool)
    chosen[excess.topk(whole(k * len(excess))).indices] = True
    return chosen.view(student.shape)


def bernoulli_gradient(logits, reward_of):
    p, gradient = torch.sigmoid(logits), torch.zeros_like(logits)
    for kept in itertools.product([False, True], repeat=len(logits)):
        a = torch.tensor(kept, dtype=logits.dtype)
        chance = torch.where(a.bool(), p, 1 - p).prod()
        gradient += chance * reward_of(kept) * (a - p)
    return gradient


SOLUTIONS = {
    "prompt_budget": prompt_budget,
    "keep_words": keep_words,
    "excess_top": excess_top,
    "bernoulli_gradient": bernoulli_gradient,
}


def _sum_of_words(p, words, budget):
    size = words.bincount()
    return keep_words(p * size[words], words, budget)


def _skip_what_does_not_fit(p, words, budget):
    size, out = words.bincount(), []
    mean = torch.zeros(len(size)).index_add_(0, words, p) / size
    for word in mean.sort(descending=True, stable=True).indices:
        if len(out) + size[word] <= budget:
            out += (words == word).nonzero()[:, 0].tolist()
    return sorted(out)


def _per_row(student, reference, k):
    rows = [excess_top(s[None], r[None], k) for s, r in zip(student, reference, strict=True)]
    return torch.cat(rows)


def _in_the_probability(logits, reward_of):
    p = torch.sigmoid(logits)
    return bernoulli_gradient(logits, reward_of) / (p * (1 - p))


MUTANTS = [
    ("prompt_budget", "rate of the documents alone", lambda r, i, d, q: int(r * sum(d) + 1e-9)),
    ("prompt_budget", "switched off: nothing is pruned", lambda r, i, d, q: sum(d)),
    ("prompt_budget", "question forgotten", lambda r, i, d, q: prompt_budget(r, i, d, 0)),
    ("keep_words", "tokens instead of words",
     lambda p, w, b: p.sort(descending=True, stable=True).indices[:b].sort().values.tolist()),
    ("keep_words", "sums instead of means", _sum_of_words),
    ("keep_words", "goes on behind a word that does not fit", _skip_what_does_not_fit),
    ("keep_words", "switched off: the first tokens", lambda p, w, b: list(range(b))),
    ("excess_top", "per row instead of per batch", _per_row),
    ("excess_top", "the student's loss alone", lambda s, r, k: excess_top(s, torch.zeros_like(r), k)),
    ("excess_top", "switched off: all tokens", lambda s, r, k: torch.ones_like(s, dtype=torch.bool)),
    ("excess_top", "the lowest excess", lambda s, r, k: excess_top(r, s, k)),
    ("excess_top", "rounded down", lambda s, r, k: excess_top(s, r, k, int)),
    ("excess_top", "rounded up", lambda s, r, k: excess_top(s, r, k, math.ceil)),
    ("bernoulli_gradient", "with respect to the probability", _in_the_probability),
    ("bernoulli_gradient", "outcomes not weighted by their chance",
     lambda x, f: sum((torch.tensor(k).double() - torch.sigmoid(x)) * f(k)
                      for k in itertools.product([False, True], repeat=len(x)))),
    ("bernoulli_gradient", "switched off: no gradient", lambda x, f: torch.zeros_like(x)),
    ("bernoulli_gradient", "the sign of a loss", lambda x, f: -bernoulli_gradient(x, f)),
]  # fmt: skip
