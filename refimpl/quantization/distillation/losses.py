"""The losses of distillation: a student learns the teacher's distributions, or its hidden states.

- Logits (Hinton et al., arXiv 1503.02531): a T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - a) CE. The
  gradient of the KL in z_s is (q - p) / T, and q - p itself shrinks with 1 / T: T^2 keeps the size. For large
  T the term becomes (1 / 2V) ||z_s - z_t||^2 of the centred logits.
- "forward" is that KL, which makes the student cover all that the teacher finds likely; "reverse",
  KL(student || teacher), makes it avoid what the teacher finds unlikely (MiniLLM, arXiv 2306.08543, there
  over texts that the student writes; here token by token over given texts).
- Hidden states (TinyBERT, arXiv 1909.10351, Eq. 8): mean squares of P h_s - h_t, P learned where the widths
  differ.
- A teacher may be stored: the k likeliest tokens of each position, and the probability of all others as one
  more token. That is a teacher that spreads the remainder over the other tokens as the student does, so it
  teaches nothing about them, and in particular not that they are impossible, which the common softmax over
  the k logits alone does.

All are means over the positions that have a target, as in cross-entropy: padding and prompts do not count.
Shapes: B rows, T tokens, V vocabulary, d width. Targets are shifted already (`refimpl.training.targets`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from refimpl.training import IGNORE

__all__ = ["DIRECTIONS", "TopK", "check_settings", "feature_loss", "kd_loss", "kl_loss", "top_k"]

DIRECTIONS = ("forward", "reverse")


class TopK(NamedTuple):
    """What is stored of a teacher's distributions at one temperature.

    `ids` [..., k], int32, the likeliest tokens; `log_probs` [..., k + 1], float16, theirs and that of all
    other tokens together; `temperature`. 6 k + 2 bytes a position: 302 for k = 50, and 2 V for all logits.
    """

    ids: Tensor
    log_probs: Tensor
    temperature: float


def top_k(logits: Tensor, k: int = 50, temperature: float = 2.0) -> TopK:
    """Store the k likeliest tokens of each position.

    Parameters: `logits` [..., V], finite; `k`, 1 to V - 1 (V - 1 loses nothing but float16's digits; usual:
    50 of 32,000 and more); `temperature` > 0, the one that the loss will have. Raises ValueError otherwise.

    >>> stored = top_k(torch.tensor([[2.0, 0.0, 1.0, 0.0]]), k=2, temperature=1.0)
    >>> stored.ids, stored.log_probs.float().exp().round(decimals=2)
    (tensor([[0, 2]], dtype=torch.int32), tensor([[0.6100, 0.2200, 0.1700]]))
    """
    check_settings(0.0, temperature, "forward")
    if not logits.is_floating_point() or logits.numel() == 0 or not bool(logits.isfinite().all()):
        raise ValueError(f"logits must be finite numbers [..., V], got {logits.dtype} {list(logits.shape)}")
    if type(k) is not int or not 1 <= k < logits.shape[-1]:
        raise ValueError(f"k must be an integer from 1 to V - 1 = {logits.shape[-1] - 1}, got {k!r}")
    log_p = _log_softmax(logits.detach(), temperature)
    ids = log_p.topk(k).indices
    return TopK(ids.int(), _with_remainder(log_p, ids).half(), temperature)


def kl_loss(
    student: Tensor,
    teacher: Tensor | TopK,
    targets: LongTensor,
    *,
    temperature: float = 2.0,
    direction: str = "forward",
) -> Tensor:
    """T^2 KL between teacher and student, in nats, mean over the positions that have a target; 0 without any.

    Parameters: `student`, logits [B, T, V]; `teacher`, logits of the same shape, finite where there is a
    target, or a `TopK` of the same positions and temperature; `targets` [B, T], -100: none; `temperature`,
    usual 1 to 4; `direction`, "forward" or "reverse".
    Raises ValueError for other shapes and settings.

    >>> z_t, targets = torch.tensor([[[2.0, 0.0, 1.0], [9.0, 9.0, 0.0]]]), torch.tensor([[0, -100]])
    >>> z_s = torch.zeros(1, 2, 3)
    >>> p = z_t[0, 0].softmax(0)
    >>> torch.allclose(kl_loss(z_s, z_t, targets, temperature=1.0), (p * (3 * p).log()).sum())
    True
    """
    check_settings(0.0, temperature, direction)
    _check_shapes(student, targets)
    rows = targets != IGNORE
    log_q = _log_softmax(_at(student, rows), temperature)
    if isinstance(teacher, TopK):
        if teacher.temperature != temperature:
            raise ValueError(
                f"temperature must be {teacher.temperature}, the stored one, got {temperature!r}"
            )
        if teacher.ids.shape[:-1] != targets.shape:
            raise ValueError(f"teacher must be of {list(targets.shape)}, got {list(teacher.ids.shape[:-1])}")
        # Renormalised: float16 leaves sums of 1 +- 0.001.
        log_p = _at(teacher.log_probs, rows).to(log_q.dtype).log_softmax(-1)
        log_q = _with_remainder(log_q, _at(teacher.ids, rows).long())
    else:
        if teacher.shape != student.shape:
            raise ValueError(f"teacher must be {list(student.shape)}, got {list(teacher.shape)}")
        log_p = _log_softmax(_at(teacher.detach(), rows), temperature)
    first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    total = (first.exp() * (first - second)).sum()
    if not bool(total.isfinite()) and not bool(log_p.isfinite().all()):
        raise ValueError("teacher must be finite where there is a target")
    return temperature**2 * total / rows.sum().clamp(min=1)


def kd_loss(
    student: Tensor,
    teacher: Tensor | TopK,
    targets: LongTensor,
    *,
    alpha: float = 0.5,
    temperature: float = 2.0,
    direction: str = "forward",
) -> Tensor:
    """a T^2 KL + (1 - a) CE; cross-entropy has no temperature.

    Parameters: `alpha` a, 0 (cross-entropy, bit for bit) to 1 (the teacher alone), usual 0.5 to 0.9; the
    others, and errors, as for `kl_loss`.
    """
    check_settings(alpha, temperature, direction)
    _check_shapes(student, targets)
    labels = targets.flatten()
    total = F.cross_entropy(student.flatten(0, 1).float(), labels, ignore_index=IGNORE, reduction="sum")
    cross_entropy = total / (labels != IGNORE).sum().clamp(min=1)
    if alpha == 0:
        return cross_entropy
    kl = kl_loss(student, teacher, targets, temperature=temperature, direction=direction)
    return alpha * kl + (1 - alpha) * cross_entropy


def feature_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    targets: LongTensor,
    projections: Sequence[nn.Module] | None = None,
) -> Tensor:
    """sum_l mean (P_l h_s,l - h_t,l)^2, the mean over channels and the positions that have a target.

    Parameters: `student`, hidden states [B, T, d_s], one for each pair; `teacher` [B, T, d_t], as many;
    `targets` [B, T]; `projections`, modules d_s -> d_t, one for each pair; None: the identity, d_s = d_t.
    Raises ValueError for other numbers of tensors, and shapes that do not fit.

    >>> h, targets = torch.ones(1, 2, 4), torch.tensor([[7, -100]])
    >>> float(feature_loss([h, h], [h, 3 * h], targets))
    4.0
    """
    if len(student) != len(teacher) or not student or len(projections or student) != len(student):
        got = f"{len(student)}, {len(teacher)}, {len(projections or student)}"
        raise ValueError(f"student, teacher and projections must be equally many, at least one, got {got}")
    rows, total = targets != IGNORE, torch.zeros((), device=targets.device)
    for i, (h_s, h_t) in enumerate(zip(student, teacher, strict=True)):
        _check_shapes(h_s, targets)
        h_s, h_t = _at(h_s, rows).float(), _at(h_t.detach(), rows).float()
        if projections is not None:
            h_s = projections[i](h_s)
        if h_s.shape != h_t.shape:
            raise ValueError(f"student {i} is {h_s.shape[-1]} wide, its teacher {h_t.shape[-1]}: project it")
        total = total + (h_s - h_t).square().mean(-1).sum() / rows.sum().clamp(min=1)
    return total


def check_settings(alpha: float, temperature: float, direction: str) -> None:
    """Raise ValueError for settings of `kd_loss` that are not allowed."""
    if isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be a number from 0 to 1, got {alpha!r}")
    if isinstance(temperature, bool) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")


def _check_shapes(x: Tensor, targets: LongTensor) -> None:
    if targets.dtype != torch.long or targets.ndim != 2:
        raise ValueError(f"targets must be a LongTensor [B, T], got {targets.dtype} {list(targets.shape)}")
    if x.ndim != 3 or x.shape[:2] != targets.shape or x.numel() == 0:
        raise ValueError(f"student must be {[*targets.shape, '...']}, not empty, got {list(x.shape)}")


def _at(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, T, ...] at the positions where rows [B, T] is True, [n, ...]."""
    # Not x[rows], whose backward pass is several times as slow.
    return x.flatten(0, 1).index_select(0, rows.flatten().nonzero()[:, 0])


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits.to(dtype) / temperature, dim=-1)


def _with_remainder(log_p: Tensor, ids: LongTensor) -> Tensor:
    """Log-probabilities [..., k + 1] of the tokens `ids` [..., k] and of all others together."""
    others = log_p.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat((log_p.gather(-1, ids), others), -1)
