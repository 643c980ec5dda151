"""The sub-models of Bonsai (arXiv 2402.05406): which units a round may remove, and masks drawn over them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import LongTensor, Tensor

from refimpl.backbone import Backbone
from refimpl.quantization.calibrate import collect
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.pruning.gating import gated

__all__ = ["Candidates", "Sampling", "candidates", "priors", "sample_pair"]

Sampling = Literal["model", "module"]


@dataclass(frozen=True)
class Candidates:
    """What a round may remove: m candidates, each a head or a block of neurons of one layer.

    - heads [L, H], neurons [L, F]: the number of the candidate that a unit is in; -1 for all others.
    - prior [m]: the mean prior of its units. columns [m]: columns of o or down that it feeds.
    - odds [m]: max of the prior over its module - prior. modules [m]: from 0; drop: how many a mask takes.
    - place [m]: the share of its module that is gone once everything of a lower prior and it are gone.
    """

    heads: LongTensor
    neurons: LongTensor
    prior: Tensor
    columns: Tensor
    odds: Tensor
    modules: LongTensor
    drop: tuple[int, ...]
    place: Tensor

    def gates(self, mask: Tensor, keep: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The tables of `gated`: `keep` (heads, neurons), and the candidates as in `mask` [m]."""
        extended = torch.cat((mask, mask.new_ones(1))).to(keep[0])  # at -1: not a candidate
        return extended[self.heads] * keep[0], extended[self.neurons] * keep[1]


def priors(
    bb: Backbone, ids: LongTensor, keep: tuple[Tensor, Tensor], batch: int = 8
) -> tuple[Tensor, Tensor]:
    """How much of the output of o or down a unit makes: mean over its columns j and over rows i of
    |W_ij| rms(x_j), for heads [L, H] and neurons [L, F].

    Parameters: `keep`, gates of 1 and 0 as for `gated`; what has gone has prior 0. (The code takes the mean
    of the rms of single batches.)
    """
    roles = {(kind, l): getattr(bb.layer(l), kind) for kind in ("o", "down") for l in range(bb.n_layers)}
    with gated(bb, *keep):
        stats = collect(roles, lambda: [bb.model(part, use_cache=False) for part in ids.split(batch)])
    scores = {
        role: dense_weight(module).abs().double().mean(0) * (stats[role].sqnorm / stats[role].tokens).sqrt()
        for role, module in roles.items()
    }
    heads, neurons = (torch.stack([scores[kind, l] for l in range(bb.n_layers)]) for kind in ("o", "down"))
    return heads.unflatten(-1, (bb.H, bb.D)).mean(-1), neurons


def candidates(
    rho: tuple[Tensor, Tensor], keep: tuple[Tensor, Tensor], p: float, block: int = 1, head_dim: int = 1
) -> Candidates:
    """The units of lowest prior in every module: all but the first floor(n (1 - 2p)) of the n that are left,
    at least two; floor(p n) + 1 of them are to be left out by a mask, but never all of several.

    Parameters: `rho` and `keep`, (heads [L, H], neurons [L, F]); `p`, 0 < p <= 0.5; `block`, neurons to a
    candidate, which divides these counts; `head_dim`, columns of o to a head.

    >>> rho = torch.tensor([[3.0, 1.0, 2.0, 4.0]]), torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    >>> found = candidates(rho, tuple(torch.ones_like(r) for r in rho), 0.2)
    >>> found.heads.tolist(), found.neurons.tolist(), found.drop
    ([[-1, 0, 1, -1]], [[-1, -1, -1, 3, 2]], (1, 1))
    """
    owner = [torch.full(k.shape, -1, device=k.device) for k in keep]
    prior, columns, odds, modules, drop, place = [], [], [], [], [], []
    for kind, size, width in ((0, 1, head_dim), (1, block, 1)):
        for l, alive in enumerate(keep[kind].bool()):
            units = alive.nonzero()[:, 0]
            n = len(units)
            if n == 0:
                continue
            r = rho[kind][l, units].double()
            order = r.argsort(stable=True)
            # 4 (1 - 0.5) must not become 1.999...
            free = max(n - math.floor(n * (1 - 2 * p) + 1e-9), min(2, n))
            chunks = order[:free].split(size)
            takes = round((math.floor(p * n + 1e-9) + 1) / size)
            drop.append(min(max(takes, 1), max(len(chunks) - 1, 1)))
            gone = len(alive) - n
            for chunk in chunks:
                owner[kind][l, units[chunk]] = len(prior)
                gone += len(chunk)
                prior.append(r[chunk].mean())
                odds.append(r.max() - r[chunk].mean())
                columns.append(len(chunk) * width)
                modules.append(len(drop) - 1)
                place.append(gone / len(alive))
    numbers = torch.tensor(columns).double(), torch.tensor(modules), torch.tensor(place).double()
    prior_, odds_ = torch.stack(prior).cpu(), torch.stack(odds).cpu()
    return Candidates(*owner, prior_, numbers[0], odds_, numbers[1], tuple(drop), numbers[2])


def sample_pair(
    found: Candidates, generator: torch.Generator, sampling: Sampling = "model"
) -> tuple[Tensor, Tensor]:
    """A mask [m] of 1 and 0 that leaves out as many candidates as `drop` says, drawn without replacement with
    odds max prior - prior, and its complement among the candidates.

    Parameters: `sampling`, "module": `drop` of each module; "model": the same number, but of all candidates,
    with odds that are 1 in the mean of a module.
    """
    mask = torch.ones(len(found.prior), dtype=torch.float64)
    own = [found.modules == module for module in range(len(found.drop))]
    odds = torch.zeros_like(found.odds)
    for module in own:
        # A candidate that is the best of its module has odds 0, and so have all where priors are equal.
        mean = found.odds[module].mean()
        odds[module] = found.odds[module] / mean + 1e-6 if mean > 0 else 1.0
    if sampling == "model":
        mask[torch.multinomial(odds, sum(found.drop), generator=generator)] = 0
    else:
        for module, count in zip(own, found.drop, strict=True):
            mask[torch.multinomial(odds * module, count, generator=generator)] = 0
    return mask, 1 - mask
