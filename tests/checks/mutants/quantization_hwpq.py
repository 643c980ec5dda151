"""Plausible but wrong HWPQ that its check must reject."""

import torch

from refimpl.quantization.hwpq import HWPQ, FP8Linear, contribution, ewma_mask
from refimpl.quantization.pruning.unstructured import highest
from refimpl.quantization.sparse import SparseLinear, n_m_mask


class Off(HWPQ):
    """Nothing is left out."""

    def mask(self, W, stats):
        return torch.ones(W.shape, dtype=torch.bool)

    def __call__(self, name, weight, stats):
        return SparseLinear.pack(weight, self.mask(weight, stats))


class Sorted(HWPQ):
    """The same contribution, the threshold from sorting it."""

    def mask(self, W, stats):
        if self.pattern:
            return super().mask(W, stats)
        return highest(contribution(W, stats.sqnorm).flatten(), self.sparsity).view(W.shape)


class _Scored(HWPQ):
    def mask(self, W, stats):
        L = self.score(W, stats.sqnorm)
        return n_m_mask(L, *self.pattern) if self.pattern else ewma_mask(L, self.sparsity, self.beta)


class Magnitude(_Scored):
    def score(self, W, sqnorm):
        return W.square() / 2


class Wanda(_Scored):
    def score(self, W, sqnorm):
        return W.square() * sqnorm


class Grows(_Scored):
    """1 + x^2 / S."""

    def score(self, W, sqnorm):
        return W.square() / 2 * (1 + sqnorm / sqnorm.sum())


class Hessian(_Scored):
    """The right numbers, read off the diagonal of a d_in x d_in matrix."""

    def score(self, W, sqnorm):
        H = torch.outer(sqnorm.sqrt(), sqnorm.sqrt())
        return W.square() / 2 * (1 - H.diagonal() / H.trace()).to(W.dtype)


class NoScale(HWPQ):
    """FP8 without a scale per row."""

    def __call__(self, name, weight, stats):
        layer = super().__call__(name, weight, stats)
        if isinstance(layer, FP8Linear):
            keep = layer.keep
            layer.values = weight[keep].to(torch.float8_e4m3fn)
            layer.scale = torch.ones_like(layer.scale)
        return layer


class ZerosStored(HWPQ):
    """Zeros are stored like other numbers."""

    def __call__(self, name, weight, stats):
        if not self.fp8:
            return super().__call__(name, weight, stats)
        keep = self.mask(weight, stats)
        return FP8Linear.pack(weight * keep, torch.ones_like(keep))


MUTANTS = [
    ("hwpq", "nothing is left out", Off),
    ("hwpq", "contributions are sorted", Sorted),
    ("hwpq", "magnitude without the inputs", Magnitude),
    ("hwpq", "the metric of Wanda", Wanda),
    ("hwpq", "the contribution grows with the input", Grows),
    ("hwpq", "a d_in x d_in matrix is made", Hessian),
    ("hwpq", "FP8 without a scale", NoScale),
    ("hwpq", "zeros are stored", ZerosStored),
]
