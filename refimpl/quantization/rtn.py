"""Round to nearest (RTN): the baseline that looks at nothing but the weights.

Implements the survey's Eq. 6 for every convention of `refimpl.quantization.grids`.
"""

from dataclasses import dataclass

from torch import Tensor

from refimpl.quantization.calibrate import Stats
from refimpl.quantization.grids import Grid
from refimpl.quantization.linear import GridLinear

__all__ = ["RTN"]


@dataclass(frozen=True)
class RTN(Grid):
    """Round every weight to the nearest value of its grid; the parameters are those of `Grid`.

    An object is a recipe of `compress_model`: called with a layer's name, weight and statistics (both other
    than the weight are ignored) it returns the compressed layer.

    >>> import torch
    >>> layer = RTN(4, "full", group=4)("fc", torch.tensor([[0.5, -1.0, 0.25, 1.0]]))
    >>> layer.weight
    tensor([[ 0.5332, -1.0664,  0.2666,  0.9331]])
    """

    def __call__(self, name: str, weight: Tensor, stats: Stats | None = None) -> GridLinear:
        return GridLinear.pack(self.quantize(weight), self.bits)
