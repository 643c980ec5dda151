"""Two ways to compact positions: the query turned for each stretch, and every key at each read."""

import pytest
import torch
from cache_runs import LONG

from refimpl.backbone import Backbone
from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache import KVCache, StreamingLLM
from refimpl.kvcache.rope import Rope
from refimpl.kvcache.slots import Selection, Stretches, as_mask


class EveryKey(StreamingLLM):
    """The same policy by the other way: keys stored without rotation."""

    stretches = False


@torch.no_grad()
def run(model, cache, ids, sizes, mask=None, start=0):
    out, at = [], 0
    for size in sizes:
        positions = None if mask is not None else torch.arange(start + at, start + at + size)[None]
        if mask is not None:
            positions = (mask[:, : at + size].cumsum(-1) - 1).clamp(min=0)[:, at:]
        out.append(model(ids[:, at : at + size], past_key_values=cache, position_ids=positions,
                         attention_mask=None if mask is None else mask[:, : at + size]).logits)  # fmt: skip
        at += size
    return torch.cat(out, 1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("sink", [0, 3])
def test_both_ways_agree(family, sink):
    model, ids, sizes = tiny(family, **LONG), random_ids(2, 60), [20, 1, 1, 5] + [1] * 33
    caches = [KVCache(model, kind(7, sink)) for kind in (StreamingLLM, EveryKey)]
    a, b = (run(model, cache, ids, sizes) for cache in caches)
    assert (a - b).abs().max() < 2e-5
    assert caches[0].layers[0].stretches is not None and caches[1].layers[0].stretches is None
    assert len(list(caches[0].layers[0].stretches)) == (2 if sink else 1)
    assert torch.equal(caches[0].layers[0].pos, caches[1].layers[0].pos)


def test_padded_rows_agree_with_the_other_way():
    model, ids = tiny("llama", **LONG), random_ids(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    a, b = (
        run(model, KVCache(model, kind(5, 2)), ids, [20] + [1] * 20, mask)
        for kind in (StreamingLLM, EveryKey)
    )
    assert (a - b)[mask.bool()].abs().max() < 2e-5


def test_no_drift_at_distant_positions():
    """The model's float32 angles are off by 0.004 at position 10^5; they are undone as it computed them."""
    model, ids, sizes = tiny("llama", **LONG), random_ids(1, 50), [10] + [1] * 40
    near = run(model, KVCache(model, StreamingLLM(6, 2)), ids, sizes)
    far = run(model, KVCache(model, StreamingLLM(6, 2)), ids, sizes, start=200_000)
    assert (near - far).abs().max() < 2e-4
    cache = KVCache(model, StreamingLLM(6, 2))
    with torch.no_grad():
        run(model, cache, ids[:, :10], [10])
        for layer in cache.layers:  # the cache itself has counted 200 000 tokens since its sinks
            held = layer.pos
            layer.seen += 200_000
            layer.pos = held
        late = run(model, cache, ids[:, 10:], [1] * 40, start=10)
    assert (late - near[:, 10:]).abs().max() < 2e-4
    held = cache.layers[0].pos
    assert held.tolist() == [0, 1, *range(200_044, 200_050)]


def test_shift_is_a_rotation_by_many_positions():
    rope = Rope(Backbone(tiny("llama")))
    t = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rope.shift(t, 0), t)
    assert torch.allclose(rope.shift(rope.shift(t, 123_456), -123_456), t, atol=1e-6)
    many = torch.tensor([4, -7, 0]).expand(1, 2, 3)
    for i, steps in enumerate((4, -7, 0)):
        assert torch.allclose(rope.shift(t, many)[:, :, i], rope.shift(t[:, :, i : i + 1], steps)[:, :, 0])
    exact = 123_456 * rope.inv_freq.double()
    turned = rope.shift(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]).view(1, 1, 1, 8), 123_456)[0, 0, 0]
    assert abs(float(turned[0]) - float(exact[0].cos())) < 1e-6


def test_stretches_follow_evictions():
    held = Stretches()
    held.append(0, 12)
    held.keep(Selection([slice(0, 2), slice(5, 6), slice(8, 12)], (1, 1, 12)))
    held.append(12, 2)
    text = [shift + slot for shift, part in held for slot in range(part.start, part.stop)]
    assert text == [0, 1, 5, 8, 9, 10, 11, 12, 13]
    assert held.known
    held.keep(Selection(torch.ones(9, dtype=torch.bool), (1, 1, 9)))
    assert not held.known


@pytest.mark.parametrize("keep, message", [
    ([], "ascending"), ([slice(2, 2)], "ascending"), ([slice(3, 5), slice(0, 2)], "ascending"),
    ([slice(0, 9)], "layer has 6"), ([slice(-2, 3)], "layer has 6"),
])  # fmt: skip
def test_slices_that_do_not_fit(keep, message):
    with pytest.raises(ValueError, match=message):
        Selection(keep, (1, 2, 6))


def test_slices_select_like_a_mask():
    t = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    keep, mask = [slice(0, 1), slice(3, 6)], torch.tensor([True, False, False, True, True, True])
    for one in (keep, keep[1:]):
        sliced = Selection(one, (2, 3, 6))
        chosen = Selection(as_mask(one, (2, 3, 6))[0, 0], (2, 3, 6))
        assert torch.equal(sliced.apply(t), chosen.apply(t)) and sliced.apply(t).is_contiguous()
        assert torch.equal(sliced.rows, chosen.rows) and sliced.counts == chosen.counts
        assert sliced.apply(t).untyped_storage().nbytes() == sliced.apply(t).nbytes
    assert torch.equal(Selection(keep, (2, 3, 6)).apply(torch.arange(6)), torch.arange(6)[mask])
    ok = torch.ones(2, 3, 6, dtype=torch.bool)
    ok[0, :, 3] = False
    assert Selection(keep, (2, 3, 6), ok).counts.tolist() == [[3] * 3, [4] * 3]
