"""Readers, codecs of two tiers, and the account of bytes read."""

import pytest
import torch
from test_core import LONG, PerHead, close, context, dynamic, run

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache import Dense, KVCache, ReadAll, StreamingLLM, Window
from refimpl.kvcache.kcache import KCache
from refimpl.kvcache.quest import Quest
from refimpl.kvcache.retrieval import RetrievalAttention
from refimpl.kvcache.slots import Selection
from refimpl.kvcache.tailorkv import TailorKV
from refimpl.kvcache.tiers import HostRows, HostValues, Offloaded

L, G, D = 3, 2, 8
PAIRS = {
    "kcache": lambda: (HostValues(), KCache(3)),
    "quest": lambda: (Dense(), Quest(6, page=2)),
    "tailorkv": lambda: (Offloaded(2, 4), TailorKV(5, channels=3)),
    "retrieval": lambda: (Offloaded(2, 4), RetrievalAttention(5)),
}


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", **LONG)


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


# --- the account ----------------------------------------------------------------------------------
def test_read_bytes_of_plain_attention(llama):
    cache = KVCache(llama)
    with pytest.raises(ValueError, match="no token yet"):
        cache.read_bytes()
    run(llama, cache, random_ids(2, 21), [20, 1])
    assert cache.read_bytes() == {"payload": L * 2 * 2 * G * 21 * D * 4, "meta": 0, "host": 0, "moved": 0}
    window = KVCache(llama, Window(6))
    run(llama, window, random_ids(2, 21), [20, 1])
    assert window.read_bytes()["payload"] == L * 2 * 2 * G * 7 * D * 4  # read before the oldest is evicted
    assert window.nbytes()["payload"] == L * 2 * 2 * G * 6 * D * 4


def test_read_bytes_of_ragged_heads_leave_the_padding_out(llama):
    cache = KVCache(llama, PerHead())
    run(llama, cache, random_ids(2, 30), [30])
    held = int(cache.held(0).sum())
    run(llama, cache, random_ids(2, 2), [2])
    assert cache.read_bytes()["payload"] == L * 2 * (held + 2 * 2 * G) * D * 4


def test_each_reader_reads_less_than_all_and_moves_no_more_than_it_reads(llama, pair):
    codec, reader = pair()
    cache, full = KVCache(llama, codec=codec, reader=reader), KVCache(llama)
    for c in (cache, full):
        run(llama, c, random_ids(1, 40), [39, 1])
    read, all_of_it = cache.read_bytes(), full.read_bytes()["payload"]
    assert 0 < read["payload"] + read["host"] < all_of_it
    assert read["moved"] <= read["host"] + read["meta"]


# --- the prompt and questions of several tokens read everything -----------------------------------
def test_the_prompt_and_a_question_read_everything(llama, pair):
    ids = random_ids(2, 36)
    codec, reader = pair()
    cache = KVCache(llama, codec=codec, reader=reader)
    out = run(llama, cache, ids, [30, 6])
    close(out, dynamic(llama, ids, [30, 6]), 2e-5)
    assert sum(cache.read_bytes()[tier] for tier in ("payload", "host")) == L * 2 * 2 * G * 36 * D * 4


def test_chunked_prefill_equals_one_forward(llama, pair):
    ids = random_ids(2, 46)
    outs = []
    for sizes in ([40], [13, 1, 26]):
        codec, reader = pair()
        cache = KVCache(llama, codec=codec, reader=reader)
        with cache.prefill():
            run(llama, cache, ids[:, :40], sizes)
        outs.append(run(llama, cache, ids[:, 40:], [1] * 6))
    close(*outs)


def test_a_small_budget_changes_the_logits(llama, pair):
    ids, sizes = random_ids(1, 60), [50] + [1] * 10
    codec, reader = pair()
    out = run(llama, KVCache(llama, codec=codec, reader=reader), ids, sizes)
    expected = dynamic(llama, ids, sizes)
    close(out[:, :50], expected[:, :50], 2e-5)
    assert (out[:, 51:] - expected[:, 51:]).abs().max() > 0.02


