"""The check of LLM.int8() (quantization spec, section 4; arXiv 2208.07339)."""

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"int8": "refimpl.quantization.int8:LLMInt8"}
ROWS, COLUMNS, TOKENS = 12, 32, 9


@check
def check_int8(LLMInt8: Callable) -> None:
    """`LLMInt8(threshold=6.0, keep_weight=False)(name, W, stats)` -> a layer, called with x [..., d_in]."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    x = torch.randn(2, TOKENS, COLUMNS, generator=generator, dtype=torch.float64).clamp(-4, 4)
    x[0, 2, 5], x[1, 0, 11], x[..., 20] = 6.0, -9.0, 50 * x[..., 20]
    x[0, 4, 5] = 5.5  # small beside the threshold, but in an outlier column, and the largest of its token
    for threshold, columns in ((6.0, [5, 11, 20]), (inf, []), (0.0, list(range(COLUMNS)))):
        for keep in (False, True):
            what = f"threshold {threshold}, keep_weight={keep}"
            layer = LLMInt8(threshold=threshold, keep_weight=keep)("fc", W, None)
            reference = _reference(W, x.flatten(0, 1), columns, keep).view(2, TOKENS, ROWS)
            require_close(layer(x), reference, 1e-9, what)
    require_close(layer(x), x @ W.T, 1e-9, "all columns in float, with the float weight: the plain product")
    layer = LLMInt8()("fc", W, None)
    layer(x)
    calm = torch.randn(1, COLUMNS, generator=generator, dtype=torch.float64).clamp(-4, 4)
    what = "a call without outliers after one with them"
    require_close(layer(calm), _reference(W, calm, [], False), 1e-9, what)
    stored = sum(t.nbytes for t in layer.buffers())
    require(stored <= W.numel() + 8 * ROWS + 8, f"{stored} bytes stored for {W.numel()} weights of int8")


def _reference(W: Tensor, X: Tensor, columns: list[int], keep: bool) -> Tensor:
    sw = (W.abs().amax(1, keepdim=True) / 127).float().double()
    W8 = (W / sw).round().clamp(-127, 127)
    rest = X.clone()
    rest[:, columns] = 0
    sx = rest.abs().amax(1, keepdim=True) / 127
    sx[sx == 0] = 1
    exact = (W if keep else W8 * sw)[:, columns]
    return ((rest / sx).round() @ W8.T) * sx * sw.T + X[:, columns] @ exact.T
