"""Plausible but wrong ASER that its check must reject."""

import torch

from refimpl.quantization.aser import ASER, AserLinear, smoothing
from refimpl.quantization.repair import input_metric, low_rank
from refimpl.quantization.rtn import RTN


class Off(ASER):
    """Round to nearest behind rounded activations."""

    def __call__(self, name, weight, stats):
        return ASER(rank=0, outliers=0, activation_bits=self.activation_bits)(name, weight, stats)


class NoSmoothing(ASER):
    def __call__(self, name, weight, stats):
        return ASER(rank=self.rank, outliers=0, activation_bits=self.activation_bits)(name, weight, stats)


class ActivationsAsTheyAre(ASER):
    def __call__(self, name, weight, stats):
        return ASER(rank=self.rank, outliers=self.outliers, activation_bits=None)(name, weight, stats)


class PlainSVD(ASER):
    """The residual is not whitened."""

    def __call__(self, name, weight, stats):
        return _by_hand(self, name, weight, stats, metric=lambda H: None)


class InverseOnTheWrongSide(ASER):
    """V' S'^-1 in the place of V' S^-1."""

    def __call__(self, name, weight, stats):
        return _by_hand(self, name, weight, stats, transposed=True)


class OutliersQuantized(ASER):
    """The outlier columns are not taken out of what is rounded."""

    def __call__(self, name, weight, stats):
        return _by_hand(self, name, weight, stats, split=False)


class ResidualWithoutOutliers(ASER):
    """E = W_s - Q(W_s): the columns that were taken out are forgotten."""

    def __call__(self, name, weight, stats):
        return _by_hand(self, name, weight, stats, forget=True)


class MetricOfRawInputs(ASER):
    """Whitened with the inputs as they were before smoothing."""

    def __call__(self, name, weight, stats):
        raw = stats.H
        return _by_hand(self, name, weight, stats, metric=lambda H: input_metric(raw, "whitened"))


def _by_hand(self, name, weight, stats, metric=None, transposed=False, split=True, forget=False):
    channels, factors = smoothing(weight, stats.absmean, self.outliers)
    m = torch.ones(weight.shape[1])
    m[channels.long()] = factors.float()
    W, H = weight * m, stats.H / torch.outer(m, m)
    W_s = W.index_fill(1, channels.long(), 0)
    base = RTN(4, "restricted")(name, W_s if split else W)
    E = (W_s if forget else W) - base.weight
    S = metric(H) if metric else input_metric(H, "whitened")
    L, R, _ = low_rank(E, self.rank, S)
    if transposed:
        U, sigma, Vt = torch.linalg.svd(E.double() @ S, full_matrices=False)
        r = L.shape[1]
        L, R = U[:, :r] * sigma[:r], torch.linalg.solve(S, Vt[:r].T).T
    extra = {"channels": channels, "factors_m": factors} if self.outliers else {}
    return AserLinear.repair(base, L, R, tensors=extra, activation_bits=self.activation_bits)


MUTANTS = [
    ("aser", "nothing is smoothed or repaired", Off),
    ("aser", "outliers stay in the activations and in the weight", NoSmoothing),
    ("aser", "activations are not rounded", ActivationsAsTheyAre),
    ("aser", "plain SVD of the residual", PlainSVD),
    ("aser", "the inverse of S on the wrong side", InverseOnTheWrongSide),
    ("aser", "outlier columns are quantized with the others", OutliersQuantized),
    ("aser", "the residual does not hold the outlier columns", ResidualWithoutOutliers),
    ("aser", "whitened with inputs that are not smoothed", MetricOfRawInputs),
]
