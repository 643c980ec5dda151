"""The check of NF4 as stored layer (quantization spec, section 8; arXiv 2305.14314, section 3)."""

from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"nf4": "refimpl.quantization.nf4:NF4"}
ROWS, COLUMNS, OUTER = 128, 192, 256


@check
def check_nf4(NF4: Callable) -> None:
    """`NF4(block=64, double_quant=True)`, called as `(name, W, stats)` -> a layer with `weight`, `nbytes()`
    and buffers of exactly what is stored, through which a gradient passes without W^ being kept."""
    generator = torch.Generator().manual_seed(0)
    normal = 0.05 * torch.randn(ROWS, COLUMNS, generator=generator)
    normal *= torch.linspace(0.8, 1.2, ROWS)[:, None]
    with_zeros = normal.clone()
    with_zeros[7] = 0
    levels = _levels()
    for block in (64, 32):
        for double, W in ((False, with_zeros), (True, normal)):
            what = f"block {block}, double_quant={double}"
            blocks = W.view(-1, block)
            absmax = blocks.abs().amax(1, keepdim=True)
            units = blocks / absmax.where(absmax > 0, 1.0)
            nearest = levels[(units[..., None] - levels).abs().argmin(-1)]
            layer = NF4(block=block, double_quant=double)("fc", W, None)
            # 8-bit absmaxima are off by half the widest step of the map, 0.9 / 64, times their spread.
            slack = float((absmax - absmax.mean()).abs().max()) / 130 if double else 1e-7
            found = layer.weight.detach()
            require(found.shape == W.shape, f"{what}: the weight has shape {list(found.shape)}")
            require_close(
                found.reshape(-1, block), nearest * absmax, slack, f"{what}: nearest level times absmax"
            )
            n = len(blocks)
            parts = n + 4 * -(-n // OUTER) + 4 if double else 4 * n
            _require_bytes(layer, W.numel() // 2 + parts, what)
    _require_gradients(NF4()("fc", normal, None), generator)


def _require_bytes(layer: torch.nn.Module, expected: int, what: str) -> None:
    """4 bits a weight, and for a block a byte and its share of a float32, or a float32."""
    tensors = [*layer.buffers(), *layer.parameters()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    require(sum(held.values()) == expected, f"{what}: {sum(held.values())} bytes are held, not {expected}")
    require(layer.nbytes() == expected, f"{what}: nbytes() says {layer.nbytes()}, not {expected}")


def _require_gradients(layer: torch.nn.Module, generator: torch.Generator) -> None:
    x = torch.randn(2, 5, COLUMNS, generator=generator).requires_grad_()
    kept: list[int] = []
    pack = lambda tensor: kept.append(tensor.numel()) or tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    require_close(y, x.detach() @ layer.weight.T, 1e-5, "layer(x) is not x W^T")
    dense = max(kept, default=0)
    require(dense < ROWS * COLUMNS, f"{dense} numbers are kept for the backward pass: W^ must be a temporary")
    require(
        not any(p.requires_grad for p in layer.parameters()), "a parameter of the frozen layer would train"
    )
    grad = torch.randn(2, 5, ROWS, generator=generator)
    require(y.requires_grad, "no gradient can pass through the layer, so no factor below it would train")
    y.backward(grad)
    require_close(x.grad, grad @ layer.weight, 1e-5, "the gradient of x is not dy W^")


def _levels() -> Tensor:
    """Seven quantiles below zero, zero, eight above, divided by the largest."""
    tail = (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(0.5 + (0.5 - tail) * i / 8) for i in range(1, 9)]
    below = [-quantile(0.5 + (0.5 - tail) * i / 7) for i in range(7, 0, -1)]
    return torch.tensor([*below, 0.0, *above]) / above[-1]
