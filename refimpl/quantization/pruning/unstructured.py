"""Magnitude and Wanda pruning: leave out the weights of the lowest score, and change nothing else.

- Magnitude: score |W_ij|, compared over the whole layer (Han et al., arXiv 1506.02626; refs 9 and 121 of the
  survey). It knows nothing of the inputs.
- Wanda (arXiv 2306.11695): score |W_ij| ||x_j||, compared within each row, as in its authors' code. It does
  not change when channel j is scaled by c and its weights by 1/c; magnitude does.

Both also come as N:M: in each m neighbours of a row the n of highest score are kept.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.sparse import VALUE_DTYPES, SparseLinear, n_m_mask

__all__ = ["Magnitude", "Pruner", "Wanda", "check_weight", "highest"]


@dataclass(frozen=True)
class Pruner:
    """What every pruning recipe has.

    Parameters
    ----------
    sparsity : share of weights to leave out, 0 <= s < 1, or "n:m" to keep n in each m neighbours of a row.
        Of k weights that are compared with each other floor(k s) go; usual: 0.5, "2:4".
    dtype : of the kept values as they are stored.

    An object is a recipe of `compress_model` and makes a `SparseLinear`, stored as "2:4" if it is that and
    else as "bitmap". Raises ValueError for values that are not allowed.
    """

    sparsity: float | str = 0.5
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        share = self.pattern is None
        if share and (isinstance(self.sparsity, str | bool) or not 0 <= self.sparsity < 1):
            raise ValueError(
                f"sparsity must be a number, 0 <= s < 1, or 'n:m' with 0 < n < m, got {self.sparsity!r}"
            )
        if self.dtype not in VALUE_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, VALUE_DTYPES))}, got {self.dtype!r}")

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(n, m), or None for a share.

        >>> Pruner("2:4").pattern, Pruner(0.5).pattern
        ((2, 4), None)
        """
        n, colon, m = str(self.sparsity).partition(":")
        if colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m):
            return int(n), int(m)
        return None

    @property
    def storage(self) -> str:
        """The storage of `SparseLinear` that the mask gets."""
        return "2:4" if self.pattern == (2, 4) else "bitmap"

    def mask(self, W: Tensor, stats: Stats) -> Tensor:
        """The weights to keep, bool [d_out, d_in]."""
        raise NotImplementedError

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> SparseLinear:
        return SparseLinear.pack(weight, self.mask(weight, stats), self.storage, self.dtype)


@dataclass(frozen=True)
class Magnitude(Pruner):
    """Leave out the smallest weights of a layer; the parameters are those of `Pruner`.

    >>> W = torch.tensor([[1.0, -2.0, 3.0, 4.0], [-5.0, 6.0, 7.0, 8.0]])
    >>> Magnitude(0.5)("fc", W).weight.tolist()
    [[0.0, 0.0, 0.0, 0.0], [-5.0, 6.0, 7.0, 8.0]]
    >>> Magnitude("2:4")("fc", W).weight.tolist()
    [[0.0, 0.0, 3.0, 4.0], [0.0, 0.0, 7.0, 8.0]]
    """

    def mask(self, W: Tensor, stats: Stats | None = None) -> Tensor:
        check_weight(W)
        if self.pattern:
            return n_m_mask(W.abs(), *self.pattern)
        return highest(W.abs().flatten(), self.sparsity).view(W.shape)

    def __call__(self, name: str, weight: Tensor, stats: Stats | None = None) -> SparseLinear:
        return super().__call__(name, weight, stats)


@dataclass(frozen=True)
class Wanda(Pruner):
    """Leave out, in each row, the weights of the lowest |W_ij| ||x_j||; the parameters are those of `Pruner`.

    ||x_j||^2 is `Stats.sqnorm`. Raises ValueError where it is not [d_in].

    >>> from refimpl.quantization.calibrate import stats_of
    >>> W, X = torch.tensor([[1.0, -2.0, 3.0, 4.0]]), torch.tensor([[9.0, 3.0, 1.0, 1.0]])
    >>> Wanda(0.5)("fc", W, stats_of(X)).weight.tolist()
    [[1.0, -2.0, 0.0, 0.0]]
    """

    def mask(self, W: Tensor, stats: Stats) -> Tensor:
        check_weight(W)
        if stats.sqnorm.shape != W.shape[1:]:
            raise ValueError(
                f"stats must be of {W.shape[1]} inputs for W {list(W.shape)}, got {list(stats.sqnorm.shape)}"
            )
        score = W.abs().double() * stats.sqnorm.double().sqrt()
        return n_m_mask(score, *self.pattern) if self.pattern else highest(score, self.sparsity)


def highest(score: Tensor, sparsity: float) -> Tensor:
    """Keep all but the floor(k s) lowest of each k scores along the last dimension; of equal ones the later.

    Parameters: `score` [..., k], no NaN; `sparsity` s, 0 <= s < 1. Returns a bool mask of the same shape.
    Raises ValueError otherwise.

    >>> highest(torch.tensor([3.0, 1.0, 2.0, 4.0, 5.0]), 0.5).tolist()
    [True, False, False, True, True]
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be a number, 0 <= s < 1, got {sparsity!r}")
    if score.numel() == 0 or bool(score.isnan().any()):
        raise ValueError(f"score must have no NaN and not be empty, got {list(score.shape)}")
    # 100 * 0.29 is a little less than 29.
    count = math.floor(score.shape[-1] * sparsity + 1e-9)
    lowest = score.argsort(dim=-1, stable=True)[..., :count]
    return torch.ones(score.shape, dtype=torch.bool, device=score.device).scatter_(-1, lowest, False)


def check_weight(W: Tensor) -> None:
    """Raise TypeError or ValueError for a W that is no finite, floating-point matrix [d_out, d_in]."""
    if not W.is_floating_point():
        raise TypeError(f"W must be floating point, got {W.dtype}")
    if W.ndim != 2 or W.numel() == 0 or not bool(W.isfinite().all()):
        raise ValueError(f"W must be a finite matrix [d_out, d_in], not empty, got {list(W.shape)}")
