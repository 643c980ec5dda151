"""Plausible but wrong measurements and remedies that the checks must reject."""

from dataclasses import replace

import numpy as np
import torch

from refimpl.evaluate import bootstrap
from refimpl.quantization.evaluation.long_context import LargestGroups, position_gap


def unsigned(new, old, n_bins=5, seed=0):
    """Computational errors taken without a sign."""
    return position_gap(np.asarray(old) + np.abs(np.asarray(new) - old), old, n_bins, seed)


def unpaired(new, old, n_bins=5, seed=0):
    """Documents of the two models are not the same ones."""
    return position_gap(new, np.roll(old, 1, axis=0), n_bins, seed)


def over_tokens(new, old, n_bins=5, seed=0):
    """The slope's interval treats positions as independent observations."""
    found = position_gap(new, old, n_bins, seed)
    T = found.gaps.shape[1]
    p = np.arange(1, T + 1) - (T + 1) / 2
    each = (1000 * found.gaps * p / (p @ p) * T).ravel()
    return replace(found, slope=bootstrap(each, rng=np.random.default_rng(0)))


def two_ends(new, old, n_bins=5, seed=0):
    """The slope is the line through the first and the last position."""
    found = position_gap(new, old, n_bins, seed)
    rise = 1000 * (found.gaps[:, -1] - found.gaps[:, 0]) / (found.gaps.shape[1] - 1)
    return replace(found, slope=bootstrap(rise, rng=np.random.default_rng(0)))


class Off(LargestGroups):
    """No group gets more bits."""

    def chosen(self, W):
        return torch.zeros(W.numel() // self.group, dtype=torch.bool)


class ByMean(LargestGroups):
    """The magnitude of a group is taken to be its sum of weights."""

    def chosen(self, W):
        count = int(super().chosen(W).sum())
        size = W.reshape(-1, self.group).sum(1)
        return torch.zeros(len(size), dtype=torch.bool).index_fill(0, size.argsort()[-count:], True)


class Generous(LargestGroups):
    """The remedy takes twice the groups that its control takes."""

    def chosen(self, W):
        chosen = super().chosen(W)
        if self.generator is None:
            size = W.reshape(-1, self.group).abs().amax(1)
            chosen[size.argsort(descending=True)[: 2 * int(chosen.sum())]] = True
        return chosen


MUTANTS = [
    ("long_context_compression", "gaps without a sign", unsigned),
    ("long_context_compression", "documents are not paired", unpaired),
    ("long_context_compression", "tokens are resampled, not documents", over_tokens),
    ("long_context_compression", "a slope from two positions", two_ends),
    ("largest_groups", "switched off: all groups in the low bits", Off),
    ("largest_groups", "signed sums instead of magnitudes", ByMean),
    ("largest_groups", "more bytes than the random control", Generous),
]
