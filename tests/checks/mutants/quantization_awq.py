"""Plausible but wrong AWQs that the check must reject."""

import copy
import sys
from unittest.mock import patch

import torch

from refimpl.quantization.awq import awq
from refimpl.quantization.awq_search import clip_groups
from refimpl.quantization.calibrate import calibrate
from refimpl.quantization.grids import Grid, dequantize
from refimpl.quantization.linear import GridLinear, put_module

module = sys.modules["refimpl.quantization.awq"]  # the package may offer the function under that name


def off(model, ids, bits, group, clip=True):
    """Rounding to nearest: nothing is scaled, nothing clipped."""
    return awq(model, ids, bits, group, ratios=(0,), clip=False)


def no_clipping(model, ids, bits, group, clip=True):
    return awq(model, ids, bits, group, clip=False)


def clips_everything(model, ids, bits, group, clip=True):
    """Queries and keys are clipped too."""
    plain = copy.deepcopy(model)
    report = awq(model, ids, bits, group, clip=clip)
    if clip:
        calibration = calibrate(plain, ids)
        for search in report.searches:
            if search.site == "ln1":
                for role in "qk":
                    name = f"model.layers.{search.layer}.self_attn.{role}_proj"
                    W, H = plain.get_submodule(name).weight.detach(), calibration[name].H
                    s, grid = search.scale, Grid(bits, group=group)
                    W = clip_groups(W * s, H / (s[:, None] * s), grid)
                    put_module(model, name, GridLinear.pack(grid.quantize(W), bits))
    return report


def norms_left_as_they_are(model, ids, bits, group, clip=True):
    """Columns are multiplied, but nothing is divided."""

    def half(bb, layer, site, s):
        gains = [p.clone() for p in bb.layer(layer).ln1.parameters()]
        _fold(bb, layer, site, s)
        for p, gain in zip(bb.layer(layer).ln1.parameters(), gains, strict=True):
            p.data.copy_(gain)

    with patch.object(module, "fold", half):
        return awq(model, ids, bits, group, clip=clip)


def linear_outputs(model, ids, bits, group, clip=True):
    """q, k, v and gate, up are judged by their own outputs, not by those of attention and MLP."""

    def own(run, pairs):
        X = torch.cat([x.flatten(0, 1) for x, _ in pairs])
        return lambda W_hat, bound: float(((W_hat - own.W) @ X.T).square().mean())

    def search(W, *rest):
        own.W = W
        return _search(W, *rest)

    with patch.object(module, "_module_loss", own), patch.object(module, "search", search):
        return awq(model, ids, bits, group, clip=clip)


def weights_decide(model, ids, bits, group, clip=True):
    """Channels are salient by the size of their weights."""

    def search(W, absmean, *rest):
        return _search(W, W.abs().mean(0), *rest)

    with patch.object(module, "search", search):
        return awq(model, ids, bits, group, clip=clip)


def largest_input(model, ids, bits, group, clip=True):
    """SmoothQuant's max |x_j| in the place of the mean."""
    stats_of = module.stats_of

    def largest(X):
        stats = stats_of(X)
        stats.absmean = stats.absmax
        return stats

    with patch.object(module, "stats_of", largest):
        return awq(model, ids, bits, group, clip=clip)


def not_undone(model, ids, bits, group, clip=True):
    """Candidates are judged without dividing by s again."""

    def search(W, absmean, grid, ratios, loss):
        best = None
        for ratio in ratios:
            s = absmean.float().pow(ratio).clamp(min=1e-4)
            s = s / (s.max() * s.min()).sqrt()
            found = loss(dequantize(grid.quantize(W * s)), float("inf"))
            if best is None or found < best[3]:
                best = ratio, s, found, found
        return best

    with patch.object(module, "search", search):
        return awq(model, ids, bits, group, clip=clip)


_fold, _search = module.fold, module.search

MUTANTS = [
    ("awq", "off: rounding to nearest", off),
    ("awq", "no clipping", no_clipping),
    ("awq", "queries and keys are clipped too", clips_everything),
    ("awq", "the norms are not divided", norms_left_as_they_are),
    ("awq", "losses of the linear layers, not of the modules", linear_outputs),
    ("awq", "salience by weights", weights_decide),
    ("awq", "the largest input instead of the mean", largest_input),
    ("awq", "Q(W s) is not divided by s in the search", not_undone),
]
