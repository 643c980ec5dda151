"""Plausible but wrong selective losses that `check_rho1` must reject."""

import torch
import torch.nn.functional as F

from refimpl.kvcache.prompt.rho1 import SelectiveLM, mean_loss, next_token_losses, select_tokens
from refimpl.training import IGNORE, lm_loss


class Everything(SelectiveLM):
    """The switched-off system: every token is trained on."""

    def __call__(self, model, batch):
        return lm_loss(model, batch)


class PerSequence(SelectiveLM):
    """Every row keeps its own top k."""

    def choose(self, logits, labels, batch):
        theirs = self.reference(input_ids=batch, use_cache=False).logits
        excess = next_token_losses(logits, labels) - next_token_losses(theirs, labels)
        valid = labels != IGNORE
        rows = [select_tokens(e[None], v[None], self.k) for e, v in zip(excess, valid, strict=True)]
        return torch.cat(rows)


class ShiftedReference(SelectiveLM):
    """The reference's losses stand one token further left than the student's."""

    def choose(self, logits, labels, batch):
        theirs = self.reference(input_ids=batch, use_cache=False).logits
        theirs = next_token_losses(theirs, labels).roll(1, dims=1)
        return select_tokens(next_token_losses(logits, labels) - theirs, labels != IGNORE, self.k)


class StudentLossAlone(SelectiveLM):
    """The hardest tokens are kept, whatever the reference says of them."""

    def choose(self, logits, labels, batch):
        return select_tokens(next_token_losses(logits, labels), labels != IGNORE, self.k)


class DividedByAll(SelectiveLM):
    """The sum over selected tokens is divided by the number of all tokens."""

    def __call__(self, model, batch):
        logits = model(input_ids=batch, use_cache=False).logits
        labels = F.pad(batch[:, 1:], (0, 1), value=IGNORE)
        keep = self.choose(logits, labels, batch)
        return mean_loss(logits, labels, keep) * keep.sum() / (labels != IGNORE).sum()


class LowestExcess(SelectiveLM):
    def choose(self, logits, labels, batch):
        theirs = self.reference(input_ids=batch, use_cache=False).logits
        gap = next_token_losses(theirs, labels) - next_token_losses(logits, labels)
        return select_tokens(gap, labels != IGNORE, self.k)


MUTANTS = [
    ("rho1", "nothing is selected: plain language modelling", Everything),
    ("rho1", "the top is taken per sequence, not per batch", PerSequence),
    ("rho1", "label shift between the two losses", ShiftedReference),
    ("rho1", "no reference: the highest losses are kept", StudentLossAlone),
    ("rho1", "the mean is taken over all tokens", DividedByAll),
    ("rho1", "the lowest excess is kept", LowestExcess),
]
