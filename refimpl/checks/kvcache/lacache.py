"""The check of LaCache (kv-cache spec 13)."""

from collections.abc import Callable
from functools import cache
from math import ceil
from types import SimpleNamespace

import torch

from refimpl.checks import check, require, require_error

IMPLEMENTATION = {"lacache": "refimpl.kvcache.lacache:LaCache"}
SINK = 4


@check
def check_lacache(LaCache: Callable) -> None:
    """`LaCache(budget, n_layers, span, overlap, ladder, sink)` with `keep(v)`, on a stream of 150 tokens."""
    cases = ((24, 6, 3, 0), (24, 6, 2, 0), (26, 6, 3, 1), (30, 8, 2, 0), (30, 8, 4, 2))
    for ladder in ("interleaved", "contiguous"):
        for budget, L, span, overlap in cases:
            policy = LaCache(budget, L, span, overlap, ladder, SINK)
            require(policy.positions == "compact", "positions: a thinned stream's keys need compact ones")
            what = f"{ladder} ladder, {L} layers, span {span}, overlap {overlap}, budget {budget}"
            for chunks in ([1] * 150, [60, 7, 1, 1, 1, 30, 50]):
                held = [_stream(policy, l, L, chunks) for l in range(L)]
                for l in range(L):
                    expected = _reference(budget, L, span, overlap, ladder, l, sum(chunks))
                    require(held[l] == expected,
                            f"{what}: after {sum(chunks)} tokens in {len(chunks)} forwards layer {l} holds "
                            f"{held[l]}, not {expected}")  # fmt: skip
                require(len({len(kept) for kept in held}) == 1, f"{what}: layers hold different numbers")
    for wrong in ((24, 6, 4, 2), (24, 6, 7, 0), (24, 6, 3, 3), (24, 6, 0, 0), (9, 6, 3, 0)):
        require_error(ValueError, lambda wrong=wrong: LaCache(*wrong), f"LaCache{wrong}")


@cache  # the same for every candidate
def _reference(budget: int, L: int, s: int, o: int, ladder: str, layer: int, n: int) -> list[int]:
    """Tokens that a layer holds after n: a list, one token and one block at a time."""
    block = 1 + ceil((L - s) / (s - o))
    stay = min(ceil(s / (s - o)), block)
    drop = block - stay
    offset = layer % (drop + 1) if ladder == "interleaved" else min(layer // (s - o), drop)
    limit, cursor, held = budget + drop // 2, SINK, []
    for token in range(n):
        held.append(token)
        while len(held) > limit:
            if cursor + stay > limit - L:  # the newest L are left alone
                cursor = SINK
            piece = held[cursor : cursor + block]
            held[cursor : cursor + block] = piece[offset : offset + stay]
            cursor += stay
    return held


def _stream(policy: object, layer: int, L: int, chunks: list[int]) -> list[int]:
    """Original positions of what a policy keeps; where it has `replace`, it is asked with slots shuffled."""
    held, seen, draw = torch.empty(0, dtype=torch.long), 0, torch.Generator().manual_seed(layer)
    replaces = "replace" in vars(type(policy))
    for T in chunks:
        held = torch.cat([held, torch.arange(seen, seen + T)])
        seen, S = seen + T, len(held)
        one = replaces and T == 1 and S - 1 == policy.steady
        if one:
            held = held[torch.randperm(S, generator=draw)]
        view = SimpleNamespace(
            shape=(1, 1, S), S=S, T=T, seen=seen, prefill=seen == T, layer=layer, n_layers=L, full=True,
            count=S, rank=held.argsort().argsort(), pos=held.expand(1, 1, S), device=held.device, slot={},
            notes={}, ok=torch.ones(1, 1, S, dtype=torch.bool),
        )  # fmt: skip
        if one:
            gone = int(policy.replace(view))
            held = torch.cat((held[:gone], held[gone + 1 :])).sort().values
            continue
        keep = policy.keep(view)
        if keep is not None:
            parts = keep if isinstance(keep, list) else [keep.flatten()]  # stretches, or a mask
            held = torch.cat([held[part] for part in parts])
    return held.tolist()
