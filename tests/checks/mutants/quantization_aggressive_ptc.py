"""Plausible but wrong aggressive compression that its check must reject."""

from refimpl.backbone import Backbone
from refimpl.quantization import RTN, calibrate, compress_model
from refimpl.quantization.grids import Grid
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.pruning.aggressive import allocate, obs_errors
from refimpl.quantization.pruning.sparsegpt import SparseGPT
from refimpl.quantization.pruning.unstructured import Magnitude


def _by(score):
    """The whole method with another error of the weights."""

    def aggressive_ptc(model, ids, *, sparsity=0.7, bits=4, group="row", spread=0.15):
        stats = calibrate(model, ids)
        errors = {
            name: score(dense_weight(model.get_submodule(name)), of_one) for name, of_one in stats.items()
        }
        return _prune(model, ids, allocate(errors.items(), sparsity, spread).sparsities, bits, group)

    return aggressive_ptc


def _prune(model, ids, sparsities, bits, group):
    grid = None if bits is None else Grid(bits, group=group)
    return compress_model(model, lambda name, W, s: SparseGPT(sparsities[name], grid=grid)(name, W, s), ids)


def uniform(model, ids, *, sparsity=0.7, bits=4, group="row", spread=0.15):
    """The same sparsity everywhere."""
    names = {ref.name for ref in Backbone(model).linears()}
    return _prune(model, ids, dict.fromkeys(names, sparsity), bits, group)


def without_bounds(model, ids, *, sparsity=0.7, bits=4, group="row", spread=0.15):
    stats = calibrate(model, ids)
    errors = [(name, obs_errors(dense_weight(model.get_submodule(name)), s.H)) for name, s in stats.items()]
    found = allocate(errors, sparsity, min(sparsity, 0.99 - sparsity))
    return _prune(model, ids, found.sparsities, bits, group)


def prune_then_round(model, ids, *, sparsity=0.7, bits=4, group="row", spread=0.15):
    """SparseGPT, and then what is left is rounded to the nearest."""
    stats = calibrate(model, ids)
    errors = [(name, obs_errors(dense_weight(model.get_submodule(name)), s.H)) for name, s in stats.items()]
    sparsities = allocate(errors, sparsity, spread).sparsities

    def recipe(name, weight, stats):
        pruned = SparseGPT(sparsities[name])(name, weight, stats)
        if bits is None:
            return pruned
        grid = Grid(bits, group=group)
        scale, zero = grid.fit(weight)
        rounded = grid.encode(pruned.weight, scale, zero)
        return type(pruned).pack_codes(type(grid.quantize(weight))(rounded, scale, zero), pruned.keep, bits)

    return compress_model(model, recipe, ids)


def magnitude_and_rounding(model, ids, *, sparsity=0.7, bits=4, group="row", spread=0.15):
    """Switched off: no Hessian at all."""
    return compress_model(model, Magnitude(sparsity) if bits is None else RTN(bits, group=group), ids)


MUTANTS = [
    ("aggressive_ptc", "magnitude and rounding to nearest", magnitude_and_rounding),
    ("aggressive_ptc", "the same sparsity everywhere", uniform),
    ("aggressive_ptc", "no bounds around the mean", without_bounds),
    ("aggressive_ptc", "the threshold is on |w|", _by(lambda W, s: W.double().square())),
    (
        "aggressive_ptc",
        "the threshold is on w^2 H_jj",
        _by(lambda W, s: W.double().square() * s.H.diagonal()),
    ),
    ("aggressive_ptc", "rounded after the pruning", prune_then_round),
]
