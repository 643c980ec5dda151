"""ASER: take outlier channels out of a weight, quantize the rest, give the error back in a whitened low rank.

Reconstructs arXiv 2411.07762 (no official code; the equations are given below as they are commonly
reported). For a layer W x, with mean sizes a_j = mean |x_j| of the inputs:

1. Smoothing. I_f are the f channels of largest a_j mean_i |W_ij|; m_j = a_j / min_{I_f} a for j in I_f, else
   1. The layer is rewritten as (W diag(m)) (x / m): its activations have no outliers any more.
2. Split. W diag(m) = W_s + W_o, where W_o are the columns I_f. Only W_s is quantized; its columns I_f are 0.
3. Repair. E = W diag(m) - Q(W_s) holds the quantization error *and* W_o; its best rank r in the metric of
   the smoothed inputs ("whitened" of `refimpl.quantization.repair`) is L R.
4. y = Q(W_s) x_q + L R x_q, where x_q is x / m rounded per token to 8 or 6 bits.

Two things are ours: x / m is computed by the layer, from f stored channel numbers and factors (folded into
the norm in front, the factors would have to be the same for q, k and v); and W_o is repaired only as far as
r reaches: with r < f large weights are lost. A limit of the paper's score: an exact fold multiplies a_j by
what it divides W_ij by, so channels that only a fold made large (`refimpl.quantization.outliers`) are not
chosen for it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.linear import CompressedLinear
from refimpl.quantization.model import Recipe
from refimpl.quantization.repair import RepairedLinear, input_metric, low_rank
from refimpl.quantization.rtn import RTN

__all__ = ["ASER", "AserLinear", "round_tokens", "smoothing"]


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Activations as symmetric b-bit integers times one scale per token, s = max|x| / (2^(b-1) - 1).

    Parameters: `x` [..., d_in], floating point; `bits` b, 2 to 8. Returns s round(x / s), of x's dtype.
    Raises ValueError for other bits.

    >>> round_tokens(torch.tensor([[0.2, -1.5, 3.0], [0.0, 0.0, 0.0]]), 3)
    tensor([[ 0., -2.,  3.],
            [ 0.,  0.,  0.]])
    """
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
    scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / scale.where(scale > 0, 1.0)).round() * scale


def smoothing(W: Tensor, absmean: Tensor, outliers: int) -> tuple[Tensor, Tensor]:
    """The outlier channels I_f of a layer and their factors m.

    Parameters: `W` [d_out, d_in], finite; `absmean` [d_in], mean |x_j| (`Stats.absmean`); `outliers` f, from
    0 to d_in. Returns channels [f], int16, ascending, and m [f] >= 1, float16.
    Raises ValueError for another W or f, for more than 32768 channels, for channels that never occurred
    among the f, and for factors beyond float16.

    >>> smoothing(torch.ones(2, 4), torch.tensor([1.0, 30.0, 2.0, 6.0]), 2)
    (tensor([1, 3], dtype=torch.int16), tensor([5., 1.], dtype=torch.float16))
    """
    if W.ndim != 2 or not bool(W.isfinite().all()):
        raise ValueError(f"W must be a finite matrix [d_out, d_in], got {W.dtype} {list(W.shape)}")
    d_in = W.shape[1]
    if absmean.shape != (d_in,) or d_in > 2**15:
        raise ValueError(f"absmean must be [{d_in}], at most 32768 numbers, got {list(absmean.shape)}")
    if type(outliers) is not int or not 0 <= outliers <= d_in:
        raise ValueError(f"outliers must be an integer from 0 to d_in = {d_in}, got {outliers!r}")
    score = absmean.double() * W.double().abs().mean(0)
    channels = score.topk(outliers).indices.sort().values
    if not bool((score[channels] > 0).all()):
        live = int((score > 0).sum())
        raise ValueError(f"outliers must be at most {live}, the channels that occur, got {outliers}")
    sizes = absmean.double()[channels]
    m = (sizes / sizes.amin()).half() if outliers else sizes.half()
    if not bool(m.isfinite().all()):
        raise ValueError("absmean of the outlier channels must not differ by more than 65504")
    return channels.to(torch.int16), m


