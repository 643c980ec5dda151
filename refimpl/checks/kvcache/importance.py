"""The checks of token importance (survey Eq. 11; kv-cache spec 4)."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {
    "token_importance": "refimpl.kvcache.importance:token_importance",
    "drop_error": "refimpl.kvcache.importance:drop_error",
}
B, G, R, T, S, D = 2, 2, 3, 4, 9, 5


@check
def check_token_importance(token_importance: Callable) -> None:
    """`token_importance(weights, v, p=2)` -> [B, G, S]: attention times ||v||_p, over queries and group."""
    weights, v = _drawn()
    expected = {p: torch.zeros(B, G, S, dtype=torch.float64) for p in (1, 2)}
    for p in (1, 2):
        for b, g, r, t, i in product(*map(range, weights.shape)):
            norm = sum(abs(float(x)) ** p for x in v[b, g, i]) ** (1 / p)
            expected[p][b, g, i] += float(weights[b, g, r, t, i]) * norm
        require_close(token_importance(weights, v, p), expected[p], 1e-9, f"p = {p}")
    require_close(token_importance(weights, v), expected[2], 1e-9, "without p, the survey's norm")
    require_close(token_importance(weights.float(), v.float()), expected[2], 1e-4, "in float32")
    alone, one = weights[:1, :1, :1, :1], v[:1, :1]
    o = alone[0, 0, 0, 0] @ one[0, 0]
    for i in range(S):
        rest = alone[0, 0, 0, 0].clone()
        rest[i] = 0
        moved = (rest @ one[0, 0] - o).norm()
        got = token_importance(alone, one)[0, 0, i]
        what = f"one query, token {i}: without it the output moves by {moved:.6f}, I is {got:.6f}"
        require(abs(float(moved - got)) < 1e-9, what)
    for p in (0, 3):
        require_error(ValueError, lambda p=p: token_importance(weights, v, p), f"p = {p}")
    require_error(ValueError, lambda: token_importance(weights, v[:, :, 1:]), "a value is missing")


@check
def check_drop_error(drop_error: Callable) -> None:
    """`drop_error(weights, v)` -> [B, G, R, T, S]: how far an output moves when one token is dropped."""
    weights, v = _drawn()
    expected = torch.zeros_like(weights)
    for b, g, r, t, i in product(*map(range, weights.shape)):
        a, values = weights[b, g, r, t], v[b, g]
        rest = a.clone()
        rest[i] = 0
        expected[b, g, r, t, i] = (rest / rest.sum() @ values - a @ values).norm()
    require_close(drop_error(weights, v), expected, 1e-7, "the output computed anew without each token")
    require_error(ValueError, lambda: drop_error(weights[0], v), "weights of four dimensions")


def _drawn() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    weights = (2 * torch.randn(B, G, R, T, S, generator=draw, dtype=torch.float64)).softmax(-1)
    return weights, torch.randn(B, G, S, D, generator=draw, dtype=torch.float64)
