"""LLMLingua: choose documents by perplexity, then prune their tokens segment by segment.

Implements arXiv 2310.05736 (LLMLingua: budget controller, Algorithm 1; iterative token-level compression,
Algorithm 2) and from arXiv 2310.06839 (LongLLMLingua) the question-aware ranking of documents (Eq. 2),
contrastive perplexity (Eq. 3) and the compression rate that falls with the rank (Eq. 5). The small model is
used as it is: their instruction tuning of it on the large model's outputs is left out.

Where the official code departs from the papers, this is the papers' method. The code
- takes the threshold from the losses of all kept and of all unread tokens, the paper from the segment's own;
  the latter meets the budget in every segment;
- compares loss[i], which belongs to token i + 1, with the threshold to decide about token i, and so keeps the
  token before a surprising one; it always keeps the last token;
- reads the first token without a past and so has no loss for it; here `bos` is its past;
- does not compress a prompt that is clearly shorter than `iterative_size`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor, nn

from refimpl.kvcache.prompt.units import Pruned, check_prompt, token_losses


@dataclass(frozen=True)
class Compressed:
    """Compressed documents: `documents`, the numbers of those chosen, in their original order; `pruned`, the
    tokens kept of each; `scores` [k], the rank score of all k documents.
    """

    documents: list[int]
    pruned: list[Pruned]
    scores: Tensor


def context_budget(rate: float, instruction: int, documents: Sequence[int], question: int) -> int:
    """Tokens left for the documents when the whole prompt shall shrink to `rate` (Algorithm 1).

    rate * (instruction + documents + question) - instruction - question, where these are numbers of tokens,
    rounded down. Raises ValueError for a rate outside (0, 1], and where nothing is left (the official code
    silently sets the budget to 100 then).

    >>> context_budget(0.5, instruction=10, documents=[60, 50], question=20)
    40
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate: {rate}; allowed: 0 < rate <= 1")
    budget = int(rate * (instruction + sum(documents) + question) - instruction - question + 1e-9)
    if budget < 1:
        raise ValueError(
            f"rate: {rate} leaves {budget} tokens for the documents beside instruction and question"
        )
    return budget


