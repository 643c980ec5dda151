"""Mixed-precision training: 16-bit weights beside a float32 master copy, and what it saves.

Implements "Mixed-precision training" [survey 3, 85] after Micikevicius et al., 1710.03740: weights, gradients
and activations in 16 bits, updates added to a float32 copy of the weights, a loss scale that keeps small
float16 gradients from vanishing. (Autocast is the other common form: float32 weights, each of them cast to
16 bits where a matrix product uses it.)

Survey Eq. 2 gives its saving as M_saved = (M_model + M_gradients) / 2. By the table below that is the saving
of 16-bit weights and gradients *without* master weights, and with optimizer states that do not shrink. With
master weights the static terms of Eq. 1 are as large as before, or larger; what shrinks is the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn

from refimpl.footprint.arch import Arch
from refimpl.footprint.static import measure_static
from refimpl.ledger import Ledger, of_tensors

__all__ = ["MasterWeights", "actual_saving", "bytes_per_parameter", "cast_bytes", "eq2_saving"]

COLUMNS = ("weight", "grad", "master", "moments", "cast")
REGIMES = {
    "float32": (4, 4, 0, 8, 0),
    "autocast": (4, 4, 0, 8, 2),
    "master": (2, 2, 4, 8, 0),
    "master_grad32": (2, 4, 4, 8, 0),
    "bfloat16": (2, 2, 0, 4, 0),
    "bfloat16_moments32": (2, 2, 0, 8, 0),
}


def bytes_per_parameter(regime: str) -> dict[str, int]:
    """Return the bytes that Adam training holds per parameter: weight, grad, master, moments, cast.

    Step counts (4 bytes per tensor) and activations are left out.

    Parameters
    ----------
    regime : "float32"; "autocast" (its casts, kept from forward to backward, exist for the weights of
        matrix products only); "master" (`MasterWeights`, DeepSpeed; during the step 4 more for the gradient
        in float32, which Megatron with float16 gradients keeps: 20); "master_grad32" (Megatron with bfloat16
        weights and float32 gradients); "bfloat16" (everything in 16 bits); "bfloat16_moments32" (Apex's
        FusedAdam without master weights).

    Raises ValueError for another.

    Examples
    --------
    >>> bytes_per_parameter("master")
    {'weight': 2, 'grad': 2, 'master': 4, 'moments': 8, 'cast': 0}
    >>> {regime: sum(bytes_per_parameter(regime).values()) for regime in ("float32", "autocast", "master")}
    {'float32': 16, 'autocast': 18, 'master': 16}
    """
    if regime not in REGIMES:
        raise ValueError(f"regime must be one of {', '.join(REGIMES)}, got {regime!r}")
    return dict(zip(COLUMNS, REGIMES[regime], strict=True))


def eq2_saving(model: float, gradients: float) -> float:
    """Return M_saved = (M_model + M_gradients) / 2 in bytes: survey Eq. 2 as printed.

    Parameters: model and gradients, their bytes in float32. Raises ValueError for negative ones.

    >>> eq2_saving(4, 4)
    4.0
    """
    for name, value in (("model", model), ("gradients", gradients)):
        if not value >= 0:
            raise ValueError(f"{name} must be bytes >= 0, got {value!r}")
    return (model + gradients) / 2


def actual_saving(regime: str) -> dict[str, int]:
    """Return the bytes per parameter that a regime saves against float32, to be held beside Eq. 2.

    "model and gradients" are the two terms that Eq. 2 names, master copy and casts being weights too; "all"
    adds Adam's moments. Parameters and errors as `bytes_per_parameter`.

    >>> actual_saving("master"), eq2_saving(4, 4)
    ({'model and gradients': 0, 'all': 0}, 4.0)
    """
    here, plain = bytes_per_parameter(regime), bytes_per_parameter("float32")
    saved = {column: plain[column] - here[column] for column in COLUMNS}
    return {"model and gradients": sum(saved.values()) - saved["moments"], "all": sum(saved.values())}


def cast_bytes(arch: Arch) -> int:
    """Return the bytes of the 16-bit weight copies that autocast keeps from forward to backward.

    Two per element of every weight of a matrix product: all matrices but the embeddings, of which a tied one
    counts as the output head. Raises TypeError for something that is not an `Arch`.

    >>> gpt2 = Arch.from_config({"model_type": "gpt2"})
    >>> cast_bytes(gpt2) / gpt2.parameters()  # 2, less the positions, the biases and the norms
    1.98541...
    """
    if not isinstance(arch, Arch):
        raise TypeError(f"arch must be an Arch, got {type(arch).__name__}; see Arch.from_config")
    matrices = {name: prod(shape) for name, shape in arch.tensors() if len(shape) == 2}
    embeddings = [name for name in matrices if ".wpe." in name]
    if not arch.tied:
        embeddings += [name for name in matrices if ".wte." in name or ".embed_tokens." in name]
    return 2 * (sum(matrices.values()) - sum(matrices[name] for name in embeddings))


class MasterWeights:
    """Train a model in 16 bits and add the updates to float32 master weights.

    Implements "Mixed-precision training" [survey 3, 85], Micikevicius et al., 1710.03740, §3:

        g16 = d(S · loss) / d w16;   w32 <- optimizer(w32, float32(g16) / S);   w16 <- round(w32)

    Without w32 an update below half the spacing of w16 (bfloat16: 1/512 to 1/256 of the weight) is rounded
    away; without S, float16 gradients below 3e-8 are 0. Per parameter it holds 2 + 2 + 4 bytes and the
    optimizer's states in float32; during `step` 4 more, for the gradient in float32.

    Parameters
    ----------
    model : one with float32 weights and no gradients. Its parameters become `dtype` in place; its buffers
        stay (RoPE frequencies rounded to 16 bits would move the positions).
    make_optimizer : called once with the list of master weights, [one float32 tensor per trainable one].
    dtype : torch.bfloat16, torch.float16, or torch.float32 (then it is the plain optimizer).
    loss_scale : S at the start, >= 1 (a power of two scales without rounding; usual for float16: 65536).
        It doubles after `interval` steps and halves at a step whose gradients overflow, which is left out.
        None is S = 1 without a test for overflow, as usual for bfloat16.
    interval : steps without overflow, default 2000 (smaller for short runs).

    Raises TypeError or ValueError, the model unchanged, where these do not hold.

    Examples
    --------
    >>> model = nn.ParameterList([torch.ones(1)])
    >>> trainer = MasterWeights(model, lambda masters: torch.optim.SGD(masters, lr=1e-3))
    >>> for _ in range(8):  # each update alone would be lost: 1 - 0.001 is 1 in bfloat16
    ...     trainer.backward(model[0].sum())
    ...     taken = trainer.step()
    ...     trainer.zero_grad()
    >>> model[0].dtype, model[0].item(), round(trainer.masters[0].item(), 4)
    (torch.bfloat16, 0.9921875, 0.992)
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        dtype: torch.dtype = torch.bfloat16,
        loss_scale: float | None = None,
        interval: int = 2000,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype must be torch.bfloat16, torch.float16 or torch.float32, got {dtype}")
        if loss_scale is not None and not 1 <= loss_scale < float("inf"):
            raise ValueError(f"loss_scale must be None or a finite number >= 1, got {loss_scale!r}")
        if interval < 1:
            raise ValueError(f"interval must be an integer >= 1, got {interval!r}")
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                raise ValueError(f"model must have float32 weights, {name} is {parameter.dtype}")
            if parameter.grad is not None:
                raise ValueError(f"model must have no gradients yet, {name} has one")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("model has no parameter that requires a gradient")
        self.model, self.loss_scale, self.interval, self.good_steps = model, loss_scale, interval, 0
        self.names, self.weights = list(trained), list(trained.values())
        self.masters = [nn.Parameter(weight.detach().clone()) for weight in self.weights]
        self.optimizer = make_optimizer(self.masters)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of S · loss to those of the 16-bit weights; S is applied in float32."""
        (loss.float() * (self.loss_scale or 1.0)).backward()

    @torch.no_grad()
    def step(self) -> bool:
        """Update masters and weights; or, where a scaled gradient overflowed, only halve the loss scale.

        Returns whether the update was made. Raises RuntimeError where there is no gradient, OverflowError
        where gradients overflow at S = 1, which no scale can mend.
        """
        gradients = [weight.grad for weight in self.weights]
        if all(gradient is None for gradient in gradients):
            raise RuntimeError("step() needs gradients: call backward(loss) first")
        scale = self.loss_scale or 1.0
        if self.loss_scale is not None:
            finite = all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
            self._follow(finite)
            if not finite:
                return False
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.float() / scale
        self.optimizer.step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)
            master.grad = None
        return True

    def _follow(self, finite: bool) -> None:
        """Let the loss scale follow what the gradients bear."""
        if not finite and self.loss_scale == 1:
            raise OverflowError("the gradients are not finite even at loss scale 1")
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.good_steps == self.interval:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0

    def zero_grad(self) -> None:
        """Free the gradients."""
        for weight in self.weights:
            weight.grad = None

    def ledger(self) -> Ledger:
        """Count weights, buffers and gradients as they are now; masters and optimizer states are "optim"."""
        held = []
        for name, master in zip(self.names, self.masters, strict=True):
            states = {"master": master} | self.optimizer.state.get(master, {})
            held += [(f"{name}.{key}", value) for key, value in states.items() if isinstance(value, Tensor)]
        return measure_static(self.model) + of_tensors(held, "optim")
