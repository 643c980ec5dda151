"""The cache before any published method: T0 to T8 of the chapter's spec, and what it refuses."""

import gc
import weakref

import pytest
import torch
from cache_runs import LONG, close, generator, padded, run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import (
    Full,
    KVCache,
    KVPolicy,
    Random,
    Reader,
    StreamingLLM,
    View,
    Window,
    best,
    release,
)  # fmt: skip
from refimpl.kvcache import attention as attention_module
from refimpl.kvcache.slots import Padding, Selection
from refimpl.kvcache.snapkv import AdaSnapKV


def context(family):
    return {"n_positions": 512, "max_position_embeddings": 512} if family == "gpt2" else LONG


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny(request.param, **context(request.param))


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", **LONG)


def reference(model):
    """The same weights with transformers' own attention and cache."""
    release(model)
    return model


def dynamic(model, ids, sizes, **kwargs):
    from transformers import DynamicCache

    return run(reference(model), DynamicCache(), ids, sizes, **kwargs)


class PerHead(KVPolicy):
    """Ragged: after the prompt, head g of row b keeps every (g + b + 2)-th token and the newest."""

    def keep(self, v):
        if not v.prefill:
            return None
        B, G, S = v.shape
        step = torch.arange(B)[:, None, None] + torch.arange(G)[:, None] + 2
        return (v.pos % step == 0) | (v.pos == v.seen - 1)


class PerLayer(KVPolicy):
    """Layer l keeps the last 4 + 3 l tokens of the prompt."""

    def keep(self, v):
        return v.rank >= v.count - (4 + 3 * v.layer) if v.prefill else None


class Mass(KVPolicy):
    """Attention mass since arrival; the `budget` heaviest stay (and the newest)."""

    slots = {"acc": torch.float32}
    needs = {"attn"}

    def __init__(self, budget):
        self.budget = budget

    def observe(self, v):
        v.slot["acc"] += v.attn_sum().sum(2)

    def keep(self, v):
        if v.S <= self.budget:
            return None
        score = v.slot["acc"].clone()
        score[..., -1] = torch.inf
        return best(score.masked_fill(~v.ok, -1), self.budget)


# --- T0: Full is the model's own cache ------------------------------------------------------------
@pytest.mark.parametrize("sizes", [[40], [30] + [1] * 10, [7, 13, 1, 1, 18]])
def test_T0_full_equals_dynamic_cache(model, sizes):
    ids = random_ids(2, 40)
    expected = dynamic(model, ids, sizes)
    cache = KVCache(model)
    close(run(model, cache, ids, sizes), expected, 5e-6)
    assert cache.seen == 40 and cache.held(1).tolist() == [[40] * cache._G] * 2


def test_T0_generate(model):
    ids = random_ids(2, 12)
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None)
    expected = reference(model).generate(ids, **kwargs)
    assert torch.equal(model.generate(ids, past_key_values=KVCache(model), **kwargs), expected)


def test_T0_beam_search(llama):
    ids = random_ids(2, 8)
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=3, do_sample=False)
    expected = reference(llama).generate(ids, **kwargs)
    assert torch.equal(llama.generate(ids, past_key_values=KVCache(llama), **kwargs), expected)


def test_T0_long_prompt_in_query_blocks(llama, monkeypatch):
    ids = random_ids(2, 40)
    expected = dynamic(llama, ids, [40])
    monkeypatch.setattr(attention_module, "BLOCK", 2 * 4 * 40 * 7)  # 7 queries at a time
    cache = KVCache(llama, Mass(100))
    close(run(llama, cache, ids, [40]), expected)
    monkeypatch.undo()
    whole = KVCache(llama, Mass(100))
    run(llama, whole, ids, [40])
    close(cache.layers[2].states["acc"], whole.layers[2].states["acc"])


