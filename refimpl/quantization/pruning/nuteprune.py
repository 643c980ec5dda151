"""NutePrune: prune heads, neurons and hidden dimensions step by step, taught by earlier, denser selves.

Implements arXiv 2402.09773 (ref 46 of the survey). Hard concrete gates and LoRA factors are trained together
under a constraint on the sparsity. Whenever the sparsity passes a whole percent, masks and factors are kept
as a snapshot; the teacher is the snapshot 10 % denser than the student, the dense model before there is one.
When the target is reached the teacher walks back to the dense model. All teachers are one set of weights.

As in its authors' code, with these differences. A neuron's gate multiplies the product in front of `down`
once (the code: the gate's and the up projection's output). K/V heads are counted, and go with the last of
their queries (the code counts them as fixed where they are shared). The masks are cut out at the end,
hidden dimensions too; the code writes zeros, and its merging script forgets those of the embedding. Tuning
the small model afterwards (`add_lora`) is not part of it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.gates import HardConcrete
from refimpl.lora import add_lora, lora_state_dict, merge_lora, remove_lora
from refimpl.quantization.pruning.bonsai import weights_left
from refimpl.quantization.pruning.head_gates import check_training, next_token_loss
from refimpl.quantization.pruning.hidden import Masks, check_hidden, cut_masks, masked
from refimpl.quantization.pruning.nuteprune_teachers import (
    Snapshot,
    Teachers,
    distillation,
    outputs,
    taught,
)

__all__ = ["NuteReport", "at_inference", "nuteprune"]

GATE = HardConcrete(temperature=2 / 3)
BOUND = math.log(100)  # log a stays within +-BOUND
OPEN, OPEN_NEURON = 10.0, math.log(0.99 / 0.01)
SHARPNESS = 0.8  # of gates at inference


@dataclass(frozen=True)
class NuteReport:
    """What `nuteprune` ended with, and its course.

    - masks: at inference. sparsity: the share of the blocks' weights that was cut out.
    - expected, target, teacher [steps]: sparsities, of the student in expectation and of its teacher (0: the
      dense model). losses [steps], without the constraint. lambdas [steps]: (lambda_1, lambda_2).
    """

    masks: Masks
    sparsity: float
    expected: list[float]
    target: list[float]
    teacher: list[float]
    losses: list[float]
    lambdas: list[tuple[float, float]]


def nuteprune(
    model: nn.Module,
    ids: LongTensor,
    *,
    sparsity: float = 0.25,
    generator: torch.Generator,
    steps: int = 200,
    warmup: int | None = None,
    batch: int = 8,
    teachers: Literal["numerous", "dense"] | None = "numerous",
    interval: float = 0.01,
    ahead: int = 10,
    hidden: bool = True,
    masks_lr: float = 0.1,
    lambdas_lr: float = 0.1,
    lora_lr: float = 1e-3,
    rank: int = 8,
    alpha: float = 8.0,
) -> NuteReport:
    """Learn what to prune together with LoRA factors of the rest, merge both, and cut, in place.

    Implements arXiv 2402.09773, section 3. With s the expected share of weights pruned and t its target,
    the loss is distillation + lambda_1 (s - t) + lambda_2 (s - t)^2, minimised over gates and factors and
    maximised over both lambdas: while s < t, lambda_1 falls below 0, and pruning is rewarded. Distillation is
    0.1 T^2 KL(teacher || student) + 0.9 sum_layers MSE(hidden states), T = 2/3; the KL is summed over the
    tokens of a row, the MSE leaves out states that are 0.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, not sliced, without LoRA factors.
    ids : [N, T] token ids without padding; each step draws `batch` rows with replacement.
    sparsity : of the weights of the blocks' linear layers, 0 <= s < 1. The code: 0.2 to 0.5.
    generator : draws rows, gates and factors.
    steps, warmup : the target rises from 0 over the first `warmup` steps (None: 3/10; the code: 1/7).
    teachers : "numerous"; "dense": always the dense model; None: the language model's loss instead.
    interval, ahead : snapshots at every `interval` of sparsity; the teacher is `ahead` of them denser.
    hidden : prune dimensions of the residual stream as well. Not for GPT-2: its LayerNorm takes means over
        them.
    masks_lr, lambdas_lr, lora_lr : of Adam for gates, lambdas and factors (the last with clipped gradients,
        falling to 0). The code's 0.1 and 0.1 want thousands of steps; 0.3 and 1.5 reach 25 % in 150 here.
    rank, alpha : of LoRA on q and v (GPT-2: `c_attn`).

    Returns a `NuteReport`. Raises TypeError or ValueError for values out of range, before anything changes.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> draws = torch.Generator().manual_seed(0)
    >>> report = nuteprune(tiny("llama"), random_ids(4, 8), steps=2, batch=2, generator=draws)
    >>> report.masks.hidden.shape, report.target
    (torch.Size([32]), [0.0, 0.25])
    """
    bb = Backbone(model)
    warmup = max(1, 3 * steps // 10) if warmup is None and type(steps) is int else warmup
    check_training(bb, ids, steps, batch, masks_lr, lora_lr)
    _check(bb, sparsity, generator, warmup, teachers, interval, ahead, hidden, lambdas_lr)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    add_lora(model, ("c_attn",) if bb.is_gpt2 else ("q_proj", "v_proj"), rank, alpha, generator)
    factors = [p for p in model.parameters() if p.requires_grad]
    log_a = _locations(bb, hidden, generator, ids.device)
    lambdas = torch.zeros(2, dtype=torch.float64, requires_grad=True, device=ids.device)
    optimizers = [
        torch.optim.Adam(factors, lr=lora_lr),
        torch.optim.Adam(list(log_a.values()), lr=masks_lr),
        torch.optim.Adam([lambdas], lr=lambdas_lr, maximize=True),
    ]
    decay = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda step: 1 - step / steps)
    school = Teachers(sparsity, interval, ahead)
    total = float(weights_left(bb, torch.ones(bb.n_layers, bb.H), torch.ones(bb.n_layers, bb.F)))
    course: dict[str, list] = {"expected": [], "target": [], "teacher": [], "losses": [], "lambdas": []}
    try:
        for step in range(steps):
            rows = ids[torch.randint(len(ids), (batch,), generator=generator)]
            masks = Masks(**{kind: GATE.sample(at, generator) for kind, at in log_a.items()})
            teacher = school.now(steps - step) if teachers == "numerous" else None
            said = None if teachers is None else taught(bb, rows, teacher)
            with masked(bb, masks):
                if said is None:
                    loss = next_token_loss(model, rows)
                else:
                    loss = distillation(outputs(model, rows), said)
            expected = 1 - weights_left(bb, **{kind: GATE.p_open(at) for kind, at in log_a.items()}) / total
            target = sparsity * min(1.0, step / warmup)
            gap, now = expected - target, float(expected.detach())
            course["lambdas"].append(tuple(lambdas.tolist()))
            (loss + lambdas[0] * gap + lambdas[1] * gap**2).backward()
            school.record(now, steps - step, lambda now=now: _snapshot(model, now, log_a))
            nn.utils.clip_grad_norm_(factors, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            decay.step()
            for at in log_a.values():
                at.data.clamp_(-BOUND, BOUND)
            course["expected"].append(now)
            course["target"].append(target)
            course["teacher"].append(0.0 if teacher is None else teacher.sparsity)
            course["losses"].append(float(loss.detach()))
    except BaseException:
        remove_lora(model)
        _restore(model, trainable)
        raise
    merge_lora(model)
    _restore(model, trainable)
    masks = _inference_masks(log_a)
    hard = {kind: (gates > 0).double() for kind, gates in vars(masks).items() if gates is not None}
    cut_masks(model, masks)
    return NuteReport(masks, 1 - float(weights_left(bb, **hard)) / total, **course)


def at_inference(log_a: Tensor) -> Tensor:
    """Gates at inference: of every row of n the round(n - sum P(open)) lowest are 0, the others
    sigmoid(0.8 log_a / t), t = 2/3.

    >>> [round(z, 2) for z in at_inference(torch.tensor([4.0, -4.0, 3.0, -3.0])).tolist()]
    [0.99, 0.0, 0.97, 0.0]
    """
    gates = torch.sigmoid(log_a * SHARPNESS / GATE.temperature)
    opened = GATE.p_open(log_a).double().sum(-1).round().long()
    rank = log_a.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return gates.masked_fill(rank >= opened[..., None], 0)


def _snapshot(model: nn.Module, sparsity: float, log_a: dict[str, Tensor]) -> Snapshot:
    factors = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    return Snapshot(sparsity, _inference_masks(log_a), factors)


def _inference_masks(log_a: dict[str, Tensor]) -> Masks:
    return Masks(**{kind: at_inference(at.detach()) for kind, at in log_a.items()})


def _locations(
    bb: Backbone, hidden: bool, generator: torch.Generator, device: torch.device
) -> dict[str, Tensor]:
    """log a of all gates, open, with a little noise."""
    shapes = {"heads": (bb.n_layers, bb.H), "neurons": (bb.n_layers, bb.F)} | (
        {"hidden": (bb.d,)} if hidden else {}
    )
    log_a = {}
    for kind, shape in shapes.items():
        noise = 0.01 * torch.randn(shape, generator=generator, device=generator.device)
        start = OPEN_NEURON if kind == "neurons" else OPEN
        log_a[kind] = (start + noise).to(device).requires_grad_()
    return log_a


def _restore(model: nn.Module, trainable: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])


def _check(
    bb: Backbone,
    sparsity: float,
    generator: torch.Generator,
    warmup: int | None,
    teachers: str | None,
    interval: float,
    ahead: int,
    hidden: bool,
    lambdas_lr: float,
) -> None:
    if "kept" in vars(bb.model):
        raise ValueError("model is sliced already; prune it once")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be a number, 0 <= s < 1, got {sparsity!r}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if type(warmup) is not int or warmup < 1:
        raise ValueError(f"warmup must be an integer >= 1, got {warmup!r}")
    if teachers not in ("numerous", "dense", None):
        raise ValueError(f"teachers must be 'numerous', 'dense' or None, got {teachers!r}")
    if not 0 < interval < 1:
        raise ValueError(f"interval must be a number, 0 < interval < 1, got {interval!r}")
    if type(ahead) is not int or ahead < 1:
        raise ValueError(f"ahead must be an integer >= 1, got {ahead!r}")
    if not 0 < lambdas_lr < math.inf:
        raise ValueError(f"lambdas_lr must be positive and finite, got {lambdas_lr}")
    if hidden:
        check_hidden(bb)
