"""Plausible but wrong hybrid pipelines that their check must reject."""

from dataclasses import dataclass

import torch
from torch import nn

from refimpl.quantization.hybrid import Hybrid, hybrid
from refimpl.quantization.pruning.sparsegpt import SparseGPT
from refimpl.quantization.pruning.unstructured import Magnitude
from refimpl.quantization.sparse import SparseLinear


@dataclass(frozen=True)
class NothingFedBack(Hybrid):
    """SparseGPT, then rounding of the kept weights to nearest."""

    def solve(self, W, H):
        pruned = SparseGPT(self.sparsity, torch.float32).solve(W, H)
        return self.grid.quantize(pruned.Q.float()), pruned.keep


@dataclass(frozen=True)
class MaskOfMagnitude(Hybrid):
    def solve(self, W, H):
        q, _ = super().solve(W, H)
        return q, Magnitude(self.sparsity).mask(W)


def with_recipe(recipe):
    def mutant(teacher, ids, batches, **training):
        return hybrid(teacher, ids, batches, recipe=recipe, **training)

    return mutant


def without_repair(teacher, ids, batches, *, lr, **training):
    return hybrid(teacher, ids, batches, lr=1e-12, **training)


def values_train(teacher, ids, batches, *, train_what, **training):
    """The kept weights move freely: no longer integers."""
    model, report = hybrid(teacher, ids, batches, train_what=train_what, **training)
    if training["lr"] > 1e-6:
        for module in list(model.modules()):
            if isinstance(module, SparseLinear):
                W = module.weight * (1 + 0.1 * torch.sin(torch.arange(module.in_features)))
                module.dequantize = lambda W=W: W
    return model, report


def zeros_grow_back(teacher, ids, batches, **training):
    """Low-rank factors are merged into the matrix, and with them the zeros go."""
    model, report = hybrid(teacher, ids, batches, **training)
    for module in list(model.modules()):
        if isinstance(module, SparseLinear):
            W = module.weight + 1e-3
            module.dequantize = lambda W=W: W
    return model, report


def embedding_trains(teacher, ids, batches, **training):
    model, report = hybrid(teacher, ids, batches, **training)
    model.get_input_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight + 1e-4)
    return model, report


def float_bytes(teacher, ids, batches, **training):
    """Zeros that are stored like other numbers: fake compression."""
    model, report = hybrid(teacher, ids, batches, **training)
    for module in list(model.modules()):
        if isinstance(module, SparseLinear):
            module.register_buffer("dense", module.weight.clone())
    return model, report


MUTANTS = [
    ("hybrid_pipeline", "rounded to nearest after pruning", with_recipe(NothingFedBack())),
    ("hybrid_pipeline", "the mask is that of magnitude", with_recipe(MaskOfMagnitude())),
    ("hybrid_pipeline", "quantized first, then pruned", with_recipe(Hybrid(order="quantize-prune"))),
    ("hybrid_pipeline", "never repaired", without_repair),
    ("hybrid_pipeline", "kept weights leave the grid", values_train),
    ("hybrid_pipeline", "pruned weights grow back", zeros_grow_back),
    ("hybrid_pipeline", "the embedding trains as well", embedding_trains),
    ("hybrid_pipeline", "a dense copy is stored", float_bytes),
]
