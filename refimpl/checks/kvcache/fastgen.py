"""The check of FastGen (kv-cache spec 12)."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require

IMPLEMENTATION = {"fastgen": "refimpl.kvcache.fastgen:FastGen"}
N, BOS, COMMA, DOT, WORD = 40, 0, 5, 6, 9
SHARE = 0.2  # of the tokens so far that is frequent, of the prompt that is local
NAMES = ("special", "special + punctuation", "+ frequent", "+ local", "full")


@check
def check_fastgen(FastGen: Callable) -> None:
    """`FastGen(special, punctuation, recovery, frequent, local)` with `observe(v)` and `keep(v)`."""
    ids = torch.full((1, N), WORD)
    ids[0, 0] = BOS
    ids[0, [7, 19, 30]], ids[0, 13] = COMMA, DOT
    maps = {
        "all on BOS": _towards(lambda i: [0]),
        "all on punctuation": _towards(lambda i: [s for s in (7, 13, 19, 30) if s <= i] or [0]),
        "all on a few words": _towards(lambda i: [s for s in (3, 11, 22) if s <= i] or [0]),
        "all near": _towards(lambda i: range(max(0, i - 7), i + 1)),
        "even": _towards(lambda i: range(i + 1)),
    }
    weights = torch.stack(list(maps.values()))[None, :, None].expand(1, -1, 2, N, N)
    # Row by row some mass goes astray: means over rows and single rows differ.
    wrong = torch.rand(1, 5, 2, N, 1, generator=torch.Generator().manual_seed(0)) * 0.2
    weights = (1 - wrong) * weights + wrong * _towards(lambda i: range(i + 1))
    for recovery in (0.3, 0.6, 0.8, 0.9, 0.97, 1.1):
        policy = FastGen([BOS], [COMMA, DOT], recovery, SHARE, SHARE)
        view = _view(weights, ids)
        policy.observe(view)
        kept = policy.keep(view)
        kept = view.ok if kept is None else kept
        for g, name in enumerate(maps):
            rule, expected = _choose(weights[0, g].mean(0), ids[0], recovery)
            got = set(kept[0, g].nonzero().flatten().tolist())
            what = f"recovery {recovery}, head with its attention {name}: keeps {sorted(got)}"
            require(got == expected, f"{what}; rule '{NAMES[rule]}' keeps {sorted(expected)}")

    # Some tokens later: the local part slides, members of a class stay, more are frequent.
    policy = FastGen([BOS], [COMMA, DOT], 0.8, SHARE, SHARE)
    view = _view(weights, ids)
    policy.observe(view)
    rules = [_choose(weights[0, g].mean(0), ids[0], 0.8)[0] for g in range(5)]
    for new in ([WORD], [DOT, WORD, WORD, WORD, WORD]):
        T, n = len(new), N + len(new)
        rows = torch.ones(T, n).tril(N)
        rows = rows / rows.sum(-1, keepdim=True)
        later = _view(rows.expand(1, 5, 2, T, n), torch.tensor([new]), view)
        policy.observe(later)
        kept = policy.keep(later)
        classes = torch.cat([ids[0], torch.tensor(new)])
        for g, rule in enumerate(rules):
            mass = torch.cat([weights[0, g].mean(0).sum(0), torch.zeros(T)]) + rows.sum(0)
            expected = _members(classes, mass, rule, n)
            got = set(range(n)) if kept is None else set(kept[0, g].nonzero().flatten().tolist())
            what = f"after the further tokens {new}, rule '{NAMES[rule]}': keeps {sorted(got)}"
            require(got == expected, f"{what}, not {sorted(expected)}")


def _choose(weights: Tensor, ids: Tensor, recovery: float) -> tuple[int, set[int]]:
    """The cheapest rule whose mean recovery suffices, and what it keeps; A [N, N] row by row."""
    for rule in range(5):
        static, total = _members(ids, weights.sum(0), min(rule, 2), N), 0.0
        for i in range(N):
            near = set(range(i - round(SHARE * N) + 1, i + 1)) if rule == 3 else set()
            total += sum(float(weights[i, s]) for s in range(i + 1) if rule == 4 or s in static | near)
        if total / N >= recovery or rule == 4:
            return rule, _members(ids, weights.sum(0), rule, N)
    raise AssertionError


def _members(ids: Tensor, mass: Tensor, rule: int, n: int) -> set[int]:
    if rule == 4:
        return set(range(n))
    kept = {s for s in range(n) if ids[s] == BOS or rule >= 1 and ids[s] in (COMMA, DOT)}
    if rule >= 2:
        kept |= set(mass.argsort(descending=True)[: round(SHARE * n)].tolist())
    return kept | set(range(n - round(SHARE * N), n)) if rule == 3 else kept


def _towards(keys: Callable) -> Tensor:
    """Attention [N, N] whose row i is spread evenly over keys(i)."""
    weights = torch.zeros(N, N)
    for i in range(N):
        for s in keys(i):
            weights[i, s] = 1 / len(keys(i))
    return weights


def _view(weights: Tensor, ids: Tensor, before: SimpleNamespace | None = None) -> SimpleNamespace:
    """What a policy sees of a layer with these weights [1, G, R, T, S]; `before`: the view of the prompt."""
    _, G, R, T, S = weights.shape
    states = {"kind": torch.uint8, "mass": torch.float32}
    slot = {name: torch.zeros(1, G, S, dtype=dtype) for name, dtype in states.items()}
    if before is not None:
        for name, state in before.slot.items():
            slot[name][..., :-T] = state
    at = torch.arange(S)
    attention = SimpleNamespace(
        blocks=lambda: [slice(a, a + 16) for a in range(0, T, 16)], pos=at, at=at[S - T :]
    )
    return SimpleNamespace(
        shape=(1, G, S), S=S, T=T, seen=S, prefill=before is None, layer=0, n_layers=1, full=True, count=S,
        rank=at, pos=at.expand(1, G, S), device=weights.device, slot=slot, ids=ids, attention=attention,
        notes={} if before is None else before.notes, q=torch.zeros(1, G, R, T, 1), attn=weights,
        ok=torch.ones(1, G, S, dtype=torch.bool), attn_sum=lambda: weights.sum(3),
        attn_rows=lambda part: weights[:, :, :, part],
    )  # fmt: skip
