"""QuIP and QuIP#: make weights and inputs incoherent, round with error feedback, transform the activations.

Implements arXiv 2307.13304 (QuIP) and arXiv 2402.04396 (QuIP#; the survey's reference 87). With orthogonal
L [d_out, d_out] and R [d_in, d_in],

    W' = L W R',    H' = R H R'    (R' here: R transposed),    W x = L' (W' (R x)),

so that the loss tr(dW H dW') stays what it was, while W' looks Gaussian: no entry stands out, and one scale
fits all. Columns are rounded from the last to the first (LDLQ), each in view of the errors of those after it:
GPTQ in the opposite order. The layer keeps W' in codes and transforms its *inputs and outputs*.

QuIP: L, R random Kronecker products, the diagonal rescaling, b bits for each weight on +-2.4 rms. QuIP#:
randomized Hadamard transforms and E8P, eight weights at a time, with a residual code for 3 and 4 bits.

Left out: the greedy passes that both programs can run after LDLQ (ten by default in that of QuIP#), and the
fine-tuning of QuIP#.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.e8p import CODEBOOKS
from refimpl.quantization.feedback import Feedback, feedback_quantize
from refimpl.quantization.hadamard import RandomHadamard, RandomKronecker, Transform, rescaling, rotate
from refimpl.quantization.linear import CompressedLinear
from refimpl.quantization.packing import pack_codes, unpack_codes

__all__ = ["IncoherentLinear", "QuIP", "QuIPLinear", "QuIPSharp", "QuIPSharpLinear", "ldlq"]


def ldlq(
    W: Tensor, H: Tensor, encode: Callable[[Tensor], tuple[Tensor, Tensor]], vdim: int = 1, damp: float = 0.01
) -> Feedback:
    """LDLQ: with H = M D M' (M unit lower block triangular), from the last block of v columns to the first,

        Q_k = encode(W_k + (W_>k - Q_>k) M_>k,k).

    This is `feedback_quantize` in reversed order. Parameters: `encode`, [d_out, v] -> values [d_out, v] and
    codes [d_out, c]; the others and what is raised as there.

    >>> H = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> ldlq(torch.tensor([[0.4, 0.4]]), H, lambda w: (w.round(), w.round()), damp=0).Q
    tensor([[1., 0.]], dtype=torch.float64)
    """
    if type(vdim) is not int or vdim < 1 or W.shape[-1] % vdim:
        raise ValueError(f"vdim must be a divisor of d_in = {W.shape[-1]}, got {vdim!r}")
    order = torch.arange(W.shape[-1] // vdim - 1, -1, -1, device=W.device)
    return feedback_quantize(W, H, lambda step: encode(step.w), vdim=vdim, order=order, damp=damp)


class IncoherentLinear(CompressedLinear):
    """y = L' W' R (x / s) + bias: the transforms act on activations, W' is all that is decoded.

    Subclasses give `transforms()` and `rotated()`. Computed in float32 or the dtype of x if that is wider.
    """

    def transforms(self) -> tuple[Transform, Transform]:
        """L, for outputs, and R, for inputs."""
        raise NotImplementedError

    def rotated(self) -> Tensor:
        """W' [d_out, d_in], float32."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        left, right = self.transforms()
        W = left.inverse(right.inverse(self.rotated()).T).T
        return W / self.rescale.float() if "rescale" in self._buffers else W

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.transforms()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if "rescale" in self._buffers:
            wide = wide / self.rescale.to(wide.dtype)
        y = left.inverse(F.linear(right(wide), self.rotated().to(wide.dtype))).to(x.dtype)
        return y if self.bias is None else y + self.bias


