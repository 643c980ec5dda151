"""Plausible but wrong versions of the survey's Algorithm 2 that its check must reject."""

import torch

from refimpl.quantization.symmetric import algorithm_2, symmetric_codes


def as_printed(W, bits, per="tensor"):
    """The last line of the algorithm: the codes are multiplied by s and nothing else is kept."""
    codes, scale = algorithm_2(W, bits, per)
    return scale * codes, scale


def tensor_only(W, bits, per="tensor"):
    codes, scale = algorithm_2(W, bits, "tensor")
    return codes, scale.expand(len(W), 1) if per == "row" else scale


def by_half(W, bits, per="tensor"):
    """Divided by 2^(b-1): the largest positive weight is clipped by a whole step."""
    _, scale = algorithm_2(W, bits, per)
    scale = scale * (2 ** (bits - 1) - 1) / 2 ** (bits - 1)
    return symmetric_codes(W, scale, bits), scale


def truncated(W, bits, per="tensor"):
    _, scale = algorithm_2(W, bits, per)
    return (W / scale).trunc().to(torch.int8), scale


MUTANTS = [
    ("symmetric", "nothing is stored as integers, as printed", as_printed),
    ("symmetric", "one scale for all rows", tensor_only),
    ("symmetric", "the scale counts 2^(b-1) steps", by_half),
    ("symmetric", "digits are cut off instead of rounded", truncated),
]
