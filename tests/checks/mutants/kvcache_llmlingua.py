"""Plausible but wrong versions of LLMLingua that the check must reject."""

import torch

from refimpl.kvcache.prompt import LLMLingua, Pruned


class KeepsTheBeginning(LLMLingua):
    def prune(self, ids, budget, question=None):
        return Pruned(torch.arange(budget), super().prune(ids, budget, question).scores)


class OneShot(LLMLingua):
    def __init__(self, model, *, iterative_size=200, bos=0):
        super().__init__(model, iterative_size=200, bos=bos)


class KeepsTheTokenBefore(LLMLingua):
    def prune(self, ids, budget, question=None):
        pruned = super().prune(ids, budget, question)
        return Pruned(pruned.keep.sub(1).clamp_min(0), pruned.scores)


class ForgetsTheQuestion(LLMLingua):
    def prune(self, ids, budget, question=None):
        return super().prune(ids, budget)


class RanksTheExpectedFirst(LLMLingua):
    def rank(self, documents, question=None):
        return -super().rank(documents, question)


class RanksTheDocumentGivenTheQuestion(LLMLingua):
    def rank(self, documents, question=None):
        if question is None:
            return super().rank(documents)
        rows = [torch.cat([question, d]) for d in documents]
        return torch.stack([-super(RanksTheDocumentGivenTheQuestion, self).rank([r])[0] for r in rows])


MUTANTS = [
    ("llmlingua", "switched off: keeps the beginning", KeepsTheBeginning),
    ("llmlingua", "one segment whatever its size", OneShot),
    ("llmlingua", "keeps the token before the surprising one", KeepsTheTokenBefore),
    ("llmlingua", "ignores the question when it prunes", ForgetsTheQuestion),
    ("llmlingua", "ranks in the wrong direction", RanksTheExpectedFirst),
    ("llmlingua", "documents given the question", RanksTheDocumentGivenTheQuestion),
]
