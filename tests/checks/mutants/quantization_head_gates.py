"""Plausible but wrong head gates that their check must reject."""

import dataclasses

import torch

from refimpl.gates import HardConcrete
from refimpl.quantization.pruning.head_gates import train_head_gates


class NoNoise(HardConcrete):
    def sample(self, log_a, generator):
        return self.at_test(log_a)


class PlainSigmoid(HardConcrete):
    """The penalty forgets the stretch: sigmoid(log a)."""

    def p_open(self, log_a):
        return torch.sigmoid(log_a)


class TemperatureAtTest(HardConcrete):
    def at_test(self, log_a):
        return super().at_test(log_a / self.temperature)


class NotStretched(HardConcrete):
    """A concrete gate never is 0."""

    def at_test(self, log_a):
        return torch.sigmoid(log_a)


def no_penalty(model, ids, coefficient, **settings):
    return train_head_gates(model, ids, 0.0, **settings)


def mean_penalty(model, ids, coefficient, **settings):
    """The mean over heads where the loss has their sum."""
    report = train_head_gates(model, ids, coefficient, **settings)
    n = report.gates.numel()
    return dataclasses.replace(report, expected_open=[x / n for x in report.expected_open])


def frozen(model, ids, coefficient, **settings):
    return train_head_gates(model, ids, coefficient, **(settings | {"weights_lr": None}))


def ones_at_test(model, ids, coefficient, **settings):
    """Gates are rounded to 0 and 1 and the values in between forgotten."""
    report = train_head_gates(model, ids, coefficient, **settings)
    return dataclasses.replace(report, gates=(report.gates > 0.5).float())


def _with(gate):
    return lambda model, ids, coefficient, **settings: train_head_gates(
        model, ids, coefficient, gate=gate, **settings
    )


MUTANTS = [
    ("head_gates", "no penalty", no_penalty),
    ("head_gates", "gates without noise", _with(NoNoise())),
    ("head_gates", "the penalty is sigmoid(log a), without the stretch", _with(PlainSigmoid())),
    ("head_gates", "the temperature of another paper", _with(HardConcrete(2 / 3))),
    ("head_gates", "the temperature is in the gate at test", _with(TemperatureAtTest())),
    ("head_gates", "the gate at test is not stretched", _with(NotStretched())),
    ("head_gates", "the gates at test are rounded", ones_at_test),
    ("head_gates", "the penalty is a mean over heads", mean_penalty),
    ("head_gates", "the weights never train", frozen),
]
