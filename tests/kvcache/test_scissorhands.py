"""Scissorhands: its ring of bits against lists, its bulk drops, what it forgets, and the hypothesis."""

import pytest
import torch
from cache_runs import LONG, close, run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import KVCache
from refimpl.kvcache.scissorhands import Scissorhands, _ones, persistence


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", **LONG)


@pytest.mark.parametrize("family", FAMILIES)
def test_enough_budget_equals_full_and_a_small_one_does_not(family):
    long = LONG | ({"n_positions": 512} if family == "gpt2" else {})
    model, ids, sizes = tiny(family, **long), random_ids(2, 40), [20, 5] + [1] * 15
    expected = run(model, KVCache(model), ids, sizes)
    close(run(model, KVCache(model, Scissorhands(40)), ids, sizes), expected)
    cache = KVCache(model, Scissorhands(6, recent=2, history=16))
    out = run(model, cache, ids, sizes)
    close(out[:, :20], expected[:, :20])
    assert (out[:, 21:] - expected[:, 21:]).abs().max() > 0.03
    assert set(cache.held(2).unique().tolist()) <= {4, 5, 6}


class Lists(Scissorhands):
    """The same choice from lists of booleans, for each row, head and token its own, never overwritten."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows, self.checked = {}, 0

    def observe(self, v):
        super().observe(v)
        weights = v.attn.mean(2)
        self.kept = {}
        for b, g in torch.cartesian_prod(torch.arange(v.shape[0]), torch.arange(v.shape[1])).tolist():
            held = v.pos[b, g].tolist()
            for t in range(v.T):
                query = v.seen - v.T + t
                there = [s for s, i in enumerate(held) if i <= query]
                row = weights[b, g, t].tolist()
                for s in there:
                    low = row[s] < 1 / len(there)
                    self.rows.setdefault((v.layer, b, g, held[s]), []).append((query, low))

    def counts(self, v):
        got = super().counts(v)
        for b, g in torch.cartesian_prod(torch.arange(v.shape[0]), torch.arange(v.shape[1])).tolist():
            held, counted = v.pos[b, g].tolist(), got[b, g].tolist()
            for s, i in enumerate(held):
                log = self.rows[v.layer, b, g, i]
                expected = sum(low for query, low in log if query >= v.seen - self.history)
                recent = s >= v.S - self.recent
                assert counted[s] == (0 if recent else expected), (v.layer, b, g, i)
                self.checked += 1
        return got


@pytest.mark.parametrize("history", [1, 7, 64, 65, 130])
def test_counters_equal_brute_force(llama, history):
    policy = Lists(30, recent=4, history=history, drop=9)
    run(llama, KVCache(llama, policy), random_ids(1, 143), [100, 3] + [1] * 40)
    assert policy.checked > 1000


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_drops_are_rare_and_in_bulk(family):
    model = tiny(family, **LONG)
    cache, held = KVCache(model, Scissorhands(20, recent=5, history=50, drop=8)), []
    run(model, cache, random_ids(2, 45), [45])
    assert cache.held(0).unique().tolist() == [45 - 4 * 8]  # 25 too many: four times 8
    for t in range(40):
        run(model, cache, random_ids(2, 1, seed=t), [1])
        held.append(int(cache.held(1)[0, 0]))
        for layer in cache.layers:
            assert layer.pos.expand(2, 2, -1)[..., -5:].min() == 45 + t - 4  # the recent ones
    assert held[:9] == [14, 15, 16, 17, 18, 19, 20, 13, 14] and max(held) == 20 and min(held) == 13


def test_what_mattered_too_long_ago_loses_its_protection():
    """Queries 1 to 11 look at token 0, later ones at themselves. At query 24 one drop of 8 falls due."""
    for history, kept in ((8, False), (40, True)):
        policy = Scissorhands(24, recent=2, history=history, drop=8)
        low = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
        for t in range(1, 25):
            low = torch.cat((low, low.new_zeros(1, 1, 1, 1)), 2)
            weights = torch.full((t + 1,), 0.3 / t)
            weights[0 if t < 12 else t] = 0.7
            v = fake(weights, low, list(range(t + 1)), t + 1)
            policy.observe(v)
            keep = policy.keep(v)
        # In 40 rows token 0 counts 13 and tokens 1 to 8 more; in 8 rows all count 8, and the oldest go.
        assert keep[0, 0].tolist() == ([0, *range(9, 25)] if kept else list(range(8, 25)))


def fake(weights, low, alive, seen):
    from refimpl.kvcache.attention import Attention
    from refimpl.kvcache.view import View

    S, pos = len(alive), torch.tensor(alive)
    one = torch.zeros(1, 1, 1, 1, 2)
    return View(
        Attention(one, torch.zeros(1, 1, S, 2), torch.zeros(1, 1, S, 2), 1.0, pos, pos[-1:]),
        read=lambda: None, pos=pos, shape=(1, 1, S), layer=0, n_layers=1, prefill=False, seen=seen,
        slot={"low": low}, weights=weights.view(1, 1, 1, 1, S),
    )  # fmt: skip


def test_padded_rows_equal_each_row_alone(llama):
    lengths, new = [24, 15, 5], 14
    rows = [random_ids(1, n + new, seed=n) for n in lengths]
    batch, mask = torch.ones(3, 24 + new, dtype=torch.long), torch.zeros(3, 24 + new, dtype=torch.long)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        batch[b, 24 - n :], mask[b, 24 - n :] = row[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    make = lambda: Scissorhands(10, recent=3, history=12, drop=4)  # noqa: E731
    cache = KVCache(llama, make())
    out = run(llama, cache, batch, [24] + [1] * new, mask, positions)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        alone = KVCache(llama, make())
        close(out[b, 24 - n :], run(llama, alone, row, [n] + [1] * new)[0])
        assert cache.held(0)[b].tolist() == alone.held(0)[0].tolist()  # rows differ: ragged storage


def test_chunked_prefill_equals_one_forward(llama):
    ids = random_ids(2, 50)
    whole, chunked = (KVCache(llama, Scissorhands(12, recent=3, history=20)) for _ in range(2))
    expected = run(llama, whole, ids, [40] + [1] * 10)
    with chunked.prefill():
        run(llama, chunked, ids[:, :40], [11, 1, 28])
    close(run(llama, chunked, ids[:, 40:], [1] * 10), expected[:, 40:])
    assert all(torch.equal(a.pos, b.pos) for a, b in zip(whole.layers, chunked.layers, strict=True))


def test_bits_are_packed(llama):
    for history, words in ((64, 1), (65, 2), (400, 7)):
        cache = KVCache(llama, Scissorhands(20, history=history))
        run(llama, cache, random_ids(2, 20), [20])
        assert cache.nbytes()["state"] == 3 * 2 * 2 * 20 * words * 8  # layers, rows, KV heads, slots
    words = torch.tensor([0, -1, 1 << 62, -(1 << 63), 0x0123456789ABCDEF])
    assert _ones(words).tolist() == [0, 64, 1, 1, 32]


def test_persistence_by_sets():
    draw = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(2, 3, 21, 21, generator=draw)
    weights = scores.masked_fill(torch.ones(21, 21).triu(1).bool(), -torch.inf).softmax(-1)
    ratio, share = persistence(weights)
    for b in range(2):
        for h in range(3):
            pivotal = lambda t, b=b, h=h: {s for s in range(t + 1) if weights[b, h, t, s] > 1 / (t + 1)}  # noqa: E731
            before = set().union(*map(pivotal, range(10)))
            after = set().union(*map(pivotal, range(10, 21))) & set(range(10))
            assert ratio[b, h] == pytest.approx(len(before & after) / len(after))
            assert share[b, h] == pytest.approx(len(before) / 10)


@pytest.mark.parametrize(("args", "kwargs", "named"), [
    ((1,), {}, "budget"), ((20.0,), {}, "budget"), ((20,), {"recent": 11}, "recent"), ((8,), {}, "recent"),
    ((20,), {"history": 0}, "history"), ((20,), {"drop": 0}, "drop"), ((20,), {"drop": 21}, "drop"),
    ((20,), {"recent": -1}, "recent"), ((20,), {"drop": 20, "recent": 1}, "recent"),
])  # fmt: skip
def test_bad_parameters(args, kwargs, named):
    with pytest.raises(ValueError, match=f"{named}: .*allowed"):
        Scissorhands(*args, **kwargs)


@pytest.mark.parametrize("weights", [
    torch.ones(3), torch.ones(2, 3), torch.ones(1, 1), torch.ones(3, 3).long(), [[1.0, 0], [0.5, 0.5]],
])  # fmt: skip
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights: .*allowed"):
        persistence(weights)
