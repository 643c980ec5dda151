"""Scale the inputs of linear layers without changing the model: the product moves, the function stays.

W x = (W diag(s)) (x / s). The left factor goes into the weights that read x; the right one into whatever
produced x, if that is linear in it. SmoothQuant, AWQ and ASER choose s; `refimpl.quantization.outliers`
uses the same identity the other way, to give a small model the outliers of a large one.
"""

import torch
from torch import Tensor, nn

from refimpl.backbone import Backbone
from refimpl.quantization.linear import dense_weight

__all__ = ["SITES", "consumers", "fold"]

SITES = ("ln1", "ln2", "v-o", "up-down")


def consumers(bb: Backbone, layer: int, site: str) -> tuple[str, ...]:
    """Names of the modules of block `layer` that read what `site` produces.

    "ln1": the first norm, read by q, k, v (GPT-2: c_attn); "ln2": the second, read by gate and up (c_fc);
    "v-o": v, read by o through the attention, which mixes tokens and not channels; "up-down": up, read by
    down through the product with the gate. Raises ValueError for another site, for "up-down" in GPT-2 (GELU
    stands between), and for "v-o" where several query heads share a value head.

    >>> from refimpl.checks.tiny import tiny
    >>> consumers(Backbone(tiny("llama")), 1, "ln2")
    ('model.layers.1.mlp.gate_proj', 'model.layers.1.mlp.up_proj')
    """
    if site not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, got {site!r}")
    if site == "up-down" and bb.is_gpt2:
        raise ValueError("site 'up-down': GPT-2 has a GELU between the two, nothing can be moved")
    if site == "v-o" and bb.G != bb.H:
        raise ValueError(f"site 'v-o': {bb.H} query heads read {bb.G} value heads; channels do not match")
    roles = {"ln1": "qkv", "ln2": ("fc", "gate", "up"), "v-o": "o", "up-down": ("down",)}[site]
    return tuple(dict.fromkeys(r.name for r in bb.linears() if r.layer == layer and r.role in roles))


@torch.no_grad()
def fold(bb: Backbone, layer: int, site: str, s: Tensor) -> None:
    """Divide what `site` of a block produces by s and multiply the columns that read it by s, in place.

    The model computes what it did, to rounding. Parameters: `s` [channels of the site], finite and > 0 (not
    0 is all that the identity needs; methods use positive scales). Raises ValueError as `consumers`, and for
    another s; TypeError for layers that are compressed, or whose producer is.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> model, ids = tiny("gpt2"), random_ids(2, 8)
    >>> before = model(ids).logits
    >>> fold(Backbone(model), 0, "ln1", torch.linspace(0.5, 4, model.config.n_embd))
    >>> torch.allclose(model(ids).logits, before, atol=1e-5)
    True
    """
    readers = [dense_weight(bb.model.get_submodule(name)) for name in consumers(bb, layer, site)]
    n = readers[0].shape[1]
    if s.shape != (n,) or not bool((s.isfinite() & (s > 0)).all()):
        raise ValueError(f"s must be [{n}], finite and > 0, got {list(s.shape)} {s.dtype}")
    parts = _producers(bb, layer, site)
    for W in readers:
        W *= s.to(W.dtype)
    for part in parts:
        part /= s.to(part.dtype)[(...,) + (None,) * (part.ndim - 1)]


def _producers(bb: Backbone, layer: int, site: str) -> list[Tensor]:
    """Views of what is to be divided, channels first: a norm's weight and bias, or rows of a matrix."""
    if site in ("ln1", "ln2"):
        norm: nn.Module = getattr(bb.layer(layer), site)
        return [p.detach() for p in norm.parameters(recurse=False)]
    role = {"v-o": "v", "up-down": "up"}[site]
    ref = next(r for r in bb.linears() if r.layer == layer and r.role == role)
    parts = [dense_weight(ref.module)[ref.rows]]
    return parts if ref.bias is None else [*parts, ref.bias.detach()]
