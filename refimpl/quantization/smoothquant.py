"""SmoothQuant: divide large input channels, multiply the weights that read them, then W8A8.

Implements arXiv 2211.10438 (Eq. 4) as in its authors' code. Behind a norm, for input channel j,

    s_j = max_t |X_tj|^alpha / max_o |W_oj|^(1 - alpha),

the second maximum over all linear layers that read the norm (q, k, v; gate, up), since they share s. The
norm's gain and bias are divided by s, the columns multiplied: the model computes what it did. Inputs that no
norm produces (of o and down) stay as they are.

The authors' OPT models also quantize the two products inside attention; here, as in their LLaMA models, only
linear layers are quantized.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.quantization.activations import W8A8
from refimpl.quantization.calibrate import calibrate
from refimpl.quantization.fold import consumers, fold
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.model import Recipe, Report, compress_model

__all__ = ["SmoothReport", "smooth", "smoothing_factor", "smoothquant"]

SMALLEST = 1e-5  # of a weight's maximum and of a factor, as in the code
Factors = dict[tuple[int, str], Tensor]


@dataclass(frozen=True)
class SmoothReport:
    """`factors`, (block, "ln1" or "ln2") -> s [d]; `report`, that of `compress_model`, whose errors are
    those of the smoothed weights under the smoothed inputs."""

    factors: Factors
    report: Report

    def __str__(self) -> str:
        lo = min(float(s.min()) for s in self.factors.values())
        hi = max(float(s.max()) for s in self.factors.values())
        return f"{self.report}\nfactors from {lo:.3g} to {hi:.3g} in {len(self.factors)} norms"


def smoothing_factor(absmax: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """s [d_in], float64, for inputs with max |X_j| = absmax [d_in], read by weights [d_out, d_in] each.

    At alpha = 0.5 inputs and weights get the same range, sqrt(max |X_j| max |W_j|); at 1 the inputs' range
    becomes 1; at 0 the weights'. Raises ValueError for alpha outside 0 to 1, no weights, shapes that
    disagree, and numbers that are not finite.

    >>> smoothing_factor(torch.tensor([16.0, 1.0]), [torch.tensor([[1.0, -0.25], [-0.5, 0.0]])])
    tensor([4., 2.], dtype=torch.float64)
    """
    _check_alpha(alpha)
    if not weights or any(W.ndim != 2 or W.shape[1:] != absmax.shape for W in weights):
        got = ", ".join(str(list(W.shape)) for W in weights) or "none"
        raise ValueError(f"weights must be one or more [d_out, {len(absmax)}], got {got}")
    w = torch.stack([W.detach().abs().amax(0) for W in weights]).amax(0).double()
    if not bool(w.isfinite().all() and absmax.isfinite().all()):
        raise ValueError("absmax and weights must be finite")
    return (absmax.double() ** alpha / w.clamp(min=SMALLEST) ** (1 - alpha)).clamp(min=SMALLEST)


def smooth(model: nn.Module, ids: LongTensor, alpha: float = 0.5, *, batch: int = 8) -> Factors:
    """Fold the smoothing factors into a model's norms and weights, in place; nothing is quantized.

    Smoothing again changes nothing: all factors are then 1. Parameters and errors as for `smoothquant`.
    Returns (block, "ln1" or "ln2") -> s [d].

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> model, ids = tiny("gpt2"), random_ids(4, 16)
    >>> before = model(ids).logits
    >>> factors = smooth(model, ids)
    >>> torch.allclose(model(ids).logits, before, atol=1e-4), len(factors)
    (True, 6)
    """
    _check_alpha(alpha)
    bb = Backbone(model)
    stats = calibrate(model, ids, batch=batch)
    factors = {}
    for layer in range(bb.n_layers):
        for site in ("ln1", "ln2"):
            names = consumers(bb, layer, site)
            weights = [dense_weight(model.get_submodule(name)) for name in names]
            factors[layer, site] = smoothing_factor(stats[names[0]].absmax, weights, alpha)
    for (layer, site), s in factors.items():
        fold(bb, layer, site, s)
    return factors


def smoothquant(
    model: nn.Module,
    ids: LongTensor,
    alpha: float = 0.5,
    recipe: Recipe = W8A8(),  # noqa: B008
    *,
    batch: int = 8,
) -> SmoothReport:
    """Smooth a model and compress it, in place.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, uncompressed.
    ids : [B, T] calibration tokens without padding (the paper: 512 rows of 512).
    alpha : how much of the difficulty moves from inputs to weights, 0 to 1 (default 0.5, for OPT and BLOOM;
        0.75 to 0.9 where outliers are larger).
    recipe : of the layers; the paper's O1, O2 and O3 are `W8A8("tensor", a)` with a = "token", "tensor",
        "static"; its code for LLaMA is `W8A8("row", "token")`, the default. Statistics of the smoothed,
        uncompressed model are passed to it.
    batch : rows of ids at a time.

    Raises ValueError for alpha or ids, TypeError for another model or a compressed layer, and whatever the
    recipe raises: the model is then as it was.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> result = smoothquant(tiny("llama"), random_ids(4, 16), 0.5, W8A8("tensor", "static"))
    >>> len(result.report.rows), result.factors[0, "ln2"].shape
    (21, torch.Size([32]))
    """
    Backbone(model)
    before = [(p, p.detach().clone()) for p in model.parameters()]
    try:
        factors = smooth(model, ids, alpha, batch=batch)
        return SmoothReport(factors, compress_model(model, recipe, ids, sequential=False, batch=batch))
    except BaseException:
        with torch.no_grad():
            for p, old in before:
                p.copy_(old)
        raise


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be a number from 0 to 1, got {alpha!r}")
