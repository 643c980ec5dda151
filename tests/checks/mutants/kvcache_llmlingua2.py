"""Plausible but wrong versions of LLMLingua-2 that the checks must reject."""

from dataclasses import replace

import torch

from refimpl.kvcache.prompt import LLMLingua2, Pruned
from refimpl.kvcache.prompt.annotation import annotate, lemma


class KeepsTheBeginning(LLMLingua2):
    def prune(self, ids, budget):
        return Pruned(torch.arange(budget), super().prune(ids, budget).scores)


class TokensInsteadOfWords(LLMLingua2):
    def prune(self, ids, budget):
        scores = self.keep_probability(ids)
        return Pruned(scores.topk(budget).indices.sort().values, super().prune(ids, budget).scores)


class FirstTokenOfAWord(LLMLingua2):
    def keep_probability(self, ids):
        p = super().keep_probability(ids)
        for i in range(1, len(ids)):
            if not self.tokenizer.decode([int(ids[i])]).startswith((" ", ".")):
                p[i] = p[i - 1]
        return p


class ProbabilityOfDropping(LLMLingua2):
    def keep_probability(self, ids):
        return 1 - super().keep_probability(ids)


class IgnoresForcedWords(LLMLingua2):
    def _forced(self, texts, units):
        return torch.zeros_like(super()._forced(texts, units))


def every_occurrence(original, compressed, **kw):
    wanted = {w.lower() for w in compressed}
    return replace(annotate(original, compressed, **kw), labels=[w.lower() in wanted for w in original])


def no_pointer(original, compressed, *, window=150):
    right, labels = annotate(original, compressed, window=window), [False] * len(original)
    for word in compressed:
        free = [i for i, w in enumerate(original[:window]) if lemma(w) == lemma(word) and not labels[i]]
        if free:
            labels[free[0]] = True
    return replace(right, labels=labels)


def exact_strings(original, compressed, *, window=150):
    return annotate(original, compressed, window=window, lemma=lambda word: word)


def nothing_kept(original, compressed, **kw):
    return replace(annotate(original, compressed, **kw), labels=[False] * len(original))


MUTANTS = [
    ("llmlingua2", "switched off: keeps the beginning", KeepsTheBeginning),
    ("llmlingua2", "cuts words into tokens", TokensInsteadOfWords),
    ("llmlingua2", "a word has the probability of its first token", FirstTokenOfAWord),
    ("llmlingua2", "class 0 taken for keep", ProbabilityOfDropping),
    ("llmlingua2", "forced words are not forced", IgnoresForcedWords),
    ("llmlingua2_annotation", "labels every occurrence of a word", every_occurrence),
    ("llmlingua2_annotation", "searches from the beginning, no pointer", no_pointer),
    ("llmlingua2_annotation", "compares strings, not lemmas", exact_strings),
    ("llmlingua2_annotation", "switched off: nothing is kept", nothing_kept),
]
