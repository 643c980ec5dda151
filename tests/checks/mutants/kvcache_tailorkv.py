"""Plausible but wrong TailorKV that its checks must reject."""

import torch

from refimpl.kvcache.tailorkv import TailorKV, spread


class FetchesAll(TailorKV):
    """The method switched off."""

    def __init__(self, budget=128, channels=8):
        super().__init__(budget, channels)
        self.budget = 10**6


class ChannelsOfTheQueryAlone(TailorKV):
    """Channels are chosen without the size of the keys."""

    def choose(self, q):
        return q.abs().topk(self.n_channels).indices


class FirstHeadForAll(TailorKV):
    """The first head's query stands for its group."""

    def read(self, q, codec, scale, ok):
        rank = self.rank
        self.rank = lambda mean, codec: rank(q[:, :, 0, 0], codec)
        try:
            return super().read(q, codec, scale, ok)
        finally:
            del self.rank


def spread_without_mask(weights, seen, share=0.05):
    """Later tokens count as seen: their number sets how many weights are taken."""
    spread(weights, seen, share)
    return spread(weights, torch.full_like(seen, weights.shape[-1]) + 40, share)


def mass_for_spread(weights, seen, share=0.05):
    return 1 - spread(weights, seen, share)


MUTANTS = [
    ("tailorkv", "all far tokens are fetched", FetchesAll),
    ("tailorkv", "channels are chosen by the query alone", ChannelsOfTheQueryAlone),
    ("tailorkv", "one head's query ranks for its whole group", FirstHeadForAll),
    ("tailorkv_spread", "the causal mask is left out", spread_without_mask),
    ("tailorkv_spread", "the captured mass itself, so that layers swap their roles", mass_for_spread),
]
