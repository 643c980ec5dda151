"""Plausible but wrong versions of Selective Context that the check must reject."""

import torch

from refimpl.kvcache.prompt import Pruned, SelectiveContext
from refimpl.kvcache.prompt.units import unit_mean


class KeepsTheBeginning(SelectiveContext):
    def prune(self, ids, budget):
        return Pruned(torch.arange(budget), super().prune(ids, budget).scores)


class ReadsTheWholeDocument(SelectiveContext):
    def __init__(self, model, tokenizer, *, scope="sentence", **kw):
        super().__init__(model, tokenizer, scope="document", **kw)


class PercentileOfTokens(SelectiveContext):
    def prune_ratio(self, ids, reduce_ratio=0.35):
        units, scores = self.unit_scores(ids)
        tokens = self.self_information(ids)
        kept = scores >= torch.quantile(tokens, reduce_ratio) if reduce_ratio else scores > -1
        return Pruned(kept[units].nonzero()[:, 0], scores[units])


class AlwaysTheMean(SelectiveContext):
    def unit_scores(self, ids):
        units, _ = super().unit_scores(ids)
        return units, unit_mean(self.self_information(ids), units)


class ScoreOfTheNextToken(SelectiveContext):
    def self_information(self, ids):
        return super().self_information(ids).roll(-1)


class DropsTheSurprising(SelectiveContext):
    def unit_scores(self, ids):
        units, scores = super().unit_scores(ids)
        return units, -scores


MUTANTS = [
    ("selective_context", "switched off: keeps the beginning", KeepsTheBeginning),
    ("selective_context", "scores sentences with the document before them", ReadsTheWholeDocument),
    ("selective_context", "takes the percentile over tokens", PercentileOfTokens),
    ("selective_context", "means where sums are asked", AlwaysTheMean),
    ("selective_context", "losses shifted by one token", ScoreOfTheNextToken),
    ("selective_context", "keeps the expected, drops the surprising", DropsTheSurprising),
]
