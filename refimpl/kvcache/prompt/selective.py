"""Selective Context: drop the phrases that a language model finds least surprising.

Implements arXiv 2310.06201 (Li et al., EMNLP 2023), section 2. The authors read each sentence alone, behind
the beginning-of-text token; a unit's score is the mean over its tokens in their code, the sum in their paper.
"""

import torch
from torch import LongTensor, Tensor, nn

from refimpl.kvcache.prompt.units import (
    Pruned,
    Units,
    best_units,
    check_prompt,
    phrases,
    pieces,
    sentences,
    token_losses,
    unit_mean,
    unit_numbers,
    unit_sum,
)

SCOPES = ("sentence", "document")
REDUCTIONS = {"mean": unit_mean, "sum": unit_sum}


class SelectiveContext:
    """Prune by self-information I(x_t) = -log p(x_t | bos, x_<t) of lexical units.

    Parameters
    ----------
    model : causal language model, the scorer (need not be the model that reads the result).
    tokenizer : its tokenizer; only `decode` is used, to find the units.
    units : what is kept or dropped whole: `phrases` (default), `words`, `tokens`, `sentences`, or your own.
    scope : "sentence" (default, as published): a token's past is its own sentence, so every sentence begins
        with a surprise; "document": it is everything before.
    reduce : "mean" (default, as in the code) or "sum" (as in the paper) of the tokens' self-information.
    bos : the id in front of every sentence or document.

    Raises ValueError for an unknown scope or reduction.

    Unlike the authors' code this one scores token ids: the first token of a sentence keeps its leading space.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> class Letters:
    ...     def decode(self, ids): return f" w{ids[0]}"
    >>> pruner = SelectiveContext(tiny("llama"), Letters())
    >>> pruner.prune(random_ids(12), 6).keep.shape
    torch.Size([6])
    """

    def __init__(
        self, model: nn.Module, tokenizer: object, *, units: Units = phrases, scope: str = "sentence",
        reduce: str = "mean", bos: int = 0,
    ) -> None:  # fmt: skip
        if scope not in SCOPES:
            raise ValueError(f"scope: {scope!r}; allowed: {', '.join(SCOPES)}")
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce: {reduce!r}; allowed: {', '.join(REDUCTIONS)}")
        self.model, self.tokenizer, self.units, self.bos = model, tokenizer, units, bos
        self.scope, self.reduce = scope, reduce

    def self_information(self, ids: LongTensor) -> Tensor:
        """-log p of each token [n] in nats, given its sentence or its document so far."""
        check_prompt(ids)
        if self.scope == "document":
            return token_losses(self.model, [ids], self.bos)[0].to(ids.device)
        sentence = unit_numbers(pieces(self.tokenizer, ids), sentences)
        rows = list(ids.split(sentence.bincount().tolist()))
        return torch.cat(token_losses(self.model, rows, self.bos)).to(ids.device)

    def unit_scores(self, ids: LongTensor) -> tuple[LongTensor, Tensor]:
        """The unit of each token [n], and the score of each unit [U]."""
        information = self.self_information(ids)
        units = unit_numbers(pieces(self.tokenizer, ids), self.units).to(ids.device)
        return units, REDUCTIONS[self.reduce](information, units)

    def prune(self, ids: LongTensor, budget: int) -> Pruned:
        """Keep the units of highest score that fit into `budget` tokens: at most one unit less stays.

        Parameters: ids [n]; budget, 1 to n tokens. Raises ValueError and TypeError as `check_prompt`.
        """
        check_prompt(ids, budget)
        units, scores = self.unit_scores(ids)
        return Pruned(best_units(scores, units, budget), scores[units])

    def prune_ratio(self, ids: LongTensor, reduce_ratio: float = 0.35) -> Pruned:
        """The published rule: drop the units that score strictly below a percentile of all units.

        The percentile is over units, not tokens: 0.35 drops 35 % of the phrases, which may be any share of
        the tokens. Parameters: ids [n]; reduce_ratio in [0, 1), 0 keeps everything. Raises ValueError for a
        ratio outside.
        """
        if not 0 <= reduce_ratio < 1:  # also refuses NaN
            raise ValueError(f"reduce_ratio: {reduce_ratio}; allowed: 0 <= reduce_ratio < 1")
        units, scores = self.unit_scores(ids)
        kept = scores >= torch.quantile(scores, reduce_ratio)
        return Pruned(kept[units].nonzero()[:, 0], scores[units])
