"""Plausible but wrong DynamicKV that its check must reject."""

import torch

from refimpl.kvcache.dynamickv import DynamicKV, layer_budgets
from refimpl.kvcache.snapkv import first


class Uniform(DynamicKV):
    def plan(self, views):
        return [first(v.slot["vote"], self.capacity) for v in views]


class Normalised(DynamicKV):
    """Votes of each layer divided by their sum before layers are compared."""

    def observe(self, v):
        super().observe(v)
        vote = v.slot["vote"]
        vote /= vote.masked_fill(vote.isinf(), 0).amax()


class RestToTheLast(DynamicKV):
    """The released code's rounding: down, and what is left goes to the last layer."""

    def plan(self, views):
        base, L = self.capacity - self.window, len(views)
        votes = [v.slot["vote"] for v in views]
        pool = torch.stack([vote.masked_fill(vote.isinf(), -1).flatten() for vote in votes])
        G = votes[0].shape[1]
        largest = pool.flatten().topk(base * G * L).indices // pool.shape[1]
        budgets = torch.bincount(largest, minlength=L) // G
        budgets[-1] += base * L - budgets.sum()
        return [first(vote, int(n) + self.window) for vote, n in zip(votes, budgets, strict=True)]


class HeadsShare(DynamicKV):
    """All heads of a layer keep the same tokens."""

    def plan(self, views):
        votes = [v.slot["vote"].mean(1, keepdim=True) for v in views]
        budgets = layer_budgets([v.slot["vote"] for v in views], self.capacity - self.window)
        masks = [first(x, n[:, None, None] + self.window) for x, n in zip(votes, budgets, strict=True)]
        return [m.expand(v.shape) for m, v in zip(masks, views, strict=True)]


MUTANTS = [
    ("dynamickv", "all layers keep the same number: SnapKV", Uniform),
    ("dynamickv", "votes are normalised layer by layer before they are compared", Normalised),
    ("dynamickv", "the remainder goes to the last layer", RestToTheLast),
    ("dynamickv", "heads share a selection", HeadsShare),
]
