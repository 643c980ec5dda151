"""The check of NutePrune (quantization spec, section 21; arXiv 2402.09773)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import HEADS, LAYERS, WIDTH, random_ids, tiny

IMPLEMENTATION = {"nuteprune": "refimpl.quantization.pruning.nuteprune:nuteprune"}
NEURONS, DIM, GROUPS = 40, WIDTH // HEADS, 2
TARGET, INTERVAL, AHEAD, STEPS, WARMUP = 0.3, 0.03, 2, 32, 8


@check
def check_nuteprune(nuteprune: Callable) -> None:
    """`nuteprune(model, ids, sparsity=, generator=, steps=, warmup=, batch=, teachers=, interval=, ahead=,
    masks_lr=, lambdas_lr=, lora_lr=)` prunes in place; returns masks (heads, neurons, hidden), sparsity and
    the course: expected, target, teacher, losses, lambdas. teachers: "numerous", "dense", None."""
    ids = random_ids(1, 8)

    def train(**settings: object) -> tuple[object, nn.Module, list[tuple[bool, Tensor]]]:
        model = tiny("llama")
        seen = _watch(model)
        given = {"sparsity": TARGET, "generator": torch.Generator().manual_seed(0), "steps": STEPS}
        given |= {"warmup": WARMUP, "batch": 1, "interval": INTERVAL, "ahead": AHEAD}
        given |= {"masks_lr": 0.5, "lambdas_lr": 20.0, "lora_lr": 1e-2}
        return nuteprune(model, ids, **(given | settings)), model, seen

    plain, _, _ = train(steps=1, teachers=None)
    with torch.no_grad():
        expected = float(tiny("llama")(ids, labels=ids).loss)
    near = abs(plain.losses[0] - expected) < 0.1 * expected
    require(near, f"no teacher: the first loss is {plain.losses[0]:.3f}, the model's own {expected:.3f}")
    report, model, seen = train()
    ramp = [TARGET * min(1, step / WARMUP) for step in range(STEPS)]
    require_close(torch.tensor(report.target), torch.tensor(ramp), 1e-6, "the target sparsity of each step")
    start = [1 / (1 + math.exp(-(at + 2 / 3 * math.log(11)))) for at in (10.0, math.log(99))]
    first = (
        1 - _left(*(torch.full(s, p) for s, p in zip(_shapes(), (*start, start[0]), strict=True))) / _left()
    )
    close = math.isclose(report.expected[0], first, rel_tol=0.03)
    require(close, f"expected sparsity of the first step: {report.expected[0]:.5f}, not {first:.5f}")
    below = [step for step in range(1, STEPS) if max(report.expected[:step]) < TARGET]
    first_steps = [l[0] for l in report.lambdas[1:WARMUP]]  # in step 0, t is 0
    falls = first_steps == sorted(first_steps, reverse=True) and first_steps[-1] < 0
    require(falls, f"lambda_1 does not fall while s < t: {[round(l, 1) for l in first_steps]}")
    rises = all(l[1] >= 0 for l in report.lambdas) and report.lambdas[-1][1] > 0
    require(rises, f"lambda_2 fell to {report.lambdas[-1][1]:.2f}")
    found = max(report.expected)
    require(found > 0.8 * TARGET, f"the expected sparsity never passes {found:.3f} on its way to {TARGET}")
    taught = [step for step in below if report.teacher[step] > 0]
    require(len(taught) >= 2, f"an earlier self taught in {len(taught)} of {len(below)} steps to the target")
    for step in taught:
        gap = report.expected[step] - report.teacher[step]
        require(gap > 0, f"step {step}: the teacher is sparser than its student, by {-gap:.3f}")
        before = [s for s in report.expected[:step] if s == report.teacher[step]]
        require(
            before, f"step {step}: the teacher's sparsity {report.teacher[step]:.3f} is of no earlier step"
        )
    _check_factors(seen, report.teacher)
    masks = report.masks
    hard = 1 - _left(*((m > 0).double() for m in (masks.heads, masks.neurons, masks.hidden))) / _left()
    require(report.sparsity > TARGET / 2, f"{report.sparsity:.3f} is cut out at the end, at {TARGET}")
    right = math.isclose(report.sparsity, hard, abs_tol=1e-6)
    require(right, f"sparsity is said to be {report.sparsity:.4f}; the masks leave out {hard:.4f}")
    left = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
    require(math.isclose(1 - left / _left(), hard, abs_tol=1e-6), f"{left} weights of {_left():.0f} are left")
    # Without training of the factors the pruned model is the plain one under the masks.
    report, model, _ = train(lora_lr=1e-12, steps=STEPS // 2)
    with torch.no_grad():
        plain = tiny("llama")
        _mask(plain, report.masks)
        require_close(model(ids).logits, plain(ids).logits, 1e-3, "cut and masked logits")
    dense, _, _ = train(teachers="dense", steps=2)
    require(not any(dense.teacher), "teachers='dense': an earlier self taught")


def _watch(model: nn.Module) -> list[tuple[bool, Tensor]]:
    """Of every run: whether it is a student's, and the parameters that the plain model does not have."""
    own = {name for name, _ in model.named_parameters()}
    seen: list[tuple[bool, Tensor]] = []

    def look(module: nn.Module, _: tuple[object, ...]) -> None:
        new = [p.detach().flatten() for name, p in module.named_parameters() if name not in own]
        if new:
            seen.append((torch.is_grad_enabled(), torch.cat(new).clone()))

    model.register_forward_pre_hook(look)
    return seen


def _check_factors(seen: list[tuple[bool, Tensor]], teacher: list[float]) -> None:
    """The LoRA factors of an earlier self are those of an earlier step."""
    students = [factors for grad, factors in seen if grad]
    teachers = [factors for grad, factors in seen if not grad]
    require(
        len(students) == len(teachers) == len(teacher),
        "a step is one run of the teacher and one of the student",
    )
    for step, sparsity in enumerate(teacher):
        if sparsity > 0:
            same = [s for s in range(step + 1) if torch.equal(students[s], teachers[step])]
            require(same and same[0] < step, f"step {step}: the teacher does not have its own LoRA factors")


def _shapes() -> tuple[tuple[int, ...], ...]:
    return (LAYERS, HEADS), (LAYERS, NEURONS), (WIDTH,)


def _left(heads: Tensor | None = None, neurons: Tensor | None = None, hidden: Tensor | None = None) -> float:
    """Weights of the blocks, when units are there with these probabilities."""
    given = (heads, neurons, hidden)
    heads, neurons, hidden = (
        torch.ones(s) if t is None else t.double() for s, t in zip(_shapes(), given, strict=True)
    )
    shared = 1 - (1 - heads.view(LAYERS, GROUPS, -1)).prod(-1)
    return float(hidden.sum() * (2 * DIM * (heads.sum() + shared.sum()) + 3 * neurons.sum()))


def _mask(model: nn.Module, masks: object) -> None:
    """Hooks that multiply by the masks, wherever they belong."""
    hidden = masks.hidden
    model.model.embed_tokens.register_forward_hook(lambda _, __, y: y * hidden)
    for l, layer in enumerate(model.model.layers):
        for module, gates in (
            (layer.self_attn.o_proj, masks.heads[l].repeat_interleave(DIM)),
            (layer.mlp.down_proj, masks.neurons[l]),
        ):
            module.weight.mul_(gates)
            module.register_forward_hook(lambda _, __, y: y * hidden)
