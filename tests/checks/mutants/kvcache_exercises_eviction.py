"""Mistakes that a reader of the notebook on eviction may make, and the right answers."""


def heavy_hitters(acc, heavy, recent):
    old = range(max(0, len(acc) - recent))
    best = sorted(old, key=lambda i: acc[i], reverse=True)[:heavy]
    return sorted([*best, *range(len(old), len(acc))])


def grouped_importance(alpha, v):
    G = v.shape[0]
    return alpha.view(G, -1, alpha.shape[-1]).sum(1) * v.norm(dim=-1)


def tova_keeps(alpha, budget):
    return alpha.mean(0).topk(min(budget, alpha.shape[1])).indices.sort().values.tolist()


def pyramid_slots(n_layers, average, beta):
    last = average / beta
    first = 2 * average - last
    return [first - l * (first - last) / (n_layers - 1) for l in range(n_layers)]


SOLUTIONS = {
    "heavy_hitters": heavy_hitters,
    "grouped_importance": grouped_importance,
    "tova_keeps": tova_keeps,
    "pyramid_slots": pyramid_slots,
}


def _recent_compete(acc, heavy, recent):
    best = sorted(range(len(acc)), key=lambda i: acc[i], reverse=True)[:heavy]
    return sorted({*best, *range(max(0, len(acc) - recent), len(acc))})


def _heads_interleaved(alpha, v):
    G = v.shape[0]
    return alpha.view(-1, G, alpha.shape[-1]).sum(0) * v.norm(dim=-1)


def _newest_forced(alpha, budget):
    score = alpha.mean(0).clone()
    score[-1] = 2
    return score.topk(min(budget, len(score))).indices.sort().values.tolist()


def _halving(n_layers, average, beta):
    slots = [2.0**-l for l in range(n_layers)]
    return [average * n_layers * s / sum(slots) for s in slots]


MUTANTS = [
    ("heavy_hitters", "switched off: the most recent",
     lambda acc, heavy, recent: list(range(max(0, len(acc) - heavy - recent), len(acc)))),
    ("heavy_hitters", "recent slots take places of heavy hitters", _recent_compete),
    ("heavy_hitters", "no recent slots",
     lambda acc, heavy, recent: heavy_hitters(acc, heavy + recent, 0)),
    ("grouped_importance", "attention alone",
     lambda alpha, v: alpha.view(v.shape[0], -1, alpha.shape[-1]).sum(1)),
    ("grouped_importance", "query heads dealt out in turn", _heads_interleaved),
    ("grouped_importance", "the l1 norm", lambda alpha, v: grouped_importance(alpha, v.abs().sum(-1, True))),
    ("grouped_importance", "summed over KV heads too",
     lambda alpha, v: grouped_importance(alpha, v).sum(0).expand(v.shape[0], -1)),
    ("tova_keeps", "newest token forced", _newest_forced),
    ("tova_keeps", "one head decides", lambda alpha, budget: tova_keeps(alpha[:1], budget)),
    ("tova_keeps", "switched off: the most recent",
     lambda alpha, budget: list(range(max(0, alpha.shape[1] - budget), alpha.shape[1]))),
    ("pyramid_slots", "switched off: the same for all layers", lambda L, average, beta: [average] * L),
    ("pyramid_slots", "upside down", lambda L, average, beta: pyramid_slots(L, average, beta)[::-1]),
    ("pyramid_slots", "halved from layer to layer", _halving),
]  # fmt: skip
