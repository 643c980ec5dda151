"""Plausible but wrong D2O that `check_d2o` must reject."""

import torch

from refimpl.kvcache import d2o
from refimpl.kvcache.d2o import D2O, layer_ratios


class NoMerging(D2O):
    def merge(self, v, keep):
        return None


class EverythingMerges(D2O):
    """No threshold."""

    def merge(self, v, keep):
        smoothing, self.smoothing = self.smoothing, 1.0
        v.notes["tau"] = torch.full(v.shape[:2], -2.0)
        merged = super().merge(v, keep)
        self.smoothing = smoothing
        return merged


class OneThresholdForAllHeads(D2O):
    """Which victims merge is decided by their rank, averaged over heads, as in the released code."""

    def merge(self, v, keep):
        inner = d2o.merge_into_nearest

        def averaged(k, val, gk, gv, nearest, u, chosen):
            mean = u.mean(1, keepdim=True)
            return inner(k, val, gk, gv, nearest, u, (mean >= v.notes["tau"].mean()).expand_as(chosen))

        d2o.merge_into_nearest = averaged
        try:
            return super().merge(v, keep)
        finally:
            d2o.merge_into_nearest = inner


class PlainMean(D2O):
    """The mean of the survivor and u · victim."""

    def merge(self, v, keep):
        inner = d2o.merge_into_nearest

        def plain(k, val, gk, gv, nearest, u, chosen):
            count = torch.ones_like(k[..., 0]).scatter_add(-1, nearest, chosen.float())[..., None]
            at = nearest[..., None].expand_as(gk)
            weight = (u * chosen)[..., None]
            pairs = ((k, gk), (val, gv))
            return tuple(own.scatter_add(-2, at, weight * other) / count for own, other in pairs)

        d2o.merge_into_nearest = plain
        try:
            return super().merge(v, keep)
        finally:
            d2o.merge_into_nearest = inner


class SameBudgets(D2O):
    def plan(self, views):
        for v in views:
            v.notes["density"] = torch.zeros(v.shape[0])
        return super().plan(views)


class DenseLayersGetMore(D2O):
    """The sign of the density is lost."""

    def plan(self, views):
        inner = d2o.layer_ratios
        d2o.layer_ratios = lambda density, ratio: layer_ratios(-density, ratio)
        try:
            return super().plan(views)
        finally:
            d2o.layer_ratios = inner


class FrozenThreshold(D2O):
    """tau stays what it was after the prompt."""

    def __init__(self, *args, smoothing=0.5, **options):
        super().__init__(*args, smoothing=1.0, **options)


class NoSinks(D2O):
    def __init__(self, *args, **options):
        super().__init__(*args, sinks=0, **options)


MUTANTS = [
    ("d2o", "nothing is merged", NoMerging),
    ("d2o", "every victim merges", EverythingMerges),
    ("d2o", "victims are chosen by rank, averaged over heads", OneThresholdForAllHeads),
    ("d2o", "plain mean of the survivor and u times the victim", PlainMean),
    ("d2o", "all layers have the same budget", SameBudgets),
    ("d2o", "dense layers get more", DenseLayersGetMore),
    ("d2o", "the threshold is not updated", FrozenThreshold),
    ("d2o", "the first tokens are not pinned", NoSinks),
]
