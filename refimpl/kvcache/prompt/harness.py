"""What pruning costs a reader: answers and their losses on full and pruned prompts, at equal tokens.

A prompt is "Context:\n[1] " + context + "\nQuestion: ...\nAnswer:"; only the context is pruned: a ratio is
a share of its tokens. Items come from the synthetic world, evaluation names and held-out wordings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import LongTensor, nn

from refimpl.evaluate import Estimate, paired_bootstrap
from refimpl.kvcache.prompt.units import Pruned, best_units, check_prompt, pieces, unit_numbers, words
from refimpl.scoring import BOS, score_completions
from refimpl.world.document_formats import parse_qa
from refimpl.world.formats import BY_NAME
from refimpl.world.memory_relations import FILLERS
from refimpl.world.rng import Rng

RATIOS = (0.8, 0.65, 0.5, 0.35, 0.2)
HEAD = "Context:\n[1] "
Prune = Callable[[LongTensor, int, LongTensor], Pruned]  # (context, budget, question line) -> what stays


@dataclass(frozen=True)
class Item:
    """One question about one context."""

    context: str
    question: str
    answer: str


@dataclass(frozen=True)
class Cell:
    """Per item: `exact` (bool [N]), `nll` of the gold answer per token (nats, [N]), `kept` tokens [N]."""

    exact: np.ndarray
    nll: np.ndarray
    kept: np.ndarray


def qa_items(
    n: int, *, key: str = "prompt", fillers: float = 0.0, shortest: int = 60, longest: int = 160
) -> list[Item]:
    """n questions about passages of 60-160 words (format `document_long`), one per passage.

    Parameters: key, names the stream of chance; fillers, the chance of a sentence without a fact behind each
    sentence (0: every sentence states facts). Raises ValueError for n < 1 or fillers outside [0, 1].
    """
    if n < 1 or not 0 <= fillers <= 1:
        raise ValueError(f"n, fillers: {n}, {fillers}; allowed: n >= 1 and 0 <= fillers <= 1")
    rng, out = Rng("prompt pruning", key), []
    while len(out) < n:
        text = BY_NAME["document_long"].document(rng, "eval")
        lines = text.split("\n")
        if not shortest <= lines[1].count(" ") <= longest:
            continue
        sentences = []
        for sentence in lines[1].removeprefix("[1] ").removesuffix(".").split(". "):
            sentences.append(sentence + ".")
            if rng.chance(fillers):
                sentences.append(rng.choice(FILLERS))
        question, answer = lines[2].removeprefix("Question: "), lines[3].removeprefix("Answer: ")
        out.append(Item(" ".join(sentences), question, answer))
    return out


def ranking_items(n: int, documents: int = 12, *, key: str = "rank") -> list[tuple[list[str], str, int]]:
    """n tasks (documents, question, number of the gold document): facts about other people, and one answer.

    The question asks for the value of a fact of one person. Raises ValueError for n < 1 or documents < 2.
    """
    if n < 1 or documents < 2:
        raise ValueError(f"n, documents: {n}, {documents}; allowed: n >= 1 and documents >= 2")
    rng, out = Rng("prompt ranking", key), []
    while len(out) < n:
        text = BY_NAME["document_distractors"].document(rng, "eval")
        facts, lines = parse_qa(text), text.split("\n")
        asked, answer = facts["qa"][0]
        if asked[0] != "path" or asked[2].startswith("~"):
            continue
        gold = next(i for i, p in enumerate(facts["passages"]) if [*asked[1:], answer] == p[0][:3])
        others: list[str] = []
        while len(others) < documents:
            drawn = BY_NAME["document_qa"].document(rng, "eval").split("\n")
            others.append(drawn[1].removeprefix("[1] "))
        place = rng.below(documents)
        others[place] = lines[1 + gold].split("] ", 1)[1]
        out.append((others, lines[1 + len(facts["passages"])].removeprefix("Question: "), place))
    return out


# --- baselines ----------------------------------------------------------------------------------------------


def truncate(ids: LongTensor, budget: int, question: LongTensor | None = None) -> Pruned:
    """Keep the first `budget` tokens."""
    check_prompt(ids, budget)
    scores = -torch.arange(len(ids), dtype=torch.float32, device=ids.device)
    return Pruned(torch.arange(budget, device=ids.device), scores)


def random_words(tokenizer: object, generator: torch.Generator) -> Prune:
    """Keep random words, as many as fit into the budget."""

    def prune(ids: LongTensor, budget: int, question: LongTensor | None = None) -> Pruned:
        check_prompt(ids, budget)
        units = unit_numbers(pieces(tokenizer, ids), words)
        scores = torch.rand(int(units[-1]) + 1, generator=generator)
        keep = best_units(scores, units, budget)
        return Pruned(keep.to(ids.device), scores[units].to(ids.device))

    return prune


def random_tokens(generator: torch.Generator) -> Prune:
    """Keep `budget` random tokens."""

    def prune(ids: LongTensor, budget: int, question: LongTensor | None = None) -> Pruned:
        check_prompt(ids, budget)
        scores = torch.rand(len(ids), generator=generator)
        keep = scores.sort(descending=True).indices[:budget].sort().values
        return Pruned(keep.to(ids.device), scores.to(ids.device))

    return prune


# --- measuring ----------------------------------------------------------------------------------------------


def evaluate(
    model: nn.Module, tokenizer: object, items: Sequence[Item], prune: Prune | None, ratio: float = 1.0
) -> Cell:
    """Answer every item from its pruned context.

    Parameters: model, tokenizer: the reader; prune, None for the full prompt; ratio, the share of the
    context's tokens that may stay (rounded down, at least 1). "Exact": greedy decoding gives
    the answer and ends its line. Raises ValueError for no items or a ratio outside (0, 1].
    """
    if not items or not 0 < ratio <= 1:
        raise ValueError(
            f"items, ratio: {len(items)}, {ratio}; allowed: at least one item and 0 < ratio <= 1"
        )
    rows, kept = [], []
    head = tokenizer(HEAD)["input_ids"]
    for item in items:
        context = torch.tensor(tokenizer(item.context)["input_ids"])
        asked = torch.tensor(tokenizer(f"\nQuestion: {item.question}\n")["input_ids"])
        question = torch.tensor(tokenizer(f"\nQuestion: {item.question}\nAnswer:")["input_ids"])
        if prune is not None:
            budget = max(1, int(ratio * len(context) + 1e-9))
            context = prune(context, budget, asked).ids(context)
        kept.append(len(context))
        rows.append(([BOS, *head, *context.tolist(), *question.tolist()], item.answer))
    gold = [tokenizer(f" {answer}\n")["input_ids"] for _, answer in rows]
    scores = score_completions(model, [(prompt, g) for (prompt, _), g in zip(rows, gold, strict=True)])
    return Cell(scores.exact, scores.nll / scores.tokens, np.array(kept))


def grid(
    model: nn.Module, tokenizer: object, items: Sequence[Item], methods: Mapping[str, Prune],
    ratios: Sequence[float] = RATIOS,
) -> dict[tuple[str, float], Cell]:  # fmt: skip
    """(method, ratio) -> cell, and ("full", 1.0)."""
    cells = {("full", 1.0): evaluate(model, tokenizer, items, None)}
    for name, prune in methods.items():
        for ratio in ratios:
            cells[name, ratio] = evaluate(model, tokenizer, items, prune, ratio)
    return cells


def gain(a: Cell, b: Cell, rng: np.random.Generator) -> tuple[Estimate, Estimate]:
    """Paired bootstrap over items: accuracy of `a` minus that of `b`, answer loss of `b` minus that of `a`;
    both positive where `a` is better.
    """
    accuracy = paired_bootstrap(a.exact.astype(float), b.exact.astype(float), rng=rng)
    return accuracy, paired_bootstrap(b.nll, a.nll, rng=rng)
