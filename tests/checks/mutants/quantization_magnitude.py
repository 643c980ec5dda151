"""Plausible but wrong magnitude pruning that its check must reject."""

import torch

from refimpl.quantization.pruning.unstructured import Magnitude, highest
from refimpl.quantization.sparse import SparseLinear, n_m_mask


class Off(Magnitude):
    """The mask is computed and everything is kept."""

    def mask(self, W, stats=None):
        return super().mask(W, stats) | True


class RowByRow(Magnitude):
    """Compared within each row."""

    def mask(self, W, stats=None):
        return super().mask(W, stats) if self.pattern else highest(W.abs(), self.sparsity)


class AlongTheOutputs(Magnitude):
    """n:m among neighbours of a column."""

    def mask(self, W, stats=None):
        one_of_four = self.pattern == (1, 4)
        return n_m_mask(W.abs().T, 1, 4).T if one_of_four else super().mask(W, stats)


class OneMore(Magnitude):
    """Everything up to and with the threshold goes."""

    def mask(self, W, stats=None):
        if self.pattern:
            return super().mask(W, stats)
        threshold = W.abs().flatten().sort().values[int(W.numel() * self.sparsity)]
        return W.abs() > threshold


class PrunesTheRest(Magnitude):
    """n:m leaves n out."""

    def mask(self, W, stats=None):
        n, m = self.pattern or (0, 0)
        return n_m_mask(W.abs(), m - n, m) if m else super().mask(W, stats)


class StoredDense(Magnitude):
    """Zeros are stored like all other weights."""

    def __call__(self, name, weight, stats=None):
        pruned = super().__call__(name, weight, stats).weight
        return SparseLinear.pack(pruned, torch.ones_like(pruned).bool())


MUTANTS = [
    ("magnitude", "nothing is left out", Off),
    ("magnitude", "compared row by row", RowByRow),
    ("magnitude", "n:m along the outputs", AlongTheOutputs),
    ("magnitude", "the threshold itself goes as well", OneMore),
    ("magnitude", "n:m leaves n of m out", PrunesTheRest),
    ("magnitude", "zeros are stored densely", StoredDense),
]
