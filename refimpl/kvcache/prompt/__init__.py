"""Prompt pruning: drop tokens of a prompt before the model reads it.

Every method has `prune(ids, budget)`, which returns a `Pruned`: ascending indices into `ids` and the scores
that chose them. So what is kept is a subsequence of the prompt by construction, and any two methods can be
compared at equal tokens.
"""

from refimpl.kvcache.prompt.llmlingua import LLMLingua, context_budget
from refimpl.kvcache.prompt.llmlingua2 import LLMLingua2, TokenClassifier, load_classifier
from refimpl.kvcache.prompt.selective import SelectiveContext
from refimpl.kvcache.prompt.units import Pruned, phrases, pieces, sentences, tokens, words

__all__ = ["LLMLingua", "LLMLingua2", "Pruned", "SelectiveContext", "TokenClassifier", "context_budget",
           "load_classifier", "phrases", "pieces", "sentences", "tokens", "words"]  # fmt: skip
