"""Plausible but wrong subset pruning that its checks must reject."""

import dataclasses
from unittest.mock import patch

import torch

from refimpl.quantization.pruning import subset_pruning
from refimpl.quantization.pruning.subset_pruning import soft_top_k, train_subset


def clamped(scores, k, temperature):
    """Entries above 1 are cut off, and the mask no longer sums to k."""
    return soft_top_k(scores, k, temperature).clamp(max=1)


def one_softmax(scores, k, temperature):
    """k times one softmax: what was taken stays in the scores."""
    return k * torch.softmax(scores / temperature, 0)


def single_precision(scores, k, temperature):
    r, mask = scores.float(), torch.zeros_like(scores, dtype=torch.float32)
    for _ in range(k):
        p = torch.softmax(r / temperature, 0)
        mask = mask + p
        r = r + (1 - p).clamp(min=1e-30).log()
    return mask


def taken_out_tempered(scores, k, temperature):
    """log(1 - p) is added to r / t, not to r."""
    r, mask = scores / temperature, torch.zeros_like(scores)
    for _ in range(k):
        p = torch.softmax(r, 0)
        mask = mask + p
        r = r + (1 - p).clamp(min=torch.finfo(torch.float64).tiny).log()
    return mask


def hard(scores, k, temperature):
    """The top k, without relaxation."""
    return subset_pruning.hard_top_k(scores, k)


def random_subset(model, ids, k, *, generator, **settings):
    report = train_subset(model, ids, k, generator=generator, **settings)
    scores = torch.rand(report.scores.shape, generator=generator, dtype=torch.float64)
    heads = torch.zeros(scores.numel()).bool().index_fill(0, scores.flatten().topk(k).indices, True)
    return dataclasses.replace(report, scores=scores, heads=heads.view(scores.shape))


def noise_at_the_end(model, ids, k, *, generator, **settings):
    report = train_subset(model, ids, k, generator=generator, **settings)
    noisy = report.scores + 3 * subset_pruning.gumbel(tuple(report.scores.shape), generator)
    heads = torch.zeros(noisy.numel()).bool().index_fill(0, noisy.flatten().topk(k).indices, True)
    return dataclasses.replace(report, heads=heads.view(noisy.shape))


def even_over_layers(model, ids, k, **settings):
    """k / L heads of each layer, and the rest of the first."""
    report = train_subset(model, ids, k, **settings)
    L, H = report.scores.shape
    heads = torch.zeros(L, H).bool()
    for l in range(L):
        heads[l, report.scores[l].topk(k // L + (k % L if l == 0 else 0)).indices] = True
    return dataclasses.replace(report, heads=heads)


def quarter(model, ids, k, **settings):
    """A share of the heads that nobody asked for."""
    report = train_subset(model, ids, k, **settings)
    return dataclasses.replace(report, heads=report.scores > report.scores.quantile(0.75))


def never_hot(model, ids, k, **settings):
    with patch.object(subset_pruning, "annealed", lambda *_: 1e-8):
        return train_subset(model, ids, k, **settings)


def never_cold(model, ids, k, **settings):
    with patch.object(subset_pruning, "annealed", lambda *_: 1.0):
        return train_subset(model, ids, k, **settings)


def always_joint(model, ids, k, **settings):
    return train_subset(model, ids, k, **(settings | {"weights_lr": 1e-4}))


def always_pipelined(model, ids, k, **settings):
    return train_subset(model, ids, k, **(settings | {"weights_lr": None}))


MUTANTS = [
    ("soft_top_k", "entries above 1 are clamped", clamped),
    ("soft_top_k", "what was taken stays in the scores", one_softmax),
    ("soft_top_k", "single precision", single_precision),
    ("soft_top_k", "log(1 - p) is not divided by the temperature", taken_out_tempered),
    ("soft_top_k", "no relaxation", hard),
    ("subset_pruning", "a random subset", random_subset),
    ("subset_pruning", "noise in the final choice", noise_at_the_end),
    ("subset_pruning", "k heads are dealt out to the layers", even_over_layers),
    ("subset_pruning", "a quarter of the heads instead of k", quarter),
    ("subset_pruning", "cold from the start", never_hot),
    ("subset_pruning", "never cold", never_cold),
    ("subset_pruning", "frozen weights train", always_joint),
    ("subset_pruning", "the weights never train", always_pipelined),
]
