"""The survey's Eq. 6, Eq. 7 and Algorithm 2, corrected.

What the survey prints, and what is done here:

- Eq. 6 and the last line of Algorithm 2 call s clip(round(W / s)) the quantized matrix. That is the
  *dequantized* one, a float for every weight; what is stored are the integers and s. Both are returned here.
- The clip bound "2^(b-1) 1" of Algorithm 2 has lost its minus: 2^(b-1) - 1.
- With Algorithm 2's scale |W / s| <= 2^(b-1) - 1, so its clip never acts and the code -2^(b-1) is never used:
  one of 4 codes at b = 2. This is the "restricted" scheme of `refimpl.quantization.grids`, which has others.
- At b = 1 it divides by zero, and W = 0 gives NaN: b = 1 is refused here, and W = 0 gets s = 1.
- s is called learnable, but Algorithm 2 takes a maximum; per channel is said in the text, per tensor printed:
  `per` chooses. (Scales are learned in PEQA, arXiv 2305.14152.)
- Eq. 7 is one distortion, not the typical one: methods that look at a layer's inputs lower
  `output_distortion` and *raise* Eq. 7.
"""

import torch
from torch import Tensor

__all__ = ["algorithm_2", "distortion", "output_distortion", "symmetric_codes"]


def symmetric_codes(W: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    """The integers of the survey's Eq. 6 for a given scale: clip(round(W / s), -2^(b-1), 2^(b-1) - 1).

    Parameters: `W`, floating point, finite; `scale` s > 0, a number or a tensor that broadcasts to W;
    `bits` b, 2 to 8. Returns int8 of W's shape; s times it is the dequantized matrix. Halves are rounded to
    even. Raises TypeError for a W that is not floating point, ValueError for everything else.

    >>> symmetric_codes(torch.tensor([[-1.0, 0.25, 0.9]]), 0.25, 3)
    tensor([[-4,  1,  3]], dtype=torch.int8)
    """
    _check(W, bits)
    if not bool((torch.as_tensor(scale) > 0).all()):
        raise ValueError(f"scale must be > 0, got {torch.as_tensor(scale).min().item()}")
    half = 2 ** (bits - 1)
    return (W / scale).round().clamp(-half, half - 1).to(torch.int8)


def algorithm_2(W: Tensor, bits: int, per: str = "tensor") -> tuple[Tensor, Tensor]:
    """Symmetric b-bit quantization, the survey's Algorithm 2: s = max|W| / (2^(b-1) - 1), then Eq. 6.

    Parameters: `W` [m, n], floating point, finite; `bits` b, 2 to 8; `per` "tensor" (as printed) or "row"
    (per output channel). Returns codes, int8 [m, n], from -(2^(b-1) - 1) to 2^(b-1) - 1, and the scale
    [1, 1] or [m, 1] of W's dtype; scale * codes is the dequantized matrix. Raises as `symmetric_codes`.

    >>> W = torch.tensor([[0.1, -0.7], [0.02, 0.04]])
    >>> codes, scale = algorithm_2(W, 3, per="row")
    >>> codes.tolist(), (scale * codes)[0, 1].item() == W[0, 1].item()
    ([[0, -3], [2, 3]], True)
    """
    _check(W, bits)
    if W.ndim != 2 or W.numel() == 0:
        raise ValueError(f"W must be a matrix [m, n] that is not empty, got {list(W.shape)}")
    if per not in ("tensor", "row"):
        raise ValueError(f"per must be 'tensor' or 'row', got {per!r}")
    largest = W.abs().amax(1, keepdim=True) if per == "row" else W.abs().max()[None, None]
    scale = largest / (2 ** (bits - 1) - 1)
    scale = scale.where(scale > 0, 1.0)
    return symmetric_codes(W, scale, bits), scale


def distortion(W: Tensor, W_hat: Tensor) -> float:
    """The survey's Eq. 7, ||W - W^||_F^2, for the *dequantized* W^; in float64.

    >>> distortion(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]]))
    0.25
    """
    return float((W.double() - W_hat.double()).square().sum())


def output_distortion(W: Tensor, W_hat: Tensor, H: Tensor) -> float:
    """What the layer's outputs lose: tr((W - W^) H (W - W^)'), with `Stats.H`, so 2/N sum ||(W - W^) x||^2.

    >>> X = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> output_distortion(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]]), 2 / 2 * X.T @ X)
    0.5
    """
    error = W.double() - W_hat.double()
    return float(((error @ H.double()) * error).sum())


def _check(W: Tensor, bits: int) -> None:
    if not W.is_floating_point():
        raise TypeError(f"W must be floating point, got {W.dtype}")
    if not bool(W.isfinite().all()):
        raise ValueError(f"W must be finite, got {int((~W.isfinite()).sum())} values that are not")
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r}")