class AserLinear(RepairedLinear):
    """A repaired layer behind smoothed and rounded activations.

    Buffers: those of `RepairedLinear`, `channels` int16 [f] and `factors_m` float16 [f] (none for f = 0);
    `activation_bits`, 2 to 8, or None for activations as they are. `weight` is the one for inputs that are
    not smoothed, (base + L R) diag(1 / m).
    """

    def dequantize(self) -> Tensor:
        return self._divided(super().dequantize())

    def forward(self, x: Tensor) -> Tensor:
        x, bits = self._divided(x), self.settings["activation_bits"]
        return super().forward(x if bits is None else round_tokens(x, bits))

    def _divided(self, x: Tensor) -> Tensor:
        """x / m along the last dimension."""
        if "channels" not in self._buffers:
            return x
        m = torch.ones(self.in_features, device=x.device)
        m[self.channels.long()] = self.factors_m.float()
        return (x / m).to(x.dtype)


@dataclass(frozen=True)
class ASER:
    """Activation smoothing and error reconstruction, a recipe of `compress_model`.

    Parameters
    ----------
    base : the recipe that quantizes W_s (the paper: round to nearest, 4 bits, a scale per row).
    rank : r, 0 to min(d_out, d_in) (the paper: 64 for 4096 columns), or the paper's threshold alpha in
        (0, 1), see `low_rank`.
    outliers : f (the paper: 32).
    activation_bits : 8 (W4A8), 6 (W4A6), 2 to 8; None: not rounded.
    damp : added to the diagonal of H, see `input_metric`.

    With rank = 0, outliers = 0 it is the base behind rounded activations. Raises ValueError for
    activation_bits and damp when it is made, and as `smoothing` and `low_rank` when it is called.

    Examples
    --------
    >>> from refimpl.quantization import stats_of
    >>> generator = torch.Generator().manual_seed(0)
    >>> X, W = torch.randn(300, 32, generator=generator), torch.randn(16, 32, generator=generator)
    >>> X[:, 5] *= 50                                   # one outlier channel
    >>> lost = {}
    >>> for name, recipe in (("RTN", ASER(rank=0, outliers=0)), ("ASER", ASER(rank=2, outliers=1))):
    ...     lost[name] = float((recipe("fc", W, stats_of(X))(X) - X @ W.T).norm() / (X @ W.T).norm())
    >>> lost["ASER"] < 0.5 * lost["RTN"]
    True
    """

    base: Recipe = field(default_factory=lambda: RTN(4, "restricted"))
    rank: int | float = 8
    outliers: int = 4
    activation_bits: int | None = 8
    damp: float = 1e-6

    def __post_init__(self) -> None:
        if self.activation_bits is not None:
            round_tokens(torch.ones(1, 1), self.activation_bits)
        input_metric(torch.eye(1), "whitened", self.damp)

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> AserLinear:
        channels, factors = smoothing(weight, stats.absmean, self.outliers)
        m = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
        m[channels.long()] = factors.double()
        W = (weight.double() * m).to(weight.dtype)
        smoothed = Stats(
            stats.H / (m[:, None] * m), stats.absmax / m, stats.absmean / m, stats.sqnorm / m.square(),
            stats.tokens, None if stats.X is None else (stats.X / m).to(stats.X.dtype),
        )  # fmt: skip
        base: CompressedLinear = self.base(name, W.index_fill(1, channels.long(), 0), smoothed)
        L, R, _ = low_rank(W - base.weight, self.rank, input_metric(smoothed.H, "whitened", self.damp))
        extra = {"channels": channels, "factors_m": factors} if self.outliers else {}
        return AserLinear.repair(base, L, R, tensors=extra, activation_bits=self.activation_bits)
