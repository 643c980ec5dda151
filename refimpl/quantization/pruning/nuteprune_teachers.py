"""The teachers of NutePrune (arXiv 2402.09773): which earlier self teaches, what it says, and the loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.lora import lora_state_dict, without_lora
from refimpl.quantization.pruning.hidden import Masks, masked

__all__ = ["Snapshot", "Teachers", "distillation", "outputs", "taught"]

KL_SHARE, HIDDEN_SHARE, TEMPERATURE = 0.1, 0.9, 2 / 3
Outputs = tuple[Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Snapshot:
    """A teacher: its expected `sparsity`, `masks` at inference and LoRA factors by name."""

    sparsity: float
    masks: Masks
    lora: dict[str, Tensor]


class Teachers:
    """Which earlier self teaches.

    Parameters: `target`, the final sparsity; `interval` of sparsity between snapshots, the first at
    `interval`, the last below `target - interval`; `ahead`, how many snapshots denser the teacher is.

    Before the target is reached the teacher is the `ahead`-th last snapshot, the dense model (None) while
    there are fewer. From then on the steps that are left are divided into one phase for each snapshot and one
    more, and the teacher of phase i, counted from the end, is snapshot i - `ahead`: it ends dense.

    >>> school = Teachers(0.05, 0.01, ahead=2)
    >>> for left, s in ((20, 0.011), (19, 0.025), (18, 0.031), (17, 0.045), (16, 0.04), (15, 0.05)):
    ...     school.record(s, left, lambda: s)
    >>> school.snapshots, [school.now(left) for left in (14, 11, 8, 5, 0)]
    ([0.011, 0.025, 0.031, 0.045], [0.031, 0.025, 0.011, None, None])
    """

    def __init__(self, target: float, interval: float = 0.01, ahead: int = 10) -> None:
        # int(0.06 / 0.01) is 5 in floating point; so is the code's.
        self.levels = [i * interval for i in range(1, int(target / interval + 1e-9))]
        self.target, self.ahead = target, ahead
        self.snapshots: list[Snapshot] = []
        self.reached: int | None = None  # steps that were left when the target was reached

    def record(self, sparsity: float, left: int, snapshot: Callable[[], Snapshot]) -> None:
        """Keep a snapshot if the next level is reached, one at most; or notice that the target is."""
        if self.reached is not None:
            return
        if len(self.snapshots) == len(self.levels):
            self.reached = left if sparsity >= self.target else None
        elif sparsity >= self.levels[len(self.snapshots)]:
            self.snapshots.append(snapshot())

    def now(self, left: int) -> Snapshot | None:
        """The teacher with `left` steps to go; None is the dense model."""
        n = len(self.snapshots)
        if self.reached is None:
            return self.snapshots[-self.ahead] if n >= self.ahead else None
        phase = left // max(1, self.reached // (n + 1)) - self.ahead
        return self.snapshots[min(phase, n - 1)] if phase >= 0 and n else None


def distillation(student: Outputs, teacher: Outputs) -> Tensor:
    """0.1 T^2 KL(teacher || student) + 0.9 sum over layers of the MSE of hidden states, T = 2/3.

    Parameters: (logits [B, T, V], hidden states [B, T, d] behind every layer) of both. The KL of logits / T
    is summed over positions and averaged over B; the MSE is over the student's states that are not 0.
    """
    (logits, states), (taught, taught_states) = student, teacher
    log_p, q = (logits.float() / TEMPERATURE).log_softmax(-1), (taught.float() / TEMPERATURE).softmax(-1)
    kl = F.kl_div(log_p, q, reduction="batchmean") * TEMPERATURE**2
    mse = sum(F.mse_loss(s[s != 0], t[s != 0]) for s, t in zip(states, taught_states, strict=True))
    return KL_SHARE * kl + HIDDEN_SHARE * mse


def outputs(model: nn.Module, rows: LongTensor) -> Outputs:
    """(logits [B, T, V], hidden states [B, T, d] behind every layer, the last behind the final norm)."""
    out = model(rows, use_cache=False, output_hidden_states=True)
    return out.logits, out.hidden_states[1:]


@torch.no_grad()
def taught(bb: Backbone, rows: LongTensor, teacher: Snapshot | None) -> Outputs:
    """What a teacher says to rows [B, T]: the dense model without factors (None), or a snapshot's masks and
    factors in the same weights."""
    if teacher is None:
        with without_lora(bb.model):
            return outputs(bb.model, rows)
    with _factors(bb.model, teacher.lora), masked(bb, teacher.masks):
        return outputs(bb.model, rows)


@contextmanager
def _factors(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """The model with other LoRA factors."""
    current = lora_state_dict(model)
    own = {name: tensor.clone() for name, tensor in current.items()}
    try:
        for name, tensor in current.items():
            tensor.copy_(values[name])
        yield
    finally:
        for name, tensor in current.items():
            tensor.copy_(own[name])
