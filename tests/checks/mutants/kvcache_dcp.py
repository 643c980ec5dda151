"""Plausible but wrong Dynamic Context Pruning that its checks must reject."""

import torch

from refimpl.kvcache import KVCache, Window
from refimpl.kvcache.dcp import ContextPruning, keep_probabilities, sparse_sigmoid
from refimpl.kvcache.dcp_policy import DynamicContextPruning


def logistic_whatever_alpha(z, alpha):
    sparse_sigmoid(z, alpha)
    return z.sigmoid()


def linear_whatever_alpha(z, alpha):
    sparse_sigmoid(z, alpha)
    return ((z + 1) / 2).clamp(0, 1)


def second_entry(z, alpha):
    return 1 - sparse_sigmoid(z, alpha)


def straight_through(z, alpha):
    return sparse_sigmoid(z, alpha).detach() + (z - z.detach()) / 2


class NothingPruned(ContextPruning):
    def keep(self, l, x, alpha, real=None):
        return torch.ones_like(super().keep(l, x, alpha, real))


class ForgetsWhatItDropped(ContextPruning):
    """Each query decides anew: a token that was dropped comes back."""

    def keep(self, l, x, alpha, real=None):
        gate = sparse_sigmoid(self.layers[l](x), alpha)
        return torch.where(torch.ones_like(gate).tril(-1) > 0, gate, 1)


class ProductOverKeys(ContextPruning):
    """The cumulative product runs along the keys."""

    def keep(self, l, x, alpha, real=None):
        gate = sparse_sigmoid(self.layers[l](x), alpha)
        return torch.where(torch.ones_like(gate).tril(-1) > 0, gate, 1).cumprod(-1)


class DropsItself(ContextPruning):
    """A token may drop itself on arrival."""

    def keep(self, l, x, alpha, real=None):
        gate = sparse_sigmoid(self.layers[l](x), alpha)
        return torch.where(torch.ones_like(gate).tril() > 0, gate, 1).cumprod(-2)


class SmallQueriesAndKeysSwapped(ContextPruning):
    def keep(self, l, x, alpha, real=None):
        return keep_probabilities(sparse_sigmoid(self.layers[l](x).transpose(1, 2), alpha))


class StaysOneStepLonger(ContextPruning):
    """What a token drops is still seen by that token."""

    def keep(self, l, x, alpha, real=None):
        keep = super().keep(l, x, alpha, real)
        later = torch.cat((torch.ones_like(keep[:, :1]), keep[:, :-1]), 1)
        return later


def _decode(policy):
    @torch.no_grad()
    def decode(model, pruning, ids):
        cache = KVCache(model, policy(model, pruning))
        logits, held = [], []
        for t in range(ids.shape[1]):
            logits.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
            held.append(torch.stack([cache.held(l)[:, 0] for l in range(3)]))
        return torch.cat(logits, 1), torch.stack(held, -1)

    return decode


class MaskedButKept(DynamicContextPruning):
    """Hides what is dropped and frees nothing."""

    def keep(self, v):
        return None


class DeletedAfterAttention(DynamicContextPruning):
    """The token that drops another still attends to it."""

    def hide(self, v):
        super().hide(v)
        return None


class UnnormedInput(DynamicContextPruning):
    """Small queries and keys read the residual before the norm."""

    def __init__(self, model, pruning):
        super().__init__(model, pruning)
        self.bb.ln1 = lambda l, x: x


MUTANTS = [
    ("sparse_sigmoid", "the logistic function for every alpha", logistic_whatever_alpha),
    ("sparse_sigmoid", "alpha is always 2", linear_whatever_alpha),
    ("sparse_sigmoid", "the other entry", second_entry),
    ("sparse_sigmoid", "a straight-through gradient", straight_through),
    ("context_pruning", "nothing is pruned", NothingPruned),
    ("context_pruning", "dropped tokens come back", ForgetsWhatItDropped),
    ("context_pruning", "the product runs along the keys", ProductOverKeys),
    ("context_pruning", "a token can drop itself", DropsItself),
    ("context_pruning", "query and key are swapped", SmallQueriesAndKeysSwapped),
    ("context_pruning", "dropping works one step late", StaysOneStepLonger),
    ("context_pruning_cache", "hidden tokens are not deleted", _decode(MaskedButKept)),
    ("context_pruning_cache", "deleted after the attention", _decode(DeletedAfterAttention)),
    ("context_pruning_cache", "the residual is not normed", _decode(UnnormedInput)),
    ("context_pruning_cache", "a window in place of learned pruning", _decode(lambda m, p: Window(4))),
]
