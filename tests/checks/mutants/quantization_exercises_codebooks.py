"""Mistakes that a reader of the notebook on codebooks may make, and the right answers."""

import torch


def codebook_bits(bits, v, rows, columns, entry_bits):
    return bits + 2 ** (bits * v) * v * entry_bits / (rows * columns)


def walsh_hadamard(x):
    if len(x) == 1:
        return x.clone()
    a, b = x.chunk(2)
    return torch.cat((walsh_hadamard(a + b), walsh_hadamard(a - b))) / 2**0.5


def best_pair(x, A, B):
    errors = (x - A[:, None] - B[None]).square().sum(-1)
    best = int(errors.argmin())
    return best // len(B), best % len(B)


def incoherence_mu(W):
    return W.abs().max() * W.numel() ** 0.5 / W.norm()


def best_signs(y, s):
    point = torch.where(y < 0, -s, s)
    if point.sum() % 2:
        turned = (y.abs() * s).argmin()
        point[turned] = -point[turned]
    return point


def _turned(cost):
    """best_signs that turns the sign of least cost(y, s)."""

    def wrong(y, s):
        point = torch.where(y < 0, -s, s)
        if point.sum() % 2:
            i = cost(y, s).argmin()
            point[i] = -point[i]
        return point

    return wrong


def _greedy(x, A, B):
    i = int((x - A).square().sum(-1).argmin())
    return i, int((x - A[i] - B).square().sum(-1).argmin())


def _unscaled(x):
    if len(x) == 1:
        return x.clone()
    a, b = x.chunk(2)
    return torch.cat((_unscaled(a + b), _unscaled(a - b)))


def _one_level(x):
    if len(x) == 1:
        return x.clone()
    a, b = x.chunk(2)
    return torch.cat((a + b, a - b)) / 2**0.5


SOLUTIONS = {
    "codebook_bits": codebook_bits,
    "walsh_hadamard": walsh_hadamard,
    "best_pair": best_pair,
    "incoherence_mu": incoherence_mu,
    "best_signs": best_signs,
}

MUTANTS = [
    ("codebook_bits", "codes only", lambda b, v, m, n, e: float(b)),
    ("codebook_bits", "one number for each entry", lambda b, v, m, n, e: b + 2 ** (b * v) * e / (m * n)),
    ("codebook_bits", "2^b entries", lambda b, v, m, n, e: b + 2**b * v * e / (m * n)),
    ("walsh_hadamard", "not orthogonal", _unscaled),
    ("walsh_hadamard", "one level only", _one_level),
    ("walsh_hadamard", "the input itself", torch.clone),
    ("best_pair", "greedy", _greedy),
    ("best_pair", "each for itself", lambda x, A, B: (
        int((x - A).square().sum(-1).argmin()), int((x - B).square().sum(-1).argmin())
    )),
    ("incoherence_mu", "largest value, not size", lambda W: W.max() * W.numel() ** 0.5 / W.norm()),
    ("best_signs", "parity ignored", lambda y, s: torch.where(y < 0, -s, s)),
    ("best_signs", "turns the smallest number of y", _turned(lambda y, s: y.abs())),
    ("best_signs", "turns the smallest size", _turned(lambda y, s: s)),
    ("best_signs", "the sizes themselves", lambda y, s: s.clone()),
    ("incoherence_mu", "columns only", lambda W: W.abs().max() * W.shape[1] ** 0.5 / W.norm()),
]  # fmt: skip
