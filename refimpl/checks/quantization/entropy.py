"""The check of entropy-coded codes (quantization spec, section 15; arXiv 2403.01384)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"quantized_entropy": "refimpl.quantization.entropy:EntropyRTN"}
ROWS, COLUMNS = 128, 520  # 66560 codes: no whole number of any power of two


@check
def check_quantized_entropy(EntropyRTN: Callable[..., Callable[[str, Tensor], nn.Module]]) -> None:
    """`EntropyRTN(bits, scheme, group)(name, W)` -> a layer: `weight`, and in its buffers what is stored."""
    W = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    spiked = W.clone()
    spiked[5, 7] = 20 * W.abs().max()
    plain = W * torch.logspace(-1, 1, ROWS)[:, None]
    for what, matrix in (("normal", W), ("outlier", spiked), ("rows of many sizes", plain)):
        for bits, group in ((8, "tensor"), (4, "row"), (2, 8)):
            where = f"{what} weights, {bits} bits, group {group}"
            layer = EntropyRTN(bits, "restricted", group)("fc", matrix)
            codes, restored = _rounded(matrix, bits, group)
            require_close(layer.weight, restored, 1e-6 * float(matrix.abs().max()), f"{where}: the weight")
            stored = sum(8 * buffer.nbytes for buffer in layer.buffers())
            require(stored == 8 * layer.nbytes(), f"{where}: nbytes() is not what the buffers hold")
            p = np.bincount(codes.flatten()) / codes.numel()
            ideal = float(-(p[p > 0] * np.log2(p[p > 0])).sum()) * codes.numel()
            scales = 16 * {"tensor": 1, "row": ROWS}.get(group, ROWS * COLUMNS / 8)
            table = 16 * 2**bits
            require(stored >= ideal + scales, f"{where}: {stored} bits, fewer than entropy and scales need")
            most = ideal + scales + table + 0.02 * codes.numel()
            words = f"{stored / codes.numel():.3f} bits per weight, but {most / codes.numel():.3f} are enough"
            require(stored <= most, f"{where}: {words} for entropy + 0.02, table and scales")
    constant = EntropyRTN(4, "restricted", "tensor")("fc", torch.ones(ROWS, COLUMNS))
    require_close(constant.weight, torch.ones(ROWS, COLUMNS), 1e-3, "equal weights")


def _rounded(W: Tensor, bits: int, group: int | str) -> tuple[Tensor, Tensor]:
    """Codes from 0, and what they stand for: symmetric, scales of 16 bits."""
    half = 2 ** (bits - 1)
    groups = W.view(1, 1, -1) if group == "tensor" else W.view(ROWS, -1, COLUMNS if group == "row" else group)
    scale = (groups.abs().amax(-1, True) / (half - 1)).half().float()
    codes = (groups / scale).round().clamp(-half, half - 1)
    return (codes + half).long().view(W.shape), (codes * scale).view(W.shape)
