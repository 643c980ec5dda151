"""Steps in which a new token takes the place of one that left: as if slots moved, but nothing moves."""

import pytest
import torch
from cache_runs import close, generator, run

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache import KVCache, Random, StreamingLLM, Window
from refimpl.kvcache.attention import Attention
from refimpl.kvcache.h2o import H2O
from refimpl.kvcache.lacache import LaCache
from refimpl.kvcache.places import Places
from refimpl.kvcache.tova import TOVA
from refimpl.kvcache.view import View

MAKERS = {
    "window": lambda kind: kind(Window)(9),
    "sinks": lambda kind: kind(StreamingLLM)(9, 3),
    "no sinks": lambda kind: kind(StreamingLLM)(9, 0),
    "random": lambda kind: kind(Random)(11, generator()),
    "h2o": lambda kind: kind(H2O)(6, 5),
    "h2o without recent": lambda kind: kind(H2O)(8, 0),
    "vatp": lambda kind: kind(H2O)(6, 5, p=1, sink=2),
    "tova": lambda kind: kind(TOVA)(11),
    "tova, newest": lambda kind: kind(TOVA)(11, newest=True),
    "tova, eq. 11": lambda kind: kind(TOVA)(11, p=2),
    "lacache": lambda kind: kind(LaCache)(12, 3, 2),
    "lacache, contiguous": lambda kind: kind(LaCache)(14, 3, 2, ladder="contiguous"),
}
ROTARY = {"sinks", "no sinks", "lacache", "lacache, contiguous"}
CASES = [(family, name) for family in ("llama", "gpt2") for name in MAKERS
         if family == "llama" or name not in ROTARY]  # fmt: skip


def as_is(kind):
    return kind


def moving(kind):
    """The same policy by `keep` alone: a class that does not define `replace` itself."""
    return type(kind.__name__, (kind,), {})