class LLMLingua:
    """Coarse-to-fine pruning by a small causal language model.

    Parameters: model, the small model; iterative_size, tokens per segment (200 as published; 64 suits short
    documents); bos, the id in front of every text. Raises ValueError for iterative_size < 1.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> LLMLingua(tiny("gpt2"), iterative_size=8).prune(random_ids(20), 10).keep.shape
    torch.Size([10])
    """

    def __init__(self, model: nn.Module, *, iterative_size: int = 200, bos: int = 0) -> None:
        if isinstance(iterative_size, bool) or not isinstance(iterative_size, int) or iterative_size < 1:
            raise ValueError(f"iterative_size: {iterative_size!r}; allowed: an int >= 1")
        self.model, self.iterative_size, self.bos = model, iterative_size, bos

    # --- coarse ---------------------------------------------------------------------------------------------
    def rank(self, documents: Sequence[LongTensor], question: LongTensor | None = None) -> Tensor:
        """How much each document [k] deserves to stay; higher is better.

        Without a question: its mean loss (log perplexity), the rarest first. With it: minus the mean loss of
        the question behind the document, -1/N sum_i -log p(question_i | document, question_<i). The paper
        appends to the question a sentence saying that the documents hold the answer; do so in `question`.
        """
        _check_documents(documents)
        if question is None:
            return torch.stack([loss.mean() for loss in token_losses(self.model, documents, self.bos)])
        check_prompt(question)
        rows = [torch.cat([document, question]) for document in documents]
        losses = token_losses(self.model, rows, self.bos)
        return torch.stack([-loss[-len(question) :].mean() for loss in losses])

    def compress(
        self, documents: Sequence[LongTensor], budget: int, question: LongTensor | None = None, *,
        slack: int = 100, spread: float = 0.0,
    ) -> Compressed:  # fmt: skip
        """Choose documents by rank until budget + slack tokens are spent, then prune them to `budget`.

        Parameters
        ----------
        documents : LongTensors [n_i].
        budget : tokens that stay of all documents together, 1 to the sum of n_i.
        question : for `rank` and for the contrastive scores of `prune`; None for LLMLingua without question.
        slack : room that the coarse stage leaves to the fine one (100 as published); the document that
            exceeds it is still taken.
        spread : delta of LongLLMLingua's Eq. 5: the best of N chosen documents is pruned at rate + spread,
            the last at rate - spread, cut to [0, 1] as in that equation (so the total may then be missed).

        Raises ValueError for no documents, a budget or spread out of range.
        """
        _check_documents(documents)
        check_prompt(torch.cat(list(documents)), budget)
        if slack < 0 or not 0 <= spread <= 1:
            raise ValueError(f"slack, spread: {slack}, {spread}; allowed: slack >= 0 and 0 <= spread <= 1")
        scores = self.rank(documents, question)
        chosen, left = [], budget + slack
        for i in scores.sort(descending=True, stable=True).indices.tolist():
            chosen.append(i)
            left -= len(documents[i])
            if left < 0:
                break
        lengths = torch.tensor([len(documents[i]) for i in chosen])
        rate = min(1.0, budget / int(lengths.sum()))
        delta = spread * torch.linspace(1 if len(chosen) > 1 else 0, -1, len(chosen), dtype=torch.float64)
        by_document = dict(zip(chosen, (rate + delta).clamp(0, 1).tolist(), strict=True))
        chosen.sort()
        text = torch.cat([documents[i] for i in chosen])
        rates = [r for i in chosen for r in [by_document[i]] * len(documents[i])]
        keep, losses = self._iterate(text, torch.tensor(rates, dtype=torch.float64), question)
        parts, start = [], 0
        for i in chosen:
            end = start + len(documents[i])
            inside = keep[(keep >= start) & (keep < end)] - start
            parts.append(Pruned(inside, losses[start:end]))
            start = end
        return Compressed(chosen, parts, scores)

    # --- fine -----------------------------------------------------------------------------------------------
    def prune(self, ids: LongTensor, budget: int, question: LongTensor | None = None) -> Pruned:
        """Keep the `budget` most surprising tokens, segment by segment, given what was kept before.

        A token's score is -log p(x_t | kept tokens of earlier segments, this segment so far); with a question
        it is log p(x_t | question, ...) - log p(x_t | ...), high where the question makes it likely (Eq. 3
        writes the difference of perplexities; this one, of their logarithms, is the code's).

        Parameters: ids [n]; budget, 1 to n tokens, met exactly; question [m] or None. Raises ValueError for a
        prompt whose kept part and one segment (and question) exceed the model's context.
        """
        check_prompt(ids, budget)
        rates = torch.full((len(ids),), budget / len(ids), dtype=torch.float64)
        return Pruned(*self._iterate(ids, rates, question))

    @torch.no_grad()
    def _iterate(
        self, ids: LongTensor, rates: Tensor, question: LongTensor | None
    ) -> tuple[LongTensor, Tensor]:
        """Kept indices and scores; `rates` [n] is the share of each token's surroundings that stays."""
        device = self.model.get_input_embeddings().weight.device
        bos = torch.tensor([self.bos], device=device)
        given = [bos]
        if question is not None:
            check_prompt(question)
            given.append(torch.cat([bos, question.to(device)]))
        quota = (rates.cumsum(0) + 0.5 + 1e-9).floor().long()  # tokens kept up to and with each place
        ends = [*range(self.iterative_size, len(ids), self.iterative_size), len(ids)]
        context = self.model.config.max_position_embeddings
        needed = max(
            (int(quota[s - 1]) if s else 0) + e - s + len(given[-1])
            for s, e in zip([0, *ends], ends, strict=False)
        )
        if needed > context:
            raise ValueError(
                f"ids: kept tokens, one segment of {self.iterative_size} and the question take {needed} "
                f"places, the model's context is {context}; lower budget or iterative_size"
            )
        streams = [_Stream(self.model, prefix) for prefix in given]
        keep, scores, start, kept = [], [], 0, 0
        for end in ends:
            segment = ids[start:end].to(device)
            losses = [stream.losses(segment) for stream in streams]
            score = losses[0] if question is None else losses[0] - losses[1]
            count = int(quota[end - 1]) - kept
            best = score.sort(descending=True, stable=True).indices[:count].sort().values
            for stream in streams:
                stream.append(segment[best])
            keep.append(best + start)
            scores.append(score)
            start, kept = end, kept + count
        return torch.cat(keep).to(ids.device), torch.cat(scores).to(ids.device)


def _check_documents(documents: Sequence[LongTensor]) -> None:
    if not documents:
        raise ValueError("documents: at least one is needed")
    for document in documents:
        check_prompt(document)


class _Stream:
    """A model that reads segment after segment and remembers only what was kept of them.

    The cache holds the kept tokens but the last: that one is read again, as its logits predict what comes.
    """

    def __init__(self, model: nn.Module, prefix: LongTensor) -> None:
        from transformers import DynamicCache

        self.model, self.cache, self.unread = model, DynamicCache(), prefix

    def losses(self, segment: LongTensor) -> Tensor:
        """-log p [n] of the segment's tokens behind what was kept; the cache forgets the segment again."""
        step = torch.cat([self.unread, segment])
        logits = self.model(input_ids=step[None], past_key_values=self.cache, use_cache=True).logits[0]
        self.cache.crop(-len(segment) - 1)
        self.unread = self.unread[-1:]
        return nn.functional.cross_entropy(logits[-len(segment) - 1 : -1].float(), segment, reduction="none")

    def append(self, kept: LongTensor) -> None:
        """Continue behind `kept`, which may be empty."""
        self.unread = torch.cat([self.unread, kept])
