"""Head gates: prune attention heads by training random gates with a penalty on how many are open.

Implements Voita et al., ACL 2019 (P19-1580, arXiv 1905.09418), section 6.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.gates import HardConcrete
from refimpl.quantization.pruning.gating import gated
from refimpl.quantization.pruning.slicing import slice_model

__all__ = ["GateReport", "close_gates", "train_head_gates"]


_GATE = HardConcrete()


@dataclass(frozen=True)
class GateReport:
    """What the training of gates ended with.

    - log_a [L, H]: the locations of the gates. gates [L, H]: their values at test, in [0, 1].
    - losses [steps]: the language model's loss at each step, nats per token, under sampled gates.
    - expected_open [steps]: sum of P(g > 0), the L0 penalty without its coefficient.
    """

    log_a: Tensor
    gates: Tensor
    losses: list[float]
    expected_open: list[float]

    @property
    def open(self) -> int:
        """Heads whose gate at test is not 0."""
        return int((self.gates > 0).sum())

    @property
    def polarised(self) -> float:
        """The share of gates that are exactly 0 or 1 at test."""
        return float(((self.gates == 0) | (self.gates == 1)).double().mean())


def train_head_gates(
    model: nn.Module,
    ids: LongTensor,
    coefficient: float,
    *,
    generator: torch.Generator,
    steps: int = 300,
    batch: int = 8,
    gates_lr: float = 0.1,
    weights_lr: float | None = 1e-4,
    initial: float = 0.0,
    gate: HardConcrete = _GATE,
) -> GateReport:
    """Train a converged model together with a hard concrete gate on each head, in place.

    Implements P19-1580, section 6.1: the loss is L_lm + coefficient * sum_h P(g_h > 0), with one draw of each
    gate per step for the whole batch. How many heads stay cannot be asked for: it follows from the
    coefficient. The paper's code averages the penalty over layers where the paper sums it, so that its
    `concrete_coef` is L times ours. It draws log a around 0 (Glorot); here all start at `initial`.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, not sliced; its weights change unless `weights_lr` is None.
    ids : [N, T] token ids without padding, N >= 1; each step draws `batch` rows with replacement.
    coefficient : lambda >= 0, in nats per token and head. 0.001 to 0.1; L_lm is around 2 for our models.
    generator : draws rows and gates.
    steps, batch : the paper trains until nothing changes.
    gates_lr, weights_lr : learning rates of two Adams; the gates have no weight decay, and need the larger
        one, for log a must travel several units. weights_lr None freezes the weights.
    initial : log a at the start; 0 is P(open) = 0.69, and the model first recovers from half-open gates.
    gate : the distribution.

    Returns a `GateReport`; `close_gates` then removes the closed heads. Raises TypeError or ValueError for
    values out of range, before anything is changed.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> report = train_head_gates(
    ...     tiny("llama"), random_ids(4, 8), 0.5, generator=torch.Generator().manual_seed(0), steps=3)
    >>> report.gates.shape, len(report.losses)
    (torch.Size([3, 4]), 3)
    """
    bb = Backbone(model)
    check_training(bb, ids, steps, batch, gates_lr, weights_lr)
    if not 0 <= coefficient < float("inf"):
        raise ValueError(f"coefficient must be >= 0 and finite, got {coefficient}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    log_a = torch.full((bb.n_layers, bb.H), float(initial), device=ids.device, requires_grad=True)
    optimizer = gate_optimizer(model, log_a, gates_lr, weights_lr)
    losses, expected = [], []
    for _ in range(steps):
        rows = ids[torch.randint(len(ids), (batch,), generator=generator)]
        with gated(bb, gate.sample(log_a, generator)):
            loss = next_token_loss(model, rows)
        count = gate.p_open(log_a).sum()
        (loss + coefficient * count).backward(inputs=optimized(optimizer))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        expected.append(float(count.detach()))
    log_a = log_a.detach()
    return GateReport(log_a, gate.at_test(log_a), losses, expected)


def close_gates(model: nn.Module, gates: Tensor) -> None:
    """Make gates on heads part of a model, in place: heads with a gate of 0 go, the others' columns of
    `o_proj` are multiplied by their gate, so that the logits are those of the gated model.

    Parameters: `gates` [L, H] in [0, 1]; `model` as for `slice_model`. Raises as `slice_model`, and
    ValueError for other gates, before anything is changed.

    >>> from refimpl.checks.tiny import tiny
    >>> model, gates = tiny("llama"), torch.ones(3, 4)
    >>> gates[0] = torch.tensor([0.0, 0.0, 1.0, 0.7])
    >>> close_gates(model, gates)
    >>> model.model.layers[0].self_attn.q_proj.out_features
    16
    """
    bb = Backbone(model)
    wrong = not isinstance(gates, Tensor) or not gates.is_floating_point()
    if wrong or list(gates.shape) != [bb.n_layers, bb.H]:
        raise ValueError(
            f"gates must be a floating point tensor [{bb.n_layers}, {bb.H}], got {_shape(gates)}"
        )
    if not bool(((gates >= 0) & (gates <= 1)).all()):
        raise ValueError(f"gates must lie in [0, 1], got {float(gates.min())} to {float(gates.max())}")
    slice_model(model, gates > 0, torch.ones(bb.n_layers, bb.F, dtype=torch.bool))
    for l, row in enumerate(gates):
        left = row[row > 0]
        if len(left):
            with torch.no_grad():
                module = bb.layer(l).o
                factors = left.repeat_interleave(bb.D).to(module.weight)
                module.weight.mul_(factors if isinstance(module, nn.Linear) else factors[:, None])


def next_token_loss(model: nn.Module, ids: LongTensor, reduction: str = "mean") -> Tensor:
    """Next-token negative log-likelihood in nats: a mean, or for "none" each token's, [B, T - 1]."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction=reduction)


def gate_optimizer(
    model: nn.Module, gates: Tensor, gates_lr: float, weights_lr: float | None
) -> torch.optim.Optimizer:
    """Adam without weight decay on gates and, unless weights_lr is None, on the trainable weights."""
    groups = [{"params": [gates], "lr": gates_lr}]
    if weights_lr is not None:
        weights = [p for p in model.parameters() if p.requires_grad]
        groups.append({"params": weights, "lr": weights_lr})
    return torch.optim.Adam(groups)


def optimized(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer changes; backward(inputs=...) then leaves no gradients on frozen weights."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_training(
    bb: Backbone, ids: LongTensor, steps: int, batch: int, gates_lr: float, weights_lr: float | None
) -> None:
    """ValueError for ids without a next token, counts below 1 and learning rates that are not positive."""
    bb.check_ids(ids)
    if ids.shape[1] < 2:
        raise ValueError(f"ids: expected rows of 2 tokens or more, got {list(ids.shape)}")
    for name, count in (("steps", steps), ("batch", batch)):
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {count!r}")
    for name, rate in (("gates_lr", gates_lr), ("weights_lr", 1.0 if weights_lr is None else weights_lr)):
        if not 0 < rate < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {rate}")


def _shape(value: object) -> object:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__
