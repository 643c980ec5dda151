"""The checks of mixed precision and Eq. 2 (footprint spec A4)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close, require_error
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {
    "mixed_precision": "refimpl.footprint.precision:MasterWeights",
    "mixed_precision_saving": "refimpl.footprint.precision:actual_saving",
}


@check
def check_mixed_precision(MasterWeights: Callable) -> None:
    """`MasterWeights(model, make_optimizer, dtype, loss_scale, interval)` with `backward(loss)`, `step()`,
    `zero_grad()`, `loss_scale` (now) and `ledger()`, whose kind "optim" is masters and moments."""

    def one_weight(
        start: float, dtype: torch.dtype, scale: float | None = None, interval: int = 2000
    ) -> tuple:
        model = nn.ParameterList([torch.full((1,), start)])
        return model, MasterWeights(
            model, lambda masters: torch.optim.SGD(masters, lr=1.0), dtype, scale, interval
        )

    def step(model: nn.Module, trainer: object, gradient: float) -> bool:
        trainer.zero_grad()
        trainer.backward(model[0].float().sum() * gradient)
        return trainer.step()

    model, trainer = one_weight(1.0, torch.bfloat16)
    for _ in range(64):
        step(model, trainer, 2.0**-10)
    require(model[0].dtype == torch.bfloat16, f"weights are {model[0].dtype} instead of torch.bfloat16")
    got = model[0].item()
    require(got == 1 - 2.0**-4, f"64 updates of 1/1024 move a weight from 1 to {got}, not to 0.9375")

    model, trainer = one_weight(0.0, torch.float16, 2.0**16)
    for _ in range(64):
        step(model, trainer, 2.0**-26)
    got = model[0].item()
    hint = "is the loss scaled, and the gradient divided by the scale?"
    what = "64 gradients of 2^-26, below float16's smallest number, sum to"
    require(got == -(2.0**-20), f"{what} {got:.3g}, not to -2^-20: {hint}")

    model, trainer = one_weight(1.0, torch.float16, 2.0**16)
    step(model, trainer, 4.0)
    got = model[0].item()
    require(got == 1.0, f"a step whose gradient overflows must leave the weight at 1, it is {got}")
    step(model, trainer, 0.5)
    got = model[0].item()
    what = "after an overflow the scale must fall so that the next step counts, and the weight"
    require(got == 0.5, f"{what} is 0.5, not {got}")
    model, trainer = one_weight(0.0, torch.float16, 2.0, 4)
    for _ in range(4 * 6):
        step(model, trainer, 2.0**-10)
    got = trainer.loss_scale
    require(got == 2 * 2.0**6, f"after 6 intervals of 4 steps a scale of 2 is {got}, not 128")

    plain, losses = tiny("llama"), {}
    ids = random_ids(2, 8)
    for name in ("plain", "mixed"):
        model = tiny("llama")
        trainer = _adamw(model.parameters()) if name == "plain" else MasterWeights(model, _adamw)
        losses[name] = _train(model, trainer, ids, mixed=name == "mixed")
    fall = losses["plain"][0] - losses["plain"][-1]
    what = "the loss falls otherwise than in float32"
    require_close(losses["mixed"], losses["plain"], 0.02 * float(fall), what)

    parameters, tensors = sum(p.numel() for p in plain.parameters()), len(list(plain.parameters()))
    ledger = trainer.ledger()
    right = {"weight": 2 * parameters, "grad": 2 * parameters, "optim": 12 * parameters + 4 * tensors}
    for kind, size in right.items():
        got = ledger.total(kind)
        what = "2 + 2 per parameter, then 4 for the master copy and 8 for two moments"
        require(got == size, f"{kind} holds {got:,} bytes, not {size:,}: {what}")
    rope = model.model.rotary_emb.inv_freq.dtype
    require(rope == torch.float32, f"RoPE's frequencies were rounded to {rope}")
    require_error(ValueError, lambda: MasterWeights(tiny("llama").half(), _adamw), "a model in float16")


@check
def check_mixed_precision_saving(actual_saving: Callable) -> None:
    """`actual_saving(regime)` -> {"model and gradients", "all"}: bytes per parameter that a regime saves."""
    plain = _held(torch.float32)
    regimes = {
        "float32": plain,
        "autocast": _held(torch.float32, autocast=True),
        "master": _held(torch.bfloat16, master=True),
        "bfloat16": _held(torch.bfloat16),
    }
    for regime, (model, moments) in regimes.items():
        expected = {"model and gradients": plain[0] - model, "all": sum(plain) - model - moments}
        got = actual_saving(regime)
        require(got == expected, f"{regime}: measured savings per parameter are {expected}, not {got}")
    require_error(ValueError, lambda: actual_saving("int3"), "an unknown regime")


def _adamw(weights: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=3e-4, weight_decay=0.0)


def _train(model: nn.Module, trainer: object, ids: Tensor, mixed: bool) -> Tensor:
    losses = []
    for _ in range(20):
        trainer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        if mixed:
            trainer.backward(loss)
        else:
            loss.backward()
        trainer.step()
        losses.append(loss.detach().float())
    return torch.stack(losses)


def _held(dtype: torch.dtype, *, autocast: bool = False, master: bool = False) -> tuple[float, float]:
    """Bytes per parameter (weights, copies and gradients; Adam's moments) of one matrix, counted."""
    weight = nn.Parameter(torch.ones(16, 16, dtype=dtype))
    x = torch.ones(1, 16, dtype=dtype, requires_grad=True)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = nn.functional.linear(x, weight)
    casts = [t for t in saved.values() if t.numel() == 256 and t.data_ptr() != weight.data_ptr()]
    y.sum().backward()
    trained = weight.detach().float().clone() if master else weight
    trained.grad = weight.grad.float() if master else weight.grad
    optimizer = torch.optim.AdamW([trained])
    optimizer.step()
    model = [weight, weight.grad, *casts] + ([trained] if master else [])
    moments = [optimizer.state[trained][name] for name in ("exp_avg", "exp_avg_sq")]
    return tuple(sum(t.nbytes for t in tensors) / 256 for tensors in (model, moments))
