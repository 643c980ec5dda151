"""The check of W8A8 linear layers (quantization spec, section 2: granularity of activations)."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"activations": "refimpl.quantization.activations:W8A8"}
ROWS, COLUMNS, TOKENS = 10, 24, 7


@check
def check_activations(W8A8: Callable) -> None:
    """`W8A8(weights, activations)(name, W, stats)` -> a layer; weights "row" or "tensor"; activations
    "token", "tensor" or "static" (from `stats.absmax`)."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    W = draw(ROWS, COLUMNS) * torch.linspace(0.1, 2, ROWS, dtype=torch.float64)[:, None]
    x = draw(TOKENS, COLUMNS) * torch.linspace(0.2, 5, TOKENS, dtype=torch.float64)[:, None]
    x[3] = 0
    stats = SimpleNamespace(absmax=x.abs().amax(0) * 0.6)
    for weights in ("row", "tensor"):
        for activations in ("token", "tensor", "static"):
            what = f"weights {weights}, activations {activations}"
            layer = W8A8(weights, activations)("fc", W, stats)
            stored = sum(t.nbytes for t in layer.buffers())
            require(
                stored <= W.numel() + 8 * ROWS + 8, f"{what}: {stored} bytes stored for {W.numel()} weights"
            )
            require_close(layer(x[None])[0], _reference(W, x, weights, activations, stats.absmax), 1e-9, what)
    # Whole numbers with a largest of 127 are their own codes: nothing is rounded, not even in a long sum.
    long = lambda rows: torch.randint(100, 127, (rows, 4096), generator=generator).double()
    a, b = long(3), long(5)
    a[:, 0] = b[:, 0] = 127
    product = (a.long() @ b.long().T).double()
    require_close(W8A8("row", "token")("fc", b, None)(a), product, 0, "a sum of 4096 integer products")


def _reference(W: Tensor, x: Tensor, weights: str, activations: str, absmax: Tensor) -> Tensor:
    w = W.abs().amax(1, keepdim=True) if weights == "row" else W.abs().amax()
    sw = (w / 127).float().double()
    if activations == "token":
        sx = x.abs().amax(1, keepdim=True) / 127
        sx[sx == 0] = 1
    elif activations == "tensor":
        sx = x.abs().amax() / 127
    else:
        sx = (absmax.amax() / 127).float().double()
    codes = (x / sx).round().clamp(-127, 127)
    return (codes @ (W / sw).round().clamp(-127, 127).T) * sx * sw.broadcast_to(ROWS, 1).T
