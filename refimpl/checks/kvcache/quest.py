"""The check of Quest (kv-cache spec 22): the bound, pages that grow, per-head selection, exact traffic."""

from collections.abc import Callable
from types import SimpleNamespace

import torch

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {"quest": "refimpl.kvcache.quest:Quest"}


@check
def check_quest(Quest: Callable) -> None:
    """`Quest(budget, page)` with `build(codec, q, ok)`, `append(k)`, `bound(q, lo, hi)`, `select(q)`,
    `read(q, codec, scale, ok)`, `read_bytes()` and the bounds lo, hi [B, G, P, D]."""
    draw = torch.Generator().manual_seed(0)
    B, G, R, D, page = 2, 2, 3, 8, 4
    k, v = (torch.randn(B, G, 61, D, generator=draw) for _ in range(2))
    quest = Quest(5 * page, page)
    sizes = (30, 31, 32, 33, 61)
    for before, S in zip((0, *sizes), sizes, strict=False):  # built once, then told of the rest
        codec = _dense(k[:, :, :S], v[:, :, :S])
        q = torch.randn(B, G, R, 1, D, generator=draw)
        if not before:
            quest.build(codec, q, None)
        else:
            quest.append(k[:, :, before:S])
        pages = k[:, :, :S].split(page, 2)
        for name, bound, expected in (
            ("lo", quest.lo, torch.stack([p.amin(2) for p in pages], 2)),
            ("hi", quest.hi, torch.stack([p.amax(2) for p in pages], 2)),
        ):
            require_close(bound, expected, 0, f"{S} tokens: {name} of the pages")
        bounds = torch.stack(
            [
                torch.maximum(q * p.amin(2)[:, :, None, None], q * p.amax(2)[:, :, None, None]).sum(-1)[
                    ..., 0
                ]
                for p in pages
            ],
            -1,
        )
        found = quest.bound(q[:, :, :, 0], quest.lo[:, :, None], quest.hi[:, :, None])
        require_close(found, bounds, 1e-4, f"{S} tokens: bound of q · k")
        logits = torch.einsum("bgrtd,bgsd->bgrs", q, k[:, :, :S])
        best = torch.stack([p.amax(-1) for p in logits.split(page, -1)], -1)
        require(bool((found >= best - 1e-4).all()), f"{S} tokens: a bound lies below a logit of its page")
        out, index = quest.read(q, codec, 0.5, None), quest.select(q)
        require(tuple(index.shape[:3]) == (B, G, R), f"select: {list(index.shape)}: not a row per query head")
        rows = 0
        for b in range(B):
            for g in range(G):
                union = set()
                for r in range(R):
                    top = bounds[b, g, r].topk(5).indices.tolist()
                    slots = sorted(s for p in top for s in range(page * p, min(page * (p + 1), S)))
                    got = sorted(s for s in index[b, g, r].tolist() if s >= 0)
                    require(got == slots, f"{S} tokens, head {(b, g, r)}: reads {got}, its best are {slots}")
                    weights = (logits[b, g, r, slots] * 0.5).softmax(-1)
                    require_close(out[b, g, r, 0], weights @ v[b, g, slots], 1e-5, f"{S} tokens: output")
                    union |= set(slots)
                rows += len(union)
        read = quest.read_bytes()
        require(read["payload"] == rows * 2 * D * 4, f"{read['payload']} bytes read, not {rows} entries")
        meta = 2 * B * G * len(pages) * D * 4
        require(read["meta"] == meta, f"{read['meta']} bytes of bounds read, not {meta}")
    few = Quest(1, page)
    few.build(codec, q, None)
    n = few.select(q).shape[-1]
    require(n == 3 * page, f"a budget of 1 token reads {n} tokens; three pages are the least")
    require_error(ValueError, lambda: Quest(0, page), "budget 0")


def _dense(k: torch.Tensor, v: torch.Tensor) -> SimpleNamespace:
    def read(index: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        return (k, v) if index is None else tuple(t.take_along_dim(index[..., None], 2) for t in (k, v))

    return SimpleNamespace(k=k, v=v, read=read)
