"""The check of head gates (quantization spec, section 23; P19-1580)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import HEADS, LAYERS, random_ids, tiny

IMPLEMENTATION = {"head_gates": "refimpl.quantization.pruning.head_gates:train_head_gates"}
TEMPERATURE, LOW, HIGH = 0.33, -0.1, 1.1
N = LAYERS * HEADS


@check
def check_head_gates(train_head_gates: Callable) -> None:
    """`train_head_gates(model, ids, coefficient, generator=, steps=, gates_lr=, weights_lr=, initial=)` ->
    log_a [L, H], gates [L, H], losses and expected_open per step; weights_lr None: only gates are trained."""
    ids = random_ids(1, 6)  # one row, so that every step sees the same text

    def train(coefficient: float, **settings: object) -> object:
        given = {
            "generator": torch.Generator().manual_seed(0),
            "steps": 14,
            "gates_lr": 0.3,
            "weights_lr": None,
        }
        return train_head_gates(tiny("llama"), ids, coefficient, **(given | settings))

    open_, shut = (train(0.0, initial=at, steps=2) for at in (20.0, -20.0))
    for what, report, gate in (("open", open_, 1.0), ("closed", shut, 0.0)):
        expected = torch.full((2,), _loss(tiny("llama"), ids, gate))
        require_close(torch.tensor(report.losses), expected, 1e-4, f"all gates {what}: losses")
    noisy = train(0.0, initial=0.0, gates_lr=1e-9, steps=6)
    spread = float(torch.tensor(noisy.losses).std())
    require(spread > 1e-3, f"half-open gates: losses of the same text vary by {spread:.2g}: nothing is drawn")
    for initial in (-3.0, 0.0, 1.0):
        found = train(0.0, initial=initial, steps=1).expected_open[0]
        should = N * _p_open(initial)
        right = math.isclose(found, should, rel_tol=1e-4)
        require(right, f"log a = {initial}: {found:.4f} gates expected open, not {should:.4f}")
    # A penalty that dwarfs the loss pushes every log a down by Adam's whole step.
    strong = train(1e4, initial=1.0)
    found, should = strong.expected_open[1], N * _p_open(1.0 - 0.3)
    require(
        math.isclose(found, should, rel_tol=1e-3),
        f"one step of the penalty: {found:.4f} gates, not {should:.4f}",
    )
    require(not strong.gates.any(), f"a penalty of 10 000 left {int((strong.gates > 0).sum())} gates open")
    moved = float(train(0.0, initial=0.0, steps=3).log_a.abs().max())
    require(
        moved > 0.1, f"without penalty three steps moved log a by {moved:.2g}: the loss does not reach it"
    )
    between = train(1e4, initial=1.5, steps=4)  # log a is near 0.3
    at_test = (torch.sigmoid(between.log_a) * (HIGH - LOW) + LOW).clamp(0, 1)
    require_close(between.gates, at_test, 1e-5, "gates at test")
    for rate in (None, 1e-3):
        model = tiny("llama")
        train_head_gates(model, ids, 0.1, generator=torch.Generator(), steps=2, weights_lr=rate)
        changed = any(
            not torch.equal(a, b) for a, b in zip(model.parameters(), tiny("llama").parameters(), strict=True)
        )
        require(
            changed == (rate is not None),
            f"weights_lr={rate}: the weights {'changed' if changed else 'stayed'}",
        )


def _loss(model: nn.Module, ids: Tensor, gate: float) -> float:
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(gate)
        return float(model(ids, labels=ids).loss)


def _p_open(log_a: float) -> float:
    return 1 / (1 + math.exp(-(log_a - TEMPERATURE * math.log(-LOW / HIGH))))