def test_T0_half_precision():
    half = tiny("llama").to(torch.bfloat16)
    ids = random_ids(1, 20)
    expected = dynamic(tiny("llama").to(torch.bfloat16).float(), ids, [15, 1, 4])
    eager = (dynamic(half, ids, [15, 1, 4]).float() - expected).abs().max()
    cache = KVCache(half, StreamingLLM(30))
    for ours in (KVCache(half), cache):  # as near to exact arithmetic as eager attention, which rounds too
        close(run(half, ours, ids, [15, 1, 4]).float(), expected, 1.5 * eager)
    assert cache.layers[0].codec.k.dtype == torch.bfloat16


# --- T1: a budget that suffices changes nothing ---------------------------------------------------
@pytest.mark.parametrize("policy", [Window(40), Random(40, generator()), StreamingLLM(36, 4), Mass(40)])
def test_T1_enough_budget_equals_full(model, policy):
    if policy.positions == "compact" and model.config.model_type == "gpt2":
        with pytest.raises(ValueError, match="learned positions"):
            KVCache(model, policy)
        return
    ids, sizes = random_ids(2, 40), [25, 5] + [1] * 10
    expected = dynamic(model, ids, sizes)
    close(run(model, KVCache(model, policy), ids, sizes), expected, 2e-5)


@pytest.mark.parametrize("policy", [Window(6), Random(6, generator()), StreamingLLM(4, 2), Mass(6)])
def test_a_small_budget_changes_the_logits(llama, policy):
    ids, sizes = random_ids(2, 40), [25] + [1] * 15
    expected, cache = dynamic(llama, ids, sizes), KVCache(llama, policy)
    out = run(llama, cache, ids, sizes)
    close(out[:, :25], expected[:, :25], 2e-5)  # the prompt's own logits come before the eviction
    assert (out[:, 26:] - expected[:, 26:]).abs().max() > 0.05
    assert cache.held(0).tolist() == [[6, 6]] * 2 and cache.seen == 40


