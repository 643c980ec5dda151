"""The check of magnitude pruning (quantization spec, section 16)."""

from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"magnitude": "refimpl.quantization.pruning.unstructured:Magnitude"}
ROWS, COLUMNS = 12, 40


@check
def check_magnitude(Magnitude: Callable) -> None:
    """`Magnitude(sparsity)(name, W, stats)` -> a layer with `weight` and `nbytes()`; "n:m" keeps n of m."""
    generator = torch.Generator().manual_seed(0)
    # Rows of different size, so that the whole layer is not row by row; distinct values that float16 holds.
    W = torch.randn(ROWS, COLUMNS, generator=generator) * torch.linspace(0.2, 2, ROWS)[:, None]
    rank = W.abs().flatten().argsort().argsort().view(W.shape) + 1
    W = W.sign() * rank / 64
    before = W.clone()
    for sparsity in (0.0, 0.25, 0.5, 0.7, "2:4", "4:8", "1:4"):
        layer = Magnitude(sparsity)("fc", W, None)
        require(torch.equal(W, before), f"sparsity {sparsity}: W was changed")
        expected = _reference(W, sparsity)
        found = layer.weight
        require(found.shape == W.shape, f"sparsity {sparsity}: the weight has shape {list(found.shape)}")
        zeros, wanted = int((found == 0).sum()), int((expected == 0).sum())
        require(zeros == wanted, f"sparsity {sparsity}: {zeros} weights are 0 where {wanted} should be")
        require_close(found, expected, 0, f"sparsity {sparsity}: the weights that are left")
        stored = W.numel() / 8 + 2 * (W.numel() - wanted)
        require(
            layer.nbytes() == stored,
            f"sparsity {sparsity}: {layer.nbytes()} bytes; one bit for each weight and two bytes for each "
            f"that is kept make {stored:.0f}",
        )


def _reference(W: Tensor, sparsity: float | str) -> Tensor:
    """The largest entries one by one."""
    result = torch.zeros_like(W)
    if isinstance(sparsity, str):
        n, m = (int(x) for x in sparsity.split(":"))
        for i in range(ROWS):
            for j in range(0, COLUMNS, m):
                for k in W[i, j : j + m].abs().argsort(descending=True)[:n].tolist():
                    result[i, j + k] = W[i, j + k]
        return result
    entries = sorted(range(W.numel()), key=lambda k: abs(float(W.flatten()[k])))
    for k in entries[int(W.numel() * sparsity) :]:
        result.view(-1)[k] = W.flatten()[k]
    return result
