"""Token importance: how much of the attention's output a cached token carries (survey Eq. 11)."""

from __future__ import annotations

import torch
from torch import Tensor

from refimpl.kvcache.view import View

__all__ = ["drop_error", "norm_slot", "note_norms", "token_importance", "value_norm"]

NORMS = (1, 2)


def value_norm(v: Tensor, p: int = 2) -> Tensor:
    """Return ||v_i||_p of values [..., D] -> [...], in float32 (float64 for float64 values).

    Parameters: p, 2 (the survey's) or 1 (VATP's, 2406.12335). Raises ValueError for another p, for values
    that are no floats, and for D = 0.

    >>> value_norm(torch.tensor([[3., -4.]])), value_norm(torch.tensor([[3., -4.]]), p=1)
    (tensor([5.]), tensor([7.]))
    """
    check_norm(p)
    if not isinstance(v, Tensor) or not v.is_floating_point() or v.ndim < 1 or not v.shape[-1]:
        got = f"{v.dtype} {list(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"v: {got}; allowed: floats [..., D], D >= 1")
    return torch.linalg.vector_norm(v, p, dim=-1, dtype=torch.promote_types(v.dtype, torch.float32))


def token_importance(weights: Tensor, v: Tensor, p: int = 2) -> Tensor:
    """Attention times value norm, I_i = sum over queries t and heads r of alpha[r, t, i] · ||v_i||_p.

    Survey Eq. 11, completed: the survey writes no query index, and sums over all heads. Here the queries in
    `weights` and the query heads that share a KV head are summed, since eviction acts on KV heads; summed
    over G as well (`.sum(1)`) it is the survey's, one score for all heads of a layer, to be used only by a
    policy that keeps the same slots in all of them (`TOVA`). The survey credits it to DynamicKV, which has no
    value norm; the nearest source is VATP (2406.12335), with p = 1 and attention accumulated as in H2O.

    Parameters
    - weights: softmax weights [B, G, R, T, S] of any T >= 1 queries, or sums over queries (T = 1).
    - v: values [B, G, S, D].
    - p: 2 (survey) or 1 (VATP).

    Returns [B, G, S], float32 or float64; NaN where the weights are NaN. Raises ValueError for shapes that do
    not fit and for another p.

    >>> weights = torch.tensor([0.75, 0.25]).view(1, 1, 1, 1, 2)
    >>> token_importance(weights, torch.tensor([[1., 0.], [3., 4.]]).view(1, 1, 2, 2))
    tensor([[[0.7500, 1.2500]]])
    """
    _check(weights, v)
    return weights.sum((2, 3), dtype=torch.promote_types(weights.dtype, torch.float32)) * value_norm(v, p)


def drop_error(weights: Tensor, v: Tensor) -> Tensor:
    """Return how far each head's output moves when one token is dropped: exact, for each query.

    Without token i the softmax is normalised anew, o becomes (o - alpha_i v_i) / (1 - alpha_i), and so

        ||o' - o|| = alpha_i / (1 - alpha_i) · ||v_i - o||.

    Eq. 11 is the same change before that normalisation, alpha_i ||v_i||. Infinite where alpha_i = 1.

    Parameters: weights [B, G, R, T, S], rows that sum to 1; v [B, G, S, D]. Returns [B, G, R, T, S], float32
    or float64. Raises ValueError for shapes that do not fit.

    >>> weights = torch.tensor([0.75, 0.25]).view(1, 1, 1, 1, 2)
    >>> drop_error(weights, torch.tensor([[1., 0.], [5., 0.]]).view(1, 1, 2, 2))  # o = 2: becomes 5, or 1
    tensor([[[[[3., 1.]]]]])
    """
    _check(weights, v)
    exact = torch.promote_types(weights.dtype, torch.float32)
    weights, v = weights.to(exact), v.to(exact)
    o = torch.einsum("bgrts,bgsd->bgrtd", weights, v)
    # ||v - o||² multiplied out, so that no tensor [B, G, R, T, S, D] is made.
    cross = torch.einsum("bgrtd,bgsd->bgrts", o, v)
    square = v.square().sum(-1)[:, :, None, None] - 2 * cross + o.square().sum(-1, keepdim=True)
    rest = 1 - weights
    moved = weights / rest.clamp(min=torch.finfo(exact).tiny) * square.clamp(min=0).sqrt()
    return moved.masked_fill(rest <= 0, torch.inf)


def norm_slot(p: int | None) -> dict[str, torch.dtype]:
    """The slot state for norms of the values that a policy with Eq. 11 as its score needs; None: nothing.

    Raises ValueError for another p than None, 1, 2.
    """
    if p is None:
        return {}
    check_norm(p)
    return {"norm": torch.float32}


def note_norms(v: View, p: int) -> None:
    """Write the norms of the values that just arrived into the state `norm_slot` (in `observe`)."""
    v.write("norm", value_norm(v.new_v, p))


def check_norm(p: object) -> None:
    """ValueError unless p is 1 or 2."""
    if isinstance(p, bool) or p not in NORMS:
        raise ValueError(f"p: {p!r}; allowed: 1 (VATP), 2 (survey Eq. 11)")


def _check(weights: Tensor, v: Tensor) -> None:
    for name, t, ndim in (("weights", weights, 5), ("v", v, 4)):
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.ndim != ndim or not t.numel():
            got = f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            shape = "[B, G, R, T, S]" if ndim == 5 else "[B, G, S, D]"
            raise ValueError(f"{name}: {got}; allowed: floats {shape}, not empty")
    B, G, _, _, S = weights.shape
    if v.shape[:3] != (B, G, S):
        raise ValueError(f"v: shape {list(v.shape)}; allowed with these weights: [{B}, {G}, {S}, D]")
