"""The check of QLoRA's frozen layer (footprint spec, A8; arXiv 2305.14314, section 3): NF4 typed again."""

from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"qlora": "refimpl.footprint.qlora:NF4Linear"}

IN, OUT, BLOCK, OUTER = 192, 160, 64, 256
TABLES = 4 * (16 + 256)  # NF4 levels and 8-bit map, where an implementation keeps them in the layer


@check
def check_qlora(quantized: Callable) -> None:
    """`quantized(linear)` -> a frozen layer whose weight is NF4 with double-quantised absmaxima."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.utils.skip_init(nn.Linear, IN, OUT)
    with torch.no_grad():
        # Rows of different size, so that absmaxima differ and a shared scale shows.
        plain.weight.normal_(std=0.05, generator=generator).mul_(torch.linspace(0.8, 1.2, OUT)[:, None])
        plain.bias.normal_(generator=generator)
    before = plain.weight.detach().clone()
    layer = quantized(plain)
    require(torch.equal(plain.weight, before), "the layer that was given has changed")

    blocks = before.view(-1, BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    levels = _levels()
    nearest = ((blocks / absmax)[:, :, None] - levels).abs().argmin(2)
    expected = levels[nearest]
    with torch.no_grad():
        weight = (layer(torch.eye(IN)) - plain.bias).T
    require(tuple(weight.shape) == (OUT, IN), f"layer(identity) has shape {list(weight.T.shape)}")
    units = weight.reshape(-1, BLOCK) / absmax
    # 1e-2 leaves room for 8-bit absmaxima around their mean, not for 8-bit absmaxima around zero.
    require_close(units, expected, 1e-2, "weights over their block's absmax are not the nearest NF4 levels")

    numel = before.numel()
    bytes_ = numel // 2 + numel // BLOCK + 4 * -(-numel // BLOCK // OUTER) + 4
    held = _held(layer) - 4 * OUT
    require(bytes_ <= held <= bytes_ + TABLES,
            f"the layer holds {held} bytes beside its bias, not N/2 + N/64 + 4 ceil(N/64/256) + 4 = {bytes_} "
            f"(and at most {TABLES} for tables)")  # fmt: skip
    trainable = sum(p.requires_grad for p in layer.parameters())
    require(trainable == 0, f"{trainable} parameters of the quantised layer require a gradient")

    x = torch.randn(5, IN, generator=generator).requires_grad_()
    saved: list[int] = []
    pack = lambda tensor: saved.append(tensor.numel()) or tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    require(max(saved, default=0) < numel,
            "autograd keeps the dequantised weight until backward: it must be a temporary")  # fmt: skip
    require_close(y, x.detach() @ weight.T + plain.bias, 1e-4, "layer(x) is not x W^T + b")
    grad = torch.randn(5, OUT, generator=generator)
    y.backward(grad)
    require(x.grad is not None, "no gradient reaches the layer's input, so no factor below it would train")
    require_close(x.grad, grad @ weight, 1e-4, "the gradient of the input is not dy W")


def _levels() -> Tensor:
    """NF4: seven quantiles below zero, zero, eight above, over the largest."""
    tail = (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(0.5 + (0.5 - tail) * i / 8) for i in range(1, 9)]
    below = [-quantile(0.5 + (0.5 - tail) * i / 7) for i in range(7, 0, -1)]
    return torch.tensor([*below, 0.0, *above]) / above[-1]


def _held(layer: nn.Module) -> int:
    """Bytes of the storages behind a layer's parameters and buffers, each once."""
    tensors = [*layer.parameters(), *layer.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
