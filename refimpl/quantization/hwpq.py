"""HWPQ: prune and quantize without any d_in x d_in matrix, by a contribution of each weight and one pass.

**A reconstruction.** arXiv 2501.16376 has no public code, and only its abstract and summaries by others were
at hand; its second version (SwiftPrune, EMNLP 2025) has no quantization. From these sources: the metric, EWMA
thresholds in the place of sorting, 2:4 by the two largest of four, FP8 (e4m3) for what is kept. Ours: where
the EWMA starts, its rate, how kappa follows from the sparsity, one scale per row, the bytes. Do not take its
numbers for those of the paper.

The contribution of weight w_ij whose input has the squared norm ||x_j||^2:

    L_ij = 1/2 w_ij^2 (1 - ||x_j||^2 / S),    S = sum_j ||x_j||^2.

As the sources print it, L *falls* with the input: of two equal weights the one with the larger input goes
first. With many inputs of like size all factors are nearly 1 and L ranks weights as magnitude does.

The threshold of row i at column j is mu_ij + kappa sigma_ij, with moving mean and variance

    mu_j = beta mu_(j-1) + (1 - beta) L_j,    sigma_j^2 = beta sigma_(j-1)^2 + (1 - beta) (L_j - mu_j)^2.

The survey calls the method "guided by curvature information"; its title says the opposite.
"""

import math
from dataclasses import dataclass

import torch
from torch import BoolTensor, Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.linear import CompressedLinear
from refimpl.quantization.pruning.unstructured import Pruner, check_weight
from refimpl.quantization.sparse import SparseLinear, n_m_mask, pack_mask, unpack_mask

__all__ = ["HWPQ", "FP8Linear", "contribution", "ewma_mask", "ewma_score"]

FP8 = torch.float8_e4m3fn


class FP8Linear(CompressedLinear):
    """Kept weights in eight-bit floats, W^ = s_i v_ij, with one float32 scale for each row.

    Buffers: the mask as in `SparseLinear` (none where all are kept), `values` float8_e4m3fn [kept], `scale`
    [d_out, 1]. Three bits of mantissa: the relative error is at most 1/16 for weights down to 1/28672 of
    the largest of their row, so that a large weight costs the others nothing.

    >>> W = torch.tensor([[1.0, -0.3, 0.002, 0.0]])
    >>> FP8Linear.pack(W, W != 0).weight
    tensor([[ 1.0000, -0.2857,  0.0020,  0.0000]])
    """

    @classmethod
    def pack(cls, W: Tensor, keep: BoolTensor, storage: str = "bitmap") -> "FP8Linear":
        """Parameters as for `SparseLinear.pack`, a mask without False is not stored; raises likewise."""
        check_weight(W)
        if keep.shape != W.shape:
            raise ValueError(f"keep must have the shape of W {list(W.shape)}, got {list(keep.shape)}")
        tensors = pack_mask(keep, storage)
        if bool(keep.all()):
            tensors, storage = {}, "dense"
        W = W.detach().float() * keep
        scale = W.abs().amax(1, keepdim=True) / torch.finfo(FP8).max
        scale = scale.where(scale > 0, 1.0)
        # The division may round up beyond the largest value, which has no infinity above it, only NaN.
        values = (W / scale).clamp(-torch.finfo(FP8).max, torch.finfo(FP8).max)[keep].to(FP8)
        return cls(tuple(W.shape), tensors | {"values": values, "scale": scale}, storage=storage)

    @property
    def keep(self) -> BoolTensor:
        """The mask, bool [d_out, d_in]."""
        shape, storage = (self.out_features, self.in_features), self.settings["storage"]
        if storage == "dense":
            return torch.ones(shape, dtype=torch.bool, device=self.values.device)
        return unpack_mask(self._buffers, storage, shape)

    @property
    def sparsity(self) -> float:
        """The share of weights that are not stored."""
        return 1 - self.values.numel() / (self.out_features * self.in_features)

    def dequantize(self) -> Tensor:
        keep = self.keep
        return self.scale * self.scale.new_zeros(keep.shape).masked_scatter_(keep, self.values.float())


