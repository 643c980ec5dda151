"""The check of DynamicKV (kv-cache spec 11)."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require

IMPLEMENTATION = {"dynamickv": "refimpl.kvcache.dynamickv:DynamicKV"}
G, R, N, L = 2, 2, 48, 5
CAPACITY, WINDOW = 11, 4
BASE = CAPACITY - WINDOW


@check
def check_dynamickv(DynamicKV: Callable) -> None:
    """`DynamicKV(capacity, window, kernel, pooling, most, every)` with `observe`, `keep` and `plan`."""
    for seed, scale in ((0, 1.0), (1, 3.0), (2, 0.0)):
        weights = [_attention(seed + (l * 10 if scale else 0), 1 + scale * l / L) for l in range(L)]
        votes = [w[0, :, :, -WINDOW:, :-WINDOW].sum(2).mean(1) for w in weights]  # kernel 1, [G, N - WINDOW]
        budgets = _budgets(votes)
        policy = DynamicKV(CAPACITY, WINDOW, 1, "avg", 10.0, L)
        views = [_view(w, l) for l, w in enumerate(weights)]
        for v in views:
            policy.observe(v)
            require(policy.keep(v) is None, "a layer within its largest budget is cut before the plan")
        kept = [_mask(keep) for keep in policy.plan(views)]
        got = [int(mask[0, 0].sum()) - WINDOW for mask in kept]
        require(sum(got) == BASE * L, f"budgets {got} sum to {sum(got)}, not {BASE} · {L}")
        require(got == budgets, f"layers' budgets are {got}, not {budgets}")
        for l, (mask, vote) in enumerate(zip(kept, votes, strict=True)):
            for g in range(G):
                best = vote[g].argsort(descending=True)[: budgets[l]].tolist()
                expected = sorted([*best, *range(N - WINDOW, N)])
                found = mask[0, g].nonzero().flatten().tolist()
                require(found == expected, f"layer {l}, head {g} keeps {found}, not its best {expected}")
    cut = DynamicKV(CAPACITY, WINDOW, 1, "avg", 2.0, L)
    view = _view(_attention(0, 1.0), 0)
    cut.observe(view)
    n = int(_mask(cut.keep(view))[0, 0].sum())
    require(n == 2 * BASE + WINDOW, f"most = 2: a layer is first cut to {n} slots, not {2 * BASE + WINDOW}")


def _budgets(votes: list[Tensor]) -> list[int]:
    """Layers' shares of the G · L · base largest votes, by largest remainders."""
    entries = [(float(x), l) for l, vote in enumerate(votes) for x in vote.flatten()]
    largest = sorted(entries, key=lambda entry: -entry[0])[: G * L * BASE]
    counts = [sum(l == layer for _, l in largest) for layer in range(len(votes))]
    budgets = [count // G for count in counts]
    order = sorted(range(L), key=lambda l: -(counts[l] % G))
    for l in order[: BASE * L - sum(budgets)]:
        budgets[l] += 1
    return budgets


def _attention(seed: int, sharpness: float) -> Tensor:
    scores = sharpness * torch.randn(1, G, R, N, N, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1)


def _mask(keep: Tensor | None) -> Tensor:
    require(keep is not None, "nothing is evicted")
    if keep.dtype != torch.bool:
        keep = torch.zeros(1, G, N, dtype=torch.bool).scatter(-1, keep.expand(1, G, -1), True)
    return keep.expand(1, G, N)


def _view(weights: Tensor, layer: int) -> SimpleNamespace:
    return SimpleNamespace(
        shape=(1, G, N), S=N, T=N, seen=N, prefill=True, layer=layer, n_layers=L, full=True, count=N,
        rank=torch.arange(N), pos=torch.arange(N).expand(1, G, N), device=weights.device,
        slot={"vote": torch.zeros(1, G, N)}, q=torch.zeros(1, G, R, N, 1), notes={},
        ok=torch.ones(1, G, N, dtype=torch.bool), attn_lastw=lambda w: weights[:, :, :, -w:],
    )  # fmt: skip
