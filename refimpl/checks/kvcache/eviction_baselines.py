"""The checks of window and random eviction (kv-cache spec 2)."""

from collections.abc import Callable

import torch

from refimpl.checks import check, require, require_close, require_error
from refimpl.checks.tiny import LAYERS, random_ids, tiny

IMPLEMENTATION = {
    "window": "refimpl.kvcache.baselines:window_cache",
    "random_eviction": "refimpl.kvcache.baselines:random_cache",
}
KV_HEADS = 2


@check
def check_window(window_cache: Callable) -> None:
    """`window_cache(model, recent)`: query t meets tokens t - recent .. t, whose states saw older ones."""
    ids, n = random_ids(2, 30), 30
    for recent in (1, 5, 40):
        at = torch.arange(n)
        hidden = (at[:, None] < at) | (at[:, None] - at > recent)
        bias = torch.zeros(2, 1, n, n).masked_fill(hidden, torch.finfo(torch.float32).min)
        with torch.no_grad():
            expected = tiny("llama")(ids, attention_mask=bias, use_cache=False).logits
        _, logits = _run(lambda model, recent=recent: window_cache(model, recent), ids)
        require_close(logits, expected, 2e-5, f"recent {recent}: logits, against one pass with a banded mask")
    for wrong in (0, -1, 2.5):
        require_error(ValueError, lambda wrong=wrong: window_cache(tiny("llama"), wrong), f"recent {wrong}")


@check
def check_random_eviction(random_cache: Callable) -> None:
    """`random_cache(model, budget, generator)`: the newest token and a uniform sample of all others."""
    n, budget, runs, rows = 16, 5, 2, 120
    hits = torch.zeros(n)
    for seed in range(runs):
        draw = torch.Generator().manual_seed(seed)
        cache, _ = _run(lambda model, draw=draw: random_cache(model, budget, draw), random_ids(rows, n))
        for layer in range(LAYERS):
            held = cache.held(layer)
            require(bool((held == budget).all()), f"{held.tolist()} slots held, not {budget}")
            pos = cache.layers[layer].pos
            require(
                pos.shape == (rows, KV_HEADS, budget), f"positions {list(pos.shape)}: not each head its own"
            )
            hits += torch.bincount(pos.flatten(), minlength=n)
    draws = runs * rows * KV_HEADS * LAYERS
    require(hits[-1] == draws, f"the newest token is held {int(hits[-1])} times of {draws}")
    expected, share = draws * (budget - 1) / (n - 1), (budget - 1) / (n - 1)
    chi2 = float(((hits[:-1] - expected) ** 2 / (expected * (1 - share))).sum())
    require(
        chi2 < 50,
        f"older tokens are no uniform sample: chi-square {chi2:.0f} ({n - 2} degrees of freedom); held "
        f"from the oldest on {[int(h) for h in hits[:-1]]}",
    )


def _run(make: Callable, ids: torch.Tensor) -> tuple:
    """The cache and the logits after feeding ids one by one."""
    model = tiny("llama")
    cache = make(model)
    with torch.no_grad():
        out = [
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
            for t in range(ids.shape[1])
        ]
    return cache, torch.cat(out, 1)
