"""Plausible but wrong NutePrune that its check must reject."""

from contextlib import contextmanager
from unittest import mock

import torch

from refimpl.quantization.pruning.hidden import cut_masks
from refimpl.quantization.pruning.nuteprune import nuteprune

ROOM = "refimpl.quantization.pruning."


def _with(name, replacement):
    def run(*args, **settings):
        with mock.patch(ROOM + name, replacement):
            return nuteprune(*args, **settings)

    return run


def off(model, ids, *, teachers="numerous", **settings):
    """One dense teacher."""
    return nuteprune(model, ids, teachers="dense" if teachers else None, **settings)


def descent(*args, adam=torch.optim.Adam, **settings):
    """The multipliers are minimised as well."""
    with mock.patch("torch.optim.Adam", lambda params, lr, maximize=False: adam(params, lr=lr)):
        return nuteprune(*args, **settings)


@contextmanager
def students_factors(model, values):
    yield


def without_the_embedding(model, masks):
    """Hidden gates go into o and down and not into the embedding, as in the code's merging script."""
    embedding = model.get_input_embeddings().weight.detach().clone()
    cut_masks(model, masks)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embedding[:, masks.hidden > 0])


def soft(log_a):
    """Nothing is ever closed: the gates stay between 0 and 1."""
    return torch.sigmoid(1.2 * log_a)


def no_target(model, ids, *, warmup, **settings):
    """The target is there from the first step."""
    return nuteprune(model, ids, warmup=1, **settings)


MUTANTS = [
    ("nuteprune", "one dense teacher", off),
    ("nuteprune", "the multipliers descend", descent),
    (
        "nuteprune",
        "a teacher with the student's factors",
        _with("nuteprune_teachers._factors", students_factors),
    ),
    ("nuteprune", "the embedding is not masked", _with("nuteprune.cut_masks", without_the_embedding)),
    ("nuteprune", "no gate is closed at the end", _with("nuteprune.at_inference", soft)),
    ("nuteprune", "no warm-up of the target", no_target),
]
