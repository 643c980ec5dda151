"""Plausible but wrong Bonsai that its check must reject."""

from unittest import mock

import torch

from refimpl.quantization.pruning import bonsai as module
from refimpl.quantization.pruning.bonsai import bonsai

PATH = "refimpl.quantization.pruning.bonsai."


def off(model, ids, *, regression, **settings):
    """By the prior alone."""
    return bonsai(model, ids, regression=None, **settings)


def _with(name, replacement):
    def run(*args, **settings):
        with mock.patch(PATH + name, replacement):
            return bonsai(*args, **settings)

    return run


def perplexity_not_negated(*args, utility=module._utility):
    return -utility(*args)


def no_complements(found, generator, sampling, sample=module.sample_pair):
    return sample(found, generator, sampling)[0], sample(found, generator, sampling)[0]


def magnitudes(bb, ids, keep, batch):
    """Mean |W| of the columns, without the inputs."""
    scores = [torch.stack([getattr(bb.layer(l), role).weight.abs().mean(0) for l in range(bb.n_layers)])
              for role in ("o", "down")]  # fmt: skip
    return scores[0].unflatten(-1, (bb.H, bb.D)).mean(-1), scores[1]


def everything(rho, keep, p, block, head_dim, candidates=module.candidates):
    """All units are candidates."""
    return candidates(rho, keep, 0.5, block, head_dim)


def zeroed(model, heads, neurons):
    """Masks, not matrices that are smaller."""
    for l, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight.mul_(heads[l].repeat_interleave(8))
        layer.mlp.down_proj.weight.mul_(neurons[l])


def with_gradients(*args, **settings):
    return bonsai.__wrapped__(*args, **settings)


MUTANTS = [
    ("bonsai", "no regression: the prior decides", off),
    ("bonsai", "perplexity is a utility", _with("_utility", perplexity_not_negated)),
    ("bonsai", "two draws instead of a draw and its complement", _with("sample_pair", no_complements)),
    ("bonsai", "the prior forgets the activations", _with("priors", magnitudes)),
    ("bonsai", "nothing is fixed by the prior", _with("candidates", everything)),
    ("bonsai", "weights are zeroed, nothing is cut", _with("slice_model", zeroed)),
    ("bonsai", "the sub-models are run with gradients", with_gradients),
]
