"""The check of selective language modelling (kv-cache spec 29)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.checks import check, require, require_close, require_error
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {"rho1": "refimpl.kvcache.prompt.rho1:SelectiveLM"}
ROWS, LENGTH = 3, 9


@check
def check_rho1(SelectiveLM: Callable) -> None:
    """`SelectiveLM(reference, k)` called with (model, ids) -> the loss of the batch's top k by excess."""
    ids = random_ids(ROWS, LENGTH, seed=3)
    student, reference = tiny("llama"), tiny("llama", seed=1)
    ids[0, 1:] = _greedy(student, ids[0, 1], LENGTH - 1)  # what the student knows: no row deserves its share
    mine, theirs = _losses(student, ids), _losses(reference, ids)

    whole = _gradients(student, lambda: SelectiveLM(reference, k=1.0)(student, ids))
    plain = _gradients(student, lambda: _clm(student, ids))
    require(torch.equal(whole[0], plain[0]), f"k = 1: loss {whole[0]:.9g}, plain CLM {plain[0]:.9g}")
    for name, gradient in plain[1].items():
        require(torch.equal(whole[1][name], gradient), f"k = 1: gradient of {name} is not that of CLM")

    for k in (0.25, 0.6):
        # Row-major order of a stable descending sort: all rows compete.
        order = (mine - theirs).flatten().sort(descending=True, stable=True).indices
        kept = order[: round(k * order.numel())]
        expected = mine.flatten()[kept].mean()
        got = SelectiveLM(reference, k=k)(student, ids)
        require_close(got, expected, 1e-5, f"k = {k}: loss against the mean over the top of the batch")

        seen: list[Tensor] = []
        hook = student.lm_head.register_forward_hook(lambda module, args, out, seen=seen: _watch(out, seen))
        try:
            SelectiveLM(reference, k=k)(student, ids).backward()
        finally:
            hook.remove()
        student.zero_grad()
        moved = seen[0].grad.abs().sum(-1)[:, :-1].flatten() > 0
        chosen = torch.zeros_like(moved)
        chosen[kept] = True
        require(
            bool((moved == chosen).all()),
            f"k = {k}: logits of {int((moved & ~chosen).sum())} unselected positions have a gradient, of "
            f"{int((~moved & chosen).sum())} selected ones none",
        )

    same = SelectiveLM(student, k=0.25)(student, ids)
    first = mine.flatten()[: round(0.25 * mine.numel())].mean()
    require_close(same, first, 1e-5, "reference = student: every excess is 0, so the first tokens are kept")
    before = {name: p.clone() for name, p in reference.named_parameters()}
    SelectiveLM(reference, k=0.5)(student, ids).backward()
    require(
        all(p.grad is None and torch.equal(p, before[name]) for name, p in reference.named_parameters()),
        "the reference was trained, or has a gradient",
    )
    for k in (0.0, 1.5, float("nan")):
        require_error(ValueError, lambda k=k: SelectiveLM(reference, k=k), f"k = {k}")


def _greedy(model: nn.Module, first: Tensor, n: int) -> Tensor:
    """The n ids that the model itself would say, the first one given."""
    ids = first.view(1, 1)
    with torch.no_grad():
        for _ in range(n - 1):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0]


def _losses(model: nn.Module, ids: Tensor) -> Tensor:
    """-log p(token t+1 | tokens 0..t), [rows, T-1]."""
    with torch.no_grad():
        logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return -logp.gather(2, ids[:, 1:, None])[..., 0]


def _clm(model: nn.Module, ids: Tensor) -> Tensor:
    """The plain loss, its sum taken in the order in which the logits lie: the last position has no target."""
    labels = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()
    return F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels, reduction="sum") / (
        (labels != -100).sum()
    )


def _gradients(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    value = loss()
    value.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return value.detach(), found


def _watch(out: Tensor, seen: list[Tensor]) -> None:
    """Keep the gradient of the first logits that have one."""
    if not seen and out.grad_fn is not None:
        out.retain_grad()
        seen.append(out)
