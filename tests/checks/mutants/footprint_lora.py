"""Plausible but wrong LoRA layers that `check_lora` must reject."""

import torch
import torch.nn.functional as F
from torch import nn

from refimpl.lora import is_target


def _variant(output, *, freeze=True, scale=lambda alpha, rank: alpha / rank, b_std=0.0, a_std=0.2, seed=None):
    """An `add_lora` whose hook computes `output(x, A, B, layer)` times the scale."""

    def add_lora(model, targets, rank, alpha, generator):
        layers = [m for name, m in model.named_modules() if is_target(name, targets)]
        if freeze:
            model.requires_grad_(False)
        for layer in layers:
            n_out, n_in = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
            A = torch.randn(rank, n_in, generator=None if seed == "global" else generator) * a_std
            B = torch.randn(n_out, rank, generator=generator) * b_std
            layer.A, layer.B, layer.scale = nn.Parameter(A), nn.Parameter(B), scale(alpha, rank)
            layer.register_forward_hook(lambda m, x, y: y + m.scale * output(x[0], m.A, m.B, m))

    return add_lora


def thin(x, A, B, layer):
    return F.linear(F.linear(x, A), B)


def full_matrix(x, A, B, layer):
    return F.linear(x, B @ A)


def transposed_where_it_fits(x, A, B, layer):
    if isinstance(layer, nn.Linear) or len(B) != A.shape[1]:
        return thin(x, A, B, layer)
    return F.linear(F.linear(x, B.T), A.T)


def third_of_a_fused_projection(x, A, B, layer):
    y = thin(x, A, B, layer)
    if len(B) == 3 * A.shape[1]:
        y = torch.cat([y[..., : A.shape[1]], torch.zeros_like(y[..., A.shape[1] :])], dim=-1)
    return y


MUTANTS = [
    ("lora", "the update is never added", _variant(lambda x, A, B, layer: 0 * thin(x, A, B, layer))),
    ("lora", "the model itself stays trainable", _variant(thin, freeze=False)),
    ("lora", "the update is scaled by alpha, not alpha / r", _variant(thin, scale=lambda alpha, rank: alpha)),
    ("lora", "the update is not scaled", _variant(thin, scale=lambda alpha, rank: 1.0)),
    ("lora", "B starts random", _variant(thin, b_std=0.1)),
    ("lora", "A starts at zero, too", _variant(thin, a_std=0.0)),
    ("lora", "B A is made as a full matrix", _variant(full_matrix)),
    ("lora", "the square Conv1D is taken for an nn.Linear", _variant(transposed_where_it_fits)),
    ("lora", "of the fused q, k, v only q is adapted", _variant(third_of_a_fused_projection)),
    ("lora", "A is drawn from the global generator", _variant(thin, seed="global")),
]
