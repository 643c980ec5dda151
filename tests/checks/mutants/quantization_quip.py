"""Plausible but wrong QuIP that its check must reject."""

import torch

from refimpl.quantization import quip
from refimpl.quantization.hadamard import rotate
from refimpl.quantization.quip import QuIP, QuIPLinear


class Identity:
    def __call__(self, x):
        return x

    inverse = __call__


class Off(QuIP):
    """LDLQ alone: no transform."""

    def __call__(self, name, weight, stats):
        layer = _with(
            lambda W, H, left, right: (W.double(), H.double()), super().__call__, name, weight, stats
        )
        layer._transforms = Identity(), Identity()
        return layer


class RotatesWAlone(QuIP):
    def __call__(self, name, weight, stats):
        wrong = lambda W, H, left, right: (rotate(W, H, left, right)[0], H)
        return _with(wrong, super().__call__, name, weight, stats)


class NoFeedback(QuIP):
    """Incoherent, but rounded to nearest."""

    def __call__(self, name, weight, stats):
        stats.H, H = torch.eye(weight.shape[1]).double(), stats.H
        try:
            return super().__call__(name, weight, stats)
        finally:
            stats.H = H


class FirstToLast(QuIP):
    """The feedback goes in GPTQ's order."""

    def __call__(self, name, weight, stats):
        real, quip.ldlq = quip.ldlq, lambda W, H, encode, damp: _forwards(W, H, encode, damp)
        try:
            return super().__call__(name, weight, stats)
        finally:
            quip.ldlq = real


class InputsNotRescaled(QuIP):
    """The weight is rescaled and the inputs are not."""

    def __call__(self, name, weight, stats):
        layer = super().__call__(name, weight, stats)
        return _Forgets(layer) if self.rescale else layer


class _Forgets(QuIPLinear):
    def __init__(self, layer):
        super().__init__(
            (layer.out_features, layer.in_features), dict(layer.named_buffers()), **layer.settings
        )

    def forward(self, x):
        return super().forward(x * self.rescale)


def _forwards(W, H, encode, damp):
    return quip.feedback_quantize(W, H, lambda step: encode(step.w), damp=damp)


def _with(wrong, call, *arguments):
    real, quip.rotate = quip.rotate, wrong
    try:
        return call(*arguments)
    finally:
        quip.rotate = real


MUTANTS = [
    ("quip", "no transform: LDLQ alone", Off),
    ("quip", "W is rotated and H is not", RotatesWAlone),
    ("quip", "no feedback: rounding to nearest", NoFeedback),
    ("quip", "the feedback goes from the first column to the last", FirstToLast),
    ("quip", "the inputs are not rescaled", InputsNotRescaled),
]