def test_beam_search_reorders_the_index(llama, pair):
    ids = random_ids(2, 24)
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3, do_sample=False)
    codec, reader = pair()
    found = llama.generate(ids, past_key_values=KVCache(llama, codec=codec, reader=reader), **kwargs)
    rows = [
        llama.generate(
            ids[b : b + 1], past_key_values=KVCache(llama, codec=codec, reader=reader),
            **{**kwargs, "attention_mask": torch.ones(1, 24, dtype=torch.long)},
        )
        for b in range(2)
    ]  # fmt: skip
    assert torch.equal(found, torch.cat(rows))


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen2"])
def test_other_families(family, pair):
    changes = {"sliding_window": None, **LONG} if family == "mistral" else context(family)
    model, ids = tiny(family, **changes), random_ids(1, 40)
    codec, reader = pair()
    cache = KVCache(model, codec=codec, reader=reader)
    out = run(model, cache, ids, [30] + [1] * 10)
    assert torch.isfinite(out).all() and cache.seen == 40
    close(out[:, :30], dynamic(model, ids, [30] + [1] * 10)[:, :30], 2e-5)


# --- two tiers ------------------------------------------------------------------------------------
def test_bytes_of_two_tiers(llama):
    full = 2 * L * G * 40 * D * 4
    cache = KVCache(llama, codec=HostValues(), reader=KCache(4))
    run(llama, cache, random_ids(1, 40), [30] + [1] * 10)
    assert cache.nbytes() == {"payload": full // 2, "meta": L * 40 * 4, "state": 0, "host": full // 2}
    cache = KVCache(llama, codec=Offloaded(2, 4), reader=RetrievalAttention(5))
    run(llama, cache, random_ids(1, 40), [30] + [1] * 10)
    near = 2 * L * G * (2 + 4 + 10) * D * 4
    assert cache.nbytes() == {"payload": near, "meta": L * 40 * 4, "state": 0, "host": full - near}


def test_host_rows_grow_and_shrink():
    rows, draw = torch.zeros(2, 2, 0, 3), torch.Generator().manual_seed(0)
    host = HostRows(rows)
    for t in (1, 5, 1, 1, 9):
        new = torch.randn(2, 2, t, 3, generator=draw)
        rows = torch.cat((rows, new), 2)
        host.append(new)
        assert torch.equal(host.all(), rows)
    index = torch.tensor([[[0, 16], [3, 3]], [[5, 5], [16, 1]]])[..., None]  # [B, G, R = 2, 1]
    got, moved = host.fetch(index)
    assert torch.equal(got[..., 0, :], rows.take_along_dim(index, 2)) and moved == 6 * 3 * 4
    ok = torch.arange(17).expand(2, 2, 17) > 2
    assert host.fetch(index, ok)[1] == 4 * 3 * 4  # slots 0 and 1 are padding: they do not cross
    host.keep(Selection(torch.tensor([0, 16]), (2, 2, 17)))
    assert (
        torch.equal(host.all(), rows[:, :, [0, 16]])
        and host.rows.untyped_storage().nbytes() == 2 * 2 * 2 * 12
    )
    host.take_rows(torch.tensor([1, 1, 0]))
    assert torch.equal(host.all(), rows[[1, 1, 0]][:, :, [0, 16]])
    with pytest.raises(ValueError, match="allowed: \\[B, G, n, D\\]"):
        HostRows(torch.zeros(3, 4))


def test_offloaded_prompts_shorter_than_the_near_part(llama):
    ids = random_ids(1, 9)
    expected = dynamic(llama, ids, [1] * 9)
    for reader in (TailorKV(4, channels=3), RetrievalAttention(4)):
        cache = KVCache(llama, codec=Offloaded(2, 6), reader=reader)
        close(run(llama, cache, ids, [1] * 9), expected)
        assert cache.nbytes()["host"] == 0 and cache.read_bytes()["host"] == 0


# --- one codec and reader per layer ---------------------------------------------------------------
def test_a_codec_and_a_reader_for_each_layer(llama):
    ids, sizes = random_ids(1, 60), [50] + [1] * 10
    expected = dynamic(llama, ids, sizes)
    codecs = [Dense(), HostValues(), Offloaded(2, 4)]
    readers = [Quest(100, page=4), KCache(100), RetrievalAttention(100)]
    cache = KVCache(llama, codec=codecs, reader=readers)
    close(run(llama, cache, ids, sizes), expected, 2e-5)
    assert [type(layer.codec) for layer in cache.layers] == [Dense, HostValues, Offloaded]
    cache.reset()
    close(run(llama, cache, ids, sizes), expected, 2e-5)


# --- what is refused ------------------------------------------------------------------------------
def test_sequences_of_another_length_or_content(llama):
    with pytest.raises(ValueError, match="codec: 2 of them; allowed: one, or 3"):
        KVCache(llama, codec=[Dense(), Dense()])
    with pytest.raises(ValueError, match="reader: 0 of them"):
        KVCache(llama, reader=())
    with pytest.raises(TypeError, match="reader: expected a Reader, got 'quest'"):
        KVCache(llama, reader=[ReadAll(), ReadAll(), "quest"])
    with pytest.raises(TypeError, match="codec: expected a Codec"):
        KVCache(llama, codec="dense")


@pytest.mark.parametrize("reader", [KCache(4), TailorKV(4, channels=2), RetrievalAttention(4)])
def test_a_reader_beside_the_wrong_codec(llama, reader):
    with pytest.raises(ValueError, match=f"{type(reader).__name__} and the codec Dense; allowed beside it"):
        KVCache(llama, reader=reader)


def test_quest_needs_dense_pages(llama):
    with pytest.raises(ValueError, match="Quest and the codec Offloaded; allowed beside it: Dense"):
        KVCache(llama, codec=Offloaded(2, 4), reader=Quest(8))


def test_policies_and_batches_that_readers_cannot_serve(llama, pair):
    codec, reader = pair()
    with pytest.raises(ValueError, match="original positions"):
        KVCache(llama, StreamingLLM(4, 2), codec, reader) if reader.evicts else _raise("original positions")
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    if not reader.evicts:
        with pytest.raises(ValueError, match="Window; allowed beside it: Full"):
            KVCache(llama, Window(4), codec, reader)
    if not reader.padded:
        cache = KVCache(llama, codec=codec, reader=reader)
        with pytest.raises(ValueError, match="padded rows; allowed for"):
            run(llama, cache, ids, [12], mask)
        assert cache.seen == 0 and cache.nbytes()["payload"] == 0


def _raise(message):
    raise ValueError(message)


def test_padding_is_refused_before_the_first_layer_has_changed(llama):
    cache = KVCache(llama, codec=[Dense()] * 2 + [Offloaded()], reader=[ReadAll()] * 2 + [TailorKV(4, 4)])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="padded rows; allowed for TailorKV"):
        run(llama, cache, random_ids(2, 3), [3], mask)
    assert cache.seen == 0


