"""The checks of Eq. 1's static terms (footprint spec A1): predicted bytes against tensors that exist."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_error
from refimpl.checks.tiny import random_ids, tiny

IMPLEMENTATION = {
    "static_bytes": "refimpl.footprint.static:static_bytes",
    "measure_static": "refimpl.footprint.static:measure_static",
}
OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}
MODELS = {
    "tied GPT-2": ("gpt2", {}),
    "untied LLaMA with 2 of 4 key-value heads": ("llama", {"tie_word_embeddings": False}),
    "LLaMA with matrices above 4096 elements": ("llama", {"hidden_size": 64, "intermediate_size": 100}),
    "Qwen2 with biases on q, k and v": ("qwen2", {}),
}


@check
def check_static_bytes(static_bytes: Callable) -> None:
    """`static_bytes(config, dtype, optimizer)` -> resident bytes by kind after a training step."""
    for what, (family, changes) in MODELS.items():
        config = tiny(family, **changes).config
        for dtype in (torch.float32, torch.bfloat16):
            for optimizer in [*OPTIMIZERS, "adamw8bit"]:
                model, states = _trained(config, dtype, optimizer)
                expected = {
                    "weight": sum(p.nbytes for p in model.parameters()),
                    "buffer": sum(b.nbytes for b in model.buffers()),
                    "grad": sum(p.grad.nbytes for p in model.parameters()),
                    "optim": sum(s.nbytes for s in states),
                }
                name = str(dtype).removeprefix("torch.")
                _compare(f"{what}, {name}, {optimizer}", static_bytes(config, name, optimizer), expected)
    gpt2 = static_bytes({"model_type": "gpt2"}, "float32", "adamw")
    _compare("GPT-2 of 124,439,808 parameters in 148 tensors", gpt2, {
        "weight": 497_759_232, "grad": 497_759_232, "optim": 995_519_056,
    })  # fmt: skip
    require_error(
        ValueError, lambda: static_bytes({"model_type": "gpt2"}, "float32", "adam"), "optimizer 'adam'"
    )


@check
def check_measure_static(measure_static: Callable) -> None:
    """`measure_static(model, optimizer)` -> a ledger of weights, buffers, gradients and optimizer states."""
    model = tiny("llama")  # tied: 48 x 32 weights under two names
    weights, tensors = sum(p.nbytes for p in model.parameters()), len(list(model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters())
    held = {"weight": weights, "buffer": 32}

    def measured() -> dict:
        return measure_static(model, optimizer).by_kind("resident")

    _compare("before the first step", measured(), held)
    _step(model, optimizer)
    states = {"optim": 2 * weights + 4 * tensors}
    _compare("after a step of AdamW", measured(), held | {"grad": weights} | states)
    optimizer.zero_grad()
    _compare("after zero_grad()", measured(), held | states)
    payload = measure_static(model).by_kind()
    require(payload.get("buffer", 0) == 0, "RoPE's frequencies are in no file, so their payload is 0 bytes")
    with torch.device("meta"):
        large = nn.Linear(8192, 8192)
    _compare("a layer on the meta device", measure_static(large).by_kind(), {"weight": 4 * (8192**2 + 8192)})
    other = torch.optim.AdamW(large.parameters())
    require_error(ValueError, lambda: measure_static(model, other), "an optimizer of another model")


def _trained(config: object, dtype: torch.dtype, optimizer: str) -> tuple[nn.Module, list[Tensor]]:
    """A model of this dtype after a step, and the tensors that its optimizer keeps."""
    import transformers as hf

    with torch.random.fork_rng(devices=[]):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    trainer = OPTIMIZERS.get(optimizer, OPTIMIZERS["sgd"])(model.parameters())
    _step(model, trainer)
    if optimizer == "adamw8bit":
        return model, list(_states_in_8_bits(model))
    return model, [s for states in trainer.state.values() for s in states.values() if isinstance(s, Tensor)]


def _states_in_8_bits(model: nn.Module) -> Iterator[Tensor]:
    """Codes and scales of two moments, as tensors that hold nothing."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    if any(p.numel() >= 4096 and p not in embeddings for p in model.parameters()):
        yield torch.empty(2, 256, dtype=torch.float32, device="meta")  # the maps of m and v
    for p in model.parameters():
        for _ in range(2):
            if p.numel() < 4096 or p in embeddings:
                yield torch.empty(p.numel(), dtype=torch.float32, device="meta")
            else:
                yield torch.empty(p.numel(), dtype=torch.uint8, device="meta")
                yield torch.empty(len(range(0, p.numel(), 256)), dtype=torch.float32, device="meta")


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ids = random_ids(1, 4)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def _compare(what: str, got: dict, expected: dict) -> None:
    for kind in ("weight", "buffer", "grad", "optim"):
        bytes_, right = got.get(kind, 0), expected.get(kind, 0)
        require(bytes_ == right, f"{what}: {kind} is {bytes_:,} bytes, not {right:,}")
