"""The regression of Bonsai (arXiv 2402.05406): what each candidate adds to the utility of a sub-model."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["FOLDS", "PENALTIES", "Fit", "Regression", "regress"]

Regression = Literal["l1", "ridge"]
# Shares: of the smallest penalty at which all coefficients are 0, and of the mean variance of a mask entry.
PENALTIES = {"l1": (0.3, 0.1, 0.03, 0.01, 0.003), "ridge": (10.0, 1.0, 0.1, 0.01, 0.001)}
FOLDS = 5


@dataclass(frozen=True)
class Fit:
    """A regression: `beta` [m]; the relative `penalty` chosen; `tau`, Kendall's, between utilities and their
    predictions for masks held out, mean over folds; `prior_tau`, the same for the prior's predictions."""

    beta: Tensor
    penalty: float
    tau: float
    prior_tau: float


def regress(masks: Tensor, utilities: Tensor, prior: Tensor, kind: Regression) -> Fit:
    """u ~ beta' mask + b, with the penalty whose predictions rank held-out masks best (Kendall's tau).

    - "l1": min ||y - X beta||^2 / n + penalty ||beta||_1 over centred X and y.
    - "ridge": min ||y - X beta||^2 / n + penalty ||beta - c prior||^2, with c >= 0 as fits y best.

    The code's L1 (for the whole model) starts from 0 and knows no prior; its L2 pulls to the mean mask there,
    and to the prior where each module is fitted by itself. c is ours.

    Parameters: `masks` [n, m] of 1 and 0, complements one after the other, n even and at least 10;
    `utilities` [n]; `prior` [m]. All float64. Returns a `Fit`. Raises ValueError for other shapes or kinds.

    >>> mask = torch.randint(2, (50, 4), generator=torch.Generator().manual_seed(0)).double()
    >>> masks, worth = torch.stack((mask, 1 - mask), 1).flatten(0, 1), torch.tensor([4.0, 0, 1, 2]).double()
    >>> fit = regress(masks, masks @ worth, torch.ones(4).double(), "ridge")
    >>> fit.beta.argsort().tolist(), fit.tau > 0.9 > fit.prior_tau
    ([1, 2, 3, 0], True)
    """
    n, m = masks.shape
    if kind not in PENALTIES:
        raise ValueError(f"kind must be 'l1' or 'ridge', got {kind!r}")
    if n < 2 * FOLDS or n % 2 or utilities.shape != (n,) or prior.shape != (m,):
        raise ValueError(
            f"masks must be [n, m] with n even and >= {2 * FOLDS}, utilities [n], prior [m]; "
            f"got {list(masks.shape)}, {list(utilities.shape)}, {list(prior.shape)}"
        )
    fold = torch.arange(n) // 2 * FOLDS // (n // 2)
    prior_tau, taus = 0.0, torch.zeros(len(PENALTIES[kind]))
    for held in (fold == k for k in range(FOLDS)):
        prior_tau += _tau(masks[held] @ prior, utilities[held]) / FOLDS
        predicted = masks[held] @ _solve(masks[~held], utilities[~held], prior, kind)
        taus += torch.tensor([_tau(p, utilities[held]) for p in predicted.T]) / FOLDS
    best = int(taus.argmax())
    beta = _solve(masks, utilities, prior, kind)[:, best]
    return Fit(beta, PENALTIES[kind][best], float(taus[best]), prior_tau)


def _solve(X: Tensor, y: Tensor, prior: Tensor, kind: Regression) -> Tensor:
    """The coefficients [m, P] for all P penalties."""
    X, y = X - X.mean(0), y - y.mean()
    gram, Xy = X.T @ X / len(y), (X.T @ y / len(y))[:, None]
    penalties = torch.tensor(PENALTIES[kind]).to(gram)
    if kind == "ridge":
        p = X @ prior
        agreement = max(float(p @ y), 0.0)
        centre = (prior * (agreement / float(p @ p) if agreement else 0.0))[:, None]
        damping = penalties[:, None, None] * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
        return centre + torch.linalg.solve(gram + damping, Xy - gram @ centre)[..., 0].T
    threshold = penalties * Xy.abs().max()
    bound = max(float(torch.linalg.eigvalsh(gram)[-1]), 1e-12)
    beta = ahead = torch.zeros_like(Xy).expand(-1, len(penalties))
    t = 1.0
    for _ in range(300):  # FISTA
        new = ahead + (Xy - gram @ ahead) / bound
        new = new.sign() * (new.abs() - threshold / bound).clamp(min=0)
        t, before = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        beta, ahead = new, new + (before - 1) / t * (new - beta)
    return beta


def _tau(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b; 0 where one of the two is constant."""
    above = [(x[:, None] - x).sign() for x in (a, b)]
    pairs = math.sqrt(float(above[0].square().sum() * above[1].square().sum()))
    return float((above[0] * above[1]).sum()) / pairs if pairs else 0.0
