"""Bonsai: which heads and neurons a model needs, found with forward passes alone.

Implements arXiv 2402.05406 (ref 16 of the survey). Each round

1. ranks the units of every module (a layer's heads, or its neurons) by a prior, and fixes the best of them;
2. runs sub-models that leave out some of the rest, drawn in favour of a low prior, and their complements;
3. regresses -log perplexity on the masks: the coefficient of a unit is what it is worth;
4. removes the units worth least, of all modules together.

As in its authors' code, with these differences.

- Sampling. The code leaves out the same number of units of every module in every mask. The sum of a mask over
  a module is then (almost) constant, and no regression can tell what a module is worth: only its units are
  compared with each other. Here masks are drawn over the whole model; `sampling="module"` is the code's.
- A module has at least two candidates. Of four heads the code takes one, which is gone in every mask and
  back in every complement.
- Masks are regressed on the log of the perplexity (the code: the perplexity), and both are cut at 1e8.
- The L1 problem is solved to the end; the code runs Adam over a grid of learning rates, and stops early.
- Complements stay in one fold of the cross-validation: a linear model that saw one mask knows the other.
- Cuts of earlier rounds are gates of 0 until `slice_model` makes all of them at the end. The logits are the
  same, but later rounds get no faster.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import BoolTensor, LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.quantization.pruning.bonsai_masks import Candidates, Sampling, candidates, priors, sample_pair
from refimpl.quantization.pruning.bonsai_regression import FOLDS, Fit, Regression, regress
from refimpl.quantization.pruning.gating import gated
from refimpl.quantization.pruning.head_gates import check_training, next_token_loss
from refimpl.quantization.pruning.slicing import slice_model

__all__ = ["BonsaiReport", "bonsai", "weights_left"]

WORST = math.log(1e8)


@dataclass(frozen=True)
class BonsaiReport:
    """What `bonsai` kept: `heads` [L, H], `neurons` [L, F]; the share of weights removed, `sparsity`; and the
    `fits`, one for each round (none without regression)."""

    heads: BoolTensor
    neurons: BoolTensor
    sparsity: float
    fits: tuple[Fit, ...]


@torch.no_grad()
def bonsai(
    model: nn.Module,
    ids: LongTensor,
    *,
    sparsity: float = 0.5,
    generator: torch.Generator,
    step: float = 0.05,
    masks: int = 200,
    block: int = 1,
    prior: Literal["wanda", "random"] = "wanda",
    regression: Regression | None = "l1",
    sampling: Sampling = "model",
    batch: int = 8,
) -> BonsaiReport:
    """Remove heads and neurons by the perplexity of random sub-models, in place, without any gradient.

    Implements arXiv 2402.05406, section 3.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, not sliced.
    ids : [B, T] token ids without padding (the code: 32 rows of the model's full context).
    sparsity : share of the weights of the blocks' linear layers to remove, 0 <= s < 1.
    generator : draws masks.
    step : p, the share that a round removes, at most 0.5. 2p of every module are candidates.
    masks : sub-models run in a round, even and at least 10 (the code: 200); half are complements.
    block : neurons of neighbouring prior that are removed together; 1 is the paper's. With fewer
        candidates fewer masks are needed.
    prior : "wanda", see `priors`, or "random" numbers, as the code's ablation.
    sampling : of masks, over the whole "model" or, as in the code, in each "module".
    regression : "l1"; "ridge", with a penalty on the distance to the prior, solved in closed form; or None:
        by the prior alone, the same share of every module.
    batch : rows of ids at a time.

    Returns a `BonsaiReport`. What is removed is between s and s less one head or block. Raises TypeError or
    ValueError for values out of range, before anything is changed.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> draws = torch.Generator().manual_seed(0)
    >>> report = bonsai(tiny("llama"), random_ids(4, 16), sparsity=0.1, masks=20, generator=draws)
    >>> 0.09 < report.sparsity <= 0.1, len(report.fits)
    (True, 2)
    """
    bb = Backbone(model)
    _check(bb, ids, sparsity, generator, step, masks, block, prior, regression, sampling, batch)
    keep = torch.ones(bb.n_layers, bb.H, device=ids.device), torch.ones(bb.n_layers, bb.F, device=ids.device)
    total = float(weights_left(bb, *keep))
    smallest = block * (2 if bb.layer(0).gate is None else 3) * bb.d
    if step * total < smallest:
        raise ValueError(
            f"step must be at least a block of {block} neurons, {smallest / total:.2g}, got {step}"
        )
    fits, left = [], total
    while (rest := left - (1 - sparsity) * total) >= smallest:
        share = min(step, rest / total)
        if prior == "wanda":
            rho = priors(bb, ids, keep, batch)
        else:
            rho = tuple(torch.rand(k.shape, generator=generator).to(k.device) for k in keep)
        found = candidates(rho, keep, share, block, bb.D)
        beta = found.place
        if regression is not None:
            drawn = [mask for _ in range(masks // 2) for mask in sample_pair(found, generator, sampling)]
            utilities = [_utility(bb, ids, found.gates(mask, keep), batch) for mask in drawn]
            worth = found.prior * found.columns
            fits.append(regress(torch.stack(drawn), torch.tensor(utilities).double(), worth, regression))
            beta = fits[-1].beta
        keep = _remove(bb, found, keep, beta, left - share * total)
        before, left = left, float(weights_left(bb, *keep))
        if left == before:  # only heads are left, and none of them fits
            break
    heads, neurons = (k.bool().cpu() for k in keep)
    slice_model(model, heads, neurons)
    return BonsaiReport(heads, neurons, 1 - left / total, tuple(fits))


def weights_left(bb: Backbone, heads: Tensor, neurons: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Weights of the blocks' linear layers, without biases, when each unit is there with its probability.

    Parameters: `heads` [L, H], `neurons` [L, F] and, for `NutePrune`, hidden dimensions [d], each in [0, 1]
    and independent; of 1 and 0 it is the count after `slice_model`, K/V heads without queries gone as well.
    Returns a float64 number; differentiable.

    >>> from refimpl.checks.tiny import tiny
    >>> float(weights_left(Backbone(tiny("llama")), torch.ones(3, 4), torch.ones(3, 40)))
    20736.0
    """
    heads, neurons = heads.double(), neurons.double()
    shared = 1 - (1 - heads.unflatten(-1, (bb.G, -1))).prod(-1)  # a K/V head stays with any query
    matrices = 2 if bb.layer(0).gate is None else 3
    rows = 2 * bb.D * (heads.sum() + shared.sum()) + matrices * neurons.sum()
    return rows * (bb.d if hidden is None else hidden.double().sum())


def _utility(bb: Backbone, ids: LongTensor, gates: tuple[Tensor, Tensor], batch: int) -> float:
    """-log perplexity, also of sub-models whose logits overflow."""
    with gated(bb, *gates):
        nll = sum(float(next_token_loss(bb.model, part)) * len(part) for part in ids.split(batch)) / len(ids)
    return -(nll if nll < WORST else WORST)


def _remove(
    bb: Backbone, found: Candidates, keep: tuple[Tensor, Tensor], beta: Tensor, goal: float
) -> tuple[Tensor, Tensor]:
    """Take candidates in the order of beta (of equal ones the lower prior) as long as `goal` weights stay;
    one that is too large is passed over (the code stops at it)."""
    mask = torch.ones_like(found.prior)
    by_prior = found.prior.argsort(stable=True)
    for i in by_prior[beta[by_prior].argsort(stable=True)].tolist():
        mask[i] = 0
        if float(weights_left(bb, *found.gates(mask, keep))) < goal - 0.5:  # whole numbers, but for rounding
            mask[i] = 1
    return found.gates(mask, keep)


def _check(
    bb: Backbone,
    ids: LongTensor,
    sparsity: float,
    generator: torch.Generator,
    step: float,
    masks: int,
    block: int,
    prior: str,
    regression: str | None,
    sampling: str,
    batch: int,
) -> None:
    check_training(bb, ids, 1, batch, 1.0, None)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be a number, 0 <= s < 1, got {sparsity!r}")
    if not 0 < step <= 0.5:
        raise ValueError(f"step must be a number, 0 < p <= 0.5, got {step!r}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if type(masks) is not int or masks % 2 or masks < 2 * FOLDS:
        raise ValueError(f"masks must be an even integer >= {2 * FOLDS}, got {masks!r}")
    if type(block) is not int or not 1 <= block <= bb.F:
        raise ValueError(f"block must be an integer from 1 to {bb.F}, got {block!r}")
    if prior not in ("wanda", "random"):
        raise ValueError(f"prior must be 'wanda' or 'random', got {prior!r}")
    if regression not in (None, "l1", "ridge"):
        raise ValueError(f"regression must be 'l1', 'ridge' or None, got {regression!r}")
    if sampling not in ("model", "module"):
        raise ValueError(f"sampling must be 'model' or 'module', got {sampling!r}")
