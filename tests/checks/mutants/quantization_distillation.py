"""Plausible but wrong distillation losses that its check must reject."""

import torch
import torch.nn.functional as F

from refimpl.quantization.distillation import kd_loss


def off(student, teacher, targets, *, alpha, temperature, direction):
    """Cross-entropy alone."""
    return kd_loss(student, teacher, targets, alpha=0.0)


def no_square(student, teacher, targets, *, alpha, temperature, direction):
    """T^2 forgotten: the soft part fades as the temperature rises."""
    soft = kd_loss(student, teacher, targets, alpha=1.0, temperature=temperature, direction=direction)
    hard = kd_loss(student, teacher, targets, alpha=0.0)
    return alpha * soft / temperature**2 + (1 - alpha) * hard


def arguments_swapped(student, teacher, targets, *, alpha, temperature, direction):
    """KL(student || teacher) where KL(teacher || student) is meant, and the other way round."""
    other = {"forward": "reverse", "reverse": "forward"}[direction]
    return kd_loss(student, teacher, targets, alpha=alpha, temperature=temperature, direction=other)


def _built(
    student, teacher, targets, alpha, temperature, *, reduction="tokens", soft_labels=False, mask=True
):
    rows = targets != -100
    log_q, p = F.log_softmax(student / temperature, -1), F.softmax(teacher.detach() / temperature, -1)
    kl = F.kl_div(log_q, p, reduction="none").sum(-1)
    if mask:
        kl = kl * rows
    count = len(targets) if reduction == "batchmean" else (rows.sum() if mask else rows.numel())
    scores = student / temperature if soft_labels else student
    hard = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    hard = hard / rows.sum().clamp(min=1)
    return alpha * temperature**2 * kl.sum() / max(int(count), 1) + (1 - alpha) * hard


def batchmean(student, teacher, targets, *, alpha, temperature, direction):
    """Divided by the rows, not by their tokens: larger for longer texts."""
    if direction == "reverse":
        return kd_loss(student, teacher, targets, alpha=alpha, temperature=temperature, direction=direction)
    return _built(student, teacher, targets, alpha, temperature, reduction="batchmean")


def padding_counts(student, teacher, targets, *, alpha, temperature, direction):
    if direction == "reverse":
        return kd_loss(student, teacher, targets, alpha=alpha, temperature=temperature, direction=direction)
    return _built(student, teacher, targets, alpha, temperature, mask=False)


def tempered_labels(student, teacher, targets, *, alpha, temperature, direction):
    """Cross-entropy at the temperature of the KL."""
    if direction == "reverse":
        return kd_loss(student, teacher, targets, alpha=alpha, temperature=temperature, direction=direction)
    return _built(student, teacher, targets, alpha, temperature, soft_labels=True)


def shifted_labels(student, teacher, targets, *, alpha, temperature, direction):
    """The teacher's logits are shifted like labels, the student's are not."""
    moved = torch.roll(teacher, -1, dims=1)
    return kd_loss(student, moved, targets, alpha=alpha, temperature=temperature, direction=direction)


def teacher_learns(student, teacher, targets, *, alpha, temperature, direction):
    """A gradient into the teacher: nothing detached it."""
    loss = kd_loss(student, teacher, targets, alpha=alpha, temperature=temperature, direction=direction)
    leak = (teacher - teacher.detach()).sum()
    return loss + leak


MUTANTS = [
    ("distillation", "cross-entropy alone", off),
    ("distillation", "T^2 forgotten", no_square),
    ("distillation", "the KL's arguments are swapped", arguments_swapped),
    ("distillation", "divided by rows, not tokens", batchmean),
    ("distillation", "padding and prompts count", padding_counts),
    ("distillation", "cross-entropy at the temperature", tempered_labels),
    ("distillation", "the teacher's logits are shifted, the student's not", shifted_labels),
    ("distillation", "the teacher gets a gradient", teacher_learns),
]
