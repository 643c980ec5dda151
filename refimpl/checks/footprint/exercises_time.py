"""Checks for the exercises of the notebook that buys memory with time."""

import math
from collections.abc import Callable, Sequence

from refimpl.checks import check, require


@check
def check_checkpoint_peak(checkpoint_peak: Callable[[int, int, int, int, int], int]) -> None:
    """`checkpoint_peak(layers, every, boundary, layer, grad)`: most bytes at once in a checkpointed backward.

    Bytes: `boundary`, a layer's input; `layer`, all that a layer saves, its input among it; `grad`, a layer's
    gradients. Blocks of `every` layers, the last may be shorter; recomputed from the last to the first.
    """
    for layers, every, boundary, layer, grad in (
        (4, 2, 10, 100, 0), (12, 1, 10, 280, 0), (12, 3, 10, 280, 80), (12, 12, 10, 280, 80), (7, 3, 4, 9, 2),
        (8, 3, 5, 20, 30), (6, 2, 7, 7, 0), (5, 1, 3, 11, 40), (1, 1, 5, 6, 7),
    ):  # fmt: skip
        held = []
        for first in range(
            0, layers, every
        ):  # the layers before `first` wait, those after the block are done
            size = min(every, layers - first)
            others = first // every  # boundaries of earlier blocks; this block's own is in its first layer
            held.append(others * boundary + size * layer + (layers - first - size) * grad)
        got = checkpoint_peak(layers, every, boundary, layer, grad)
        where = f"{layers} layers in blocks of {every}, boundary {boundary}, layer {layer}, grad {grad}"
        n_blocks = len(held)
        size = min(every, layers)
        if grad and got != max(held):
            free = [n * boundary + min(every, layers - n * every) * layer for n in range(n_blocks)]
            require(got != max(free), f"{where}: gradients of the layers that are done are in memory too")
        twice = max(h + boundary for h in held)
        require(
            got != twice, f"{where}: the block's own input is counted twice, {got} instead of {max(held)}"
        )
        require(
            got == max(held),
            f"{where}: {got} bytes instead of {max(held)}, the maximum over all {n_blocks} blocks",
        )


@check
def check_micro_batch_scales(micro_batch_scales: Callable[[Sequence[int]], list[float]]) -> None:
    """`micro_batch_scales(counts)`: what each micro-batch's mean loss is multiplied by before backward.

    `counts` are the numbers of targets; the scaled means add up to the mean over all targets.
    """
    for counts in ([6, 2], [5, 5, 5], [1, 0, 9], [7], [3, 4, 5, 100]):
        got = list(micro_batch_scales(counts))
        require(len(got) == len(counts), f"{counts}: {len(got)} scales for {len(counts)} micro-batches")
        expected = [n / sum(counts) for n in counts]
        mean_of_means = [1 / len(counts)] * len(counts)
        close = [math.isclose(a, b, abs_tol=1e-9) for a, b in zip(got, expected, strict=True)]
        if not all(close):
            require(
                got != mean_of_means, f"{counts}: the mean of the means weighs short micro-batches too much"
            )
        require(
            math.isclose(sum(got), 1.0, abs_tol=1e-9),
            f"{counts}: scales must add up to 1, or the learning rate changes: they give {sum(got):.4g}",
        )
        require(all(close), f"{counts}: scales {got} instead of {expected}")


@check
def check_zero_per_rank(zero_per_rank: Callable[[Sequence[int], int, int], tuple[int, int, int]]) -> None:
    """`zero_per_rank(units, stage, world)`: float32 bytes (weights, gradients, AdamW's moments) on rank 0.

    `units` are parameter counts; what a stage shards is cut unit by unit into chunks of ceil(n / world).
    """
    for units in ([10], [9, 9, 9], [1025 * 64 + 64, 45_440, 45_440], [3, 1]):
        for world in (1, 2, 4, 7):
            chunks = 0
            for n in units:
                chunks += n // world + (1 if n % world else 0)
            for stage in range(4):
                got = tuple(zero_per_rank(units, stage, world))
                whole = sum(units)
                expected = (
                    4 * (chunks if stage == 3 else whole),
                    4 * (chunks if stage >= 2 else whole),
                    8 * (chunks if stage >= 1 else whole),
                )
                where = f"units {units}, stage {stage}, {world} ranks"
                require(len(got) == 3, f"{where}: three numbers are asked for, got {got}")
                for name, mine, right in zip(("weights", "gradients", "moments"), got, expected, strict=True):
                    require(mine == right, f"{where}: {mine} bytes of {name} instead of {right}")


@check
def check_nf4_bits(nf4_bits: Callable[[int, int], float]) -> None:
    """`nf4_bits(block, outer)`: bits per weight of NF4, doubly quantised, for very many weights.

    4 bits a code; per `block` weights one byte for the absmax; per `outer` absmaxima one float32 scale.
    """
    for block, outer in ((64, 256), (64, 64), (32, 256), (128, 16)):
        weights = block * outer  # one outer block of weights, counted bit by bit
        bits = weights * 4 + outer * 8 + 32
        got, expected = nf4_bits(block, outer), bits / weights
        where = f"blocks of {block}, outer blocks of {outer}"
        require(
            not math.isclose(got, 4 + 32 / block), f"{where}: these absmaxima are float32, not one byte each"
        )
        require(not math.isclose(got, 4 + 8 / block), f"{where}: the scales of the absmaxima are forgotten")
        require(
            math.isclose(got, expected, rel_tol=1e-9), f"{where}: {got:.6g} bits instead of {expected:.6g}"
        )
