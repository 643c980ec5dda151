"""Plausible but wrong MixLLM that its check must reject."""

import copy
from dataclasses import replace

import torch

from refimpl.quantization import compress_model
from refimpl.quantization.grids import Grid
from refimpl.quantization.linear import GridLinear, dense_weight
from refimpl.quantization.mixllm import MixLLM, MixReport
from refimpl.quantization.mixllm_rows import row_salience, top_rows
from refimpl.quantization.pruning.head_gates import next_token_loss


def _build(salience=row_salience, select=top_rows, recipe=None, **changes):
    def mutant(model, ids, share, *, low, high, group, sequential):
        scores = salience(model, ids, Grid(low, group=group))
        rows = select(scores, share)
        real = replace(MixLLM(rows, low, high, group), **changes)
        report = compress_model(model, recipe(real) if recipe else real, ids, sequential=sequential)
        return MixReport(scores, rows, report)

    return mutant


def _summed(model, ids, grid, diagonal=False):
    total = {}
    for sequence in ids.split(1):
        probe = copy.deepcopy(model)
        next_token_loss(probe, sequence).backward()
        for name in row_salience(model, ids[:1, :2], grid):
            W = probe.get_submodule(name).weight
            delta = GridLinear.pack(grid.quantize(W.detach()), grid.bits).weight - W.detach()
            a = (W.grad * delta).double()
            score = (a + a.square() / 2).abs().sum(1) if diagonal else a.sum(1) + a.sum(1).square() / 2
            total[name] = total.get(name, 0) + score
    return {name: scores.abs() for name, scores in total.items()}


def _diagonal(model, ids, grid):
    return _summed(model, ids, grid, diagonal=True)


def _row_norms(model, ids, grid):
    return {
        name: dense_weight(model.get_submodule(name)).norm(dim=1).double()
        for name in row_salience(model, ids[:1], grid)
    }


def _inside_each_layer(scores, share):
    return {name: top_rows({name: s}, share)[name] for name, s in scores.items()}


def _none(scores, share):
    return top_rows(scores, 0.0)


def _rounding(real):
    def recipe(name, weight, stats):
        return real(name, weight, replace(stats, H=torch.eye(weight.shape[1], dtype=torch.float64)))

    return recipe


MUTANTS = [
    ("mixllm", "all rows get the low bits", _build(select=_none)),
    ("mixllm", "the absolute value is taken after summing over sequences", _build(salience=_summed)),
    ("mixllm", "only the diagonal of the Fisher matrix", _build(salience=_diagonal)),
    ("mixllm", "salience is the norm of a row", _build(salience=_row_norms)),
    ("mixllm", "rows are ranked inside each layer", _build(select=_inside_each_layer)),
    ("mixllm", "rounding to nearest in the place of GPTQ", _build(recipe=_rounding)),
    ("mixllm", "ranges are not clipped", _build(clip=False)),
    ("mixllm", "inputs are not rounded", _build(a8=False)),
]