def test_ragged_heads_are_refused(llama):
    for codec, reader in ((HostValues(), KCache(4)), (Dense(), Quest(4, page=2))):
        cache = KVCache(llama, PerHead(), codec, reader)
        with pytest.raises(ValueError, match="different numbers of slots"):
            run(llama, cache, random_ids(1, 20), [20])
    with pytest.raises(ValueError, match="same number of slots in every head"):
        run(llama, KVCache(llama, PerHead(), HostValues()), random_ids(1, 20), [20])


def test_sliding_windows_are_refused(pair):
    codec, reader = pair()
    model = tiny("mistral")
    with pytest.raises(ValueError, match="a sliding window of 5; allowed: models without one"):
        run(model, KVCache(model, codec=codec, reader=reader), random_ids(1, 8), [8])


def test_offloaded_evicts_and_merges_nothing(llama):
    with pytest.raises(ValueError, match="evict nothing, such as Full"):
        run(llama, KVCache(llama, Window(4), Offloaded()), random_ids(1, 8), [8])
    with pytest.raises(ValueError, match="merge nothing"):
        Offloaded().rewrite(None, None)
    for bad in ({"first": -1}, {"last": 0}, {"first": True}, {"last": 2.0}):
        with pytest.raises(ValueError, match="allowed: integers from"):
            Offloaded(**bad)
    codec = HostValues()
    codec.append(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
    with pytest.raises(ValueError, match="expected two tensors"):
        codec.rewrite(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
