"""The checks of H2O, Scissorhands and TOVA (kv-cache spec 6 to 8): evictions over a stream of queries."""

from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require, require_error

IMPLEMENTATION = {
    "h2o": "refimpl.kvcache.h2o:H2O",
    "scissorhands": "refimpl.kvcache.scissorhands:Scissorhands",
    "tova": "refimpl.kvcache.tova:TOVA",
}
B, G, R, N, D, PROMPT = 2, 2, 2, 60, 4, 24
HEADS = list(product(range(B), range(G)))


@check
def check_h2o(H2O: Callable) -> None:
    """`H2O(heavy, recent, p=, sink=)` with `slots`, `observe(v)` and `keep(v)` for a layer's view v."""
    for heavy, recent, options in ((6, 5, {}), (9, 0, {"sink": 2}), (0, 7, {}), (6, 5, {"p": 1, "sink": 3})):
        what = f"heavy {heavy}, recent {recent}, {options}" if options else f"heavy {heavy}, recent {recent}"
        p, sink = options.get("p"), options.get("sink", 0)
        acc: dict = {}
        alive: dict = {head: [] for head in HEADS}
        for step in _stream(H2O(heavy, recent, **options), seed=heavy):
            for head in HEADS:
                alive[head] += step.new
                for s, i in enumerate(step.before[head]):
                    acc[head, i] = acc.get((head, i), 0.0) + float(step.weights[head][:, :, s].sum())
                free = [i for i in alive[head][: len(alive[head]) - recent] if i >= sink]
                score = {i: acc[head, i] * (1 if p is None else step.norm(head, i, p)) for i in free}
                over = max(0, len(alive[head]) - heavy - recent - sink)
                dropped = sorted(free, key=score.__getitem__)[:over]
                alive[head] = [i for i in alive[head] if i not in dropped]
                require(step.after[head] == alive[head],
                        f"{what}: row and head {head} after token {step.new[-1]}: keeps {step.after[head]}, "
                        f"not {alive[head]}")  # fmt: skip
    for wrong in ((0, 0), (-1, 4), (4, 1.5)):
        require_error(ValueError, lambda wrong=wrong: H2O(*wrong), f"H2O{wrong}")


@check
def check_tova(TOVA: Callable) -> None:
    """`TOVA(budget, newest=)`: the slots that the last query looks at most, the same for all heads."""
    for newest in (False, True):
        alive: dict = {b: [] for b in range(B)}
        for step in _stream(TOVA(9, newest=newest), seed=3):
            for b in range(B):
                alive[b] += step.new
                mean = [0.0] * len(alive[b])
                for g, r in product(range(G), range(R)):
                    for s in range(len(mean)):
                        mean[s] += float(step.weights[b, g][r, -1, s]) / (G * R)
                if newest:
                    mean[-1] = float("inf")
                order = sorted(range(len(mean)), key=mean.__getitem__)[-9:]
                alive[b] = [alive[b][s] for s in sorted(order)]
                for g in range(G):
                    require(step.after[b, g] == alive[b],
                            f"newest={newest}: row {b}, head {g} after token {step.new[-1]}: keeps "
                            f"{step.after[b, g]}, not {alive[b]}")  # fmt: skip
    require_error(ValueError, lambda: TOVA(0), "TOVA(0)")