def model_of(family):
    return tiny(family, **({"n_positions": 512} if family == "gpt2" else {}), max_position_embeddings=512)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_it_equals_moving_every_slot(family, name, rows):
    model, ids = model_of(family), random_ids(rows, 80)
    swapping, slow = (KVCache(model, MAKERS[name](kind)) for kind in (as_is, moving))
    sizes = [30, *[1] * 17, 4, *[1] * 12]
    close(run(model, swapping, ids[:, :63], sizes), run(model, slow, ids[:, :63], sizes), 2e-5)
    assert all(layer.places is not None for layer in swapping.layers), "the last steps were swaps"
    assert all(layer.places is None for layer in slow.layers)
    assert swapping.read_bytes() == slow.read_bytes()
    for a, b in zip(swapping.layers, slow.layers, strict=True):
        assert torch.equal(a.held(), b.held()) and a.pos.shape == b.pos.shape
        assert torch.equal(a.pos, b.pos), "the same tokens, in order of arrival again"
        assert a.states.keys() == b.states.keys()
        for state in a.states:
            close(a.states[state], b.states[state], 1e-4)
        close(a.codec.k, b.codec.k, 2e-5)
        close(a.codec.v, b.codec.v, 2e-5)
    assert swapping.nbytes() == slow.nbytes()
    assert swapping.ledger().total(view="payload") == swapping.ledger().total(view="resident")
    more = ids[:, 63:]
    for cache in (swapping, slow):
        run(model, cache, more[:, :5], [1] * 5)
        cache.reorder_cache(torch.arange(rows).flip(0).repeat(2))
    again = more[:, 5:15].repeat(2, 1)
    close(run(model, swapping, again, [1] * 10), run(model, slow, again, [1] * 10), 2e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_moves(name):
    model, ids = model_of("llama"), random_ids(1, 60)
    cache = KVCache(model, MAKERS[name](as_is))
    run(model, cache, ids[:, :32], [30, 1, 1])
    layer = cache.layers[1]
    held, before = int(layer.held()[0, 0]), (layer.codec.k.clone(), layer.codec.v.clone())
    storage = layer.codec.k.data_ptr(), layer.codec.v.data_ptr()
    for i in range(32, 60):
        run(model, cache, ids[:, i : i + 1], [1])
        assert (layer.codec.k.data_ptr(), layer.codec.v.data_ptr()) == storage, "the same memory"
        for t, old in zip((layer.codec.k, layer.codec.v), before, strict=True):
            assert t.shape[2] == held + 1, "one slot more than is held"
            assert ((t != old).any(-1).sum(-1) <= 1).all(), "one entry of each head is new"
        before = layer.codec.k.clone(), layer.codec.v.clone()
    assert cache.nbytes()["payload"] == sum(int(cache.held(l).sum()) for l in range(3)) * 2 * 8 * 4


def test_it_starts_when_the_first_token_has_left():
    model, ids = model_of("llama"), random_ids(1, 20)
    for name in ("sinks", "h2o", "tova", "lacache"):
        cache, expected = (KVCache(model, MAKERS[name](kind)) for kind in (as_is, moving))
        steady = cache.policy.steady
        run(model, cache, ids[:, :steady], [1] * steady)
        assert cache.layers[0].places is None and cache.layers[0].held()[0, 0] == steady
        run(model, cache, ids[:, steady : steady + 2], [1, 1])
        assert cache.layers[0].places is not None
        run(model, expected, ids[:, : steady + 2], [steady + 2])
        run(model, expected, ids[:, -1:], [1])
        run(model, cache, ids[:, -1:], [1])
        assert cache.layers[0].held().tolist() == expected.layers[0].held().tolist()


def test_who_goes_the_general_way():
    model, ids = model_of("llama"), random_ids(2, 40)
    padded = torch.ones(2, 40, dtype=torch.long)
    padded[1, :3] = 0
    cache = KVCache(model, H2O(6, 5))
    run(model, cache, ids, [30] + [1] * 10, padded)
    assert cache.layers[0].places is None, "padding"
    cache = KVCache(model, H2O(6, 5))
    run(model, cache, ids[:, :36], [30] + [1] * 6)
    for i in (36, 37):  # with gradients: what is written over cannot be differentiated
        model(ids[:, i : i + 1], past_key_values=cache)
    assert cache.layers[0].places is None and cache.held(0).unique().tolist() == [11]

    class Once(H2O):
        once = True
        replace = H2O.replace

    cache = KVCache(model, Once(6, 5))
    run(model, cache, ids, [30] + [1] * 10)
    assert cache.layers[0].places is None and cache.held(0).unique().tolist() == [21]


def test_a_counter_that_jumps_does_not_turn_the_wrong_keys():
    """After a jump in the text the window is two stretches: no swap before the older one has left."""
    model, ids = model_of("llama"), random_ids(1, 60)
    swapping, slow = (KVCache(model, MAKERS["sinks"](kind)) for kind in (as_is, moving))
    out = []
    for cache in (swapping, slow):
        run(model, cache, ids[:, :30], [20] + [1] * 10)
        for layer in cache.layers:
            held = layer.pos
            layer.seen += 100
            layer.pos = held
        positions = torch.arange(130, 160)[None]
        out.append(run(model, cache, ids[:, 30:], [1] * 30, positions=positions))
    close(*out, 2e-5)
    assert swapping.layers[0].places is not None


def test_ranks_are_the_order_of_age():
    draw = generator(3)
    for shapes in ([(1, 1)], [(2, 3)], [(1, 1)] * 9 + [(2, 3)]):
        places, pos = Places((2, 3, 6), ranked=True), torch.arange(7).repeat(2, 3, 1)
        for seen in range(7, 40):
            shape = shapes[min(seen - 7, len(shapes) - 1)]
            dropped = torch.randint(0, 7, shape, generator=draw)
            places.free(dropped)
            pos.scatter_(-1, dropped[..., None].expand(2, 3, 1), seen)
            assert places.rank.shape[:2] == shape
            assert torch.equal(places.rank.expand(2, 3, 7), pos.argsort(-1).argsort(-1))


def test_a_view_of_places():
    places = Places((1, 2, 3))
    places.free(torch.tensor([[1, 0]]))
    q, kv = torch.zeros(1, 2, 1, 1, 4), torch.arange(32.0).view(1, 2, 4, 4)
    pos = torch.tensor([[[0, 3, 1, 2], [3, 0, 1, 2]]])
    view = View(
        Attention(q, kv, kv, 0.5, pos, None), read=lambda: (kv, kv), pos=pos, shape=(1, 2, 4), layer=0,
        n_layers=1, prefill=False, seen=4, slot={"age": torch.zeros(1, 2, 4)}, places=places,
        new_v=kv[:, :, :1],
    )  # fmt: skip
    assert view.rank.tolist() == pos.tolist()
    assert places.take(pos).tolist() == [[[3], [3]]] and torch.equal(view.new_v, kv[:, :, :1])
    view.write("age", torch.tensor([[[5.0], [6.0]]]))
    assert view.slot["age"].tolist() == [[[0, 5, 0, 0], [6, 0, 0, 0]]]
    assert view.oldest().tolist() == [[0, 1]] and view.oldest(2).tolist() == [[2, 2]]
