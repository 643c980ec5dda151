"""Plausible but wrong accounts of saved activations that the checks must reject."""

from collections.abc import Mapping
from functools import partial

import torch

from refimpl.footprint import activations
from refimpl.footprint.arch import Arch, Run
from refimpl.ledger import Item, Ledger, of_tensors


def _hooked(forward, model, counted=(), *, weights=False, dedupe=True, view="storage"):
    held = []
    pack = lambda t: held.append(t.detach()) or t.detach()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    skip = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *counted)}
    mine = [t for t in held if weights or t.untyped_storage().data_ptr() not in skip]
    if dedupe and view == "storage":
        return of_tensors(((str(i), t) for i, t in enumerate(mine)), "activation")
    items, seen = [], set()
    for i, t in enumerate(mine):
        size = t.untyped_storage().nbytes() if view == "storage" else t.nbytes
        key = t.untyped_storage().data_ptr()
        size = 0 if dedupe and key in seen else size
        seen.add(key)
        items.append(Item(str(i), "activation", t.numel(), size, size, None))
    return Ledger(tuple(items))


def _lines(config, batch, length, attention="sdpa", dtype="float32", amp=False):
    fields = config if isinstance(config, Mapping) else config.to_dict()
    activations.saved_bytes(
        fields, batch, length, attention=attention, dtype=dtype, amp=amp
    )  # refuses bad input
    fused = fields.get("activation_function") == "gelu_pytorch_tanh"
    arch = Arch.from_config(fields)
    return activations.rules(arch, Run(batch, length, dtype, amp, attention), fused_gelu=fused)


def _without(leave_out, *args, **kwargs):
    return sum(line.resident for line in _lines(*args, **kwargs) if not leave_out(line))


def layers_multiply_everything(config, batch, length, **kwargs):
    one = {**config.to_dict()}
    layers = "n_layer" if one["model_type"] == "gpt2" else "num_hidden_layers"
    count, one[layers] = one[layers], 1
    return count * activations.saved_bytes(one, batch, length, **kwargs)


def eager_as_sdpa(config, batch, length, attention="sdpa", **kwargs):
    return activations.saved_bytes(config, batch, length, attention="sdpa", **kwargs)


def autocast_halves_float32(config, batch, length, dtype="float32", amp=False, **kwargs):
    plain = activations.saved_bytes(config, batch, length, dtype=dtype, **kwargs)
    return plain // 2 if amp else plain


def bfloat16_halves_float32(config, batch, length, dtype="float32", **kwargs):
    plain = activations.saved_bytes(config, batch, length, **kwargs)
    return plain // 2 if dtype == "bfloat16" else plain


def gelu_of_one_op(config, batch, length, **kwargs):
    fields = config.to_dict()
    if fields["model_type"] == "gpt2":
        fields["activation_function"] = "gelu_pytorch_tanh"
    return activations.saved_bytes(fields, batch, length, **kwargs)


def nothing_saved(forward, model, counted=()):
    return Ledger()


MUTANTS = [
    ("saved_tensors", "switched off", nothing_saved),
    ("saved_tensors", "no dedupe: every packing counts", partial(_hooked, dedupe=False)),
    ("saved_tensors", "no dedupe and views as their slices", partial(_hooked, dedupe=False, view="slice")),
    ("saved_tensors", "the first view of a storage counts as its slice", partial(_hooked, view="slice")),
    ("saved_tensors", "weights count as activations", partial(_hooked, weights=True)),
    ("saved_tensors", "graphs that died in forward count", _hooked),
    ("saved_bytes", "eager is predicted as sdpa", eager_as_sdpa),
    ("saved_bytes", "the eager softmax is forgotten", partial(_without, lambda line: line.op == "softmax")),
    (
        "saved_bytes",
        "norm statistics are forgotten",
        partial(_without, lambda line: line.tensor == "deviation"),
    ),
    (
        "saved_bytes",
        "the logits of the loss are forgotten",
        partial(_without, lambda x: x.op == "cross_entropy"),
    ),
    (
        "saved_bytes",
        "autocast keeps no casts of weights",
        partial(_without, lambda x: x.tensor == "weight cast"),
    ),
    ("saved_bytes", "autocast halves all activations", autocast_halves_float32),
    ("saved_bytes", "bfloat16 halves all activations", bfloat16_halves_float32),
    ("saved_bytes", "GELU saves its input alone", gelu_of_one_op),
    ("saved_bytes", "embedding and loss count once per layer", layers_multiply_everything),
]
