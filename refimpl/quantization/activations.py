"""W8A8: weights and activations in eight bits, multiplied as integers.

A product y = W x sums over d_in. A scale that is one number for all d_in terms of a sum can be taken out of
it: one per row of W, one per token of x, one per tensor. Then y = s_x s_w sum_j q_w q_x, a product of
integers and two factors. A scale per *input channel* of x stands inside the sum and cannot be taken out:
this is why outliers in a few channels hurt, and what SmoothQuant goes around.

Conventions
- Codes are int8, symmetric, +-127, in steps of absmax / 127 (the survey's Eq. 6, b = 8). Halves to even.
- Scales of weights are float32, as in bitsandbytes; those of activations at least float32.
- An integer product is exact: int32, as the hardware's accumulators. It is computed here by a product of
  floats in which every partial sum is an integer that the float holds exactly.
- Backwards, W8A8 layers are the linear map W^ of their dequantized weight (straight through the rounding of
  x), as in bitsandbytes, so that LoRA can be trained on top.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.grids import Grid
from refimpl.quantization.linear import CompressedLinear

__all__ = ["W8A8", "Int8Linear", "affine_product", "int8_weight", "integer_product", "quantize_activations"]

ACTIVATIONS = ("token", "tensor", "static")


def quantize_activations(
    x: Tensor, granularity: str = "token", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes of activations and their scale: q = round(x / s).

    Parameters
    ----------
    x : [..., d_in], floating point, finite.
    granularity : "token", s = absmax of each token / 127 [..., 1]; "tensor", of all of x [1], which makes a
        token's codes depend on the other tokens of the call; "static", the given scale.
    scale : [1], for "static" only; what lies beyond 127 s is clipped.

    Returns codes, int8, of the shape of x, and the scale, float32 or float64. Raises TypeError unless x is
    floating point, ValueError for x that is empty or not finite, another granularity, and a scale where none
    belongs or the lack of one.

    Examples
    --------
    >>> q, s = quantize_activations(torch.tensor([[1.0, -2.0, 0.5], [0.1, 0.0, 0.0]]))
    >>> q.tolist()
    [[64, -127, 32], [127, 0, 0]]
    >>> quantize_activations(torch.tensor([[1.0, -2.0, 0.5], [0.1, 0.0, 0.0]]), "tensor")[0].tolist()
    [[64, -127, 32], [6, 0, 0]]
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if granularity not in ACTIVATIONS:
        raise ValueError(f"granularity must be one of {', '.join(ACTIVATIONS)}, got {granularity!r}")
    if (scale is not None) != (granularity == "static"):
        raise ValueError(f"scale must be given for 'static' and for nothing else, got {granularity!r}")
    if x.numel() == 0 or not bool(x.isfinite().all()):
        raise ValueError(f"x must be finite and not empty, got {list(x.shape)} {x.dtype}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if granularity == "static":
        s = scale.to(x.dtype)
    else:
        s = (x.abs().amax(-1, keepdim=True) if granularity == "token" else x.abs().amax()[None]) / 127
        s = s.where(s > 0, 1.0)  # zeros are zero on any grid
    return (x / s).round().clamp(-127, 127).to(torch.int8), s


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """sum_j a_ij b_kj, exactly.

    Parameters: `a` [..., d_in] and `b` [d_out, d_in], int8 or uint8. Returns int32 [..., d_out]. Raises
    TypeError for other dtypes, ValueError where the sum may leave int32 (d_in over 131 071 in int8).

    >>> integer_product(torch.tensor([[100, -100]], dtype=torch.int8), torch.tensor([[127, -127]],
    ...     dtype=torch.int8))
    tensor([[25400]], dtype=torch.int32)
    """
    if not {a.dtype, b.dtype} <= {torch.int8, torch.uint8}:
        raise TypeError(f"a and b must be int8 or uint8, got {a.dtype} and {b.dtype}")
    largest = a.shape[-1]
    for t in (a, b):
        largest *= 255 if t.dtype is torch.uint8 else 128
    if largest >= 2**31:
        raise ValueError(f"a and b have d_in = {a.shape[-1]}, whose sums may leave int32")
    dtype = torch.float32 if largest <= 2**24 else torch.float64
    return (a.to(dtype) @ b.to(dtype).T).to(torch.int32)


def affine_product(x_codes: Tensor, x_zero: Tensor, codes: Tensor, zero: Tensor | int = 0) -> Tensor:
    """sum_j (q_x - z_x)(q_w - z_w) from one integer product of the codes and two sums of them.

    = q_x q_w' - z_x (sum_j q_w)' - (sum_j q_x) z_w' + d_in z_x z_w'. The zero points do not enter the large
    product, and the sums over the weight's codes can be made once. Times s_x s_w it is the product of the
    dequantized tensors.

    Parameters: `x_codes` uint8 [..., d_in], `x_zero` integer [..., 1] or [1]; `codes` uint8 or int8
    [d_out, d_in], `zero` integer [d_out, 1], [1, 1] or a number, 0 for symmetric int8. Returns int32
    [..., d_out]; raises as `integer_product`.

    >>> q, w = torch.tensor([[0, 255]], dtype=torch.uint8), torch.tensor([[3, 1]], dtype=torch.int8)
    >>> affine_product(q, torch.tensor([100]), w)  # (0 - 100) * 3 + (255 - 100) * 1
    tensor([[-145]], dtype=torch.int32)
    """
    product = integer_product(x_codes, codes)
    of_x, of_w = x_codes.sum(-1, keepdim=True), codes.sum(-1, keepdim=True)
    zx = x_zero.to(torch.int64)
    zw = torch.as_tensor(zero, device=codes.device).to(torch.int64).reshape(-1, 1).T
    return (product - zx * of_w.T - of_x * zw + codes.shape[1] * zx * zw).to(torch.int32)


def int8_weight(W: Tensor, granularity: str = "row") -> tuple[Tensor, Tensor]:
    """Codes, int8 [d_out, d_in], and scale, float32 [d_out, 1] or for "tensor" [1, 1]; raises as `Grid`.

    >>> int8_weight(torch.tensor([[1.0, -2.0], [0.0, 0.1]]))[0].tolist()
    [[64, -127], [0, 127]]
    """
    codes, scale, zero = Grid(8, "restricted", granularity, scale_dtype=torch.float32).quantize(W)
    return (codes.to(torch.int16) - zero).to(torch.int8), scale


class Int8Linear(CompressedLinear):
    """y = s_x s_w (q_x q_w') + bias. `codes` int8 [d_out, d_in], `scale` float32; `x_scale` float32 [1] if
    static. Setting: `activations`, a granularity of `quantize_activations`."""

    def dequantize(self) -> Tensor:
        return self.codes * self.scale

    def product(self, x: Tensor) -> Tensor:
        """What takes the place of x W' [..., d_out], for x [..., d_in]; not differentiable."""
        codes, s = quantize_activations(x, self.settings["activations"], self._buffers.get("x_scale"))
        return (integer_product(codes, self.codes) * s * self.scale.flatten()).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., {self.in_features}], got {list(x.shape)}")
        y = self.product(x.detach())
        if x.requires_grad and torch.is_grad_enabled():
            through = F.linear(x, self.dequantize().to(x.dtype))
            y = y + (through - through.detach())
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class W8A8:
    """A recipe of `compress_model`: eight-bit weights and activations.

    Parameters
    ----------
    weights : "row" (a scale per output channel, default) or "tensor".
    activations : "token" (dynamic, default), "tensor" (dynamic) or "static" (absmax of calibration).

    Raises ValueError for other values, and when called without statistics for "static".

    Examples
    --------
    >>> layer = W8A8("tensor", "token")("fc", torch.eye(3))
    >>> layer(torch.tensor([[0.1, 20.0, 0.0]]))  # 0.1 is less than 20 / 254
    tensor([[ 0.1575, 20.0000,  0.0000]])
    """

    weights: str = "row"
    activations: str = "token"

    def __post_init__(self) -> None:
        if self.weights not in ("row", "tensor"):
            raise ValueError(f"weights must be 'row' or 'tensor', got {self.weights!r}")
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {self.activations!r}")

    def __call__(self, name: str, weight: Tensor, stats: Stats | None = None) -> Int8Linear:
        codes, scale = int8_weight(weight, self.weights)
        tensors: dict[str, Any] = {"codes": codes, "scale": scale}
        if self.activations == "static":
            if stats is None:
                raise ValueError(f"stats: static scales of {name} need the statistics of its inputs")
            s = stats.absmax.amax()[None] / 127
            tensors["x_scale"] = s.where(s > 0, 1.0).float()
        return Int8Linear(tuple(weight.shape), tensors, activations=self.activations)
