"""Repair what compression lost with a low-rank term: W^ = base + L R.

With E = W - base and a metric S on the inputs, the L R of rank r with the least ||(E - L R) S||_F is known in
closed form (Eckart and Young): let E S = U diag(sigma) V'; then

    L = U_r,    R = U_r' E,    ||(E - L R) S||_F^2 = sum_{i > r} sigma_i^2.

Papers write the same product as (U_r Sigma_r) (V_r' S^-1); as U_r' E no inverse of S is needed. The metrics:

- "plain": S = I, ordinary SVD, the least error of the *weights*;
- "diagonal": S = diag(sqrt(H_jj)), inputs by their size (LQER, SLiM);
- "whitened": S S' = H, all correlations: the least error of the *outputs*, tr((E - L R) H (E - L R)'), that
  any matrix of rank r can reach (SVD-LLM, ASER).

L R is an adapter of rank r that stays at inference: it is stored, multiplied and counted.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.grids import Grid
from refimpl.quantization.linear import CompressedLinear, GridLinear
from refimpl.quantization.model import Recipe

__all__ = ["METRICS", "LowRank", "Repair", "RepairedLinear", "input_metric", "low_rank", "rank_for_share"]

METRICS = ("plain", "diagonal", "whitened")
_ROOM = "refimpl.quantization."


class LowRank(NamedTuple):
    """`L` [d_out, r] and `R` [r, d_in], float64, and all singular values `sigma` of E S, falling."""

    L: Tensor
    R: Tensor
    sigma: Tensor


def input_metric(H: Tensor, metric: str, damp: float = 1e-6) -> Tensor | None:
    """The metric S of inputs with H = 2/N sum x x' [d_in, d_in]: None (S = I), [d_in] (diagonal) or
    [d_in, d_in] (the lower Cholesky factor), in float64.

    Parameters: `metric`, of `METRICS`; `damp`, > 0, this share of the mean of diag H is added to it: with
    fewer tokens than inputs, H alone has no Cholesky factor. Raises ValueError for another metric, damp or H.

    >>> input_metric(torch.tensor([[4.0, 2.0], [2.0, 5.0]]), "whitened", damp=1e-12).round(decimals=6)
    tensor([[2., 0.],
            [1., 2.]], dtype=torch.float64)
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if not damp > 0:
        raise ValueError(f"damp must be a number > 0, got {damp!r}")
    if H.ndim != 2 or H.shape[0] != H.shape[1] or not bool(H.isfinite().all()):
        raise ValueError(f"H must be finite, [d_in, d_in], got {list(H.shape)}")
    if metric == "plain":
        return None
    diagonal = H.double().diagonal()
    extra = damp * diagonal.mean()
    if metric == "diagonal":
        return (diagonal + extra).sqrt()
    factor, failed = torch.linalg.cholesky_ex(H.double() + torch.diag(extra.expand(len(H))))
    if failed:
        raise ValueError(f"H is not positive definite with damp = {damp}: raise damp")
    return factor


def low_rank(E: Tensor, rank: int | float, S: Tensor | None = None) -> LowRank:
    """The L R of a rank that is nearest to E in the metric S.

    Parameters: `E` [d_out, d_in], finite; `rank` r, an integer from 0 to min(d_out, d_in), or a share in
    (0, 1) of the sum of the singular values (`rank_for_share`); `S`, as `input_metric` gives it.
    Raises ValueError for anything else.

    >>> E, S = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 10.0])
    >>> L, R, sigma = low_rank(E, 1, S)         # the second input is ten times as large: repair its column
    >>> (L @ R).abs(), sigma.tolist()
    (tensor([[0., 0.],
            [0., 2.]], dtype=torch.float64), [20.0, 3.0])
    """
    if not E.is_floating_point() or E.ndim != 2 or E.numel() == 0 or not bool(E.isfinite().all()):
        raise ValueError(f"E must be a finite matrix [d_out, d_in], got {E.dtype} {list(E.shape)}")
    d_in = E.shape[1]
    if S is not None and tuple(S.shape) not in ((d_in,), (d_in, d_in)):
        raise ValueError(f"S must be None, [{d_in}] or [{d_in}, {d_in}], got {list(S.shape)}")
    if isinstance(rank, bool) or not (type(rank) is int and 0 <= rank <= min(E.shape)):
        if not (isinstance(rank, float) and 0 < rank < 1):
            what = f"an integer from 0 to {min(E.shape)} or a share between 0 and 1"
            raise ValueError(f"rank must be {what}, got {rank!r}")
    E = E.double()
    weighted = E if S is None else E * S.double() if S.ndim == 1 else E @ S.double()
    U, sigma, _ = torch.linalg.svd(weighted, full_matrices=False)
    L = U[:, : rank if isinstance(rank, int) else rank_for_share(sigma, rank)]
    return LowRank(L, L.T @ E, sigma)


