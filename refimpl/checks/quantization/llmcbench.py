"""The checks of LLMCBench: tracks as root mean squares, and executed FLOPs (spec, section 33)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from refimpl.checks import check, require
from refimpl.checks.tiny import tiny

IMPLEMENTATION = {
    "llmcbench": "refimpl.quantization.evaluation.llmcbench:benchmark",
    "executed_flops": "refimpl.quantization.evaluation.llmcbench:flops_per_token",
}


@dataclass(frozen=True)
class Amount:
    """A value and whether less is better."""

    value: float
    less_is_better: bool = False


@check
def check_llmcbench(benchmark: Callable) -> None:
    """`benchmark(dense, methods)` of track -> task -> (value, less_is_better) -> `.overall`, method ->
    track -> root mean square of ratios, larger is better, 1 for "dense"."""
    dense = {
        "performance": {"facts": Amount(0.8), "context": Amount(0.5), "perplexity": Amount(4.0, True)},
        "inference cost": {"bytes": Amount(400.0, True), "flops": Amount(1e6, True)},
        "speed": {"decode": Amount(50.0)},
    }
    methods = {
        "4 bits": {
            "performance": {"facts": Amount(0.6), "context": Amount(0.6), "perplexity": Amount(5.0, True)},
            "inference cost": {"bytes": Amount(100.0, True), "flops": Amount(1e6, True)},
            "speed": {"decode": Amount(20.0)},
        },
        "broken": {
            "performance": {"facts": Amount(0.0), "context": Amount(0.0), "perplexity": Amount(400.0, True)},
            "inference cost": {"bytes": Amount(50.0, True), "flops": Amount(5e5, True)},
            "speed": {"decode": Amount(100.0)},
        },
    }
    expected = {
        "dense": {"performance": 1.0, "inference cost": 1.0, "speed": 1.0},
        "4 bits": {
            "performance": math.sqrt((0.75**2 + 1.2**2 + 0.8**2) / 3),
            "inference cost": math.sqrt((16 + 1) / 2),
            "speed": 0.4,
        },
        "broken": {
            "performance": 0.01 / math.sqrt(3),
            "inference cost": math.sqrt((64 + 4) / 2),
            "speed": 2.0,
        },
    }
    found = benchmark(dense, methods).overall
    require(set(found) == set(expected), f"methods are {sorted(found)}, not {sorted(expected)}")
    for name, tracks in expected.items():
        for track, value in tracks.items():
            got = found[name][track]
            require(abs(got - value) < 1e-9, f"{name}, {track}: {got:.4f} instead of {value:.4f}")


@check
def check_executed_flops(flops_per_token: Callable) -> None:
    """`flops_per_token(model, context)`: 2 d_in d_out for each linear layer and 4 H D for each token attended
    to, whatever the bits and zeros of the weights."""
    expected = {"llama": 3 * (32 * 96 + 3 * 32 * 40), "gpt2": 3 * (32 * 96 + 32 * 32 + 2 * 32 * 128)}
    for family, weights in expected.items():
        model = tiny(family)
        for context in (1, 20):
            wanted = 2 * (weights + 32 * 48) + 3 * context * 4 * 32
            found = flops_per_token(model, context)
            require(found == wanted, f"{family}, context {context}: {found} FLOPs instead of {wanted}")
    model = tiny("llama")
    before = flops_per_token(model, 1)
    for block in model.model.layers:
        old = block.mlp.down_proj
        block.mlp.down_proj = _InFewBits(old)
        with torch.no_grad():
            block.mlp.up_proj.weight[:, ::2] = 0
    found = flops_per_token(model, 1)
    require(
        found == before,
        f"{found} FLOPs after compressing weights that are still multiplied as before, not {before}",
    )
    thinner = flops_per_token(tiny("llama", intermediate_size=24), 1)
    less = 2 * 3 * 3 * 32 * 16
    require(thinner == before - less, f"a thinner MLP saves {before - thinner} FLOPs instead of {less}")


class _InFewBits(nn.Linear):
    """Stores a byte for two weights, and multiplies floats."""

    def __init__(self, old: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = old.in_features, old.out_features, None
        self.register_buffer("codes", torch.zeros(old.weight.numel() // 2, dtype=torch.uint8))

    @property
    def weight(self) -> torch.Tensor:
        return torch.zeros(self.out_features, self.in_features)

    @property
    def bits_per_weight(self) -> float:
        return 4.0
