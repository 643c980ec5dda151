"""Plausible but wrong SpQR that its check must reject."""

from dataclasses import replace
from unittest.mock import patch

import torch

from refimpl.quantization import spqr
from refimpl.quantization.sparse import pack_mask
from refimpl.quantization.spqr import SpQR, SpQRLinear


def plain(self):
    return SpQR(*(getattr(self, name) for name in self.__dataclass_fields__))


class Off(SpQR):
    """No outliers."""

    def __call__(self, name, weight, stats):
        return replace(plain(self), threshold=float("inf"))(name, weight, stats)


class FineScales(SpQR):
    """Scales and zero points in 8 bits, said to be 3."""

    def __call__(self, name, weight, stats):
        return replace(plain(self), meta_bits=8)(name, weight, stats)


class Simplified(SpQR):
    """Scales are fitted to all weights, outliers included."""

    def solve(self, W, H):
        with patch.object(spqr, "_without_outliers", lambda w, *_: w):
            return super().solve(W, H)


class Threshold(SpQR):
    """The threshold is not relative to the variance of the weights."""

    def solve(self, W, H):
        factor = float(H.diagonal().mean() * W.var())
        return replace(plain(self), threshold=self.threshold / factor).solve(W, H)


class Afterwards(SpQR):
    """All weights are rounded and their errors fed back; outliers are put back in the end."""

    def __call__(self, name, weight, stats):
        real = plain(self).solve(weight, stats.H)
        layer = Off.__call__(self, name, weight, stats)
        if not bool(real.outliers.any()):
            return layer
        layer_tensors = dict(layer.named_buffers()) | pack_mask(real.outliers, "csr")
        values = weight[real.outliers].half()
        return SpQRLinear(tuple(weight.shape), layer_tensors | {"values": values}, **layer.settings)


class Largest(SpQR):
    """As many weights as SpQR keeps, but the largest: their error is not looked at."""

    def __call__(self, name, weight, stats):
        real = plain(self).solve(weight, stats.H)
        layer = Off.__call__(self, name, weight, stats)
        count = int(real.outliers.sum())
        if not count:
            return layer
        keep = weight.abs() >= weight.abs().flatten().sort().values[-count]
        tensors = dict(layer.named_buffers()) | pack_mask(keep, "csr") | {"values": weight[keep].half()}
        return SpQRLinear(tuple(weight.shape), tensors, **layer.settings)


class Dense(SpQR):
    """Outliers with 32-bit columns."""

    def __call__(self, name, weight, stats):
        layer = super().__call__(name, weight, stats)
        if "columns" in layer._buffers:
            layer.columns = layer.columns.int()
        return layer


class NotPermuted(SpQR):
    """Act-order without the group of each column."""

    def __call__(self, name, weight, stats):
        layer = super().__call__(name, weight, stats)
        if self.act_order:
            layer.groups = (torch.arange(weight.shape[1]) // self.group).to(torch.int16)
        return layer


MUTANTS = [
    ("spqr", "no outliers", Off),
    ("spqr", "scales in more bits than said", FineScales),
    ("spqr", "scales are fitted to outliers too", Simplified),
    ("spqr", "an absolute threshold", Threshold),
    ("spqr", "outliers are put back after the feedback of their errors", Afterwards),
    ("spqr", "outliers are the largest weights", Largest),
    ("spqr", "columns of outliers in 32 bits", Dense),
    ("spqr", "groups of permuted columns without their index", NotPermuted),
]
