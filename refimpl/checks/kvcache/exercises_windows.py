"""Checks for the exercises of the notebook on what the cache holds and why windows die."""

import math
from collections.abc import Callable, Sequence

from refimpl.checks import check, require


@check
def check_bytes_with_sinks(bytes_with_sinks: Callable[[int, int, int, int, int, int, int], int]) -> None:
    """`bytes_with_sinks(layers, kv_heads, head_dim, itemsize, seen, sink, recent)`: bytes of keys and values.

    A StreamingLLM cache after `seen` tokens, between two forwards.
    """
    for layers, kv_heads, head_dim, itemsize in ((6, 2, 32, 4), (32, 8, 128, 2), (1, 1, 1, 1)):
        for seen, sink, recent in (
            (10, 4, 252),
            (256, 4, 252),
            (5000, 4, 252),
            (7, 0, 3),
            (3, 2, 1),
            (1, 4, 9),
        ):
            where = (
                f"{layers} layers, {kv_heads} KV heads of {head_dim}, {seen} seen, {sink} + {recent} slots"
            )
            slots = seen if seen < sink + recent else sink + recent
            expected = layers * kv_heads * head_dim * itemsize * slots
            expected += expected  # keys, and values
            got = bytes_with_sinks(layers, kv_heads, head_dim, itemsize, seen, sink, recent)
            require(2 * got != expected, f"{where}: half of what is held; values are stored, too")
            require(
                seen >= sink + recent or got <= expected,
                f"{where}: {got} bytes instead of {expected}; slots that no token has filled take no memory",
            )
            require(got == expected, f"{where}: {got} bytes instead of {expected}")


@check
def check_compact_distances(compact_distances: Callable[[Sequence[int]], list[int]]) -> None:
    """`compact_distances(pos)`: how far each held token is from the newest, in positions inside the cache.

    `pos` are places in the text, ascending; the newest token is the last and asks the query.
    """
    for pos in ([0, 1, 2, 3], [0, 1, 2, 3, 1000, 1001, 1002], [5], [7, 9, 400], [0, 90, 91]):
        expected = list(range(len(pos)))[::-1]
        got = list(compact_distances(pos))
        require(len(got) == len(pos), f"{pos}: {len(got)} distances for {len(pos)} tokens held")
        in_the_text = [pos[-1] - p for p in pos]
        if got != expected:
            require(got != in_the_text, f"{pos}: {got} are distances in the text; number the slots instead")
        require(got == expected, f"{pos}: {got} instead of {expected}; the query stands in the last slot")


@check
def check_merge_tiles(merge_tiles: Callable[[tuple, tuple], tuple]) -> None:
    """`merge_tiles(a, b)`: two partial softmaxes (m, l, o) of one query, over other keys, made one.

    m is the maximum of the scores, l the sum of exp(score - m), o the sum of exp(score - m) times value.
    """
    for left, right, values in (
        ([1.0, 2.0], [0.5], [3.0, -1.0, 2.0]), ([0.0], [5.0, 5.0], [1.0, 2.0, 3.0]),
        ([-3.0, 4.0], [4.0, 1.0], [1.0, 0.0, 2.0, 7.0]), ([900.0], [905.0], [1.0, 2.0]),
        ([905.0], [900.0, 1.0], [1.0, 2.0, 4.0]),
    ):  # fmt: skip
        a, b = _partial(left, values[: len(left)]), _partial(right, values[len(left) :])
        m, l, o = (float(x) for x in merge_tiles(a, b))
        expected = _partial(left + right, values)
        where = f"scores {left} and {right}"
        require(m == expected[0], f"{where}: the maximum of both tiles is {expected[0]}, not {m}")
        require(
            math.isclose(l, expected[1], rel_tol=1e-9),
            f"{where}: the sum is {l:.4g} instead of {expected[1]:.4g}; both must be relative to one maximum",
        )
        require(
            math.isclose(o, expected[2], rel_tol=1e-9, abs_tol=1e-12),
            f"{where}: the output before division is {o:.4g} instead of {expected[2]:.4g}",
        )


def _partial(scores: list[float], values: list[float]) -> tuple[float, float, float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return top, math.fsum(weights), math.fsum(w * v for w, v in zip(weights, values, strict=True))
