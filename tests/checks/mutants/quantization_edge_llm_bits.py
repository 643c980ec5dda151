"""Plausible but wrong bit widths and policies of EDGE-LLM that their checks must reject."""

from dataclasses import replace

import torch

from refimpl.backbone import Backbone
from refimpl.quantization.edge_llm import Policy, bit_widths, make_policy, pruning_ratios, sensitivities


def mean_bits(sensitivity, low, high, n_low=None):
    """Switched off: every block has the mean bits."""
    found = bit_widths(sensitivity, low, high, n_low)
    return (round(sum(found) / len(found)),) * len(found)


def upside_down(sensitivity, low, high, n_low=None):
    """The most sensitive blocks get the few bits."""
    return bit_widths(-sensitivity, low, high, n_low)


def by_the_median(sensitivity, low, high, n_low=None):
    """Half of the blocks get many bits, however few are sensitive."""
    if n_low is not None:
        return bit_widths(sensitivity, low, high, n_low)
    return tuple(high if s > sensitivity.median() else low for s in sensitivity)


def constants(sensitivity, low, high, n_low=None):
    """The authors' script: the blocks with few bits are chosen by hand, here the last ones."""
    if n_low is None:
        return bit_widths(sensitivity, low, high)
    return (high,) * (len(sensitivity) - n_low) + (low,) * n_low


def order_of_files(sensitivity, low, high, n_low=None):
    """The authors' code: sensitivities are read in the order of file names, 10 before 2."""
    order = sorted(range(len(sensitivity)), key=str)
    return bit_widths(sensitivity[order], low, high, n_low)


def threshold(sensitivity, low, high, n_low=None):
    """All that are not above the n-th least: ties miss the number."""
    if not n_low:
        return bit_widths(sensitivity, low, high, n_low)
    last = sensitivity.sort().values[n_low - 1]
    return tuple(low if s <= last else high for s in sensitivity)


def uniform(model, ids, *, sparsity, low, high, n_low=None):
    """Switched off: the target and the mean bits for every block."""
    return Policy.uniform(Backbone(model).n_layers, sparsity, (low + high) // 2)


def sensitive_first(model, ids, *, sparsity, low, high, n_low=None):
    """Ranked the wrong way round: few bits where rounding hurts."""
    found = sensitivities(model, ids, bits=low)
    return Policy(pruning_ratios(found.pruning, sparsity), bit_widths(-found.rounding, low, high, n_low))


def one_measure(model, ids, *, sparsity, low, high, n_low=None):
    """Bits by what pruning does."""
    found = sensitivities(model, ids, bits=low)
    return Policy(pruning_ratios(found.pruning, sparsity), bit_widths(found.pruning, low, high, n_low))


def ratios_by_rounding(model, ids, *, sparsity, low, high, n_low=None):
    found = sensitivities(model, ids, bits=low)
    return Policy(pruning_ratios(found.rounding, sparsity), bit_widths(found.rounding, low, high, n_low))


def without_inputs(model, ids, *, sparsity, low, high, n_low=None):
    """The error of the weights instead of the outputs': nothing is calibrated."""
    bb = Backbone(model)
    errors = torch.zeros(bb.n_layers)
    for ref in bb.linears():
        step = ref.weight.detach().abs().amax(1, keepdim=True) / (2 ** (low - 1) - 1)
        errors[ref.layer] += ((ref.weight / step).round() * step - ref.weight).detach().square().mean()
    policy = make_policy(model, ids, sparsity=sparsity, low=low, high=high, n_low=n_low)
    return replace(policy, bits=bit_widths(errors, low, high, n_low))


MUTANTS = [
    ("edge_llm_bits", "off: every block has the mean bits", mean_bits),
    ("edge_llm_bits", "sensitive blocks get few bits", upside_down),
    ("edge_llm_bits", "the median instead of the mean", by_the_median),
    ("edge_llm_bits", "constants instead of sensitivities", constants),
    ("edge_llm_bits", "sensitivities in the order of file names", order_of_files),
    ("edge_llm_bits", "ties miss the number of blocks", threshold),
    ("edge_llm_policy", "off: all blocks alike", uniform),
    ("edge_llm_policy", "few bits where rounding hurts most", sensitive_first),
    ("edge_llm_policy", "bits by the sensitivity to pruning", one_measure),
    ("edge_llm_policy", "sparsities by the sensitivity to rounding", ratios_by_rounding),
    ("edge_llm_policy", "the weights' error instead of the outputs'", without_inputs),
]
