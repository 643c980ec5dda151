"""Plausible but wrong gradient checkpointing that the checks must reject."""

import warnings

import torch
import torch.utils.checkpoint


def switched_off(function, *inputs):
    return function(*inputs)


def random_numbers_drawn_anew(function, *inputs):
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def random_state_left_behind(function, *inputs):
    state, runs = torch.get_rng_state(), []

    def again(*inputs):
        if runs:
            torch.set_rng_state(state)
        runs.append(1)
        return function(*inputs)

    return random_numbers_drawn_anew(again, *inputs)


def nothing_learns_above_a_frozen_input(function, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=True)


class _HalfPrecision(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.save_for_backward(*(x.bfloat16() for x in inputs))
        return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        inputs = [x.float().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            ctx.function(*inputs).backward(gradient)
        return None, *(x.grad for x in inputs)


def boundary_kept_in_half_precision(function, *inputs):
    return _HalfPrecision.apply(function, *inputs)


def square_root_whatever_a_layer_saves(layers, boundary, layer):
    return round(layers**0.5)


def always_every_layer(layers, boundary, layer):
    return 1


def boundaries_thought_free(layers, boundary, layer):
    return min(range(1, layers + 1), key=lambda every: every * layer)


def blocks_and_layers_per_block_confused(layers, boundary, layer):
    return max(1, min(layers, round((layers * layer / boundary) ** 0.5)))


MUTANTS = [
    ("gradient_checkpointing", "nothing is checkpointed", switched_off),
    ("gradient_checkpointing", "the random state is not restored: other dropout", random_numbers_drawn_anew),
    ("gradient_checkpointing", "backward rewinds the random stream", random_state_left_behind),
    ("gradient_checkpointing", "a frozen input cuts off the weights", nothing_learns_above_a_frozen_input),
    ("gradient_checkpointing", "the boundary is rounded to bfloat16", boundary_kept_in_half_precision),
    ("checkpoint_blocks", "sqrt(L), as if a layer saved only its input", square_root_whatever_a_layer_saves),
    ("checkpoint_blocks", "a checkpoint at every layer", always_every_layer),
    ("checkpoint_blocks", "the boundaries cost nothing", boundaries_thought_free),
    (
        "checkpoint_blocks",
        "number of blocks returned for layers per block",
        blocks_and_layers_per_block_confused,
    ),
]
