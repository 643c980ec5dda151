"""The check of logit distillation (quantization spec, section 27; arXiv 1503.02531)."""

from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"distillation": "refimpl.quantization.distillation:kd_loss"}
ROWS, TOKENS, VOCAB = 3, 6, 11


@check
def check_distillation(kd_loss: Callable) -> None:
    """`kd_loss(student, teacher, targets, alpha=, temperature=, direction=)` of logits [B, T, V] and shifted
    targets [B, T], -100 for none -> a T^2 KL + (1 - a) CE, mean over the positions with a target."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: 2 * torch.randn(ROWS, TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    z_s, z_t = draw(), draw()
    targets = torch.randint(VOCAB, (ROWS, TOKENS), generator=generator)
    targets[0, :3] = targets[1, 4:] = targets[:, -1] = -100  # a prompt, padding, and the end of each row
    kept = targets != -100
    before = z_t.clone()
    for alpha, T, direction in (
        (1.0, 1.0, "forward"), (1.0, 3.0, "forward"), (0.7, 2.0, "forward"), (0.7, 2.0, "reverse"),
        (0.0, 2.0, "forward"),
    ):  # fmt: skip
        what = f"alpha {alpha}, temperature {T}, {direction}"
        student, teacher = z_s.clone().requires_grad_(), z_t.clone().requires_grad_()
        settings = {"alpha": alpha, "temperature": T, "direction": direction}
        loss = kd_loss(student, teacher, targets, **settings)
        expected = _reference(z_s, z_t, targets, alpha, T, direction)
        told = f"{what}: the loss is {float(loss.detach()):.4g} and should be {float(expected):.4g}"
        require_close(loss, expected, 1e-5, told)
        loss.backward()
        require(teacher.grad is None or not teacher.grad.any(), f"{what}: a gradient reaches the teacher")
        require(not student.grad[~kept].any(),
                f"{what}: positions without a target have a gradient: prompts and padding count")  # fmt: skip
        if direction == "forward":
            p, q, q1 = _softmax(z_t / T), _softmax(z_s / T), _softmax(z_s)
            hot = torch.zeros_like(q1).scatter_(-1, targets.clamp(min=0)[..., None], 1)
            gradient = (alpha * T * (q - p) + (1 - alpha) * (q1 - hot)) * kept[..., None] / kept.sum()
            told = f"{what}: the gradient is not (a T (q_T - p_T) + (1 - a) (q - y)) / positions"
            require_close(student.grad, gradient, 1e-5, told)
    for direction in ("forward", "reverse"):
        settings = {"alpha": 1.0, "temperature": 2.0, "direction": direction}
        own = float(kd_loss(z_t, z_t, targets, **settings))
        require(abs(own) < 1e-6, f"{direction}: a student like its teacher has the loss {own:.3g}, not 0")
        settings["temperature"] = 1e3
        far = kd_loss(z_s, z_t, targets, **settings)
        centred = lambda z: z - z.mean(-1, keepdim=True)
        limit = (centred(z_s) - centred(z_t)).square().sum(-1)[kept].mean() / (2 * VOCAB)
        told = f"{direction}: at temperature 1000 the loss {float(far):.4g} should be near {float(limit):.4g}"
        require_close(far, limit, 0.01 * float(limit), told)
    none = kd_loss(z_s, z_t, torch.full_like(targets, -100), alpha=0.5, temperature=2.0, direction="forward")
    require(float(none) == 0, f"without any target the loss is {float(none):.3g}, not 0")
    require(torch.equal(z_t, before), "the teacher's logits were changed")


def _softmax(z: Tensor) -> Tensor:
    weights = (z - z.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def _reference(z_s: Tensor, z_t: Tensor, targets: Tensor, alpha: float, T: float, direction: str) -> Tensor:
    total, count = 0.0, 0
    for b in range(ROWS):
        for t in range(TOKENS):
            if targets[b, t] == -100:
                continue
            p, q = _softmax(z_t[b, t] / T), _softmax(z_s[b, t] / T)
            if direction == "reverse":
                p, q = q, p
            kl = (p * (p / q).log()).sum()
            total += alpha * T * T * kl - (1 - alpha) * _softmax(z_s[b, t])[targets[b, t]].log()
            count += 1
    return torch.as_tensor(total / count)
