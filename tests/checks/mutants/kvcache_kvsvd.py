"""Plausible but wrong truncated SVDs and MiniCaches that their checks must reject."""

import torch

from refimpl.kvcache import minicache
from refimpl.kvcache.kvsvd import KVSVD
from refimpl.kvcache.minicache import MiniCache


class Dense(KVSVD):
    def commit(self, ok):
        pass


class FirstChannels(KVSVD):
    """The first r channels instead of the leading singular vectors."""

    def commit(self, ok):
        had = dict(self.factors)
        super().commit(ok)
        for name, (a, b) in self.factors.items():
            if name not in had:
                whole = a @ b.transpose(-1, -2)
                axes = torch.eye(b.shape[-2])[:, : b.shape[-1]].expand_as(b).contiguous()
                self.factors[name] = whole @ axes, axes


class RootsOnBothSides(KVSVD):
    """sqrt(S) in A and in B, while projections still assume an orthonormal B."""

    def commit(self, ok):
        had = dict(self.factors)
        super().commit(ok)
        for name, (a, b) in self.factors.items():
            if name not in had:
                root = a.norm(dim=-2, keepdim=True).sqrt()
                self.factors[name] = a / root, b * root


class ResidualAtOnce(KVSVD):
    """New tokens are projected as they come."""

    def __init__(self, rank, *, residual=32, **options):
        super().__init__(rank, residual=1, **options)


class Unmerged(MiniCache):
    def join(self, codecs):
        pass


class RawAverage(MiniCache):
    """The mean of the two entries instead of a direction with two norms."""

    def commit(self, ok):
        if self.lower is not None:
            for name in "kv":
                mean = (getattr(self.lower, name) + getattr(self, name)) / 2
                setattr(self.lower, name, mean)
                setattr(self, name, mean)
        super().commit(ok)


class Lerp(MiniCache):
    """A straight line between the directions."""

    def commit(self, ok):
        arc = minicache.slerp
        minicache.slerp = lambda a, b, t: torch.nn.functional.normalize((1 - t) * a + t * b, dim=-1)
        try:
            super().commit(ok)
        finally:
            minicache.slerp = arc


class OtherEnd(MiniCache):
    """t weighs the lower layer."""

    def __init__(self, t=0.6, **options):
        super().__init__(t, **options)
        self.t = 1 - t


class CountedTwice(MiniCache):
    """Both layers report what they share."""

    def compressed(self):
        lower, self.lower = self.lower, None
        named = super().compressed()
        self.lower = lower
        return named


MUTANTS = [
    ("kvsvd", "nothing is factored", Dense),
    ("kvsvd", "the first channels instead of singular vectors", FirstChannels),
    ("kvsvd", "the singular values are split between the factors", RootsOnBothSides),
    ("kvsvd", "no dense residual", ResidualAtOnce),
    ("minicache", "nothing is shared", Unmerged),
    ("minicache", "raw entries are averaged", RawAverage),
    ("minicache", "directions are interpolated on a line", Lerp),
    ("minicache", "t weighs the lower layer", OtherEnd),
    ("minicache", "the shared storage is counted in both layers", CountedTwice),
]
