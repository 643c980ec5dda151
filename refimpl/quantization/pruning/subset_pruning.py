"""Differentiable subset pruning: learn which K heads of a model stay, K being given.

Implements Li, Cotterell and Sachan, TACL 2021, arXiv 2108.04657: the top K of scores with Gumbel noise, a
random subset of exactly K, relaxed until a gradient reaches the scores.
"""

import math
from dataclasses import dataclass

import torch
from torch import BoolTensor, LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.quantization.pruning.gating import gated
from refimpl.quantization.pruning.head_gates import (
    check_training,
    gate_optimizer,
    next_token_loss,
    optimized,
)

__all__ = ["SubsetReport", "annealed", "gumbel", "hard_top_k", "soft_top_k", "train_subset"]

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class SubsetReport:
    """What the training of a subset ended with.

    - scores [L, H], float64: the learned w. heads [L, H]: True for the K largest, without noise.
    - losses [steps]: nats per token, under the mask of the step.
    """

    scores: Tensor
    heads: BoolTensor
    losses: list[float]


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise -log(-log u), float64: the top K of w + noise is a draw of K without replacement
    with odds exp(w)."""
    u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return -(-u.clamp(min=_TINY).log()).log()


def soft_top_k(scores: Tensor, k: int, temperature: float) -> Tensor:
    """The top K as a sum of K softmaxes: a mask that sums to K, hard at temperature 0 and differentiable.

    Implements arXiv 2108.04657, section 3: p_j = softmax(r / t), then r += log(1 - p_j), for j = 1 .. K.
    The mask is sum_j p_j. At moderate temperatures single entries exceed 1; they are not clamped, or the sum
    would not be K.

    Parameters: `scores` r [n], float64 (float32 underflows to NaN gradients), noise included; `k`, 1 to n;
    `temperature` t > 0. Returns [n]. Raises TypeError or ValueError for other values.

    >>> scores = torch.tensor([0.3, 2.0, -1.0, 1.0], dtype=torch.float64)
    >>> soft_top_k(scores, 2, 1e-8).tolist(), round(float(soft_top_k(scores, 2, 1.0).sum()), 12)
    ([0.0, 1.0, 0.0, 1.0], 2.0)
    """
    _check_scores(scores, k)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    r, mask = scores, torch.zeros_like(scores)
    for _ in range(k):
        p = torch.softmax(r / temperature, 0)
        mask = mask + p
        r = r + (1 - p).clamp(min=_TINY).log()
    return mask


def hard_top_k(scores: Tensor, k: int) -> Tensor:
    """The top K as zeros and ones, whose gradient is passed on to the scores as it is (straight-through).

    Parameters and errors as for `soft_top_k`. The paper's code compares with the k+1st score, which fails at
    k = n; this is the same mask otherwise.

    >>> w = torch.tensor([0.3, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    >>> mask = hard_top_k(w, 2)
    >>> (mask * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    >>> mask.tolist(), w.grad.tolist()
    ([0.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    """
    _check_scores(scores, k)
    mask = torch.zeros_like(scores).scatter(0, scores.topk(k).indices, 1.0)
    return scores - scores.detach() + mask if scores.requires_grad else mask


def annealed(step: int, cooldown: int, initial: float = 1000.0, final: float = 1e-8) -> float:
    """The temperature of a step: geometric from `initial` to `final` over `cooldown` steps, then `final`.

    >>> [round(math.log10(annealed(step, 10)), 2) for step in (0, 5, 10, 11)]
    [3.0, -2.5, -8.0, -8.0]
    """
    done = min(step / cooldown, 1.0)
    return math.exp((1 - done) * math.log(initial) + done * math.log(final))


def train_subset(
    model: nn.Module,
    ids: LongTensor,
    k: int,
    *,
    generator: torch.Generator,
    steps: int = 300,
    cooldown: int | None = None,
    batch: int = 8,
    scores_lr: float = 0.5,
    weights_lr: float | None = 1e-4,
    straight_through: bool = False,
) -> SubsetReport:
    """Learn scores of a model's heads whose K largest are to stay; "joint" with its weights, in place.

    Implements arXiv 2108.04657, section 3. K counts over the whole model, and a layer may lose all its heads.
    As in the code: gradients are clipped to norm 1, and learning rates fall linearly to 0.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, not sliced. With weights_lr its weights adapt to the masks.
    ids : [N, T] token ids without padding; each step draws `batch` rows with replacement.
    k : K, 1 to L * H.
    generator : draws the initial scores, rows and noise.
    steps, cooldown : steps of training, and those in which the temperature falls from 1000 to 1e-8 (None: 5/6
        of them; the paper's code: 25 000 of about 37 000).
    scores_lr : the paper's 0.5 for BERT, 0.2 for translation.
    weights_lr : None is "pipelined": a finished model is frozen and only the scores are trained. Paper: 2e-5.
    straight_through : the mask is `hard_top_k` of the scores, without noise and temperature.

    Returns a `SubsetReport`; `slice_model` takes its heads. Raises TypeError or ValueError for values out of
    range, before anything is changed.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> report = train_subset(
    ...     tiny("llama"), random_ids(4, 8), 5, generator=torch.Generator().manual_seed(0), steps=3)
    >>> int(report.heads.sum()), report.heads.shape
    (5, torch.Size([3, 4]))
    """
    bb = Backbone(model)
    check_training(bb, ids, steps, batch, scores_lr, weights_lr)
    cooldown = max(1, 5 * steps // 6) if cooldown is None else cooldown
    if type(cooldown) is not int or not 1 <= cooldown <= steps:
        raise ValueError(f"cooldown must be an integer from 1 to steps = {steps}, got {cooldown!r}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    shape = bb.n_layers, bb.H
    _check_scores(torch.zeros(shape[0] * shape[1], dtype=torch.float64), k)
    bound = math.sqrt(6 / sum(shape))  # Glorot, as in the code
    w = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    w = ((2 * w - 1) * bound).to(ids.device).requires_grad_()
    optimizer = gate_optimizer(model, w, scores_lr, weights_lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    trained, losses = optimized(optimizer), []
    for step in range(steps):
        rows = ids[torch.randint(len(ids), (batch,), generator=generator)]
        if straight_through:
            mask = hard_top_k(w.flatten(), k)
        else:
            noise = gumbel((w.numel(),), generator).to(w.device)
            mask = soft_top_k(w.flatten() + noise, k, annealed(step, cooldown))
        with gated(bb, mask.view(shape)):
            loss = next_token_loss(model, rows)
        loss.backward(inputs=trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        losses.append(float(loss.detach()))
    w = w.detach()
    return SubsetReport(w, hard_top_k(w.flatten(), k).view(shape).bool().cpu(), losses)


def _check_scores(scores: Tensor, k: int) -> None:
    if not isinstance(scores, Tensor) or scores.dtype != torch.float64:
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores must be a float64 tensor, got {got}")
    if scores.ndim != 1 or scores.numel() == 0 or bool(scores.isnan().any()):
        raise ValueError(f"scores must be numbers [n], got {list(scores.shape)}, or NaN among them")
    if type(k) is not int or not 1 <= k <= len(scores):
        raise ValueError(f"k must be an integer from 1 to {len(scores)}, got {k!r}")
