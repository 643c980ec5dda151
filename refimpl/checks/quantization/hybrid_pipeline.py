"""The check of the hybrid pipeline (survey, Fig. 5): prune, quantize what is left, repair by distillation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {"hybrid_pipeline": "refimpl.quantization.hybrid:hybrid"}
DAMP, BITS = 0.01, 4
STEPS = 8


@check
def check_hybrid_pipeline(hybrid: Callable) -> None:
    """`hybrid(teacher, ids, batches, train_what=, steps=, batch=, lr=)` with its default recipe, half of the
    weights (SparseGPT, blocks of 128 columns) and then GPTQ of 4 bits, asymmetric in groups of 32 -> (model,
    report). Linear layers with `weight` W^ and `nbytes()`."""
    ids = random_ids(12, 24)
    batches = lambda step: random_ids(4, 12, seed=step)
    teacher = tiny("gpt2", num_hidden_layers=1)
    before = {key: t.clone() for key, t in teacher.state_dict().items()}
    start, report = _run(hybrid, teacher, ids, batches, "norms", lr=1e-9)
    names = [name for name, module in start.named_modules() if hasattr(module, "nbytes")]
    require(len(names) == 4, f"{len(names)} layers of the block are compressed, not 4")
    first = names[0]
    inputs = _inputs(teacher, first, ids)
    expected, keep = _prune_then_quantize(before[f"{first}.weight"].T.double(), inputs)
    found = start.get_submodule(first).weight.detach().double()
    zeros = int((found[~keep] != 0).sum())
    require(zeros == 0, f"{first}: {zeros} of the weights that SparseGPT leaves out are not 0")
    H = inputs.T @ inputs
    dense = before[f"{first}.weight"].T.double()
    lost = [float((((dense - W) @ H) * (dense - W)).sum()) for W in (found, expected)]
    told = f"SparseGPT and then GPTQ of the kept weights, with all errors fed back, has {lost[1]:.4g}"
    require(abs(lost[0] / lost[1] - 1) < 0.001, f"{first}: output error {lost[0]:.4g}; {told}")
    size = sum(start.get_submodule(name).nbytes() for name in names)
    weights = sum(start.get_submodule(name).weight.numel() for name in names)
    biases = 4 * sum(start.get_submodule(name).out_features for name in names)
    most = weights * (1 + BITS / 2 + (16 + BITS) / 32) / 8 + biases
    require(
        size <= 1.01 * most, f"the block takes {size} bytes; mask, half of the codes and scales {most:.0f}"
    )
    far = _kl(start, teacher, ids)
    for what, lr in (("norms", 5e-3), ("scales", 5e-4)):
        model, report = _run(hybrid, teacher, ids, batches, what, lr)
        told = f"train_what={what!r}"
        _require_same_storage(start, model, names, told, moved=what == "scales")
        near = _kl(model, teacher, ids)
        require(
            near < 0.97 * far, f"{told}: KL to the teacher {near:.4g} after the repair, {far:.4g} before it"
        )
        rest = {n: p for n, p in model.named_parameters() if not n.startswith(tuple(names))}
        changed = [n for n, p in rest.items() if not torch.equal(p, before[n])]
        norms = [n for n in changed if "ln_" in n]
        require(norms == changed, f"{told}: {', '.join(set(changed) - set(norms))} changed; only {what} may")
        require(bool(norms) == (what == "norms"), f"{told}: {len(norms)} tensors of norms changed")
        after = sum(model.get_submodule(name).nbytes() for name in names)
        require(after == size, f"{told}: the layers take {after} bytes after the repair, {size} before it")
        told += f": the report says {report.bytes_after} bytes in the end, {report.bytes_compressed} before"
        require(report.bytes_after == report.bytes_compressed, f"{told} the repair, which costs none")
    now = teacher.state_dict()
    require(all(torch.equal(t, now[key]) for key, t in before.items()), "the teacher was changed")


def _run(hybrid: Callable, teacher: nn.Module, ids: Tensor, batches: Callable, what: str, lr: float) -> tuple:
    return hybrid(teacher, ids, batches, train_what=what, steps=STEPS, batch=4, lr=lr)


def _require_same_storage(start: nn.Module, model: nn.Module, names: list, told: str, *, moved: bool) -> None:
    """The same zeros; the same integers: W^ of a group is a multiple of what it was."""
    changed = False
    for name in names:
        a, b = (m.get_submodule(name).weight.detach() for m in (start, model))
        require(torch.equal(a == 0, b == 0), f"{told}: {name} has other zeros after the repair")
        if not moved:
            require(torch.equal(a, b), f"{told}: the matrix of {name} changed with the norms")
            continue
        changed |= not torch.equal(a, b)
        a, b = a.view(len(a), -1, 32).double(), b.view(len(b), -1, 32).double()
        ratio = (a * b).sum(-1, keepdim=True) / (a * a).sum(-1, keepdim=True).clamp(min=1e-12)
        require_close(b, a * ratio, 1e-4, f"{told}: {name} is not the same integers times other scales")
    require(changed == moved, f"{told}: no scale has changed")


def _kl(model: nn.Module, teacher: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        p, q = (F.log_softmax(m(ids).logits, -1) for m in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def _inputs(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    """What a module is fed, [N, d_in], float64."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0].flatten(0, 1).double()


def _prune_then_quantize(W: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Both steps by optimal brain surgery with an explicit inverse; d_in <= 32: one block, one group."""
    H = 2 / len(X) * X.T @ X
    H += DAMP * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    costs = torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(len(H))])
    score = (W.square() / costs).flatten()
    keep = torch.ones_like(score, dtype=torch.bool)
    keep[score.argsort(stable=True)[: score.numel() // 2]] = False
    keep = keep.view(W.shape)
    pruned = _surgery(W, H, lambda j, w: w * keep[:, j])
    lo, hi = pruned.amin(1).clamp(max=0), pruned.amax(1).clamp(min=0)
    scale = ((hi - lo) / (2**BITS - 1)).half().double()
    zero = (-lo / scale).round()
    rounded = lambda j, w: (((w / scale).round() + zero).clamp(0, 2**BITS - 1) - zero) * scale * keep[:, j]
    return _surgery(pruned, H, rounded), keep


def _surgery(W: Tensor, H: Tensor, settle: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Settle column after column; those to come move to make up for it."""
    W = W.clone()
    for j in range(W.shape[1]):
        inverse = torch.linalg.inv(H[j:, j:])
        value = settle(j, W[:, j])
        W[:, j:] -= ((W[:, j] - value) / inverse[0, 0])[:, None] * inverse[0]
        W[:, j] = value
    return W
