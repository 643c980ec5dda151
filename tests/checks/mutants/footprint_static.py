"""Plausible but wrong static terms that the checks of `footprint/static.py` must reject."""

import torch

from refimpl.footprint import Arch, Run
from refimpl.footprint.static import measure_static, static, static_bytes
from refimpl.ledger import Ledger, of_model, of_tensors


def _only(dropped):
    """static_bytes without the items for which `dropped` says so."""

    def mutant(config, dtype="float32", optimizer="adamw"):
        ledger = static(Arch.from_config(config), Run(dtype=dtype, optimizer=optimizer))
        return Ledger(tuple(item for item in ledger.items if not dropped(item))).by_kind("resident")

    return mutant


step_counts_forgotten = _only(lambda item: item.name.endswith(".step"))
buffers_forgotten = _only(lambda item: item.kind == "buffer")
biases_forgotten = _only(lambda item: "_proj.bias" in item.name)
maps_forgotten = _only(lambda item: item.name.endswith("_map"))


def tie_ignored(config, dtype="float32", optimizer="adamw"):
    settings = dict(config if isinstance(config, dict) else config.to_dict())
    return static_bytes(settings | {"tie_word_embeddings": False}, dtype, optimizer)


def key_value_heads_ignored(config, dtype="float32", optimizer="adamw"):
    settings = dict(config if isinstance(config, dict) else config.to_dict())
    return static_bytes(settings | {"num_key_value_heads": None}, dtype, optimizer)


def float32_whatever_the_dtype(config, dtype="float32", optimizer="adamw"):
    return static_bytes(config, "float32", optimizer)


def moments_always_float32(config, dtype="float32", optimizer="adamw"):
    return static_bytes(config, dtype, optimizer) | {
        "optim": static_bytes(config, "float32", optimizer).get("optim", 0)
    }


def adafactor_with_a_full_second_moment(config, dtype="float32", optimizer="adamw"):
    return static_bytes(config, dtype, "momentum" if optimizer == "adafactor" else optimizer)


def eight_bits_for_every_tensor(config, dtype="float32", optimizer="adamw"):
    exact = static_bytes(config, dtype, optimizer)
    if optimizer != "adamw8bit":
        return exact
    sizes = [torch.Size(shape).numel() for _, shape in Arch.from_config(config).tensors()]
    return exact | {"optim": sum(2 * (n + 4 * -(-n // 256)) for n in sizes) + 2048}


def _measured(names_of, gradients_of, optimizer_of):
    def mutant(model, optimizer=None):
        measure_static(model, optimizer)  # refuses an optimizer of another model
        ledger = names_of(model) + gradients_of(model)
        return ledger if optimizer is None else ledger + optimizer_of(model, optimizer)

    return mutant


def _gradients(model):
    return of_tensors([(n, p.grad) for n, p in model.named_parameters() if p.grad is not None], "grad")


def _states(model, optimizer):
    return Ledger(tuple(i for i in measure_static(model, optimizer).items if i.kind == "optim"))


def _with_ties_twice(model):
    copies = [(n, torch.empty_like(p)) for n, p in model.named_parameters(remove_duplicate=False)]
    return of_tensors(copies, "weight") + Ledger(
        tuple(item for item in of_model(model).items if item.kind == "buffer")
    )


def _promised_gradients(model):
    return of_tensors([(n, torch.empty_like(p)) for n, p in model.named_parameters()], "grad")


def _promised_states(model, optimizer):
    return of_tensors([(n, torch.empty(2, *p.shape)) for n, p in model.named_parameters()], "optim")


def _moments_only(model, optimizer):
    return Ledger(tuple(i for i in _states(model, optimizer).items if not i.name.endswith("step")))


MUTANTS = [
    ("static_bytes", "the step counts of AdamW are forgotten", step_counts_forgotten),
    ("static_bytes", "the buffers of RoPE are forgotten", buffers_forgotten),
    ("static_bytes", "Qwen2's biases are forgotten", biases_forgotten),
    ("static_bytes", "the maps of the 8-bit states are forgotten", maps_forgotten),
    ("static_bytes", "a tied head counts again", tie_ignored),
    ("static_bytes", "as many key-value heads as query heads", key_value_heads_ignored),
    ("static_bytes", "float32 whatever the dtype", float32_whatever_the_dtype),
    ("static_bytes", "moments are float32 beside bfloat16 weights", moments_always_float32),
    ("static_bytes", "Adafactor keeps a full second moment", adafactor_with_a_full_second_moment),
    ("static_bytes", "small tensors and embeddings have 8-bit states too", eight_bits_for_every_tensor),
    ("measure_static", "ties count under both names", _measured(_with_ties_twice, _gradients, _states)),
    (
        "measure_static",
        "gradients count before they exist",
        _measured(of_model, _promised_gradients, _states),
    ),
    (
        "measure_static",
        "states count before the first step",
        _measured(of_model, _gradients, _promised_states),
    ),
    ("measure_static", "step counts are left out", _measured(of_model, _gradients, _moments_only)),
]
