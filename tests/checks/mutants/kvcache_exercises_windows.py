"""Mistakes that a reader of the notebook on windows and sinks may make, and the right answers."""

import math


def bytes_with_sinks(layers, kv_heads, head_dim, itemsize, seen, sink, recent):
    return 2 * layers * kv_heads * head_dim * itemsize * min(seen, sink + recent)


def compact_distances(pos):
    return [len(pos) - 1 - slot for slot in range(len(pos))]


def merge_tiles(a, b):
    m = max(a[0], b[0])
    left, right = math.exp(a[0] - m), math.exp(b[0] - m)
    return m, left * a[1] + right * b[1], left * a[2] + right * b[2]


SOLUTIONS = {
    "bytes_with_sinks": bytes_with_sinks,
    "compact_distances": compact_distances,
    "merge_tiles": merge_tiles,
}


def _keys_only(layers, kv_heads, head_dim, itemsize, seen, sink, recent):
    return layers * kv_heads * head_dim * itemsize * min(seen, sink + recent)


def _always_full(layers, kv_heads, head_dim, itemsize, seen, sink, recent):
    return 2 * layers * kv_heads * head_dim * itemsize * (sink + recent)


def _everything_seen(layers, kv_heads, head_dim, itemsize, seen, sink, recent):
    return 2 * layers * kv_heads * head_dim * itemsize * seen


def _in_the_text(pos):
    return [pos[-1] - p for p in pos]


def _newest_outside(pos):
    return [len(pos) - slot for slot in range(len(pos))]


def _sum_as_is(a, b):
    return max(a[0], b[0]), a[1] + b[1], a[2] + b[2]


def _output_not_rescaled(a, b):
    m, l, _ = merge_tiles(a, b)
    return m, l, a[2] + b[2]


MUTANTS = [
    ("bytes_with_sinks", "keys alone", _keys_only),
    ("bytes_with_sinks", "slots that are still empty", _always_full),
    ("bytes_with_sinks", "nothing is evicted", _everything_seen),
    ("compact_distances", "distances in the text", _in_the_text),
    ("compact_distances", "the query one slot behind the last", _newest_outside),
    ("merge_tiles", "sums relative to different maxima", _sum_as_is),
    ("merge_tiles", "the output is not rescaled", _output_not_rescaled),
]
