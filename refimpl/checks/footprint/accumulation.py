"""The check of gradient accumulation (footprint spec, A6): the gradient of all tokens in any cut."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require_close
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {"gradient_accumulation": "refimpl.footprint.accumulation:accumulate"}


@check
def check_gradient_accumulation(accumulate: Callable) -> None:
    """`accumulate(model, micro_batches)` -> the mean loss of all tokens, its gradient in `.grad`."""
    ids = random_ids(4, 10)
    labels = ids.clone()
    for row, (first, last) in enumerate([(0, 10), (4, 10), (1, 4), (8, 9)]):  # 9, 6, 3 and 1 targets
        labels[row, :first] = labels[row, last:] = -100
    silent = {"input_ids": ids[:1], "labels": torch.full((1, 10), -100)}
    for family in ("gpt2", "llama"):
        model = tiny(family)
        loss, gradients = _all_tokens(model, ids, labels)
        for cuts in ([4], [2, 2], [1, 3], [1, 1, 1, 1]):
            model.zero_grad()
            rows = zip(ids.split(cuts), labels.split(cuts), strict=True)
            batches = [{"input_ids": i, "labels": t} for i, t in rows]
            got = accumulate(model, [*batches, silent] if len(cuts) == 4 else batches)
            case = f"{family} in micro-batches of {cuts} rows with 9, 6, 3 and 1 targets"
            for (name, parameter), expected in zip(model.named_parameters(), gradients, strict=True):
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                require_close(gradient, expected, 1e-6, f"the gradient of {name}, {case}")
            require_close(got, loss, 1e-5, f"the loss, {case}")


def _all_tokens(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The mean of -log p over all targets of the full batch, and its gradient."""
    logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    row, position = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    loss = -logps[row, position, labels[row, position + 1]].mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))
