"""LLM.int8(): an integer product for almost all input channels, a float product for the outliers.

Implements arXiv 2208.07339 (section 3, Eq. 8). For the inputs X [T, d_in] of one call,

    O = {j: some |X_tj| >= threshold},   Y = Q(X_rest) Q(W_rest)' s_x s_w' + X_O W_O',

X_rest having zeros in the columns O *before* the scales s_x of its tokens are taken. O is found anew in each
call, and over all of its tokens: a token's output depends on the others in its batch.

Where bitsandbytes 0.50 differs
- W_O is the dequantized int8 weight, for no other is stored. So it is here, unless `keep_weight`, the paper's
  float W_O. The two part where a weight's columns are small *because* their inputs are large: beside the
  other weights of their rows they lose most of their digits.
- s_x is taken after the outlier *entries* are zeroed, not their columns: the small entries of an outlier
  column still widen the scale.
- X is cast to float16 first; here it keeps its dtype. Threshold 0 there means no decomposition; here it
  sends every column through the float product, and `math.inf` means no decomposition.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from refimpl.quantization.activations import Int8Linear, int8_weight
from refimpl.quantization.calibrate import Stats

__all__ = ["LLMInt8", "LLMInt8Linear"]


class LLMInt8Linear(Int8Linear):
    """The mixed product. `codes` int8 and `scale` float32 as in `Int8Linear`; `kept` [d_out, d_in] if the
    float weight is kept. `weight` is the dequantized int8 one. Settings: `activations`, `threshold`."""

    def outlier_columns(self, x: Tensor) -> Tensor:
        """The columns O of inputs x [..., d_in], ascending, int64."""
        return (x.abs() >= self.settings["threshold"]).flatten(0, -2).any(0).nonzero().flatten()

    def product(self, x: Tensor) -> Tensor:
        if x.ndim == 1:
            return self.product(x[None])[0]
        columns = self.outlier_columns(x)
        y = super().product(x.index_fill(-1, columns, 0))
        if "kept" in self._buffers:
            W = self.kept[:, columns]
        else:
            W = self.codes[:, columns].to(x.dtype) * self.scale
        return y + x[..., columns] @ W.to(x.dtype).T


@dataclass(frozen=True)
class LLMInt8:
    """A recipe of `compress_model`: int8 weights per row, int8 activations per token, outliers in float.

    Parameters
    ----------
    threshold : from which magnitude on a value makes its column an outlier (the paper: 6.0).
    keep_weight : store the float weight beside the int8 one, for the columns O (larger than the plain layer).

    Raises ValueError for a threshold that is no number >= 0.

    Examples
    --------
    >>> layer = LLMInt8()("fc", torch.eye(3))
    >>> layer(torch.tensor([[0.1, 20.0, 0.0]]))  # per token, 0.1 would be 0.1575
    tensor([[ 0.1000, 20.0000,  0.0000]])
    """

    threshold: float = 6.0
    keep_weight: bool = False

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be a number >= 0, got {self.threshold!r}")

    def __call__(self, name: str, weight: Tensor, stats: Stats | None = None) -> LLMInt8Linear:
        codes, scale = int8_weight(weight)
        tensors: dict[str, torch.Tensor] = {"codes": codes, "scale": scale}
        if self.keep_weight:
            tensors["kept"] = weight
        return LLMInt8Linear(tuple(weight.shape), tensors, activations="token", threshold=self.threshold)
