"""The serving account against real caches and against the measured peak of a forward pass, to the byte."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refimpl.footprint import Arch
from refimpl.footprint.published import LlamaVariant, arch, of_config
from refimpl.footprint.serving import crossover, kv_bytes, kv_width, largest_batch, serving, weight_bytes
from refimpl.ledger import of_model, of_tensors

B, T = 2, 37


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and their maximum: enough of a tracker to judge a prediction."""

    def __init__(self, *tensors):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()
        self.count(tensors)

    def count(self, tensors):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def drop(self, key, nbytes):
        self.seen.remove(key)
        self.now -= nbytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.count([out])
        return out


def build(config, dtype=torch.float32):
    """A model of random weights; its configuration's attention is sdpa."""
    from transformers import AutoModelForCausalLM

    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def llama(**changes):
    from transformers import LlamaConfig

    fields = {
        "vocab_size": 48,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    return LlamaConfig(**(fields | changes), bos_token_id=0, eos_token_id=0)


def gpt2(**changes):
    from transformers import GPT2Config

    fields = {"vocab_size": 48, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
    return GPT2Config(**(fields | changes), bos_token_id=0, eos_token_id=0)


def deepseek(**changes):
    from transformers import DeepseekV3Config

    fields = {
        "vocab_size": 48,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 128,
    }
    return DeepseekV3Config(**(fields | changes), bos_token_id=0, eos_token_id=0)


def cache_of(model, length=T, cache=None):
    ids = torch.zeros(B, length, dtype=torch.long)
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).past_key_values


def entries(cache):
    pairs = [(f"layer {i}", layer) for i, layer in enumerate(cache.layers)]
    return of_tensors([(f"{n} {p}", getattr(x, p)) for n, x in pairs for p in ("keys", "values")], "kv")


# --- the cache ---


@pytest.mark.parametrize(("heads", "expected"), [(8, 909_312), (4, 454_656), (1, 113_664)])
def test_mha_gqa_mqa_caches_hold_what_the_spec_measured(heads, expected):
    """Six layers, 8 heads of 32: spec A10's figures at B = 2, T = 37, float32."""
    config = llama(num_key_value_heads=heads, hidden_size=256, num_hidden_layers=6)
    predicted = kv_bytes(of_config(config), B, T, "float32")
    assert predicted == entries(cache_of(build(config))).total(view="resident")
    assert predicted == expected


def test_mla_caches_the_latent_and_one_rotary_key():
    model = build(deepseek())
    cache = cache_of(model)
    assert cache.layers[0].keys.shape == (B, 1, T, 64) and cache.layers[0].values.shape == (B, 1, T, 16)
    predicted = kv_bytes(of_config(model.config), B, T, "float32")
    assert predicted == entries(cache).total(view="resident") == 71_040
    assert kv_width(of_config(model.config)) == 64 + 16


def test_gpt2_caches_all_heads():
    model = build(gpt2())
    assert kv_bytes(of_config(model.config), B, T, "float32") == entries(cache_of(model)).total(
        view="resident"
    )


def test_bfloat16_halves_the_cache():
    model = build(llama(), torch.bfloat16)
    predicted = kv_bytes(of_config(model.config), B, T, "bfloat16")
    assert predicted == entries(cache_of(model)).total(view="resident")
    assert 2 * predicted == kv_bytes(of_config(model.config), B, T, "float32")


def test_a_static_cache_reserves_its_maximum():
    from transformers import StaticCache

    model = build(llama())
    cache = cache_of(model, cache=StaticCache(config=model.config, max_cache_len=64))
    predicted = kv_bytes(of_config(model.config), B, T, "float32", reserved=64)
    assert predicted == entries(cache).total(view="resident")
    assert predicted == kv_bytes(of_config(model.config), B, 64, "float32")


def test_a_sliding_window_keeps_one_less_than_the_window_and_a_slice_of_more():
    from transformers import MistralConfig, StaticCache

    fields = llama().to_dict()
    wanted = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
    config = MistralConfig(**{k: fields[k] for k in wanted}, sliding_window=9, bos_token_id=0, eos_token_id=0)
    model, a = build(config), of_config(config)
    for phase, extra in (("prefill", 0), ("decode", 1)):
        cache = cache_of(model)
        if extra:
            cache = cache_of(model, 1, cache)
        ledger = serving(a, B, T + extra, "float32", phase=phase, window=9)
        for view in ("payload", "resident"):
            assert ledger.total("kv", view) == entries(cache).total(view=view), (phase, view)
    assert kv_bytes(a, B, 5, "float32", window=9) == kv_bytes(a, B, 5, "float32")
    static = cache_of(model, cache=StaticCache(config=config, max_cache_len=64))
    assert kv_bytes(a, B, T, "float32", window=9, reserved=64) == entries(static).total(view="resident")


# --- the peak ---


def measured(model, batch=B, length=T):
    """Peak of a prefill of all but the last token, and of the decoding step that follows, in bytes."""
    ids = torch.zeros(batch, length - 1, dtype=torch.long)
    live = Live(list(model.parameters()), list(model.buffers()), ids)
    peaks = []
    with torch.no_grad(), live:
        past = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        peaks.append(live.peak)
        del ids
        live.peak = live.now
        model(torch.zeros(batch, 1, dtype=torch.long), past_key_values=past, use_cache=True)
        peaks.append(live.peak)
    return peaks


def predicted(model, batch=B, length=T, dtype="float32"):
    a = of_config(model.config)
    return [
        serving(a, batch, t, dtype, phase=phase).total(view="resident")
        for t, phase in ((length - 1, "prefill"), (length, "decode"))
    ]


@pytest.mark.parametrize(
    "config",
    [
        lambda: llama(),
        lambda: llama(num_hidden_layers=1),
        lambda: llama(num_key_value_heads=8),
        lambda: llama(num_key_value_heads=1, tie_word_embeddings=True),
        lambda: llama(intermediate_size=32),
        lambda: llama(vocab_size=5000),
        lambda: llama(head_dim=16),
        lambda: llama(num_key_value_heads=8, intermediate_size=80),
        lambda: gpt2(),
        lambda: gpt2(n_layer=1),
        lambda: gpt2(vocab_size=5000),
    ],
    ids=[
        "GQA",
        "one layer",
        "MHA",
        "MQA tied",
        "narrow MLP",
        "wide vocabulary",
        "wide heads",
        "MHA, narrow MLP",
        "GPT-2",
        "GPT-2 one layer",
        "GPT-2 wide vocabulary",
    ],
)
def test_peaks_of_prefill_and_decoding_are_predicted_to_the_byte(config):
    model = build(config())
    assert measured(model) == predicted(model)
    assert measured(model, 3, 11) == predicted(model, 3, 11)


def test_peaks_with_normed_heads():
    from transformers import Qwen3Config

    fields = {
        k: v for k, v in llama().to_dict().items() if k in Qwen3Config().to_dict() and k != "model_type"
    }
    model = build(Qwen3Config(**(fields | {"head_dim": 8})))
    assert measured(model) == predicted(model)


def test_peaks_in_bfloat16():
    model = build(llama(), torch.bfloat16)
    assert measured(model) == predicted(model, dtype="bfloat16")


def test_weights_and_buffers_are_those_of_the_model():
    for config in (llama(), gpt2()):
        model = build(config)
        ledger = serving(of_config(config), B, T, "float32")
        for kind in ("weight", "buffer"):
            assert ledger.total(kind, "resident") == of_model(model).total(kind, "resident")


def test_prefill_needs_the_wider_workspace_and_decoding_the_copied_cache():
    a = of_config(llama())
    prefill, decode = (serving(a, B, T, "float32", phase=p) for p in ("prefill", "decode"))
    assert prefill.total("activation") > decode.total("activation")
    assert prefill.total("temp") == 0 and decode.total("temp") == 4 * B * (T - 1) * 2 * 8
    reserved = serving(a, B, T, "float32", reserved=T)
    assert reserved.total("temp") == 0 and reserved.total("kv") == decode.total("kv")


# --- solving for lengths and batches ---


def test_crossover_is_the_first_length_at_which_the_cache_outweighs_the_weights():
    for name in ("openai-community/gpt2", "meta-llama/Llama-2-70b-hf", "deepseek-ai/DeepSeek-V3"):
        a = arch(name)
        length = crossover(a, batch=4)
        assert kv_bytes(a, 4, length) > weight_bytes(a) >= kv_bytes(a, 4, length - 1)


def test_largest_batch_is_confirmed_by_the_measured_peak():
    model = build(llama(num_hidden_layers=2))
    a, budget = of_config(model.config), 700_000
    batch = largest_batch(a, T, budget, "float32")
    assert batch > 2
    assert max(measured(model, batch)[1:]) <= budget < measured(model, batch + 1)[1]


def test_largest_batch_is_confirmed_by_fake_tensors():
    """A model of 1.2 billion parameters without its memory: tensors of the account's shapes, fake."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    a = Arch("llama", 128256, 131072, 2048, 8192, 16, 32, 8, 64, tied=True)
    budget, length = 24 * 2**30, 8192
    batch = largest_batch(a, length, budget)
    for b, fits in ((batch, True), (batch + 1, False)):
        with FakeTensorMode():
            weights = [torch.empty(shape, dtype=torch.bfloat16) for _, shape in a.tensors()]
            cache = [torch.empty(b, 8, length, 64, dtype=torch.bfloat16) for _ in range(2 * 16)]
            old = torch.empty(b, 8, length - 1, 64, dtype=torch.bfloat16)
            tensors = [(str(i), t) for i, t in enumerate([*weights, *cache, old])]
            held = of_tensors(tensors, "temp").total(view="resident")
        # What the fake step leaves out is the one token's own activations.
        extra = serving(a, b, length).total("activation", "resident") + 4 * 64
        assert (held + extra <= budget) is fits


def test_a_budget_below_one_sequence_gives_zero():
    assert largest_batch(arch("meta-llama/Meta-Llama-3-8B"), 8192, 10**9) == 0


def test_mixtures_count_weights_and_cache_only():
    mixtral = arch("mistralai/Mixtral-8x7B-v0.1")
    ledger = serving(mixtral, 1, 8192, phase="prefill")
    assert ledger.total("weight") == 2 * 46_702_792_704
    assert ledger.total("kv") == kv_bytes(arch("mistralai/Mistral-7B-v0.3"), 1, 8192)
    assert [item.name for item in ledger.items if item.kind == "activation"] == ["output head"]


def test_neutral_settings_change_nothing():
    a = of_config(llama())
    plain = serving(a, B, T, "float32")
    assert serving(LlamaVariant(a), B, T, "float32") == plain
    assert kv_bytes(a, B, T, reserved=T) == kv_bytes(a, B, T) == kv_bytes(a, B, T, window=T + 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: kv_bytes(a, 0, 5), "batch must be an integer >= 1, got 0"),
        (lambda a: kv_bytes(a, 1, -3), "length must be an integer >= 1, got -3"),
        (lambda a: kv_bytes(a, 1, 5, "int3"), "dtype must be one of float32, bfloat16, float16, got 'int3'"),
        (lambda a: kv_bytes(a, 1, 5, window=1), "window must be an integer >= 2, got 1"),
        (lambda a: kv_bytes(a, 1, 5, reserved=4), "reserved must be None or at least the length 5, got 4"),
        (lambda a: serving(a, 1, 5, phase="train"), "phase must be 'prefill' or 'decode', got 'train'"),
        (lambda a: crossover(a, 0), "batch must be an integer >= 1, got 0"),
        (lambda a: largest_batch(a, 5, 0), "budget must be an integer >= 1 (bytes), got 0"),
        (lambda a: weight_bytes(a, "fp8"), "dtype must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError) as error:
        call(of_config(llama()))
    assert message in str(error.value)
