"""The check of LLMLingua (kv-cache spec, 27): ranking of documents, iterative and contrastive pruning."""

from collections.abc import Callable

import torch
from torch import LongTensor, Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {"llmlingua": "refimpl.kvcache.prompt.llmlingua:LLMLingua"}
SEGMENT, BUDGET = 8, 12


@check
def check_llmlingua(LLMLingua: Callable) -> None:
    """`LLMLingua(model, iterative_size=)` with `prune(ids, budget, question)`, `rank(documents, question)`
    and `compress(documents, budget, question, slack=)`.
    """
    question = random_ids(4, seed=9)
    for family in ("llama", "gpt2", "qwen2"):
        model, ids = tiny(family), random_ids(24, seed=1)
        for size in (SEGMENT, 24):
            lingua = LLMLingua(model, iterative_size=size)
            for asked in (None, question):
                case = f"{family}, segments of {size}, {'no' if asked is None else 'a'} question"
                keep, scores = _reference(model, ids, size, asked)
                pruned = lingua.prune(ids, BUDGET, asked)
                require_close(pruned.scores, scores, 1e-4, f"the scores, {case}")
                got = pruned.keep.tolist()
                require(got == keep, f"the tokens kept, {case}: {got} instead of {keep}")
        _check_documents(LLMLingua(model, iterative_size=SEGMENT), model, question, family)


def _check_documents(lingua: object, model: nn.Module, question: LongTensor, family: str) -> None:
    documents = [random_ids(6 + i, seed=20 + i) for i in range(4)]
    plain = torch.stack([_losses(model, [], d).mean() for d in documents])
    asked = torch.stack([-_losses(model, d.tolist(), question).mean() for d in documents])
    require_close(lingua.rank(documents), plain, 1e-4, f"{family}: the rank scores without a question")
    require_close(lingua.rank(documents, question), asked, 1e-4, f"{family}: the rank scores with a question")
    got = lingua.compress(documents, 10, question, slack=0)
    order = asked.sort(descending=True).indices.tolist()
    total, chosen = 10, []
    for i in order:
        chosen.append(i)
        total -= len(documents[i])
        if total < 0:
            break
    require(got.documents == sorted(chosen), f"{family}: chose {got.documents} instead of {sorted(chosen)}")
    kept = sum(len(p.keep) for p in got.pruned)
    require(kept == 10, f"{family}: {kept} tokens of the documents stay instead of 10")


def _reference(
    model: nn.Module, ids: LongTensor, size: int, question: LongTensor | None
) -> tuple[list, Tensor]:
    """Without a cache: every segment is read behind what was kept, and half of it stays."""
    keep, scores, before = [], [], []
    for start in range(0, len(ids), size):
        segment = ids[start : start + size]
        score = _losses(model, before, segment)
        if question is not None:
            score = score - _losses(model, [*question.tolist(), *before], segment)
        best = score.topk(len(segment) // 2).indices.sort().values
        keep += (best + start).tolist()
        before += segment[best].tolist()
        scores.append(score)
    return keep, torch.cat(scores)


def _losses(model: nn.Module, before: list[int], ids: LongTensor) -> Tensor:
    row = torch.tensor([0, *before, *ids.tolist()])
    with torch.no_grad():
        log_p = model(input_ids=row[None], use_cache=False).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
    return -log_p[torch.arange(len(ids)), ids]
