"""The check of the serving account (footprint spec A10): real caches and the measured peak of real steps."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refimpl.checks import check, require, require_error
from refimpl.checks.tiny import tiny

IMPLEMENTATION = {"serving_bytes": "refimpl.footprint.serving:serving_bytes"}
BATCH, LENGTH = 2, 21


@check
def check_serving_bytes(serving_bytes: Callable) -> None:
    """`serving_bytes(config, batch, length, dtype, phase=, reserved=)` -> resident bytes by kind at the peak.

    phase: "prefill" of all tokens, or "decode" (default) of the last one; reserved: a static cache's maximum.
    """
    from transformers import StaticCache

    for what, model in _models():
        got = serving_bytes(model.config, BATCH, LENGTH, "float32")
        cache = _cache(model)
        _equal(f"{what}: the cache", got.get("kv", 0), _held(cache))
        parameters = sum(p.nbytes for p in model.parameters())
        _equal(f"{what}: the weights", got.get("weight", 0), parameters)
        half = serving_bytes(model.config, BATCH, LENGTH, "bfloat16")
        _equal(f"{what}: the cache in bfloat16", 2 * half["kv"], _held(cache))
        if what.startswith("DeepSeek"):
            continue
        for phase, peak in _peaks(model).items():
            length = LENGTH - 1 if phase == "prefill" else LENGTH
            total = sum(serving_bytes(model.config, BATCH, length, "float32", phase=phase).values())
            _equal(f"{what}: the peak of {phase}", total, peak)
    model = tiny("llama", attention="sdpa")
    reserved = serving_bytes(model.config, BATCH, LENGTH, "float32", reserved=32)
    static = _cache(model, cache=StaticCache(config=model.config, max_cache_len=32))
    _equal("a static cache, which reserves its maximum of 32 tokens", reserved["kv"], _held(static))
    config = model.config.to_dict()
    for bad in ({"batch": 0}, {"length": 0}, {"dtype": "int3"}, {"phase": "train"}, {"reserved": LENGTH - 1}):
        arguments = {"batch": BATCH, "length": LENGTH} | bad
        require_error(ValueError, lambda a=arguments: serving_bytes(config, **a), f"called with {bad}")


def _models() -> Iterable[tuple[str, nn.Module]]:
    yield "GPT-2", tiny("gpt2", attention="sdpa")
    for heads, what in ((4, "MHA"), (2, "GQA"), (1, "MQA")):
        yield f"LLaMA with {what}", tiny("llama", attention="sdpa", num_key_value_heads=heads)
    yield "LLaMA of one layer, untied", tiny("llama", attention="sdpa", num_hidden_layers=1,
                                             tie_word_embeddings=False)  # fmt: skip
    yield "LLaMA with a wide vocabulary", tiny("llama", attention="sdpa", vocab_size=3000)
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, n_shared_experts=1,
        moe_intermediate_size=16, first_k_dense_replace=1, max_position_embeddings=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        yield "DeepSeek-V3 with a latent of 64 and a rotary key of 16", DeepseekV3ForCausalLM(config).eval()


def _cache(model: nn.Module, cache: Any = None) -> Any:
    ids = torch.full((BATCH, LENGTH), 2)
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).past_key_values


def _held(cache: Any) -> int:
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


def _peaks(model: nn.Module) -> dict[str, int]:
    """The most bytes alive during a prefill of all tokens but one, and during the step with the last one."""
    ids, peaks = torch.full((BATCH, LENGTH - 1), 2), {}
    meter = _Meter([*model.parameters(), *model.buffers(), ids])
    with torch.no_grad(), meter:
        past = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        peaks["prefill"] = meter.peak
        del ids
        meter.peak = meter.live
        model(torch.full((BATCH, 1), 2), past_key_values=past, use_cache=True)
        peaks["decode"] = meter.peak
    return peaks


class _Meter(TorchDispatchMode):
    """Bytes of the storages that operations make and nobody has freed yet, and their maximum."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()
        self.add(tensors)

    def add(self, values: Any) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor) or tensor.untyped_storage()._cdata in self.known:
                continue
            storage = tensor.untyped_storage()
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.add(made)
        return made


def _equal(what: str, got: int, expected: int) -> None:
    require(got == expected, f"{what}: {got} bytes predicted, {expected} measured")
