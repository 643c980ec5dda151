"""How the add-on of Dynamic Context Pruning is trained and measured; `data/kvcache_adapters.py` runs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.kvcache.dcp import ContextPruning, sparsity
from refimpl.world.formats import BY_NAME
from refimpl.world.mix import SHARES
from refimpl.world.rng import Rng
from refimpl.world.tokens import EOT

__all__ = ["PruningRun", "alpha_at", "pruned_scores", "slot_width", "train_pruning", "window_scores",
           "world_rows"]  # fmt: skip


@dataclass(frozen=True)
class PruningRun:
    """Settings of one training run of an add-on.

    Parameters: gamma >= 0, weight of the penalty (paper: 0.01 to 0.3 and more); steps; r, width of the small
    keys; interaction_only, whether the model stays as it is (not in the paper, which trains all weights); lr
    of the model and lr_interaction of the add-on; alpha, last value of its schedule; bias, first value of b
    (gates with z above 1 / (alpha - 1) are 1 and have no gradient: with z = 5 from alpha = 1.2 on).
    Raises ValueError for values out of range.

    >>> PruningRun(gamma=0.3).alpha
    8.0
    """

    gamma: float
    steps: int = 200
    r: int = 16
    interaction_only: bool = False
    lr: float = 1e-4
    lr_interaction: float = 1e-2
    alpha: float = 8.0
    bias: float = 2.0
    seed: int = field(default=0)

    def __post_init__(self) -> None:
        rules = {"gamma": (self.gamma >= 0, "0 and more"), "steps": (self.steps >= 1, "1 and more"),
                 "lr": (self.lr > 0, "above 0"), "lr_interaction": (self.lr_interaction > 0, "above 0"),
                 "alpha": (1 <= self.alpha < math.inf, "1 and more, finite")}  # fmt: skip
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise ValueError(f"{name}: {getattr(self, name)!r}; allowed: {allowed}")


def alpha_at(step: int, steps: int, last: float = 8.0) -> float:
    """Return alpha after `step` of `steps` updates: a half cosine from 1 to `last`.

    Gates that are 0 or 1 have no gradient, and with a large alpha most are: hence the slow start.

    >>> [round(alpha_at(step, 4), 2) for step in range(5)]
    [1.0, 2.03, 4.5, 6.97, 8.0]
    """
    return last + (1 - last) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2


def train_pruning(
    model: nn.Module, batches: Callable[[int], LongTensor], run: PruningRun
) -> tuple[ContextPruning, list[dict[str, float]]]:
    """Train an add-on, and unless `interaction_only` the model with it, in place.

    Minimises the mean of -log p(next token) + gamma · sparsity with AdamW, a tenth of the steps as warm-up,
    and gradients clipped to norm 1.

    Parameters: model, on its device; batches, step -> ids [B, T].
    Returns the add-on and records {step, alpha, loss, kept (the penalty without gamma), grad_norm}.
    """
    bb, device = Backbone(model), next(model.parameters()).device
    pruning = ContextPruning(
        bb.d, bb.n_layers, run.r, torch.Generator().manual_seed(run.seed), bias=run.bias
    ).to(device)
    model.requires_grad_(not run.interaction_only)
    groups = [{"params": list(pruning.parameters()), "lr": run.lr_interaction}]
    if not run.interaction_only:
        groups.append({"params": list(model.parameters()), "lr": run.lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    parameters = [p for group in groups for p in group["params"]]
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, run.steps // 10))
    )
    records = []
    for step in range(run.steps):
        ids = batches(step).to(device)
        alpha = alpha_at(step, run.steps, run.alpha)
        logits, keeps = pruning(model, ids, alpha)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        kept = sparsity(keeps)
        (loss + run.gamma * kept).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        if step % 10 == 0 or step == run.steps - 1:
            numbers = {"loss": loss, "kept": kept, "grad_norm": norm}
            records.append(
                {"step": step, "alpha": round(alpha, 4)} | {n: round(t.item(), 5) for n, t in numbers.items()}
            )
    model.requires_grad_(True)
    return pruning.eval(), records


@torch.no_grad()
def pruned_scores(
    model: nn.Module, pruning: ContextPruning, rows: LongTensor, *, batch: int = 8
) -> dict[str, Tensor]:
    """Score rows [N, T] with the step function, which is what decoding token by token gives.

    Returns per row: nll, mean -log p of its tokens 1 to T-1 in nats; slots, mean number of slots that a layer
    holds after each token; last, the same after the last token only.
    """
    T, device = rows.shape[1], next(model.parameters()).device
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    found: dict[str, list[Tensor]] = {"nll": [], "slots": [], "last": []}
    for ids in rows.to(device).split(batch):
        logits, keeps = pruning(model, ids, math.inf)
        held = torch.stack([(keep * causal).sum(-1) for keep in keeps]).mean(0)  # [B, T]
        for name, value in (("nll", _nll(logits, ids)), ("slots", held.mean(1)), ("last", held[:, -1])):
            found[name].append(value.cpu())
    return {name: torch.cat(values) for name, values in found.items()}


@torch.no_grad()
def window_scores(model: nn.Module, rows: LongTensor, window: int, *, batch: int = 8) -> dict[str, Tensor]:
    """Score rows [N, T] with the cache of policy `Window(window)`: nll and slots as `pruned_scores`.

    A token attends to itself and to the `window` tokens that the cache held before it.
    Raises ValueError unless window >= 1.
    """
    if window < 1:
        raise ValueError(f"window: {window}; allowed: 1 and more")
    bb, T, device = Backbone(model), rows.shape[1], next(model.parameters()).device
    pos = torch.arange(T, device=device)
    near = pos >= pos[:, None] - window
    parts = []
    for ids in rows.to(device).split(batch):
        x = bb.embed(ids, pos)
        for l in range(bb.n_layers):
            x = bb.block(l, x, pos, bb.mask(l, T) & near)
        parts.append(_nll(bb.head(bb.ln_final(x)), ids).cpu())
    slots = (pos + 1).clamp(max=window).float().mean().cpu()
    return {"nll": torch.cat(parts), "slots": slots.expand(len(rows))}


def slot_width(bb: Backbone, r: int = 0) -> int:
    """Numbers that one slot of one layer takes: a key and a value for each KV head, and a small key.

    >>> from refimpl.checks.tiny import tiny
    >>> slot_width(Backbone(tiny("llama")), r=4)  # 2 · 2 · 8 + 4
    36
    """
    return 2 * bb.G * bb.D + r


def world_rows(tokenizer: Any, n_rows: int, width: int, split: str, seed: int) -> LongTensor:
    """Make rows [n_rows, width] of the world's formats in the shares of pretraining, without books.

    A row begins with id 0, which also stands between documents; the last document of a row is cut.
    """
    names, shares = list(SHARES), np.array(list(SHARES.values()))
    draw = np.random.default_rng(seed)
    rngs = {name: Rng("pruning", split, seed, name) for name in names}
    rows: list[list[int]] = []
    row = [EOT]
    while len(rows) < n_rows:
        # Shares are per cent of tokens; documents differ in length, so this draw is only roughly the same.
        chosen = draw.choice(len(names), size=64, p=shares / shares.sum())
        texts = [BY_NAME[names[i]].document(rngs[names[i]], split) for i in chosen]
        for ids in tokenizer(texts)["input_ids"]:
            row += [*ids, EOT]
            if len(row) >= width:
                rows.append(row[:width])
                row = [EOT]
    return torch.tensor(rows[:n_rows])


def _nll(logits: Tensor, ids: LongTensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none").mean(1)