def rank_for_share(sigma: Tensor, share: float) -> int:
    """The smallest r with sum_{i <= r} sigma_i >= share of the sum of all (ASER's threshold alpha).

    >>> rank_for_share(torch.tensor([5.0, 3.0, 2.0]), 0.6)
    2
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share!r}")
    return min(int((sigma.cumsum(0) < share * sigma.sum()).sum()) + 1, len(sigma))


class RepairedLinear(CompressedLinear):
    """A compressed layer and a low-rank term: y = base(x) + L (R x) + bias.

    Buffers: the base's, their names prefixed with "base_"; `L` [d_out, r] and `R` [r, d_in] in float16, or,
    quantized, `L_codes`, `L_scale`, `R_codes`, `R_scale`. Nothing for r = 0. The settings name the base's
    class and hold its settings with the same prefix, so a base may itself be repaired.

    >>> from refimpl.quantization import RTN
    >>> W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    >>> base = RTN(2, group=16)("fc", W)
    >>> L, R, _ = low_rank(W - base.weight, 4)
    >>> layer = RepairedLinear.repair(base, L, R)
    >>> base.bits_per_weight, layer.bits_per_weight         # 16 bits r (d_out + d_in) more
    (3.125, 6.125)
    """

    def __init__(self, *stored: Any, **settings: Any) -> None:
        base_class = _layer_class(settings.get("base"))
        super().__init__(*stored, **settings)
        self._base_class = base_class

    @classmethod
    def repair(
        cls,
        base: CompressedLinear,
        L: Tensor,
        R: Tensor,
        *,
        bits: int | None = None,
        tile: int | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        **settings: Any,
    ) -> "RepairedLinear":
        """Join a layer and its repair.

        Parameters: `base`, whose bias moves to the new layer; `L` [d_out, r]; `R` [r, d_in]; `bits`, None for
        float16, else 2 to 8 on symmetric grids; `tile`, neighbours of a row that share a scale, a divisor of
        r and d_in (None: a row); further `tensors` and `settings` of a subclass.
        Raises ValueError for other shapes, values that float16 cannot hold, and as `Grid`.
        """
        shape, r = (base.out_features, base.in_features), L.shape[-1]
        if L.shape != (shape[0], r) or R.shape != (r, shape[1]):
            both = f"{list(L.shape)} and {list(R.shape)}"
            raise ValueError(f"L and R must be [{shape[0]}, r] and [r, {shape[1]}], got {both}")
        stored = {f"base_{name}": tensor for name, tensor in base.named_buffers()} | dict(tensors or {})
        about = {"base": f"{type(base).__module__}:{type(base).__qualname__}", **settings}
        about |= {f"base_{name}": value for name, value in base.settings.items()}
        for name, factor in (("L", L), ("R", R)) if r else ():
            if bits is None:
                stored[name] = factor.half()
                if not bool(stored[name].isfinite().all()):
                    raise ValueError(f"{name} must be finite and fit float16")
            else:
                grid = Grid(bits, "restricted", "row" if tile is None else tile)
                packed = GridLinear.pack(grid.quantize(factor.float()), bits)
                stored |= {f"{name}_{key}": tensor for key, tensor in packed.named_buffers()}
        return cls(shape, stored, base.bias, rank=r, factor_bits=bits, **about)

    def base(self) -> CompressedLinear:
        """The layer that was repaired, without bias, made anew."""
        strip = lambda found: {k[5:]: v for k, v in found.items() if k.startswith("base_")}
        shape = self.out_features, self.in_features
        return self._base_class(shape, strip(self._buffers), **strip(self.settings))

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and R as they are stored, in float32."""
        r = self.settings["rank"]
        return self._factor("L", (self.out_features, r)), self._factor("R", (r, self.in_features))

    def dequantize(self) -> Tensor:
        W = self.base().weight
        L, R = self.factors()
        return W + (L @ R).to(W) if self.settings["rank"] else W

    def forward(self, x: Tensor) -> Tensor:
        y = self.base()(x)
        if self.settings["rank"]:
            L, R = (factor.to(x.dtype) for factor in self.factors())
            y = y + F.linear(F.linear(x, R), L)
        return y if self.bias is None else y + self.bias

    def _factor(self, name: str, shape: tuple[int, int]) -> Tensor:
        bits = self.settings["factor_bits"]
        if shape.count(0):
            return torch.zeros(shape)
        if bits is None:
            return self._buffers[name].float()
        codes = {key: self._buffers[f"{name}_{key}"] for key in ("codes", "scale")}
        return GridLinear(shape, codes, bits=bits).weight


@dataclass(frozen=True)
class Repair:
    """Compress with one recipe and repair the residual: a recipe of `compress_model`.

    Parameters
    ----------
    base : any recipe, such as `RTN(3)`.
    rank : r, 0 to min(d_out, d_in), usual 8 to 64; or a share of the singular values, see `low_rank`.
    metric : of `METRICS`.
    damp : see `input_metric`.

    Raises ValueError for another metric or damp when it is made, and as `low_rank` when it is called.

    >>> from refimpl.quantization import RTN, output_distortion, stats_of
    >>> generator = torch.Generator().manual_seed(0)
    >>> W, mix = torch.randn(16, 32, generator=generator), torch.randn(32, 32, generator=generator)
    >>> stats = stats_of(torch.randn(200, 32, generator=generator) @ mix)
    >>> recipes = [RTN(3), *(Repair(RTN(3), 4, metric) for metric in METRICS)]
    >>> lost = [output_distortion(W, recipe("fc", W, stats).weight, stats.H) for recipe in recipes]
    >>> lost == sorted(lost, reverse=True)
    True
    """

    base: Recipe
    rank: int | float = 8
    metric: str = "whitened"
    damp: float = 1e-6

    def __post_init__(self) -> None:
        input_metric(torch.eye(1), self.metric, self.damp)

    def __call__(self, name: str, weight: Tensor, stats: Stats) -> RepairedLinear:
        base = self.base(name, weight, stats)
        S = input_metric(stats.H, self.metric, self.damp)
        L, R, _ = low_rank(weight - base.weight, self.rank, S)
        return RepairedLinear.repair(base, L, R)


def _layer_class(path: Any) -> type[CompressedLinear]:
    """The class that "module:name" names; ValueError unless it is a compressed layer of this package."""
    module, _, name = str(path).partition(":")
    found = getattr(importlib.import_module(module), name, None) if module.startswith(_ROOM) else None
    if not (isinstance(found, type) and issubclass(found, CompressedLinear)):
        raise ValueError(f"base must name a CompressedLinear of {_ROOM}*, got {path!r}")
    return found
