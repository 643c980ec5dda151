"""SLiM: 4-bit weights of which half are zero, and low-rank adapters that repair both losses at once.

Implements arXiv 2410.09615 as in its authors' code. For a layer W with sums of squared inputs n_j:

1. SLiM-Quant: one scale for the whole matrix, from the clipping point alpha that loses least (`clip_point`).
2. Wanda: of |W_ij| sqrt(n_j) the smaller half of each row, or two of each four neighbours, become 0.
3. Saliency-weighted adapters: E = W - mask * Q(W); with E diag(sqrt(n)) = U Sigma V', L = U_r and
   R = Sigma_r V_r' diag(sqrt(n))^-1 = U_r' E ("diagonal" of `refimpl.quantization.repair`); r is a tenth of
   min(d_out, d_in). "Naive" adapters leave the weighting out.
4. The compressed weight is made again from what the adapters leave: mask * Q(mask * (W - L R)).
5. The adapters are quantized, groups of neighbours sharing a scale ("tiles"); r is rounded up to whole tiles.

The low rank is the repair of what pruning and rounding lost; it does not choose which weights matter. Where
the code differs from what its comments say: "shifting zeros" of n adds the smallest positive n_j to *every*
n_j. Two mistakes there are done right here: if some n_j is 0, it adds 1 where the smallest is more than 1;
and where the number of histogram bins is a multiple of ten (20000: from 20 million weights on), its fine
search has no bins left if the last coarse point is the best one, and returns almost 0. Step 4 has a limit of
its own: the more the adapters take, the closer W - L R is to the grid of step 1, and the histogram, which
takes it for a smooth density, then finds a worse scale for it.
Training the adapters afterwards (the paper's optional step) is left to `refimpl.lora`.
"""

from dataclasses import dataclass

import torch
from torch import BoolTensor, Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.grids import Grid, Quantized
from refimpl.quantization.linear import CompressedLinear, GridLinear
from refimpl.quantization.repair import RepairedLinear, low_rank
from refimpl.quantization.sparse import SparseLinear, n_m_mask

__all__ = ["SLiM", "clip_point", "saliency", "slim_quantize", "wanda_mask"]

SPARSITIES = ("2:4", "half", "none")


