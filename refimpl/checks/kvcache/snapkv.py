"""The checks of SnapKV, its split over heads, and PyramidKV (kv-cache spec 9 and 10)."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require, require_error

IMPLEMENTATION = {
    "snapkv": "refimpl.kvcache.snapkv:SnapKV",
    "adakv": "refimpl.kvcache.snapkv:AdaSnapKV",
    "pyramidkv": "refimpl.kvcache.pyramidkv:PyramidKV",
}
B, G, R, N = 2, 2, 3, 40
CAPACITY, WINDOW, KERNEL = 12, 4, 5


@check
def check_snapkv(SnapKV: Callable) -> None:
    """`SnapKV(capacity, window, kernel, pooling)` with `keep(v)` for a layer's view v."""
    for pooling in ("avg", "max"):
        for seed in range(3):
            weights = _attention(seed)
            kept = _mask(SnapKV(CAPACITY, WINDOW, KERNEL, pooling).keep(_view(weights)))
            for b in range(B):
                for g in range(G):
                    votes = _votes(weights[b, g], pooling)
                    got = kept[b, g].nonzero().flatten().tolist()
                    where = f"{pooling} pooling, row {b}, head {g}: keeps {got}"
                    window = set(range(N - WINDOW, N))
                    require(window <= set(got), f"{where}, not the whole window")
                    require(len(got) == CAPACITY, f"{where}, not {CAPACITY} slots")
                    least = min(votes[s] for s in got if s not in window)
                    lost = max(range(N - WINDOW), key=lambda s: (s not in got) * votes[s])
                    require(votes[lost] <= least + 1e-6, f"{where}; {lost} has more votes")
    weights = _attention(0)
    policy = SnapKV(CAPACITY, WINDOW, KERNEL)
    again = None if policy.once else policy.keep(_view(weights[..., -1:, :], prefill=False))
    require(again is None, "evicts again while decoding")
    require(SnapKV(N, WINDOW, KERNEL).keep(_view(weights)) is None, "evicts from a prompt that fits")
    for wrong in ((WINDOW, WINDOW), (CAPACITY, WINDOW, 4), (CAPACITY, WINDOW, 5, "sum"), (0, 0)):
        require_error(ValueError, lambda wrong=wrong: SnapKV(*wrong), f"SnapKV{wrong}")


@check
def check_adakv(AdaSnapKV: Callable) -> None:
    """`AdaSnapKV(capacity, window, kernel, pooling, floor)`: heads share capacity · G slots."""
    weights = _attention(1)
    weights[:, 0, :, -WINDOW:, : N - WINDOW] *= 4  # head 0 votes louder
    votes = torch.tensor([[_votes(weights[b, g], "avg") for g in range(G)] for b in range(B)])
    for floor in (0.0, 0.2, 0.75, 1.0):
        kept = _mask(AdaSnapKV(CAPACITY, WINDOW, KERNEL, "avg", floor).keep(_view(weights)))
        for b in range(B):
            safe = set()
            for g in range(G):
                more = max(int(floor * CAPACITY) - WINDOW, 0)
                best = sorted(range(N - WINDOW), key=votes[b, g].tolist().__getitem__)[::-1][:more]
                safe |= {(g, s) for s in [*best, *range(N - WINDOW, N)]}
            others = [(float(votes[b, g, s]), (g, s)) for g in range(G) for s in range(N - WINDOW)]
            others = [slot for _, slot in sorted(others, reverse=True) if slot not in safe]
            expected = safe | set(others[: CAPACITY * G - len(safe)])
            got = {tuple(slot) for slot in kept[b].nonzero().tolist()}
            require(got == expected,
                    f"floor {floor}, row {b}: heads keep {kept[b].sum(-1).tolist()} slots, of which "
                    f"{len(got - expected)} should go and {len(expected - got)} miss")  # fmt: skip


@check
def check_pyramidkv(PyramidKV: Callable) -> None:
    """`PyramidKV(capacity, window, kernel, pooling, beta)`: how many slots each of L layers keeps."""
    weights = _attention(2)
    for capacity, beta, L in ((12, 20, 3), (12, 4, 6), (16, 1, 5), (30, 20, 4), (12, 20, 1)):
        last = (capacity - WINDOW) / beta
        first = 2 * (capacity - WINDOW) - last
        if first > N - WINDOW:
            first, last = N - WINDOW, 2 * (capacity - WINDOW) - (N - WINDOW)
        got = []
        for l in range(L):
            keep = PyramidKV(capacity, WINDOW, KERNEL, "avg", beta).keep(_view(weights, layer=l, n_layers=L))
            got.append(N if keep is None else int(_mask(keep)[0, 0].sum()))
        exact = [WINDOW + first - l * (first - last) / max(L - 1, 1) for l in range(L)]
        what = f"capacity {capacity}, beta {beta}, {L} layers"
        require(all(abs(n - e) <= 1 for n, e in zip(got, exact, strict=True)),
                f"{what}: layers keep {got} slots, not about {[round(e, 1) for e in exact]}")  # fmt: skip
        if L > 1:
            require(abs(sum(got) - L * capacity) <= L / 2,
                    f"{what}: {sum(got)} slots in all, not {L * capacity}")  # fmt: skip


def _votes(weights: Tensor, pooling: str) -> list[float]:
    """Votes of one KV head for the keys before the window, from weights [R, N, N], in plain loops."""
    votes = [0.0] * (N - WINDOW)
    for r in range(R):
        paid = [sum(float(weights[r, i, s]) for i in range(-WINDOW, 0)) for s in range(N - WINDOW)]
        for s in range(N - WINDOW):
            near = paid[max(0, s - KERNEL // 2) : s + KERNEL // 2 + 1]
            votes[s] += (max(near) if pooling == "max" else sum(near) / KERNEL) / R
    return votes


def _attention(seed: int) -> Tensor:
    scores = 2 * torch.randn(B, G, R, N, N, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1)


def _mask(keep: Tensor | None) -> Tensor:
    require(keep is not None, "keep: nothing is evicted")
    if keep.dtype != torch.bool:
        keep = torch.zeros(B, G, N, dtype=torch.bool).scatter(-1, keep.expand(B, G, -1), True)
    return keep.expand(B, G, N)


def _view(weights: Tensor, prefill: bool = True, layer: int = 0, n_layers: int = 3) -> SimpleNamespace:
    """What a policy sees of a layer with these attention weights [B, G, R, T, N]."""
    T = weights.shape[3]
    return SimpleNamespace(
        shape=(B, G, N), S=N, T=T, seen=N, prefill=prefill, layer=layer, n_layers=n_layers, full=True,
        count=N, rank=torch.arange(N), pos=torch.arange(N).expand(B, G, N), device=weights.device, slot={},
        q=torch.zeros(B, G, R, T, 1), ok=torch.ones(B, G, N, dtype=torch.bool), attn=weights,
        attn_lastw=lambda w: weights[:, :, :, -w:], attn_sum=lambda: weights.sum(3),
    )  # fmt: skip
