"""Mistakes that a reader of the notebook on pruning may make, and the right answers."""

import torch


def sparse_bits(kept, bits, storage, columns):
    return 1 + kept * bits if storage == "bitmap" else kept * (bits + 16) + 32 / columns


def input_aware_mask(W, X, sparsity):
    score = W.abs() * X.norm(dim=0)
    lowest = score.argsort(dim=1)[:, : int(W.shape[1] * sparsity)]
    return torch.ones(W.shape, dtype=torch.bool).scatter_(1, lowest, False)


def remove_one(w, H, j):
    inverse = torch.linalg.inv(H)
    new = w - w[j] / inverse[j, j] * inverse[:, j]
    return new, float(w[j] ** 2 / inverse[j, j])


def relaxed_top_k(scores, k, temperature):
    r, mask = scores, torch.zeros_like(scores)
    for _ in range(k):
        p = torch.softmax(r / temperature, 0)
        mask = mask + p
        r = r + (1 - p).clamp(min=1e-300).log()
    return mask


def _layerwise(W, X, sparsity):
    score = (W.abs() * X.norm(dim=0)).flatten()
    keep = torch.ones(W.numel(), dtype=torch.bool)
    keep[score.argsort()[: int(W.numel() * sparsity)]] = False
    return keep.view(W.shape)


def _magnitude(W, X, sparsity):
    return input_aware_mask(W, torch.ones_like(X), sparsity)


def _only_zero(w, H, j):
    new = w.clone()
    new[j] = 0
    return new, float(w[j] ** 2 * H[j, j])


def _wrong_cost(w, H, j):
    new, cost = remove_one(w, H, j)
    return new, cost / 2


def _repeated(scores, k, temperature):
    return k * torch.softmax(scores / temperature, 0)


def _clamped(scores, k, temperature):
    return relaxed_top_k(scores, k, temperature).clamp(max=1)


SOLUTIONS = {
    "sparse_bits": sparse_bits,
    "input_aware_mask": input_aware_mask,
    "remove_one": remove_one,
    "relaxed_top_k": relaxed_top_k,
}

MUTANTS = [
    ("sparse_bits", "values only", lambda kept, bits, storage, columns: kept * bits),
    ("sparse_bits", "csr without pointers", lambda kept, bits, storage, columns: (
        1 + kept * bits if storage == "bitmap" else kept * (bits + 16)
    )),
    ("input_aware_mask", "a threshold for the whole layer", _layerwise),
    ("input_aware_mask", "magnitude", _magnitude),
    ("input_aware_mask", "the mask turned around", lambda W, X, s: ~input_aware_mask(W, X, s)),
    ("remove_one", "the others stay", _only_zero),
    ("remove_one", "half the cost", _wrong_cost),
    ("relaxed_top_k", "the same softmax k times", _repeated),
    ("relaxed_top_k", "entries clamped at 1", _clamped),
]  # fmt: skip
