"""The checks of saved activations (footprint spec A2): measured with hooks of their own, and predicted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_error
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {
    "saved_tensors": "refimpl.footprint.saved_tensors:saved_tensors",
    "saved_bytes": "refimpl.footprint.activations:saved_bytes",
}
UNTIED = {"tie_word_embeddings": False}
MODELS = {
    "tied GPT-2": ("gpt2", {}),
    "untied GPT-2": ("gpt2", UNTIED),
    "GPT-2 with fused GELU": ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),
    "tied LLaMA, 2 of 4 KV heads": ("llama", {}),
    "untied LLaMA, 4 of 4 KV heads": ("llama", UNTIED | {"num_key_value_heads": 4}),
    "Qwen2": ("qwen2", {}),
}


@check
def check_saved_tensors(saved_tensors: Callable) -> None:
    """`saved_tensors(forward, model, counted=())` -> a ledger of kind "activation"."""
    layer, x = nn.Linear(8, 4, bias=False), torch.ones(2, 8)
    cases = [
        ("x·W saves x [2, 8] (and W, a parameter)", lambda: layer(x).sum(), (), 64),
        ("exp saves its output [2, 4] beside x", lambda: layer(x).exp().sum(), (), 64 + 32),
        ("x used twice is one storage", lambda: (layer(x) + layer(x)).sum(), (), 64),
        ("x is in another ledger", lambda: layer(x).exp().sum(), (x,), 32),
        ("a view keeps its storage of 3 rows", lambda: layer(torch.ones(3, 8)[:1]).sum(), (), 96),
        ("a product of y and y/2 saves both", lambda: ((y := layer(x)) * (y / 2)).sum(), (), 64 + 32 + 32),
        ("a graph that nothing holds any more", lambda: (layer(x).exp(), layer(x).sum())[1], (), 64),
    ]
    for what, forward, counted, expected in cases:
        _compare(what, saved_tensors(forward, layer, counted).total("activation", "resident"), expected)
    for what, (family, changes) in MODELS.items():
        for attention in ("eager", "sdpa"):
            model = tiny(family, attention=attention, **changes)
            forward = _step(model, 2, 12)
            got = saved_tensors(forward, model).total("activation", "resident")
            _compare(f"{what}, {attention}", got, _measured(forward, model))


@check
def check_saved_bytes(saved_bytes: Callable) -> None:
    """`saved_bytes(config, batch, length, attention=, dtype=, amp=)` -> bytes that backward needs."""
    for what, (family, changes) in MODELS.items():
        for attention in ("eager", "sdpa"):
            for layers, batch, length in ((1, 2, 8), (2, 3, 11), (3, 1, 30)):
                model = tiny(family, attention=attention, num_hidden_layers=layers, **changes)
                got = saved_bytes(model.config, batch, length, attention=attention)
                expected = _measured(_step(model, batch, length), model)
                _compare(f"{what}, {attention}, L={layers}, B={batch}, S={length}", got, expected)
            for dtype, amp in (("bfloat16", False), ("float32", True)):
                model = tiny(family, attention=attention, **changes).to(getattr(torch, dtype))
                got = saved_bytes(model.config, 2, 12, attention=attention, dtype=dtype, amp=amp)
                regime = "autocast" if amp else dtype
                _compare(f"{what}, {attention}, {regime}", got, _measured(_step(model, 2, 12, amp), model))
    require_error(ValueError, lambda: saved_bytes(tiny("gpt2").config, 1, 1), "a length of 1")
    require_error(ValueError, lambda: saved_bytes(tiny("gpt2").config, 1, 33), "a length above the positions")


def _step(model: nn.Module, batch: int, length: int, amp: bool = False) -> Callable[[], Tensor]:
    ids = random_ids(batch, length)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    return forward


def _measured(forward: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of the distinct storages that autograd packs, parameters and buffers left out."""
    free = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.append(t.detach()) or t.detach(), lambda t: t
    ):
        forward()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(size for address, size in storages.items() if address not in free)


def _compare(what: str, got: int, expected: int) -> None:
    require(got == expected, f"{what}: {got} bytes instead of {expected}, {got - expected:+d}")
