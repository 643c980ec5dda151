"""Plausible but wrong SLiM that its check must reject."""

import torch

from refimpl.quantization.grids import Grid
from refimpl.quantization.repair import RepairedLinear, low_rank
from refimpl.quantization.slim import SLiM, saliency, slim_quantize, wanda_mask


class Off(SLiM):
    """Wanda and rounding, without adapters."""

    def __call__(self, name, weight, stats):
        return _plain(self, rank=0)(name, weight, stats)


class ScaleOfTheLargest(SLiM):
    """The scale is that of the largest weight."""

    def __call__(self, name, weight, stats):
        return _by_hand(self, weight, stats, quantize=Grid(self.bits, "restricted", "tensor").quantize)


class NaiveAdapters(SLiM):
    def __call__(self, name, weight, stats):
        return _plain(self, adapters="naive")(name, weight, stats)


class SquaresForSizes(SLiM):
    """Sums of squares weight the error; their root is forgotten."""

    def __call__(self, name, weight, stats):
        return _by_hand(self, weight, stats, metric=saliency(stats.sqnorm) ** 2)


class Magnitude(SLiM):
    """The mask is that of the largest weights."""

    def __call__(self, name, weight, stats):
        return _by_hand(self, weight, stats, mask_size=torch.ones(len(stats.sqnorm)))


class NeverRecomputed(SLiM):
    def __call__(self, name, weight, stats):
        return _plain(self, recompute=False)(name, weight, stats)


class MaskedAgain(SLiM):
    """Step 4 chooses the mask again, from what the adapters leave."""

    def __call__(self, name, weight, stats):
        return _by_hand(self, weight, stats, again=True)


class AdaptersInSixteenBits(SLiM):
    def __call__(self, name, weight, stats):
        return _plain(self, adapter_bits=None)(name, weight, stats)


class OnlyZerosShifted(SLiM):
    """Inputs that never occurred get the smallest size that did; the others keep theirs."""

    def __call__(self, name, weight, stats):
        n = stats.sqnorm
        return _by_hand(self, weight, stats, metric=n.where(n > 0, n[n > 0].min()).sqrt())


def _plain(self, **changes):
    """The real thing with other settings, whatever the class."""
    return SLiM(**{k: changes.get(k, getattr(self, k)) for k in SLiM.__dataclass_fields__})


def _by_hand(self, weight, stats, quantize=None, metric=None, mask_size=None, again=False):
    quantize = quantize or (lambda W: slim_quantize(W, self.bits))
    size = saliency(stats.sqnorm)
    keep = wanda_mask(weight, size if mask_size is None else mask_size, self.sparsity)
    base = self._stored(quantize(weight), keep)
    if self.adapters == "naive":
        metric = None
    elif metric is None:
        metric = size
    L, R, _ = low_rank(weight - base.weight, self._rank(*weight.shape), metric)
    if self.recompute and L.shape[1]:
        rest = (weight - L @ R).to(weight.dtype)
        keep = wanda_mask(rest, size, self.sparsity) if again else keep
        base = self._stored(quantize(rest * keep), keep)
    return RepairedLinear.repair(base, L, R, bits=self.adapter_bits, tile=self.tile)


MUTANTS = [
    ("slim", "no adapters", Off),
    ("slim", "the scale of the largest weight", ScaleOfTheLargest),
    ("slim", "adapters without saliency", NaiveAdapters),
    ("slim", "squares of the sizes weight the error", SquaresForSizes),
    ("slim", "a mask of the largest weights", Magnitude),
    ("slim", "the compressed weight is not made again", NeverRecomputed),
    ("slim", "a new mask in step 4", MaskedAgain),
    ("slim", "adapters are not quantized", AdaptersInSixteenBits),
    ("slim", "only inputs that never occurred are shifted", OnlyZerosShifted),
]
