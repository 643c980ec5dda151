"""Mistakes that a reader of the notebook on memory and time may make, and the right answers."""

import math


def checkpoint_peak(layers, every, boundary, layer, grad):
    sizes = [min(every, layers - i) for i in range(0, layers, every)]
    held = [
        i * boundary + size * layer + sum(sizes[i + 1 :]) * grad for i, size in enumerate(sizes)
    ]  # the block's own boundary is what its first layer saves first
    return max(held)


def micro_batch_scales(counts):
    return [n / sum(counts) for n in counts]


def zero_per_rank(units, stage, world):
    whole, chunks = sum(units), sum(-(-n // world) for n in units)
    weights, gradients, moments = (chunks if stage >= s else whole for s in (3, 2, 1))
    return 4 * weights, 4 * gradients, 8 * moments


def nf4_bits(block, outer):
    return 4 + 8 / block + 32 / (block * outer)


SOLUTIONS = {
    "checkpoint_peak": checkpoint_peak,
    "micro_batch_scales": micro_batch_scales,
    "zero_per_rank": zero_per_rank,
    "nf4_bits": nf4_bits,
}


def _last_block_only(layers, every, boundary, layer, grad):
    sizes = [min(every, layers - i) for i in range(0, layers, every)]
    return (len(sizes) - 1) * boundary + sizes[-1] * layer


def _one_padding(units, stage, world):
    return zero_per_rank([sum(units)], stage, world)


def _no_padding(units, stage, world):
    whole, chunks = sum(units), sum(n // world for n in units)
    weights, gradients, moments = (chunks if stage >= s else whole for s in (3, 2, 1))
    return 4 * weights, 4 * gradients, 8 * moments


def _stages_reversed(units, stage, world):
    whole, chunks = sum(units), sum(-(-n // world) for n in units)
    weights, gradients, moments = (chunks if stage >= s else whole for s in (1, 2, 3))
    return 4 * weights, 4 * gradients, 8 * moments


MUTANTS = [
    ("checkpoint_peak", "gradients forgotten", lambda n, k, b, a, g: checkpoint_peak(n, k, b, a, 0)),
    ("checkpoint_peak", "switched off: nothing recomputed", lambda n, k, b, a, g: n * a),
    ("checkpoint_peak", "own boundary twice", lambda n, k, b, a, g: checkpoint_peak(n, k, b, a, g) + b),
    ("checkpoint_peak", "only the block that is recomputed first", _last_block_only),
    ("checkpoint_peak", "all boundaries at once",
     lambda n, k, b, a, g: (math.ceil(n / k) - 1) * b + min(n, k) * a + max(n - k, 0) * g),
    ("micro_batch_scales", "mean of means", lambda counts: [1 / len(counts)] * len(counts)),
    ("micro_batch_scales", "sums of losses", lambda counts: [float(n) for n in counts]),
    ("micro_batch_scales", "switched off: plain sum of the means", lambda counts: [1.0] * len(counts)),
    ("micro_batch_scales", "relative to the longest", lambda counts: [n / max(counts) for n in counts]),
    ("zero_per_rank", "switched off: everything on every rank",
     lambda units, stage, world: zero_per_rank(units, 0, world)),
    ("zero_per_rank", "no padding", _no_padding),
    ("zero_per_rank", "one padding for the whole model", _one_padding),
    ("zero_per_rank", "stage 1 shards the weights", _stages_reversed),
    ("nf4_bits", "one float32 absmax per block", lambda block, outer: 4 + 32 / block),
    ("nf4_bits", "scales forgotten", lambda block, outer: 4 + 8 / block),
    ("nf4_bits", "a scale for each 256 weights", lambda block, outer: 4 + 8 / block + 32 / outer),
]  # fmt: skip
