"""The checks of differentiable subset pruning (quantization spec, section 24; arXiv 2108.04657)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import HEADS, LAYERS, WIDTH, random_ids, tiny

IMPLEMENTATION = {
    "soft_top_k": "refimpl.quantization.pruning.subset_pruning:soft_top_k",
    "subset_pruning": "refimpl.quantization.pruning.subset_pruning:train_subset",
}
N, TOKEN = LAYERS * HEADS, 7


@check
def check_soft_top_k(soft_top_k: Callable) -> None:
    """`soft_top_k(scores [n] float64, k, temperature)`: a sum of k softmaxes, where each takes out of the
    scores what the ones after it do not see."""
    for seed in range(4):
        scores = torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
        for k in (1, 6, 20):
            for temperature in (100.0, 1.0, 0.1, 1e-8):
                what = f"k = {k}, temperature {temperature:g}"
                r = scores.clone().requires_grad_()
                mask = soft_top_k(r, k, temperature)
                require(mask.dtype == torch.float64, f"{what}: the mask is {mask.dtype}, which underflows")
                total = float(mask.detach().sum())
                require(abs(total - k) < 1e-9, f"{what}: the mask sums to {total:.6g}")
                require_close(mask, _taken(scores, k, temperature), 1e-9, f"{what}: the mask")
                require(mask.requires_grad, f"{what}: no gradient reaches the scores")
                (mask * torch.arange(20.0)).sum().backward()
                require(bool(r.grad.isfinite().all()), f"{what}: gradients are not finite")
            hard = torch.zeros(20, dtype=torch.float64)
            hard[scores.sort(descending=True).indices[:k]] = 1
            require_close(soft_top_k(scores, k, 1e-8), hard, 1e-12, f"k = {k}, cold: the top k")


@check
def check_subset_pruning(train_subset: Callable) -> None:
    """`train_subset(model, ids, k, generator=, steps=, cooldown=, batch=, weights_lr=, straight_through=)` ->
    scores [L, H], heads [L, H] and losses; weights_lr None: only scores are trained."""
    _check_losses(train_subset, random_ids(1, 10))
    ids = torch.full((1, 6), TOKEN)
    bad = torch.zeros(LAYERS, HEADS).bool()
    bad[0] = True  # a layer that only hurts
    bad[2, 1] = True
    for straight_through in (False, True):
        what = "straight-through" if straight_through else "annealed"
        model = _with_bad_heads(bad)
        before = [p.detach().clone() for p in model.parameters()]
        settings = {"steps": 25, "batch": 1, "weights_lr": None, "straight_through": straight_through}
        report = train_subset(model, ids, 7, generator=torch.Generator().manual_seed(0), **settings)
        kept = int(report.heads.sum())
        require(kept == 7, f"{what}: {kept} heads are kept instead of 7")
        top = torch.zeros(N).bool()
        top[report.scores.flatten().sort(descending=True).indices[:7]] = True
        require(
            torch.equal(report.heads.flatten(), top), f"{what}: the heads are not those of the largest scores"
        )
        wrong = int((report.heads & bad).sum())
        require(wrong == 0, f"{what}: {wrong} of the 5 heads that hurt are kept")
        same = all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        require(same, f"{what}: the weights changed although they were frozen")


def _check_losses(train_subset: Callable, ids: Tensor) -> None:
    settings = {"steps": 6, "cooldown": 3, "batch": 1, "weights_lr": None}
    plain = _loss(tiny("llama"), ids)
    whole = train_subset(tiny("llama"), ids, N, generator=torch.Generator().manual_seed(0), **settings)
    require_close(torch.tensor(whole.losses[3:]), torch.full((3,), plain), 1e-3, "all heads, cold: losses")
    hot = train_subset(tiny("llama"), ids, N // 2, generator=torch.Generator().manual_seed(0), **settings)
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.5)
    expected = torch.tensor([_loss(model, ids)])
    require_close(torch.tensor(hot.losses[:1]), expected, 0.02, "half the heads, hot: every gate 1/2: loss")
    trained = tiny("llama")
    train_subset(trained, ids, 6, generator=torch.Generator(), steps=2, weights_lr=1e-3)
    pairs = zip(trained.parameters(), tiny("llama").parameters(), strict=True)
    require(any(not torch.equal(a, b) for a, b in pairs), "joint: the weights did not change")


def _taken(scores: Tensor, k: int, temperature: float) -> Tensor:
    """The same in logarithms: log(1 - p) from the logits themselves."""
    r, mask = scores.clone(), torch.zeros_like(scores)
    for _ in range(k):
        p = (r / temperature - (r / temperature).logsumexp(0)).exp()
        mask += p
        r = r + torch.where(p < 1, torch.log1p(-p), torch.tensor(-708.0, dtype=torch.float64))
    return mask


def _with_bad_heads(bad: Tensor) -> nn.Module:
    """Every value is 1; bad heads write it against the embedding of TOKEN, the whole text; others nothing."""
    model = tiny("gpt2")
    with torch.no_grad():
        direction = -0.3 * HEADS / WIDTH * model.get_input_embeddings().weight[TOKEN]
        for block, row in zip(model.transformer.h, bad, strict=True):
            block.attn.c_attn.weight[:, 2 * WIDTH :] = 0
            block.attn.c_attn.bias[2 * WIDTH :] = 1
            block.attn.c_proj.weight.copy_(row.repeat_interleave(WIDTH // HEADS)[:, None] * direction)
    return model


def _loss(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)
