"""Plausible but wrong Wanda that its check must reject."""

from refimpl.quantization.pruning.unstructured import Magnitude, Wanda, highest
from refimpl.quantization.sparse import n_m_mask


class WithoutInputs(Wanda):
    """|W| within each row."""

    def mask(self, W, stats):
        return n_m_mask(W.abs(), *self.pattern) if self.pattern else highest(W.abs(), self.sparsity)


class MagnitudeItself(Magnitude):
    """|W| over the layer."""


class WholeLayer(Wanda):
    """The right score, compared over the whole layer, as one toolkit does."""

    def mask(self, W, stats):
        if self.pattern:
            return super().mask(W, stats)
        score = W.abs() * stats.sqnorm.sqrt()
        return highest(score.flatten(), self.sparsity).view(W.shape)


class SquaredNorm(Wanda):
    """|W| ||x||^2."""

    def mask(self, W, stats):
        score = W.abs() * stats.sqnorm
        return n_m_mask(score, *self.pattern) if self.pattern else highest(score, self.sparsity)


class LargestInput(Wanda):
    """|W| max |x|."""

    def mask(self, W, stats):
        score = W.abs() * stats.absmax
        return n_m_mask(score, *self.pattern) if self.pattern else highest(score, self.sparsity)


MUTANTS = [
    ("wanda", "the inputs play no part", WithoutInputs),
    ("wanda", "magnitude over the layer", MagnitudeItself),
    ("wanda", "compared over the whole layer", WholeLayer),
    ("wanda", "the squared norm of the inputs", SquaredNorm),
    ("wanda", "the largest input instead of the norm", LargestInput),
]