@dataclass(frozen=True)
class HWPQ(Pruner):
    """A recipe of `compress_model`; of the statistics it reads only `sqnorm` [d_in].

    Parameters
    ----------
    sparsity : share of each layer to leave out, or "n:m"; usual 0.5, "2:4"; 0 quantizes only.
    dtype : of the kept values if not `fp8`.
    fp8 : store them as FP8 with a scale per row.
    beta : of the moving averages, 0 < beta < 1; 1 / (1 - beta) weights count.

    Raises ValueError as `Pruner` and for another beta.

    Examples
    --------
    >>> from refimpl.quantization.calibrate import stats_of
    >>> generator = torch.Generator().manual_seed(0)
    >>> W, X = torch.randn(16, 64, generator=generator), torch.randn(99, 64, generator=generator)
    >>> layer = HWPQ("2:4")("fc", W, stats_of(X))
    >>> layer.sparsity, layer.bits_per_weight     # 1 of positions, 8 / 2 of values, 32 / 64 of scales
    (0.5, 5.5)
    """

    fp8: bool = True
    beta: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must lie between 0 and 1, got {self.beta!r}")

    def mask(self, W: Tensor, stats: Stats) -> BoolTensor:
        L = contribution(W, stats.sqnorm)
        return n_m_mask(L, *self.pattern) if self.pattern else ewma_mask(L, self.sparsity, self.beta)

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> CompressedLinear:
        keep = self.mask(weight, stats)
        if self.fp8:
            return FP8Linear.pack(weight, keep, self.storage)
        return SparseLinear.pack(weight, keep, self.storage, self.dtype)


def contribution(W: Tensor, sqnorm: Tensor) -> Tensor:
    """L_ij = 1/2 w_ij^2 (1 - ||x_j||^2 / S).

    Parameters: `W` [d_out, d_in]; `sqnorm` [d_in], ||x_j||^2 >= 0, not all 0 (`Stats.sqnorm`). Returns
    [d_out, d_in], >= 0, in W's dtype, at least float32. Raises TypeError or ValueError otherwise.

    >>> contribution(torch.tensor([[2.0, 2.0]]), torch.tensor([3.0, 1.0]))
    tensor([[0.5000, 1.5000]])
    """
    check_weight(W)
    valid = sqnorm.shape == W.shape[1:] and bool((sqnorm.isfinite() & (sqnorm >= 0)).all())
    if not valid or not float(sqnorm.sum()) > 0:
        raise ValueError(f"sqnorm must be [{W.shape[1]}], finite, >= 0, not all 0, got {list(sqnorm.shape)}")
    W = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    return W.square() / 2 * (1 - sqnorm / sqnorm.sum()).to(W.dtype)


def ewma_score(L: Tensor, beta: float = 0.99) -> Tensor:
    """(L_ij - mu_ij) / sigma_ij: how many moving deviations a contribution lies above the moving mean.

    One pass over the columns, all rows at once. mu and sigma^2 start as mean and variance of the row, so that
    its first weights are judged like the others. Parameters: `L` [d_out, d_in]; `beta`. Returns the shape
    of L; a row whose values are all equal scores 0.

    >>> ewma_score(torch.tensor([[1.0, 1.0, 4.0, 1.0, 1.0]]), beta=0.5).round(decimals=1)
    tensor([[-0.3000, -0.2000,  1.3000, -0.8000, -0.5000]])
    """
    mean, variance = L.mean(1), L.var(1, unbiased=False)
    columns = L.T.contiguous()
    scores = torch.empty_like(columns)
    tiny = torch.finfo(L.dtype).tiny
    for column, score in zip(columns, scores, strict=True):
        mean = beta * mean + (1 - beta) * column
        deviation = column - mean
        variance = beta * variance + (1 - beta) * deviation.square()
        torch.div(deviation, variance.sqrt().clamp_min(tiny), out=score)
    return scores.T


def ewma_mask(L: Tensor, sparsity: float, beta: float = 0.99) -> BoolTensor:
    """Keep what lies on or above mu + kappa sigma; kappa is one number for the matrix.

    Nothing is sorted: kappa is halved in on by counting, until floor(n s) of the n weights lie below, or
    fewer where scores are equal. Parameters: `L` [d_out, d_in], no NaN; `sparsity` s, 0 <= s < 1; `beta`.
    Returns a bool mask. Raises ValueError otherwise.

    >>> ewma_mask(torch.tensor([[1.0, 3.0, 4.0, 2.0]]), 0.5).tolist()
    [[False, True, True, False]]
    """
    if not 0 <= sparsity < 1 or L.ndim != 2 or L.numel() == 0 or bool(L.isnan().any()):
        raise ValueError(f"sparsity must be >= 0 and < 1, L [d_out, d_in] without NaN, got {sparsity!r}")
    score, target = ewma_score(L, beta), math.floor(L.numel() * sparsity + 1e-9)
    below, above = float(score.min()), float(score.max()) + 1
    # `below` always removes few enough; a float has no more than about 60 halvings.
    for _ in range(60):
        kappa = (below + above) / 2
        count = int((score < kappa).sum())
        below, above = (kappa, above) if count <= target else (below, kappa)
        if count == target:
            break
    return score >= below
