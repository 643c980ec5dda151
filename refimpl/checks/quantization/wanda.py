"""The check of Wanda (quantization spec, section 16; arXiv 2306.11695)."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {"wanda": "refimpl.quantization.pruning.unstructured:Wanda"}
ROWS, COLUMNS, TOKENS = 12, 40, 64


@check
def check_wanda(Wanda: Callable) -> None:
    """`Wanda(sparsity)(name, W, stats)` -> a layer with `weight`; `stats.sqnorm` is sum x_j^2."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, COLUMNS, generator=generator) * torch.linspace(0.2, 2, ROWS)[:, None]
    W = W.half().float()
    X = torch.randn(TOKENS, COLUMNS, generator=generator) * torch.logspace(-1, 1, COLUMNS)
    stats = _stats(X)
    before = W.clone()
    for sparsity in (0.0, 0.25, 0.5, 0.7, "2:4", "4:8", "1:4"):
        found = Wanda(sparsity)("fc", W, stats).weight
        require(torch.equal(W, before), f"sparsity {sparsity}: W was changed")
        expected = _reference(W, X, sparsity)
        require(found.shape == W.shape, f"sparsity {sparsity}: the weight has shape {list(found.shape)}")
        zeros, wanted = (found == 0).sum(1).tolist(), (expected == 0).sum(1).tolist()
        require(zeros == wanted, f"sparsity {sparsity}: {zeros} zeros in the rows where {wanted} should be")
        require_close(found, expected, 0, f"sparsity {sparsity}: the weights that are left")
    # A channel that is 64 times as large, read with weights 64 times as small, is the same channel.
    c = torch.ones(COLUMNS)
    c[[3, 17, 30]] = 64
    plain, scaled = Wanda(0.5)("fc", W, stats).weight, Wanda(0.5)("fc", W / c, _stats(X * c)).weight
    same = torch.equal(plain == 0, scaled == 0)
    require(same, "scaling a channel and its weights inversely changes which weights are left out")


def _stats(X: Tensor) -> SimpleNamespace:
    x = X.double()
    return SimpleNamespace(
        H=2 / len(x) * x.T @ x, sqnorm=x.square().sum(0), absmax=x.abs().amax(0), absmean=x.abs().mean(0),
        tokens=len(x), X=None,
    )  # fmt: skip


def _reference(W: Tensor, X: Tensor, sparsity: float | str) -> Tensor:
    """Row by row, weight by weight."""
    n, m = (int(x) for x in sparsity.split(":")) if isinstance(sparsity, str) else (None, COLUMNS)
    left_out = m - n if n else int(COLUMNS * sparsity)
    norm = X.double().norm(dim=0)
    result = W.clone()
    for i in range(ROWS):
        for j in range(0, COLUMNS, m):
            lowest = sorted(range(j, j + m), key=lambda k: abs(float(W[i, k])) * float(norm[k]))
            result[i, lowest[:left_out]] = 0
    return result
