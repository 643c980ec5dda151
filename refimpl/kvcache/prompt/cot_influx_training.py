"""Training CoT-Influx' pruner on its task, and what it and the other ways to fill the window keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from refimpl.kvcache.prompt.cot_influx import (
    MovingAverage,
    Pruner,
    encode,
    fill,
    prune,
    reinforce_loss,
    reward,
    sample_actions,
)  # fmt: skip
from refimpl.kvcache.prompt.cot_influx_task import KINDS, LIMIT, Task, budgets, read, rollout
from refimpl.models import revision
from refimpl.paths import data_file
from refimpl.training import History, TrainConfig, train


def train_pruner(
    pruner: Pruner, llm: nn.Module, tasks: Callable[[int], Sequence[Task]], *, layer: int, limit: int = LIMIT,
    updates: int = 300, questions: int = 8, samples: int = 8, lr: float = 1e-3, seed: int = 0,
    time_limit: float = float("inf"),
) -> tuple[History, list[float]]:  # fmt: skip
    """Train a pruner by REINFORCE; the LLM is encoder and environment, and stays as it is.

    Parameters: pruner, on the LLM's device; llm; tasks(step), the questions of an update; layer of the
    features; limit T; updates; samples of actions per question; lr; seed of the actions; time_limit in
    seconds. Returns the log of the training loop and the mean reward of every update.
    """
    generator = torch.Generator().manual_seed(seed)
    baseline: list[MovingAverage] = []
    rewards: list[float] = []

    def loss_fn(policy: Pruner, batch: dict[str, Tensor]) -> Tensor:
        asked = tasks(int(batch["step"][0]))
        actions = sample_actions(policy, *read(llm, asked, layer), samples, generator)
        found = rollout(llm, asked, actions.tokens)
        r = reward(found["loss"].float(), found["correct"], found["tokens"], limit)
        if not baseline:  # the first update has no past: it starts at its own mean
            baseline.append(MovingAverage(start=r.mean().item()))
        loss = reinforce_loss(actions.log_prob, r.to(actions.log_prob.device), baseline[0].value)
        baseline[0].update(r)
        rewards.append(r.mean().item())
        return loss

    config = TrainConfig(
        steps=updates, batch=questions, lr=lr, warmup=min(10, updates // 4), decay_fraction=0.3,
        weight_decay=0.0, amp=False, log_every=10, seed=seed, data="cot influx",
    )  # fmt: skip
    history = train(
        pruner, lambda step: {"step": torch.full((questions,), step)}, config,
        loss_fn=loss_fn, time_limit=time_limit, progress=False,
    )  # fmt: skip
    return history, rewards


@torch.no_grad()
def prunings(
    pruner: Pruner,
    llm: nn.Module,
    tasks: Sequence[Task],
    *,
    layer: int,
    limit: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return what each method keeps, bool [Q, k, N], all within the limit.

    `pruner` (greedy), `random` (shots in random order until T), `first` (keep first until T), `similar`
    (shots by the cosine of mean hidden states with the question's, until T), `none`, and `relevant`: the
    relevant shots alone, as if they were known.
    """
    features, mask = read(llm, tasks, layer)
    device, (Q, k) = mask.device, mask.shape[:2]
    left, sizes = budgets(tasks, limit).to(device), mask.sum(-1)
    relevant = torch.tensor([[kind == "relevant" for kind in task.kinds] for task in tasks], device=device)
    scores = {
        "random": torch.rand(Q, k, generator=generator).to(device),
        "first": -torch.arange(k, device=device).float().expand(Q, k),
        "similar": _similarity(llm, tasks, layer),
        "none": torch.full((Q, k), -torch.inf, device=device),
        "relevant": torch.where(relevant, 0.0, -torch.inf),
    }
    kept = {name: mask & fill(score, sizes, left)[..., None] for name, score in scores.items()}
    return {"pruner": prune(pruner, features, mask, left)} | kept


def _similarity(llm: nn.Module, tasks: Sequence[Task], layer: int) -> Tensor:
    """Cosine [Q, k] of the mean hidden states of question and shot, each read alone."""
    texts = [[*task.shots, task.question] for task in tasks]
    features, mask = encode(llm, [[] for _ in tasks], texts, layer)
    mean = features.sum(-2) / mask.sum(-1, keepdim=True)
    return torch.cosine_similarity(mean[:, :-1], mean[:, -1:], dim=-1)


@torch.no_grad()
def kept_by_kind(
    pruner: Pruner, llm: nn.Module, tasks: Sequence[Task], layer: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return, per kind, mean probabilities per task [Q]: of keeping such a shot, and its tokens."""
    features, mask = read(llm, tasks, layer)
    shot, token = pruner.shot_logits(features, mask).sigmoid(), pruner.token_logits(features).sigmoid()
    token = token.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)
    out = {}
    for kind in dict.fromkeys(KINDS):
        at = torch.tensor([[own == kind for own in task.kinds] for task in tasks], device=shot.device)
        out[kind] = tuple(((x * at).sum(1) / at.sum(1)).cpu().numpy() for x in (shot, token))
    return out


def load_pruner(folder: str | Path | None = None) -> tuple[Pruner, int]:
    """Return a trained pruner and the layer whose features it reads.

    Parameters: folder, None for the one that ships. Raises FileNotFoundError where there is none, ValueError
    for a pruner that was trained on another revision of its model than is installed.
    """
    file = (data_file("adapters", "cot_influx") if folder is None else Path(folder)) / "pruner.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"no pruner at {file}; make it with data/kvcache_trained_prompt.py")
    with safe_open(file, framework="pt") as stored:
        about = stored.metadata()
        weights = {name: stored.get_tensor(name) for name in stored.keys()}
    installed = revision(about["model"])
    if about["revision"] != installed:
        raise ValueError(
            f"folder: trained on revision {about['revision']} of {about['model']}, not {installed}"
        )
    pruner = Pruner(weights["shot.0.weight"].shape[0], int(about["hidden"]))
    pruner.load_state_dict(weights)
    return pruner.eval(), int(about["layer"])