def clip_point(W: Tensor, bits: int = 4) -> float:
    """SLiM-Quant's alpha: weights beyond it are clipped, those below are rounded.

    Over a histogram of |W| (n / 1000 bins, 512 to 20000) it minimises the expected squared error

        integral_0^alpha p(w) (w - floor(w / d) d)^2 dw + integral_alpha^max p(w) (w - alpha)^2 dw,

    d = alpha / 2^b: the error of flooring to steps of d has the mean square of rounding to steps of 2 d. The
    search tries every tenth of the bins, then all between the neighbours of the best.

    Parameters: `W`, floating point, finite, not all 0; `bits` b, 2 to 8. Raises ValueError otherwise.

    >>> W = torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat(250)
    >>> W[0] = 4.0                                  # clip one weight, and 999 are rounded finely
    >>> 0.35 < clip_point(W, 3) < 1.5
    True
    """
    _check(W, bits)
    if not bool(W.any()):
        raise ValueError("W must not be all 0")
    sizes = W.detach().abs().float().flatten().cpu()
    bins = max(512, min(len(sizes) // 1000, 20000))
    density, edges = torch.histogram(sizes, bins=bins, density=True)
    centre = (edges[:-1] + edges[1:]) / 2

    def expected(index: int) -> float:
        alpha = centre[index]
        step = alpha / 2**bits
        below, beyond = centre[:index], centre[index:]
        lost = density[:index] @ (below - (below // step) * step).square()
        return float(lost + density[index:] @ (beyond - alpha).square())

    coarse = list(range(0, bins, bins // 10))
    best = min(range(len(coarse)), key=lambda i: expected(coarse[i]))
    first = coarse[max(best - 1, 0)]
    last = coarse[best + 1] if best + 1 < len(coarse) else bins
    return float(centre[min(range(first, last), key=expected)])


def slim_quantize(W: Tensor, bits: int = 4) -> Quantized:
    """Codes of W on SLiM-Quant's grid: s = alpha / (2^(b-1) - 1), all 2^b codes, one float16 scale.

    Parameters and errors: `clip_point`, and W must be a matrix [d_out, d_in].

    >>> W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> q = slim_quantize(W, 4)
    >>> q.scale.shape, bool(7 * q.scale < W.abs().max())
    (torch.Size([1, 1]), True)
    """
    Grid(bits, "full", "tensor").check(W)
    scale = torch.tensor([[clip_point(W, bits) / (2 ** (bits - 1) - 1)]], device=W.device).half()
    if not 0 < float(scale) < float("inf"):
        raise ValueError(f"W must have a scale that float16 can hold, got {float(scale)}")
    # "full" stands for all 2^b codes; the scale is SLiM's own.
    return Quantized(Grid(bits, "full", "tensor").encode(W, scale, 2 ** (bits - 1)), scale, 2 ** (bits - 1))


def saliency(sqnorm: Tensor) -> Tensor:
    """sqrt(n_j + the smallest positive n_j) of sums of squared inputs [d_in], float64: none is 0.

    >>> saliency(torch.tensor([0.0, 4.0, 12.0, 5.0])).tolist()[::2]
    [2.0, 4.0]
    """
    if sqnorm.ndim != 1 or not bool((sqnorm >= 0).all()) or not bool((sqnorm > 0).any()):
        raise ValueError(f"sqnorm must be [d_in], >= 0 and not all 0, got {list(sqnorm.shape)}")
    n = sqnorm.double()
    return (n + n[n > 0].min()).sqrt()


def wanda_mask(W: Tensor, size: Tensor, sparsity: str) -> BoolTensor:
    """Which weights Wanda keeps, bool [d_out, d_in].

    Parameters: `W` [d_out, d_in]; `size` [d_in], of the inputs; `sparsity` "2:4", "half" (of each row) or
    "none". Raises ValueError for others, other shapes, and a d_in that four does not divide ("2:4").

    >>> wanda_mask(torch.tensor([[1.0, 2.0, -3.0, 4.0]]), torch.tensor([9.0, 1, 1, 1]), "2:4").tolist()
    [[True, False, False, True]]
    """
    if sparsity not in SPARSITIES:
        raise ValueError(f"sparsity must be one of {', '.join(SPARSITIES)}, got {sparsity!r}")
    if W.ndim != 2 or size.shape != W.shape[1:]:
        raise ValueError(f"size must be [d_in] for W [d_out, d_in], got {list(size.shape)}, {list(W.shape)}")
    score = W.abs().double() * size
    if sparsity == "2:4":
        return n_m_mask(score)
    keep = torch.ones_like(score, dtype=torch.bool)
    if sparsity == "half":
        dropped = score.argsort(dim=1, stable=True)[:, : W.shape[1] // 2]
        keep.scatter_(1, dropped, False)
    return keep


@dataclass(frozen=True)
class SLiM:
    """Quantized, sparse, and repaired: a recipe of `compress_model`.

    Parameters
    ----------
    bits : of the weights, 2 to 8 (the paper: 4).
    sparsity : "2:4", "half" (of each row, unstructured) or "none".
    rank : r / min(d_out, d_in), in [0, 1] (the paper: 0.1); the r that comes out is rounded down, then up to
        whole tiles. 0: no adapters.
    adapters : "slim", weighted by the sizes of the inputs, or "naive", plain SVD.
    recompute : step 4; without it the error has exactly the singular values that r leaves.
    adapter_bits : 2 to 8, or None for float16.
    tile : neighbours of an adapter's row that share a scale (the paper: 128 or 256); it must divide d_in.
        Without adapter_bits it counts for nothing.

    Raises ValueError for values that are not allowed, when it is made or, for d_in, when it is called.

    Examples
    --------
    >>> from refimpl.quantization import stats_of
    >>> generator = torch.Generator().manual_seed(0)
    >>> W = torch.randn(64, 64, generator=generator)
    >>> stats = stats_of(torch.randn(99, 64, generator=generator) * torch.linspace(0.1, 3, 64))
    >>> layer = SLiM(rank=0.25, tile=16)("fc", W, stats)
    >>> layer.settings["rank"], round(layer.bits_per_weight, 2)    # 3 of 2:4 with 4 bits; 9 of two factors
    (16, 7.5)
    """

    bits: int = 4
    sparsity: str = "2:4"
    rank: float = 0.1
    adapters: str = "slim"
    recompute: bool = True
    adapter_bits: int | None = 8
    tile: int = 16

    def __post_init__(self) -> None:
        Grid(self.bits)
        if self.sparsity not in SPARSITIES:
            raise ValueError(f"sparsity must be one of {', '.join(SPARSITIES)}, got {self.sparsity!r}")
        if self.adapters not in ("slim", "naive"):
            raise ValueError(f"adapters must be 'slim' or 'naive', got {self.adapters!r}")
        if isinstance(self.rank, bool) or not 0 <= self.rank <= 1:
            raise ValueError(f"rank must be a number from 0 to 1, got {self.rank!r}")
        if self.adapter_bits is not None:
            Grid(self.adapter_bits, group=self.tile)

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> RepairedLinear:
        size = saliency(stats.sqnorm)
        q = slim_quantize(weight, self.bits)
        keep = wanda_mask(weight, size, self.sparsity)
        base = self._stored(q, keep)
        E = weight - base.weight
        L, R, _ = low_rank(E, self._rank(*weight.shape), size if self.adapters == "slim" else None)
        if self.recompute and L.shape[1]:
            rest = (weight - L @ R).to(weight.dtype) * keep
            base = self._stored(slim_quantize(rest, self.bits), keep)
        return RepairedLinear.repair(base, L, R, bits=self.adapter_bits, tile=self.tile)

    def _rank(self, d_out: int, d_in: int) -> int:
        rank = int(self.rank * min(d_out, d_in))
        if self.adapter_bits is None or rank % self.tile == 0:
            return rank
        rank += self.tile - rank % self.tile
        if rank > min(d_out, d_in):
            raise ValueError(f"tile: rank {rank}, whole tiles of {self.tile}, exceeds [{d_out}, {d_in}]")
        return rank

    def _stored(self, q: Quantized, keep: BoolTensor) -> CompressedLinear:
        if self.sparsity == "none":
            return GridLinear.pack(q, self.bits)
        return SparseLinear.pack_codes(q, keep, self.bits, "2:4" if self.sparsity == "2:4" else "bitmap")


def _check(W: Tensor, bits: int) -> None:
    Grid(bits)
    if not W.is_floating_point() or W.numel() == 0 or not bool(W.isfinite().all()):
        raise ValueError(f"W must be floating point, finite and not empty, got {W.dtype} {list(W.shape)}")