class QuIPLinear(IncoherentLinear):
    """W' on 2^b values from -r to r: packed `codes`, `range` r, and the `seed` of both transforms."""

    def __init__(
        self,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(shape, tensors, bias, **settings)
        # Made once; what the seed gives is no part of what is stored.
        self._transforms = _kronecker(int(tensors["seed"]), *shape)

    def transforms(self) -> tuple[RandomKronecker, RandomKronecker]:
        return self._transforms

    def rotated(self) -> Tensor:
        bits = self.settings["bits"]
        codes = unpack_codes(self.codes, bits, (self.out_features, self.in_features))
        return (codes.float() * (2 / (2**bits - 1)) - 1) * self.range


class QuIPSharpLinear(IncoherentLinear):
    """W' in E8P codes, uint8 [d_out, d_in / 8, b], high byte first; `scale`; `signs` of L and R as bits."""

    def transforms(self) -> tuple[RandomHadamard, RandomHadamard]:
        signs = unpack_codes(self.signs, 1, (self.out_features + self.in_features,)).float() * 2 - 1
        return RandomHadamard(signs[: self.out_features]), RandomHadamard(signs[self.out_features :])

    def rotated(self) -> Tensor:
        return CODEBOOKS[self.codes.shape[-1]].decode(self.codes).flatten(1) * self.scale


@dataclass(frozen=True)
class QuIP:
    """QuIP with LDLQ: random orthogonal transforms and a uniform grid.

    Parameters
    ----------
    bits : b, 2 to 8.
    reach : where the grid ends, in rms of W'. The paper's 2.4 cuts off 1.6 % of Gaussian weights, a loss that
        more than 4 bits do not make smaller.
    rescale : the diagonal rescaling before the transforms; stored as 16 bits for each input.
    damp : share of the mean of diag H that is added to it.
    seed : of the transforms, together with the layer's name.

    A recipe of `compress_model`. Raises ValueError for other values.

    Examples
    --------
    >>> from refimpl.quantization.calibrate import stats_of
    >>> generator = torch.Generator().manual_seed(0)
    >>> W, X = torch.randn(64, 96, generator=generator), torch.randn(500, 96, generator=generator)
    >>> layer = QuIP(2, rescale=False)("fc", W, stats_of(X))
    >>> float((layer.weight - W).square().mean()) < 0.3, layer.bits_per_weight < 2.02
    (True, True)
    """

    bits: int = 2
    reach: float = 2.4
    rescale: bool = True
    damp: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be an integer from 2 to 8, got {self.bits!r}")
        if not 0 < self.reach < float("inf"):
            raise ValueError(f"reach must be a number > 0, got {self.reach!r}")

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> QuIPLinear:
        (W, H), tensors = _prepared(weight, stats.H), {}
        if self.rescale:
            s = tensors["rescale"] = rescaling(W, H)
            W, H = W * s.double(), H / torch.outer(s.double(), s.double())
        seed = _seed(self.seed, name)
        W, H = rotate(W, H, *_kronecker(seed, *W.shape))
        r = _rms(W, self.reach)
        top = 2**self.bits - 1

        def encode(w: Tensor) -> tuple[Tensor, Tensor]:
            codes = ((w / r + 1) * (top / 2)).round().clamp(0, top)
            return (codes * (2 / top) - 1) * r, codes

        # As in the authors' program what lies beyond the grid is cut off first: no column makes up for that.
        codes = ldlq(W.clamp(-r, r), H, encode, damp=self.damp).codes.to(torch.uint8)
        tensors |= {"codes": pack_codes(codes, self.bits), "range": r, "seed": torch.tensor(seed)}
        return QuIPLinear(tuple(W.shape), tensors, bits=self.bits)


@dataclass(frozen=True)
class QuIPSharp:
    """QuIP# without fine-tuning: randomized Hadamard transforms, block LDLQ, E8P and residual codes.

    Parameters
    ----------
    bits : 2 (E8P), 3 (and one byte for the residual of eight weights) or 4 (and a second E8P code).
    rms : of W' in units of the codebook; None: where Gaussian numbers lose least. Authors at 2 bits: 0.9.
    damp : share of the mean of diag H that is added to it.
    seed : of the signs, together with the layer's name.

    A recipe of `compress_model`; d_in must be a multiple of 8. Raises ValueError for other values.

    Examples
    --------
    >>> from refimpl.quantization.calibrate import stats_of
    >>> generator = torch.Generator().manual_seed(0)
    >>> W, X = torch.randn(64, 96, generator=generator), torch.randn(500, 96, generator=generator)
    >>> layer = QuIPSharp(2)("fc", W, stats_of(X))
    >>> float((layer.weight - W).square().mean()) < 0.12, layer.bits_per_weight < 2.04
    (True, True)
    """

    bits: int = 2
    rms: float | None = None
    damp: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bits not in CODEBOOKS:
            raise ValueError(f"bits must be 2, 3 or 4, got {self.bits!r}")
        if self.rms is not None and not 0 < self.rms < float("inf"):
            raise ValueError(f"rms must be None or a number > 0, got {self.rms!r}")

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> QuIPSharpLinear:
        W, H = _prepared(weight, stats.H)
        d_out, d_in = W.shape
        if d_in % 8:
            raise ValueError(f"weight: d_in must be a multiple of 8, got {[d_out, d_in]}")
        generator = Generator().manual_seed(_seed(self.seed, name))
        left, right = (RandomHadamard.draw(n, generator) for n in (d_out, d_in))
        W, H = rotate(W, H, left, right)
        book = CODEBOOKS[self.bits]
        scale = _rms(W, 1 / (book.scale if self.rms is None else self.rms))
        codes = ldlq(W / scale, H, lambda w: book.encode(w.float()), vdim=8, damp=self.damp).codes
        signs = (torch.cat((left.signs, right.signs)) > 0).to(torch.uint8)
        tensors = {"codes": codes.view(d_out, -1, self.bits), "scale": scale, "signs": pack_codes(signs, 1)}
        return QuIPSharpLinear((d_out, d_in), tensors)


def _prepared(W: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """W and H in float64; ValueError for those that do not fit."""
    if W.ndim != 2 or W.numel() == 0 or not W.is_floating_point() or not bool(W.isfinite().all()):
        raise ValueError(f"weight must be a finite floating-point matrix, got {W.dtype} {list(W.shape)}")
    n = W.shape[1]
    if H.shape != (n, n) or not bool(H.isfinite().all()):
        raise ValueError(f"H must be finite, [{n}, {n}] for W {list(W.shape)}, got {list(H.shape)}")
    return W.double(), H.double()


def _rms(W: Tensor, factor: float) -> Tensor:
    """factor rms(W) as it is stored, float32; 1 for a matrix of zeros."""
    value = (factor * W.square().mean().sqrt()).float()
    return value.where(value > 0, 1.0)


def _kronecker(seed: int, d_out: int, d_in: int) -> tuple[RandomKronecker, RandomKronecker]:
    generator = Generator().manual_seed(seed)
    return RandomKronecker(d_out, generator), RandomKronecker(d_in, generator)


def _seed(seed: int, name: str) -> int:
    """Another one for every layer, the same in every run."""
    return crc32(f"{seed} {name}".encode())
