"""Plausible but wrong token importances that their checks must reject."""

import torch

from refimpl.kvcache.importance import drop_error, token_importance


def attention_mass(weights, v, p=2):
    return token_importance(weights, torch.ones_like(v[..., :1]).expand_as(v), p) / v.shape[-1] ** (1 / p)


def norm_squared(weights, v, p=2):
    return token_importance(weights, v, p) * torch.linalg.vector_norm(v, p, dim=-1)


def last_query(weights, v, p=2):
    return token_importance(weights[:, :, :, -1:], v, p)


def mean_of_the_group(weights, v, p=2):
    return token_importance(weights, v, p) / weights.shape[2]


def all_heads(weights, v, p=2):
    one = token_importance(weights, v, p)
    return one.sum(1, keepdim=True).expand_as(one)


def always_l1(weights, v, p=2):
    token_importance(weights, v, p)
    return token_importance(weights, v, 1)


def not_normalised_anew(weights, v):
    drop_error(weights, v)
    return weights * torch.linalg.vector_norm(v, dim=-1)[:, :, None, None]


def output_left_out(weights, v):
    drop_error(weights, v)
    return weights / (1 - weights) * torch.linalg.vector_norm(v, dim=-1)[:, :, None, None]


def nothing_moves(weights, v):
    return 0 * drop_error(weights, v)


MUTANTS = [
    ("token_importance", "attention mass without the values", attention_mass),
    ("token_importance", "the norm is squared", norm_squared),
    ("token_importance", "only the last query counts", last_query),
    ("token_importance", "the mean of the group, not the sum", mean_of_the_group),
    ("token_importance", "summed over KV heads, but handed out per head", all_heads),
    ("token_importance", "p is ignored", always_l1),
    ("drop_error", "the other weights do not grow", not_normalised_anew),
    ("drop_error", "distance to zero, not to the output", output_left_out),
    ("drop_error", "no token matters", nothing_moves),
]
