"""Mistakes that a reader of the notebook on rounding may make, and the right answers."""

import torch


def whole_model_ratio(compressed, kept, bits):
    return 32 * (compressed + kept) / (bits * compressed + 32 * kept)


def pack_three_bits(codes):
    units = codes.view(-1, 8).to(torch.int32)
    word = sum(units[:, i] << 3 * (7 - i) for i in range(8))
    return torch.stack([(word >> shift) & 255 for shift in (16, 8, 0)], 1).to(torch.uint8).flatten()


def zero_point_product(x_codes, zero, w_codes):
    x, w = x_codes.long(), w_codes.long()
    return x @ w.T - zero * w.sum(1)


def best_shrink(w, bits, norm=2, shares=80):
    top = 2 ** (bits - 1) - 1
    errors = {}
    for i in range(shares):
        s = (1 - i / 100) * w.abs().max() / top
        errors[1 - i / 100] = float((w - s * (w / s).round().clamp(-top, top)).abs().pow(norm).sum())
    return min(errors, key=errors.get)


def backwards(codes):
    return pack_three_bits(codes.view(-1, 8).flip(1).flatten())


def in_four_bits(codes):
    return (codes[0::2] << 4) | codes[1::2]


def unclipped(w, bits):
    top = 2 ** (bits - 1) - 1
    errors = {}
    for i in range(80):
        s = (1 - i / 100) * w.abs().max() / top
        errors[1 - i / 100] = float((w - s * (w / s).round()).square().sum())
    return min(errors, key=errors.get)


SOLUTIONS = {
    "whole_model_ratio": whole_model_ratio,
    "pack_three_bits": pack_three_bits,
    "zero_point_product": zero_point_product,
    "best_shrink": best_shrink,
}

MUTANTS = [
    ("whole_model_ratio", "embeddings forgotten", lambda n, kept, bits: 32 / bits),
    ("whole_model_ratio", "upside down", lambda n, kept, bits: 1 / whole_model_ratio(n, kept, bits)),
    ("whole_model_ratio", "numbers in place of bytes", lambda n, kept, bits: (n + kept) / (n + kept)),
    ("pack_three_bits", "codes of a unit in reverse", backwards),
    ("pack_three_bits", "two codes in a byte", in_four_bits),
    ("pack_three_bits", "not packed", lambda codes: codes.clone()),
    ("zero_point_product", "zero point ignored", lambda x, z, w: x.long() @ w.long().T),
    (
        "zero_point_product",
        "subtracted in eight bits",
        lambda x, z, w: (x - z).to(torch.int8).long() @ w.long().T,
    ),
    (
        "zero_point_product",
        "sum over x",
        lambda x, z, w: x.long() @ w.long().T - z * x.long().sum(1)[:, None],
    ),
    ("best_shrink", "the whole range", lambda w, bits: 1.0),
    ("best_shrink", "without clipping", unclipped),
    ("best_shrink", "least absolute error", lambda w, bits: best_shrink(w, bits, norm=1)),
]
