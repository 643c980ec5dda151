"""The check of Selective Context (kv-cache spec, 26): units by self-information, sentence by sentence."""

from collections.abc import Callable

import torch
from torch import LongTensor, Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {"selective_context": "refimpl.kvcache.prompt.selective:SelectiveContext"}
FULL_STOP = 7


class Tokenizer:
    """Token 7 is a full stop, every other one a word."""

    def decode(self, ids: list[int]) -> str:
        return "." if ids[0] == FULL_STOP else f" w{ids[0]}"


def triples(pieces: list[str]) -> list[int]:
    """Units of three tokens."""
    return [i // 3 for i in range(len(pieces))]


@check
def check_selective_context(SelectiveContext: Callable) -> None:
    """`SelectiveContext(model, tokenizer, units=, scope=, reduce=)` with `prune(ids, budget)` and
    `prune_ratio(ids, reduce_ratio)`, which return an object with `keep` [m] and `scores` [n].
    """
    for family in ("llama", "gpt2"):
        model = tiny(family)
        ids = random_ids(24, seed=3)
        ids[ids == FULL_STOP] = FULL_STOP + 1
        ids[[6, 13]] = FULL_STOP
        for scope, starts in (("sentence", [0, 7, 14]), ("document", [0])):
            information = _information(model, ids, starts)
            for reduce in ("mean", "sum"):
                case = f"{family}, scope {scope!r}, reduce {reduce!r}"
                pruner = SelectiveContext(model, Tokenizer(), units=triples, scope=scope, reduce=reduce)
                units = getattr(information.view(8, 3), reduce)(1)
                pruned = pruner.prune(ids, 12)
                require_close(
                    pruned.scores, units.repeat_interleave(3), 1e-4, f"the scores of the tokens, {case}"
                )
                best = units.topk(4).indices.sort().values
                _same(pruned.keep, _tokens(best), f"the tokens kept of 24 at a budget of 12, {case}")
                kept = pruner.prune_ratio(ids, 0.35).keep
                at_least = (units >= torch.quantile(units, 0.35)).nonzero()[:, 0]
                _same(kept, _tokens(at_least), f"the tokens kept at reduce_ratio 0.35 of the units, {case}")
                _same(pruner.prune_ratio(ids, 0.0).keep, torch.arange(24), f"reduce_ratio 0, {case}")


def _tokens(units: LongTensor) -> LongTensor:
    return (3 * units[:, None] + torch.arange(3)).flatten()


def _same(got: LongTensor, expected: LongTensor, what: str) -> None:
    require(got.tolist() == expected.tolist(), f"{what}: {got.tolist()} instead of {expected.tolist()}")


def _information(model: nn.Module, ids: LongTensor, starts: list[int]) -> Tensor:
    """-log p of each token behind id 0 and the tokens since the last start."""
    out = []
    for first, last in zip(starts, [*starts[1:], len(ids)], strict=True):
        row = torch.cat([torch.tensor([0]), ids[first:last]])
        with torch.no_grad():
            log_p = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
        out.append(-log_p[torch.arange(last - first), row[1:]])
    return torch.cat(out)
