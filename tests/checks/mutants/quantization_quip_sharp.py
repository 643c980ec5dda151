"""Plausible but wrong QuIP# that its check must reject."""

from types import SimpleNamespace

import torch

from refimpl.quantization import quip
from refimpl.quantization.e8p import Codebook, decode, nearest
from refimpl.quantization.hadamard import RandomHadamard, rotate
from refimpl.quantization.quip import QuIP, QuIPSharp, QuIPSharpLinear


class Scalar(QuIPSharp):
    """A uniform grid for each weight and not the lattice."""

    def __call__(self, name, weight, stats):
        layer = QuIP(self.bits, rescale=False)(name, weight, stats)
        draw = lambda n: RandomHadamard.draw(n, torch.Generator().manual_seed(n))
        layer._transforms = tuple(draw(n) for n in weight.shape)
        return layer


class NoFeedback(QuIPSharp):
    def __call__(self, name, weight, stats):
        return super().__call__(name, weight, SimpleNamespace(H=torch.eye(weight.shape[1]).double()))


class SignsOnOneSide(QuIPSharp):
    """The signs of the inputs are drawn and stored, and not applied in the product."""

    def __call__(self, name, weight, stats):
        layer = super().__call__(name, weight, stats)
        return _OneSide(tuple(weight.shape), dict(layer.named_buffers()))


class _OneSide(QuIPSharpLinear):
    def forward(self, x):
        left, right = self.transforms()
        plain = RandomHadamard(torch.ones(self.in_features))
        return left.inverse(torch.nn.functional.linear(plain(x), self.rotated()))


class RotatesWAlone(QuIPSharp):
    def __call__(self, name, weight, stats):
        wrong = lambda W, H, left, right: (rotate(W, H, left, right)[0], H)
        return _with("rotate", wrong, super().__call__, name, weight, stats)


class FirstToLast(QuIPSharp):
    def __call__(self, name, weight, stats):
        forwards = lambda W, H, encode, vdim, damp: quip.feedback_quantize(
            W, H, lambda step: encode(step.w), vdim=vdim, damp=damp
        )
        return _with("ldlq", forwards, super().__call__, name, weight, stats)


class ParityForgotten(QuIPSharp):
    """The table is searched with the signs of the vector; whether they are allowed is not looked at."""

    def __call__(self, name, weight, stats):
        books = {bits: _Careless(*book) for bits, book in quip.CODEBOOKS.items()}
        return _with("CODEBOOKS", books, super().__call__, name, weight, stats)


class _Careless(Codebook):
    def encode(self, x):
        code = nearest(x)
        y = x - 0.25
        careless = nearest(y.sign() * (y.abs() + 0.2) + 0.25)
        better = torch.where((decode(careless) - x).abs().amax(1) < 1, careless, code)
        parts = [better >> 8, better & 255]
        if self.bits == 4:
            second = nearest((x - decode(better)) * self.residual_scale)
            parts += [second >> 8, second & 255]
        codes = torch.stack(parts, 1).to(torch.uint8)
        return self.decode(codes), codes


class ResidualOfTheFirstScale(QuIPSharp):
    """The second code is taken at the scale of the first."""

    def __call__(self, name, weight, stats):
        books = {bits: book._replace(residual_scale=1.0) for bits, book in quip.CODEBOOKS.items()}
        return _with("CODEBOOKS", books, super().__call__, name, weight, stats)


def _with(name, wrong, call, *arguments):
    real = getattr(quip, name)
    setattr(quip, name, wrong)
    try:
        return call(*arguments)
    finally:
        setattr(quip, name, real)


MUTANTS = [
    ("quip_sharp", "a uniform grid, no lattice", Scalar),
    ("quip_sharp", "no feedback: rounding to nearest", NoFeedback),
    ("quip_sharp", "signs on one side only", SignsOnOneSide),
    ("quip_sharp", "W is rotated and H is not", RotatesWAlone),
    ("quip_sharp", "the feedback goes from the first block to the last", FirstToLast),
    ("quip_sharp", "a careless search of the lattice", ParityForgotten),
    ("quip_sharp", "the residual is not scaled up", ResidualOfTheFirstScale),
]
