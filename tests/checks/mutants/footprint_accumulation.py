"""Plausible but wrong gradient accumulation that the check must reject."""

import torch

from refimpl.footprint.accumulation import count_targets


def _accumulate(model, micro_batches, weight):
    total = torch.zeros(())
    for batch in micro_batches:
        loss = model(**batch, num_items_in_batch=1).loss * weight(batch)
        loss.backward()
        total = total + loss.detach()
    return total


def mean_of_means(model, micro_batches):
    return _accumulate(model, micro_batches, lambda b: 1 / (max(1, count_targets(b)) * len(micro_batches)))


def sum_of_means(model, micro_batches):
    return _accumulate(model, micro_batches, lambda b: 1 / max(1, count_targets(b)))


def first_label_counted_although_nothing_predicts_it(model, micro_batches):
    targets = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
    return _accumulate(model, micro_batches, lambda b: 1 / targets)


def masked_tokens_counted(model, micro_batches):
    targets = sum(batch["labels"][:, 1:].numel() for batch in micro_batches)
    return _accumulate(model, micro_batches, lambda b: 1 / targets)


def gradients_zeroed_between_micro_batches(model, micro_batches):
    targets, total = sum(count_targets(batch) for batch in micro_batches), torch.zeros(())
    for batch in micro_batches:
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=targets).loss
        loss.backward()
        total = total + loss.detach()
    return total


def only_the_first_micro_batch(model, micro_batches):
    return _accumulate(model, micro_batches[:1], lambda b: 1 / count_targets(b))


MUTANTS = [
    ("gradient_accumulation", "the mean of the micro-batches' mean losses", mean_of_means),
    ("gradient_accumulation", "mean losses added, not divided by k", sum_of_means),
    (
        "gradient_accumulation",
        "counts labels before the shift",
        first_label_counted_although_nothing_predicts_it,
    ),
    ("gradient_accumulation", "divides by all tokens, masked ones too", masked_tokens_counted),
    ("gradient_accumulation", "zero_grad between micro-batches", gradients_zeroed_between_micro_batches),
    ("gradient_accumulation", "nothing accumulates", only_the_first_micro_batch),
]
