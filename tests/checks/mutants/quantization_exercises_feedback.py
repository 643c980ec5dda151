"""Mistakes that a reader of the notebook on rounding with data may make, and the right answers."""

import torch


def compensated(w, H, q1):
    return w[1] + (w[0] - q1) * H[0, 1] / H[1, 1]


def damped_h(X, damp):
    X = X.double()
    H = 2 / len(X) * X.T @ X
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1
    return H + damp * diagonal.mean() * torch.eye(len(H), dtype=H.dtype)


def damped_once(X, damp):
    H = 2 / len(X) * X.double().T @ X.double()
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def shared_smooth(X, weights, alpha):
    largest = torch.cat(list(weights)).abs().amax(0)
    return X.abs().amax(0) ** alpha / largest ** (1 - alpha)


def whitened_repair(E, H, r):
    U = torch.linalg.svd(E @ torch.linalg.cholesky(H))[0][:, :r]
    return U @ (U.T @ E)


def plain_repair(E, H, r):
    U = torch.linalg.svd(E)[0][:, :r]
    return U @ (U.T @ E)


SOLUTIONS = {
    "compensated": compensated,
    "damped_h": damped_h,
    "shared_smooth": shared_smooth,
    "whitened_repair": whitened_repair,
}

MUTANTS = [
    ("compensated", "the wrong sign", lambda w, H, q1: w[1] - (w[0] - q1) * H[0, 1] / H[1, 1]),
    ("compensated", "divided by the first's own H", lambda w, H, q1: w[1] + (w[0] - q1) * H[0, 1] / H[0, 0]),
    ("compensated", "no compensation", lambda w, H, q1: w[1]),
    ("damped_h", "float32 products", lambda X, damp: damped_h(X.float(), damp).float()),
    ("damped_h", "unused inputs stay 0", damped_once),
    ("damped_h", "damping not relative", lambda X, damp: damped_h(X, 0.0) + damp * torch.eye(X.shape[1])),
    ("damped_h", "without the factor 2", lambda X, damp: damped_h(X / 2**0.5, damp)),
    ("shared_smooth", "only the first weight", lambda X, w, alpha: shared_smooth(X, w[:1], alpha)),
    ("shared_smooth", "exponents swapped", lambda X, w, alpha: shared_smooth(X, w, 1 - alpha)),
    ("shared_smooth", "the inverse", lambda X, w, alpha: 1 / shared_smooth(X, w, alpha)),
    ("whitened_repair", "plain SVD", plain_repair),
    ("whitened_repair", "the whole residual", lambda E, H, r: E),
    (
        "whitened_repair",
        "H in place of its factor",
        lambda E, H, r: plain_repair(E @ H, H, r) @ torch.linalg.inv(H),
    ),
]