@check
def check_scissorhands(Scissorhands: Callable) -> None:
    """`Scissorhands(budget, recent=, history=, drop=)`: counts of rows below average, dropped in bulk."""
    for budget, recent, history, drop in ((20, 4, 70, 5), (16, 6, 3, 10), (18, 0, 1, 1)):
        what = f"budget {budget}, recent {recent}, history {history}, drop {drop}"
        low: dict = {}
        alive: dict = {head: [] for head in HEADS}
        policy = Scissorhands(budget, recent=recent, history=history, drop=drop)
        for step in _stream(policy, seed=budget):
            for head in HEADS:
                alive[head] += step.new
                for t, query in enumerate(step.new):
                    there = sum(i <= query for i in step.before[head])
                    for s, i in enumerate(step.before[head][:there]):
                        weight = float(step.weights[head][:, t, s].mean())
                        low.setdefault((head, i), []).append((query, weight < 1 / there))
                last = step.new[-1]
                count = {
                    i: sum(below for t, below in low[head, i] if t > last - history) for i in alive[head]
                }
                count |= dict.fromkeys(alive[head][len(alive[head]) - recent :], 0)
                over = len(alive[head]) - budget
                times = -(-over // drop) if over > 0 else 0
                worst = sorted(alive[head], key=lambda i: (-count[i], i))[: drop * times]  # noqa: B023
                alive[head] = [i for i in alive[head] if i not in worst]
                require(step.after[head] == alive[head],
                        f"{what}: row and head {head} after token {last}: keeps {step.after[head]}, not "
                        f"{alive[head]}")  # fmt: skip
    for wrong in ({"drop": 0}, {"history": 0}, {"recent": 21}, {"drop": 21}):
        require_error(ValueError, lambda wrong=wrong: Scissorhands(20, **wrong), f"Scissorhands(20, {wrong})")


def _stream(policy: object, seed: int) -> Iterator[SimpleNamespace]:
    """Feed a prompt, three tokens at once, then single ones; yield what each forward saw and left.

    Query t pays token i an attention fixed beforehand, normalised over what is held. The slot states that
    the policy declares are carried along with the slots that stay. A policy whose class has `replace` is
    asked for that where it can be, and then sees its slots shuffled.
    """
    replaces = "replace" in vars(type(policy))
    draw = torch.Generator().manual_seed(seed)
    scores = 1.5 * torch.randn(B, G, R, N, N, generator=draw) + torch.randn(B, G, 1, 1, N, generator=draw)
    values = torch.randn(B, G, N, D, generator=draw)
    held, states = torch.zeros(B, G, 0, dtype=torch.long), {}
    for name, kind in policy.slots.items():
        dtype, *width = kind if isinstance(kind, tuple) else (kind,)
        states[name] = torch.zeros(B, G, 0, *width, dtype=dtype)
    first = 0
    for T in (PROMPT, 3, *[1] * (N - PROMPT - 3)):
        new = torch.arange(first, first + T)
        held = torch.cat((held, new.expand(B, G, T)), -1)
        states = {name: torch.cat((t, t.new_zeros(B, G, T, *t.shape[3:])), 2) for name, t in states.items()}
        first += T
        weights = scores[:, :, :, new].take_along_dim(held[:, :, None, None], -1)
        weights = weights.masked_fill(held[:, :, None, None] > new[:, None], -torch.inf).softmax(-1)
        before, shown, keep = held, weights, None
        one = replaces and T == 1 and held.shape[-1] == policy.steady + 1
        if one:
            order = torch.rand(B, 1, held.shape[-1], generator=draw).argsort(-1).expand(B, G, -1)
            held, shown = held.gather(-1, order), weights.take_along_dim(order[:, :, None, None], -1)
            states = {name: t.gather(-1, order) for name, t in states.items()}
        v = _view(shown, held, new, values.take_along_dim(held[..., None], 2), states)
        policy.observe(v)
        if one:  # what stays, in order of age again
            age = held.scatter(-1, policy.replace(v).expand(B, G)[..., None], N)
            keep = age.argsort(-1)[..., :-1]
        else:
            keep = policy.keep(v)
        if keep is not None:
            if keep.dtype == torch.bool:
                keep = keep.expand(held.shape).nonzero()[:, -1].view(B, G, -1)
            keep = keep.expand(B, G, -1)
            held = held.gather(-1, keep)
            states = {
                name: t.take_along_dim(keep.view(*keep.shape, *[1] * (t.ndim - 3)), 2)
                for name, t in states.items()
            }
        yield SimpleNamespace(
            new=new.tolist(), weights={head: weights[head] for head in HEADS},
            before={head: before[head].tolist() for head in HEADS},
            after={head: held[head].tolist() for head in HEADS},
            norm=lambda head, i, p: float((values[head][i].abs() ** p).sum() ** (1 / p)),
        )  # fmt: skip


def _view(weights: Tensor, held: Tensor, new: Tensor, values: Tensor, states: dict) -> SimpleNamespace:
    """What a policy sees of a layer after a forward with these weights [B, G, R, T, S]."""
    S, T = held.shape[-1], len(new)
    rows = lambda part: weights[:, :, :, part]  # noqa: E731
    arrived = torch.isin(held, new)

    def write(name: str, numbers: Tensor) -> None:
        states[name][arrived] = numbers.flatten()

    attention = SimpleNamespace(
        q=torch.zeros(B, G, R, T, D), k=values, v=values, pos=held, at=new.expand(B, G, T), weights=rows
    )
    return SimpleNamespace(
        shape=(B, G, S), S=S, T=T, seen=int(new[-1]) + 1, prefill=len(new) == PROMPT, layer=0, n_layers=1,
        full=True, count=S, rank=held.argsort(-1).argsort(-1), pos=held,
        ok=torch.ones(B, G, S, dtype=torch.bool), device=weights.device, slot=states, write=write,
        q=attention.q, k=values, v=values, new_v=values[arrived].view(B, G, T, D), attention=attention,
        attn=weights, attn_rows=rows, attn_sum=lambda: weights.sum(3),
        attn_lastw=lambda w: weights[:, :, :, -w:],
    )  # fmt: skip
