"""The check of injected outliers (quantization spec, section 0, item 8)."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import LAYERS, WIDTH, random_ids, tiny

IMPLEMENTATION = {"outliers": "refimpl.quantization.outliers:inject_outliers"}
CHANNELS, FACTOR = 3, 40.0
# Site -> the norm and who reads it.
SITES = {
    "gpt2": {
        "ln1": ("transformer.h.{}.ln_1", ["transformer.h.{}.attn.c_attn"]),
        "ln2": ("transformer.h.{}.ln_2", ["transformer.h.{}.mlp.c_fc"]),
    },
    "llama": {
        "ln1": (
            "model.layers.{}.input_layernorm",
            [f"model.layers.{{}}.self_attn.{role}_proj" for role in "qkv"],
        ),
        "ln2": (
            "model.layers.{}.post_attention_layernorm",
            ["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"],
        ),
    },
}


@check
def check_outliers(inject_outliers: Callable) -> None:
    """`inject_outliers(model, generator, channels, factor)` changes a model in place and returns
    (block, "ln1" or "ln2") -> the channels of that norm."""
    ids = random_ids(2, 12)
    for family in ("gpt2", "llama"):
        model = tiny(family).double()
        plain = copy.deepcopy(model)
        found = inject_outliers(model, torch.Generator().manual_seed(0), CHANNELS, FACTOR)
        expected = {(layer, site) for layer in range(LAYERS) for site in ("ln1", "ln2")}
        require(set(found) == expected, f"{family}: channels of {sorted(found)}, not of {sorted(expected)}")
        chosen = [tuple(sorted(int(j) for j in channels)) for channels in found.values()]
        require(all(len(set(c)) == CHANNELS for c in chosen), f"{family}: not {CHANNELS} channels: {chosen}")
        require(len(set(chosen)) > 1, f"{family}: every norm has the same channels")
        with torch.no_grad():
            before, after = plain(ids).logits, model(ids).logits
        require_close(after, before, 1e-6, f"{family}: the logits must stay; the logits")
        inputs = _inputs(plain, family, ids), _inputs(model, family, ids)
        for (layer, site), channels in found.items():
            gain = torch.ones(WIDTH, dtype=torch.float64)
            gain[list(channels)] = FACTOR
            what = f"{family}, block {layer}, {site}: the inputs of the layers behind the norm"
            require_close(inputs[1][layer, site], inputs[0][layer, site] * gain, 1e-6, what)
        left = [n for n, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(n))]
        readers = [name.format(l) for norm, names in SITES[family].values() for l in range(LAYERS)
                   for name in (norm, *names)]  # fmt: skip
        other = [name for name in left if name.rpartition(".")[0] not in readers]
        require(not other, f"{family}: {', '.join(other)} changed as well")


def _inputs(model: nn.Module, family: str, ids: Tensor) -> dict[tuple[int, str], Tensor]:
    found, hooks = {}, []
    for site, (_, readers) in SITES[family].items():
        for layer in range(LAYERS):
            module = model.get_submodule(readers[0].format(layer))
            keep = lambda _, x, at=(layer, site): found.__setitem__(at, x[0].detach())
            hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found