# --- T2: left padding -----------------------------------------------------------------------------
@pytest.mark.parametrize("make", [Full, lambda: Window(7), lambda: StreamingLLM(5, 2), lambda: Mass(7)])
def test_T2_padded_rows_equal_each_row_alone(llama, make):
    lengths, new = [20, 11, 5], 12
    rows = [random_ids(1, n + new, seed=n) for n in lengths]
    batch, mask = torch.ones(3, 20 + new, dtype=torch.long), torch.zeros(3, 20 + new, dtype=torch.long)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        batch[b, 20 - n :], mask[b, 20 - n :] = row[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = KVCache(llama, make())
    out = run(llama, cache, batch, [20] + [1] * new, mask, positions)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        alone = run(llama, KVCache(llama, make()), row, [n] + [1] * new)
        close(out[b, 20 - n :], alone[0], 2e-5)
    if not isinstance(cache.policy, Full):
        assert cache.layers[0].counts is None and cache.held(0).unique().tolist() == [7]


def test_T2_generate_with_padding(model):
    ids, mask = random_ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 1, 0
    kwargs = dict(attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None)
    expected = reference(model).generate(ids, **kwargs)
    assert torch.equal(model.generate(ids, past_key_values=KVCache(model), **kwargs), expected)


# --- T3: order of slots ---------------------------------------------------------------------------
def test_T3_permuted_slots_give_the_same_output(model):
    ids = random_ids(2, 30)
    plain, permuted = KVCache(model, Mass(40)), KVCache(model, Mass(40))
    for cache in (plain, permuted):
        run(model, cache, ids[:, :20], [20])
    for layer in permuted.layers:
        order = torch.stack([torch.randperm(20, generator=generator(i)) for i in range(2 * plain._G)])
        layer._pack(Selection(torch.arange(20).expand(2, plain._G, 20), layer.shape))
        at = order.view(2, plain._G, 20)
        layer.codec.k, layer.codec.v = layer.codec.read(at)
        layer.pos = layer.pos.gather(-1, at)
        layer.states["acc"] = layer.states["acc"].gather(-1, at)
    close(run(model, permuted, ids[:, 20:], [4, 1, 5]), run(model, plain, ids[:, 20:], [4, 1, 5]))


# --- T4: bytes ------------------------------------------------------------------------------------
def test_T4_bytes_equal_the_formula_and_stay_constant(llama):
    L, G, D = 3, 2, 8
    cache = KVCache(llama)
    run(llama, cache, random_ids(2, 100), [90] + [1] * 10)
    assert cache.nbytes() == {"payload": 2 * L * 2 * G * 100 * D * 4, "meta": L * 100 * 4, "state": 0}
    for policy, meta, state in ((StreamingLLM(12, 4), 4, 0), (Window(16), 4, 0), (Mass(16), 4 * 2 * G, 4)):
        cache, resident = KVCache(llama, policy), set()
        run(llama, cache, random_ids(2, 100), [100])
        for step in range(100):
            run(llama, cache, random_ids(2, 1, seed=step), [1])
            resident.add(cache.ledger().total(view="resident"))
        per_layer = 2 * 2 * G * 16 * D * 4
        expected = {"payload": L * per_layer, "meta": L * 16 * meta, "state": L * 2 * G * 16 * state}
        assert cache.nbytes() == expected
        assert resident == {sum(expected.values())}


def test_T4_nothing_of_the_prompt_is_kept_alive(llama):
    cache = KVCache(llama, Window(4))
    run(llama, cache, random_ids(1, 400), [400])
    assert cache.ledger().total(view="resident") == 3 * (2 * 2 * 4 * 8 * 4 + 4 * 4)
    store, gone = weakref.ref(cache.layers[0].codec.k), weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None and store() is None, (
            "a reference cycle keeps the cache until the collector runs"
        )
    finally:
        gc.enable()


# --- T5: ragged heads -----------------------------------------------------------------------------
def test_T5_ragged_heads_equal_a_masked_dense_reference(model):
    from transformers import DynamicCache

    ids, n, new = random_ids(2, 36), 30, 6
    cache = KVCache(model, PerHead())
    out = run(model, cache, ids, [n] + [1] * (new - 2) + [2])
    G, H = cache._G, model.config.num_attention_heads
    hidden = torch.zeros(2, G, 36, 36, dtype=torch.bool)
    for b in range(2):
        for g in range(G):
            evicted = [t for t in range(n - 1) if t % (b + g + 2)]
            hidden[b, g, n:, evicted] = True
    query, key = torch.arange(36)[:, None], torch.arange(36)[None]
    window = getattr(model.config, "sliding_window", None) if model.config.model_type == "mistral" else None
    hidden |= (key > query) | ((key <= query - window) if window else False)
    bias = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = reference(model)(
            ids, attention_mask=bias.repeat_interleave(H // G, 1), past_key_values=DynamicCache()
        ).logits
    close(out, expected, 2e-5)
    counts = [[len({*range(0, n, b + g + 2), n - 1}) + new for g in range(G)] for b in range(2)]
    assert cache.held(0).tolist() == counts
    D = cache._D
    assert cache.nbytes()["payload"] == 3 * 2 * sum(map(sum, counts)) * D * 4  # the real sum, no padding
    assert cache.ledger().total(view="payload") == cache.ledger().total(view="resident")


def test_steps_beside_ragged_entries_equal_the_general_way(model):
    class Once(PerHead):
        once = True

    ids, n, sizes = random_ids(2, 40), 30, [1, 1, 1, 2, 1, 1]
    plain, general = (KVCache(model, Once()) for _ in range(2))
    for layer in general.layers:
        layer.plain = False
    close(run(model, plain, ids, [n, *sizes]), run(model, general, ids, [n, *sizes]), 1e-6)
    layer = plain.layers[0]
    windowed = getattr(model.config, "sliding_window", None) is not None
    assert layer.counts is not None and layer.beside == (0 if windowed else 2), "the last two tokens wait"
    for l in range(plain.n_layers):
        assert plain.held(l).tolist() == general.held(l).tolist()
    waiting = layer.codec.nbytes()["payload"]
    assert waiting == int(plain.held(0).sum()) * 2 * plain._D * 4, "nothing is padded at rest"
    assert plain.read_bytes() == general.read_bytes()
    assert torch.equal(layer.pos, general.layers[0].pos) and layer.beside == 0
    assert torch.equal(layer.codec.k, general.layers[0].codec.k)
    more = torch.tensor([[7], [8]])
    run(model, plain, more, [1]), run(model, general, more, [1])
    for cache in (plain, general):
        cache.reorder_cache(torch.tensor([1, 0]))
    close(run(model, plain, more, [1]), run(model, general, more, [1]), 1e-6)
    assert plain.nbytes() == general.nbytes()


# --- T7: questions after eviction, chunked prefill, plans -----------------------------------------
@pytest.mark.parametrize("policy", [PerLayer(), PerHead()])
def test_T7_a_question_after_eviction(model, policy):
    ids = random_ids(2, 35)
    at_once, by_token = KVCache(model, policy), KVCache(model, policy)
    a, b = run(model, at_once, ids, [30, 5]), run(model, by_token, ids, [30] + [1] * 5)
    close(a, b)
    if isinstance(policy, PerLayer):
        assert at_once.seen == by_token.seen == 35
        assert [int(at_once.held(l)[0, 0]) for l in range(3)] == [9, 12, 15]
        difference = (a[:, 30:] - dynamic(model, ids, [35])[:, 30:]).abs().max()
        # Mistral's own window of 5 lies inside what the first layer keeps of the last tokens.
        assert difference < 1e-5 if model.config.model_type == "mistral" else difference > 0.01


@pytest.mark.parametrize("make", [
    PerLayer, PerHead, lambda: Mass(9), lambda: Random(9, generator()), lambda: StreamingLLM(7, 2),
])  # fmt: skip
def test_chunked_prefill_evicts_like_one_forward(llama, make):
    ids, new = random_ids(2, 40), [1] * 10
    whole, chunked = KVCache(llama, make()), KVCache(llama, make())
    expected = run(llama, whole, ids, [30, *new])
    with chunked.prefill():
        out = [run(llama, chunked, ids[:, a:b], [b - a]) for a, b in ((0, 11), (11, 12), (12, 30))]
        assert chunked.held(0).unique().tolist() == [30]
    out.append(run(llama, chunked, ids[:, 30:], new))
    close(torch.cat(out, 1), expected, 2e-5)
    for a, b in zip(whole.layers, chunked.layers, strict=True):
        assert torch.equal(a.pos, b.pos)


def test_plan_sees_all_layers_once(llama):
    class Planned(KVPolicy):
        calls = []

        def plan(self, views):
            self.calls.append([v.layer for v in views])
            return [v.rank >= v.count - (9 - 2 * v.layer) for v in views]

    cache = KVCache(llama, Planned())
    run(llama, cache, random_ids(1, 22), [20, 1, 1])
    assert Planned.calls == [[0, 1, 2]] and [int(cache.held(l)[0, 0]) for l in range(3)] == [11, 9, 7]


def test_merge_rewrites_the_survivors(llama):
    class MeanOfDropped(KVPolicy):
        def keep(self, v):
            return v.rank >= v.count - 4 if v.prefill else None

        def merge(self, v, keep):
            mean = v.v.masked_fill(keep[..., None], 0).sum(2, keepdim=True) / (~keep).sum(-1)[..., None, None]
            return v.k, torch.where((v.rank == v.S - 4)[:, None], mean, v.v)

    full, merged = KVCache(llama), KVCache(llama, MeanOfDropped())
    for cache in (full, merged):
        run(llama, cache, random_ids(1, 20), [20])
    close(merged.layers[0].codec.v[:, :, 0], full.layers[0].codec.v[:, :, :16].mean(2))
    close(merged.layers[0].codec.v[:, :, 1:], full.layers[0].codec.v[:, :, 17:])


def test_hidden_is_the_input_of_the_layer(llama):
    class Hidden(KVPolicy):
        needs = {"hidden"}
        inputs = []

        def observe(self, v):
            self.inputs.append(v.x)

    ids = random_ids(1, 6)
    with torch.no_grad():
        expected = reference(llama)(ids, output_hidden_states=True).hidden_states
    cache = KVCache(llama, Hidden())
    run(llama, cache, ids, [6])
    for x, y in zip(Hidden.inputs, expected[:3], strict=True):
        close(x, y)
    del cache
    gc.collect()
    assert not llama.model.layers[0]._forward_pre_hooks


def test_a_reader_reads_what_it_selects(llama):
    class Everything(Reader):
        def select(self, q):
            return torch.arange(self.n).expand(*q.shape[:2], -1)

        def build(self, codec, q, ok):
            self.n = codec.k.shape[2]  # the prompt only: new tokens are not read

    ids = random_ids(1, 12)
    cache = KVCache(llama, reader=Everything())
    out = run(llama, cache, ids, [10, 1, 1])
    expected = dynamic(llama, ids, [12])
    close(out[:, :10], expected[:, :10])
    assert (out[:, 10:] - expected[:, 10:]).abs().max() > 1e-3


# --- T8: slot states ------------------------------------------------------------------------------
def test_T8_slot_states_equal_a_dictionary_keyed_by_position(llama):
    class Recorded(Mass):
        log = []

        def observe(self, v):
            super().observe(v)
            self.log.append((v.layer, v.pos.clone(), v.attn.sum((2, 3))))

    policy = Recorded(8)
    cache = KVCache(llama, policy)
    run(llama, cache, random_ids(2, 30), [12, 3] + [1] * 15)
    table = {}
    for layer, pos, mass in policy.log:
        for b, g, s in torch.cartesian_prod(*map(torch.arange, pos.shape)).tolist():
            key = (layer, b, g, int(pos[b, g, s]))
            table[key] = table.get(key, 0.0) + float(mass[b, g, s])
    for layer in cache.layers:
        for b, g, s in torch.cartesian_prod(*map(torch.arange, layer.pos.shape)).tolist():
            expected = table[layer.index, b, g, int(layer.pos[b, g, s])]
            assert float(layer.states["acc"][b, g, s]) == pytest.approx(expected, abs=1e-4)


def test_streaming_equals_brute_force_over_300_steps(llama):
    """Un-rotated keys of every token in a list, numbered anew at each step, one head at a time."""
    from refimpl.backbone import Backbone

    ids, bb, sink, recent = random_ids(1, 310), Backbone(llama), 3, 9
    cache = KVCache(llama, StreamingLLM(recent, sink))
    out = run(llama, cache, ids, [10] + [1] * 300)
    kept = [[] for _ in range(3)]
    with torch.no_grad():
        for t in range(310):
            x = bb.embed(ids[:, t : t + 1], torch.tensor([t]))
            for l in range(3):
                q, k, v = bb.qkv(l, bb.ln1(l, x))
                kept[l].append((k, v))
                if len(kept[l]) > sink + recent + 1:
                    del kept[l][sink]
                keys, values = (torch.cat(part, 2) for part in zip(*kept[l], strict=True))
                n = keys.shape[2]
                q, keys = bb.rot(q, torch.tensor([n - 1])), bb.rot(keys, torch.arange(n))
                heads = []
                for h in range(4):
                    a = (q[0, h] @ keys[0, h // 2].T / 8**0.5).softmax(-1)
                    heads.append(a @ values[0, h // 2])
                x = x + bb.o_proj(l, torch.stack(heads)[None])
                x = x + bb.mlp(l, bb.ln2(l, x))
            if t >= 10:
                close(bb.head(bb.ln_final(x))[0, 0], out[0, t], 2e-5)
            elif t == 9:
                for l in range(3):
                    assert len(kept[l]) == 10


def test_compact_positions_do_not_depend_on_absolute_ones(llama):
    ids, sizes = random_ids(1, 40), [20] + [1] * 20
    at = torch.arange(40)[None]
    a = run(llama, KVCache(llama, StreamingLLM(6, 2)), ids, sizes, positions=at)
    b = run(llama, KVCache(llama, StreamingLLM(6, 2)), ids, sizes, positions=at + 1000)
    close(a, b, 2e-4)


def test_random_is_a_uniform_reservoir(llama):
    n, budget, hits = 24, 5, torch.zeros(24)
    for seed in range(10):  # rows and heads draw for themselves: ten batches of 40 are as good as 100 of 4
        cache = KVCache(llama, Random(budget, generator(seed)))
        run(llama, cache, random_ids(40, n), [12] + [1] * 12)
        pos = torch.stack([layer.pos for layer in cache.layers])
        hits += torch.bincount(pos.flatten(), minlength=n)
    draws = 10 * 3 * 40 * 2
    assert hits[-1] == draws
    expected = draws * (budget - 1) / (n - 1)
    chi2 = ((hits[:-1] - expected) ** 2 / (expected * (1 - (budget - 1) / (n - 1)))).sum()
    assert chi2 < 50, hits  # 22 degrees of freedom: 48.3 is the 0.1 % point


# --- what is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [
    lambda: Window(0), lambda: Window(2.0), lambda: Window(True), lambda: StreamingLLM(0),
    lambda: Random(0, generator()), lambda: StreamingLLM(4, -1),
])  # fmt: skip
def test_sizes_out_of_range(make):
    with pytest.raises(ValueError, match="allowed: integers from"):
        make()


def test_wrong_arguments(llama):
    with pytest.raises(TypeError, match="generator: expected a torch.Generator"):
        Random(4, 0)
    for kwargs in ({"policy": "h2o"}, {"codec": 4}, {"reader": 4}):
        with pytest.raises(TypeError, match=f"{next(iter(kwargs))}: expected a"):
            KVCache(llama, **kwargs)
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        KVCache(torch.nn.Linear(2, 2))
    bad = type("Bad", (KVPolicy,), {"positions": "relative"})
    with pytest.raises(ValueError, match="'relative'; allowed: original, compact"):
        KVCache(llama, bad())
    with pytest.raises(ValueError, match="needs: .*; allowed"):
        KVCache(llama, type("Bad", (KVPolicy,), {"needs": {"gradient"}})())
    with pytest.raises(ValueError, match="original positions"):
        KVCache(llama, Mass(4), reader=Reader())
    for n in (0, 5):
        with pytest.raises(ValueError, match=r"n: .; allowed: 1\.\.4"):
            best(torch.zeros(4), n)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_types_that_depend_on_the_length(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    model = tiny("llama", rope_parameters=rope)
    with pytest.raises(ValueError, match=rope_type):
        KVCache(model, StreamingLLM(4))


def test_yarn_is_turned_back_exactly():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    model = tiny("llama", rope_parameters=rope)
    assert model.model.rotary_emb.attention_scaling != 1
    ids = random_ids(1, 20)
    close(
        run(model, KVCache(model, StreamingLLM(30)), ids, [15, 1, 4]), dynamic(model, ids, [15, 1, 4]), 2e-5
    )


def test_refused_input_changes_nothing(llama):
    cache, ids = KVCache(llama, Window(6)), random_ids(2, 10)
    run(llama, cache, ids, [8])
    before = cache.ledger().total(), cache.seen
    for wrong, kwargs, message in (
        (random_ids(3, 1), {}, "3 rows, but the cache holds 2"),
        (ids[:, 8:9], {"attention_mask": torch.ones(2, 3)}, r"shape \[2, 3\]; allowed: \[B, 9\]"),
        (ids[:, 8:9], {"attention_mask": torch.zeros(2, 1, 1, 9)}, r"allowed: \[B, tokens seen\]"),
    ):
        with pytest.raises(ValueError, match=message):
            llama(wrong, past_key_values=cache, **kwargs)
        assert (cache.ledger().total(), cache.seen) == before
    with pytest.raises(ValueError, match="empty cache"):
        with cache.prefill():
            pass
    with pytest.raises(ValueError, match=r"layer: 3; allowed: 0\.\.2"):
        cache.held(3)
    with pytest.raises(ValueError, match="no token"):
        KVCache(llama).held(0)


def test_a_padded_prompt_needs_its_mask_later(llama):
    cache, ids, mask = KVCache(llama), random_ids(2, 10), torch.ones(2, 10)
    mask[0, :3] = 0
    run(llama, cache, ids, [9], mask)
    with pytest.raises(ValueError, match="the prompt was padded"):
        run(llama, cache, ids[:, 9:], [1])


def test_attention_without_cache_and_cache_without_attention(llama):
    cache, ids = KVCache(llama), random_ids(1, 5)
    with pytest.raises(RuntimeError, match="keys carry no cache layer"):
        llama(ids, use_cache=False)
    release(llama)
    with pytest.raises(RuntimeError, match="attention is 'eager'"):
        llama(ids, past_key_values=cache)
    other = tiny("mistral")
    KVCache(other)
    wrong = KVCache(llama)
    with pytest.raises(ValueError, match=r"keys: shape .*; allowed: \[B, 2, T, 8\]"):
        other(ids, past_key_values=wrong)


def test_dropout_is_refused():
    model = tiny("gpt2")
    model.train()
    with pytest.raises(ValueError, match="model.eval"):
        model(random_ids(1, 5), past_key_values=KVCache(model))


@pytest.mark.parametrize("keep, message", [
    (torch.zeros(4), "expected a mask"), (None, "expected a mask"),
    (torch.ones(3, dtype=torch.bool), "shape"),
    (torch.ones(1, 3, 4, dtype=torch.bool), "shape"), (torch.arange(5), "5 indices"),
    (torch.zeros(1, 2, 4, dtype=torch.bool), "nothing stays"),
])  # fmt: skip
def test_selections_that_do_not_fit(keep, message):
    with pytest.raises(ValueError, match=message):
        Selection(keep, (1, 2, 4))


def test_selection_forms_agree():
    t = torch.randn(2, 3, 5, 4, generator=generator())
    shared = Selection(torch.tensor([0, 3]), (2, 3, 5)).apply(t)
    mask = torch.zeros(2, 3, 5, dtype=torch.bool)
    mask[..., [0, 3]] = True
    for keep in (mask, mask[0, 0], torch.tensor([0, 3]).expand(2, 3, 2)):
        assert torch.equal(Selection(keep, (2, 3, 5)).apply(t), shared)
    ragged = torch.rand(2, 3, 5, generator=generator()) < 0.5
    selection = Selection(ragged, (2, 3, 5))
    padding = Padding(selection.counts)
    assert torch.equal(padding.apply(selection.apply(t))[padding.ok], t[ragged])


def test_view_refuses_no_queries():
    one, at = torch.zeros(1, 1, 1, 2, 4), torch.arange(2)
    attention = attention_module.Attention(one, one[0], one[0], 1.0, at, at)
    view = View(attention, read=lambda: (one[0],) * 2, pos=at, shape=(1, 1, 2), layer=0, n_layers=1,
                prefill=True, seen=2)  # fmt: skip
    assert torch.equal(view.attn_lastw(9), view.attn) and view.attn_lastw(1).shape == (1, 1, 1, 1, 2)
    with pytest.raises(ValueError, match="w: 0"):
        view.attn_lastw(0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("make", [Full, lambda: Window(6), lambda: AdaSnapKV(6, 2, 1)])
def test_a_padded_batch_token_by_token_equals_each_row_alone(family, make):
    """A query at padding sees nothing at all: what it computes must not reach the others, as NaN would."""
    model = tiny(family)
    rows, batch, mask, positions = padded((12, 5), 6, 12)
    cache = KVCache(model, make())
    step = lambda t: model(
        batch[:, t : t + 1], past_key_values=cache, attention_mask=mask[:, : t + 1],
        position_ids=positions[:, t : t + 1],
    ).logits  # fmt: skip
    with torch.no_grad():
        with cache.prefill():
            parts = [step(t) for t in range(12)]
        out = torch.cat([*parts, *(step(t) for t in range(12, 18))], 1)
    assert out.isfinite().all()
    for b, n in enumerate((12, 5)):
        alone = KVCache(model, make())
        close(out[b, 12 - n :], run(model, alone, rows[b], [n] + [1] * 6)[0], 2e-5)
