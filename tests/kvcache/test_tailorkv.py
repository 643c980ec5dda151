"""TailorKV (spec 23): P, the channels, identity, exact traffic, the assignment of layers."""

import pytest
import torch
from test_core import LONG, close, dynamic, run

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache import KVCache, ReadAll
from refimpl.kvcache.kivi import KIVI
from refimpl.kvcache.tailorkv import TailorKV, layer_density, spread, tailor
from refimpl.kvcache.tiers import Offloaded


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", **LONG)


def offloaded(S=80, first=2, last=4, B=2, G=2, R=3, D=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    codec = Offloaded(first, last)
    scale = torch.rand(D, generator=draw) * 4
    codec.append(torch.randn(B, G, S, D, generator=draw) * scale, torch.randn(B, G, S, D, generator=draw))
    k, v = codec.k, codec.v
    codec.commit(None)
    return codec, torch.randn(B, G, R, 1, D, generator=draw), k, v


def overlap(a, b):
    return (a[..., :, None] == b[..., None, :]).any(-1).float().mean().item()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sufficient_budget_gives_plain_attention(family):
    model = tiny(family, **({"n_positions": 512} if family == "gpt2" else LONG))
    ids, sizes = random_ids(2, 31), [21] + [1] * 10
    expected = dynamic(model, ids, sizes)
    cache = KVCache(model, codec=Offloaded(2, 4), reader=TailorKV(15, channels=1))
    close(run(model, cache, ids, sizes), expected)


def test_all_channels_rank_exactly_and_more_channels_rank_better():
    found, random = {c: [] for c in (1, 2, 4, 8)}, []
    draw = torch.Generator().manual_seed(0)
    for seed in range(10):
        codec, q, k, v = offloaded(seed=seed)
        mean = q[:, :, :, 0].mean(2)
        scores = (k[:, :, 2:76] @ mean[..., None])[..., 0]
        exact = scores.topk(16).indices
        for c in found:
            reader = TailorKV(16, channels=c)
            reader.build(codec, q, None)
            index, moved = reader.rank(mean, codec)
            found[c].append(overlap(exact, index))
            assert moved == 2 * 2 * 74 * c * 4
        channels = torch.rand(2, 2, 8, generator=draw).topk(2).indices
        part = k[:, :, 2:76].take_along_dim(channels[:, :, None], -1)
        guess = (part @ mean.gather(-1, channels)[..., None])[..., 0].topk(16).indices
        random.append(overlap(exact, guess))
    mean = {c: sum(x) / 10 for c, x in found.items()}
    assert mean[8] == 1 and mean[1] < mean[2] < mean[4] < 1
    assert mean[2] > sum(random) / 10 + 0.1


def test_channels_equal_a_loop_over_heads():
    codec, q, k, v = offloaded()
    reader = TailorKV(4, channels=3)
    reader.build(codec, q, None)
    chosen = reader.choose(q[:, :, :, 0].mean(2))
    for b in range(2):
        for g in range(2):
            weight = q[b, g, :, 0].mean(0).abs() * k[b, g].abs().amax(0)
            assert sorted(chosen[b, g].tolist()) == sorted(weight.topk(3).indices.tolist())


def test_bytes_on_the_device_on_the_host_and_moved(llama):
    cache = KVCache(llama, codec=Offloaded(2, 4), reader=TailorKV(5, channels=3))
    run(llama, cache, random_ids(1, 40), [30] + [1] * 10)
    heads, near, far = 3 * 2, 2 + 4 + 10, 24
    assert cache.nbytes() == {
        "payload": heads * near * 2 * 8 * 4, "meta": 3 * 40 * 4 + heads * 8 * 4, "state": 0,
        "host": heads * far * 2 * 8 * 4,
    }  # fmt: skip
    fetched, looked = heads * 5 * 2 * 8 * 4, heads * far * 3 * 4
    assert cache.read_bytes() == {
        "payload": heads * near * 2 * 8 * 4, "meta": looked, "host": fetched, "moved": fetched + looked,
    }  # fmt: skip


def test_spread():
    seen = torch.arange(69, 101)
    causal = torch.arange(100) < seen[:, None]
    uniform = causal / seen[:, None]
    assert spread(uniform, seen).item() == pytest.approx(0.95, abs=0.01)
    assert spread(torch.nn.functional.one_hot(seen - 1, 100).float(), seen).item() == pytest.approx(
        0, abs=1e-6
    )
    for bad in (0, 1.1, -1):
        with pytest.raises(ValueError, match="share"):
            spread(uniform, seen, bad)


def test_density_of_a_model_equals_numpy(llama):
    from transformers import DynamicCache

    from refimpl.kvcache import release

    ids = random_ids(2, 60)
    found = layer_density(llama, ids, last=10)
    release(llama)
    with torch.no_grad():
        attentions = llama(ids, past_key_values=DynamicCache(), output_attentions=True).attentions
    for p, weights in zip(found, attentions, strict=True):
        mass = [
            weights[:, :, t, : t + 1].sort(-1, descending=True).values[..., : -(-(t + 1) // 20)].sum(-1)
            for t in range(50, 60)
        ]
        assert p.item() == pytest.approx(1 - torch.stack(mass).mean().item(), abs=1e-5) and 0 <= p <= 1
    for bad in (torch.ones(4, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match="ids: shape"):
            layer_density(llama, bad)
    with pytest.raises(ValueError, match="last: 0"):
        layer_density(llama, ids, last=0)


def test_a_quantised_layer_beside_offloaded_ones(llama):
    codecs, readers = tailor([0.5, 0.1, 0.2], budget=5, channels=3, first=2, last=4, group=8, residual=8)
    assert [type(c) for c in codecs] == [KIVI, Offloaded, Offloaded] and codecs[0].bits == 1
    assert [type(r) for r in readers] == [ReadAll, TailorKV, TailorKV]
    cache = KVCache(llama, codec=codecs, reader=readers)
    out = run(llama, cache, random_ids(1, 60), [40] + [1] * 20)
    assert torch.isfinite(out).all() and cache.held(0).tolist() == [[60, 60]]
    full = 2 * 2 * 60 * 8 * 4
    assert cache.layers[0].codec.nbytes()["payload"] < full / 3
    assert cache.nbytes()["host"] == 2 * 2 * 2 * (40 - 6) * 8 * 4


@pytest.mark.parametrize("density", [[], [1.5], [float("nan")], [-0.1]])
def test_bad_densities(density):
    with pytest.raises(ValueError, match="one number in \\[0, 1\\] for each layer"):
        tailor(density)


def test_bad_input(llama):
    for kwargs in ({"budget": 0}, {"channels": 0}, {"budget": 2.0}):
        with pytest.raises(ValueError, match="allowed: integers from 1"):
            TailorKV(**kwargs)
    with pytest.raises(ValueError, match="channels: 9; allowed: 1..8, the head dim"):
        KVCache(llama, codec=Offloaded(), reader=TailorKV(4, channels=9))
