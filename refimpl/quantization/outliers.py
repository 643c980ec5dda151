"""Give a small model the activation outliers of a large one, without changing what it computes.

From about 6.7 billion parameters on, a few channels of the inputs of every block are many times larger
than the rest (arXiv 2208.07339, section 4). The small models of this book have none, so LLM.int8(),
SmoothQuant and AWQ have nothing to repair in them. Here such channels are *injected*: the gains of a norm
grow, the columns that read them shrink by as much. It is a stand-in for what training does to large models.
One difference shows: the columns that read an injected channel are small beside the rest of their rows, so
that eight bits per row lose their digits as well. What that costs is not due to the activations.
"""

from math import isfinite

import torch
from torch import nn

from refimpl.backbone import Backbone
from refimpl.quantization.fold import consumers, fold
from refimpl.quantization.linear import dense_weight

__all__ = ["inject_outliers"]


def inject_outliers(
    model: nn.Module, generator: torch.Generator, channels: int = 4, factor: float = 60.0
) -> dict[tuple[int, str], tuple[int, ...]]:
    """Multiply some channels of every norm of a model's blocks, and divide their readers, in place.

    The logits stay as they are, to rounding (to the last bit where the factor is a power of two); the inputs
    of q, k, v and of the MLP's first layers get outliers. The final norm stays.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, uncompressed; pass a `copy.deepcopy` to keep the plain one.
    generator : draws the channels of every norm, without repetition.
    channels : per norm, 1 to d (default 4; the paper found about 6 in a model of 6.7 billion parameters).
    factor : > 0, how much larger they become (default 60; 1 changes nothing).

    Returns (block, site) -> the channels, ascending; site is "ln1" or "ln2", as for `fold`. Raises TypeError
    for another model, a compressed layer or another generator, ValueError for other numbers, before anything
    changes.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> model, ids = tiny("llama"), random_ids(2, 8)
    >>> before = model(ids).logits
    >>> found = inject_outliers(model, torch.Generator().manual_seed(0), channels=2)
    >>> len(found), len(found[0, "ln1"]), torch.allclose(model(ids).logits, before, atol=1e-4)
    (6, 2, True)
    """
    bb = Backbone(model)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if type(channels) is not int or not 1 <= channels <= bb.d:
        raise ValueError(f"channels must be an integer from 1 to {bb.d}, got {channels!r}")
    if not (isfinite(factor) and factor > 0):
        raise ValueError(f"factor must be a finite number > 0, got {factor!r}")
    sites = [(layer, site) for layer in range(bb.n_layers) for site in ("ln1", "ln2")]
    for layer, site in sites:
        for name in consumers(bb, layer, site):
            dense_weight(model.get_submodule(name))  # raises TypeError for a compressed one
    injected = {}
    for layer, site in sites:
        drawn = torch.randperm(bb.d, generator=generator, device=generator.device)[:channels].sort().values
        s = torch.ones(bb.d, dtype=torch.float64, device=model.device)
        s[drawn.to(s.device)] = 1 / factor
        fold(bb, layer, site, s)
        injected[layer, site] = tuple(drawn.tolist())
    return injected
