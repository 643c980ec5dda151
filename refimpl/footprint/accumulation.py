"""Gradient accumulation: the gradient of a large batch from several small ones, one after the other.

Survey Eq. 1: the activation term becomes that of one micro-batch, the other terms stay. It is not free: from
the second micro-batch on, the gradients (4 bytes per float32 parameter) are there during the forward pass, so
a peak that lies in forward or early backward rises by one gradient copy, and by no more for further ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["accumulate", "count_targets", "split"]

IGNORE = -100  # the label that means "no target here", as in torch's cross_entropy


def accumulate(model: nn.Module, micro_batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Add to `.grad` the gradient of the mean loss over all tokens of `micro_batches`; return that loss.

    Implements gradient accumulation with total-token normalisation: L = Σ_k Σ_{t in k} -log p_t / N, where N
    counts the targets of all micro-batches. The mean of the micro-batches' mean losses is another number as
    soon as these have different numbers of targets (padding, masked prompts).

    Parameters
    ----------
    model : a causal language model of `transformers`.
    micro_batches : for each, the keyword arguments of `model`, "input_ids" and "labels" among them (int64
        [B, T], a label of -100 is no target); rows and lengths may differ.

    Raises, before the first forward pass, ValueError for no micro-batch, one without labels or no target at
    all, and TypeError for an iterator (N must be known before the first loss).

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> model, ids = tiny("llama"), random_ids(4, 8)
    >>> whole = model(ids, labels=ids).loss
    >>> loss = accumulate(model, split({"input_ids": ids, "labels": ids}, 2))
    >>> bool(torch.isclose(loss, whole)), model.lm_head.weight.grad is None
    (True, False)
    """
    if not isinstance(micro_batches, Sequence):
        raise TypeError(f"micro_batches must be a list or tuple, got {type(micro_batches).__name__}")
    if not micro_batches:
        raise ValueError("micro_batches must hold at least one micro-batch, got none")
    targets = sum(count_targets(batch) for batch in micro_batches)
    if targets == 0:
        raise ValueError(f"micro_batches must hold at least one label that is not {IGNORE}, got none")
    total = torch.zeros(())
    for batch in micro_batches:
        loss = model(**batch, use_cache=False, num_items_in_batch=targets).loss  # a sum over tokens / targets
        loss.backward()
        total = total + loss.detach().cpu()
    return total


def count_targets(batch: Mapping[str, Tensor]) -> int:
    """Return how many tokens of `batch` a causal language model is scored on.

    The label of position t is predicted from t - 1, so the first column of "labels" [B, T] has no prediction.
    Raises ValueError without two-dimensional labels.

    >>> count_targets({"labels": torch.tensor([[5, 6, 7, -100]])})
    2
    """
    if "labels" not in batch or batch["labels"].dim() != 2:
        raise ValueError(
            f"batch must hold 'labels' [B, T], got { ({k: list(v.shape) for k, v in batch.items()}) }"
        )
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def split(batch: Mapping[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Return `batch` cut by rows into `parts` micro-batches; of B rows, the first B mod parts get one more.

    Every tensor of `batch` has B rows. Raises ValueError for unequal rows and for `parts` outside 1..B.

    >>> [len(part["labels"]) for part in split({"labels": torch.ones(5, 3)}, 2)]
    [3, 2]
    """
    rows = {len(tensor) for tensor in batch.values()}
    if len(rows) != 1:
        raise ValueError(f"batch must hold tensors of equally many rows, got {sorted(rows)}")
    if not isinstance(parts, int) or not 1 <= parts <= max(rows):
        raise ValueError(f"parts must be an integer in 1..{max(rows)} (the rows of batch), got {parts!r}")
    cut = {name: torch.tensor_split(tensor, parts) for name, tensor in batch.items()}
    return [{name: pieces[i] for name, pieces in cut.items()} for i in range(parts)]
