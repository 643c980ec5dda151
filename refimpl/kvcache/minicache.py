"""MiniCache (2405.14366): two neighbouring layers share the directions of their keys and values.

The authors released no code, and the paper was read in its abstract only: directions and norms equal those
of KVCache-Factory's port; which tokens are distinct enough to stay whole is a rule of ours, where that port
keeps the share with the largest distances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.codecs import Codec, DenseTail
from refimpl.kvcache.slots import Selection

__all__ = ["MiniCache", "angle", "slerp"]

PARALLEL = 1e-3  # radians; sin of a smaller angle is too small to divide by


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Return the angle [..., 1] between unit vectors a, b [..., D], 0 to pi, exact also where it is small.

    >>> angle(torch.tensor([1., 0.]), torch.tensor([0., 1.]))
    tensor([1.5708])
    """
    # arccos(a.b) would lose half of the digits near 0 and pi.
    return 2 * torch.atan2((a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True))


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the unit vectors on the great circle from a to b [..., D] at the fraction t of their angle W.

    sin((1 - t) W) / sin W · a + sin(t W) / sin W · b; where a and b are (anti)parallel, the normalised
    (1 - t) a + t b. Rotating a and b alike rotates the result, so merging before or after RoPE is the same.

    >>> slerp(torch.tensor([1., 0.]), torch.tensor([0., 1.]), 0.5)
    tensor([0.7071, 0.7071])
    """
    w = angle(a, b)
    parallel = torch.minimum(w, torch.pi - w) < PARALLEL
    sin = torch.where(parallel, 1, w.sin())
    line = torch.nn.functional.normalize((1 - t) * a + t * b, dim=-1)
    arc = ((1 - t) * w).sin() / sin * a + (t * w).sin() / sin * b
    return torch.where(parallel, line, arc)


@dataclass
class Shared:
    """What a pair of layers holds of its keys, or of its values.

    Attributes
    - row: int32 [B, G, S], where each slot's entry is: i >= 0 in `direction`, -1 - i in `whole`.
    - direction: unit vectors [M, D]; size: [2, M], the norms of the lower and of the upper layer's entries.
    - whole: [2, N, D], both layers' entries that are not merged.
    - nearest, farthest: [B, G, 1], the smallest and largest distance so far.
    """

    row: Tensor
    direction: Tensor
    size: Tensor
    whole: Tensor
    nearest: Tensor
    farthest: Tensor

    def read(self, which: int) -> Tensor:
        """The lower (0) or upper (1) layer's entries [B, G, S, D]."""
        rows = torch.cat((self.direction * self.size[which, :, None], self.whole[which]))
        index = torch.where(self.row >= 0, self.row, len(self.direction) - 1 - self.row)
        return rows.index_select(0, index.flatten()).view(*self.row.shape, -1)

    def take_rows(self, rows: LongTensor) -> Shared:
        """The same for other rows of the batch; entries that no row uses any more are dropped."""
        row = self.row.index_select(0, rows)
        merged = row >= 0
        use, keep = row[merged], -1 - row[~merged]
        return Shared(
            _number(merged), self.direction[use], self.size[:, use], self.whole[:, keep],
            self.nearest.index_select(0, rows), self.farthest.index_select(0, rows),
        )  # fmt: skip


class MiniCache(DenseTail):
    """Merge the entries of layers (l, l + 1), pair by pair from the middle of the model upwards (2405.14366).

    For each token and KV head, x (a key or a value) of the two layers becomes a common direction, slerp of
    x_l / |x_l| and x_{l+1} / |x_{l+1}| at t, and the two norms: D + 2 numbers for 2 D. Retained whole are the
    tokens whose angular distance d = W / pi is within the fraction `retain` of the range from the largest:
    d >= d_max - retain (d_max - d_min), for each head, keys and values apart; after the prefill d_max and
    d_min are those of all tokens seen. A token is merged once the upper layer has its entry and has attended.
    Layers below the middle, and a last one without partner, stay dense.

    Not here: the paper's combination with 4-bit quantisation.

    Parameters
    - t: weight of the upper layer, 0..1 (the paper, as that port quotes it: 0.6).
    - retain: 0..1 (the port's share: 0.05); 1 retains everything; None retains nothing.
    - start: lower layer of the first pair, 0 and more; None: half the number of layers.

    Raises ValueError for others, and for a policy that evicts or merges. Padding is merged, and ignored in d.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model = tiny("llama", num_hidden_layers=4)
    >>> cache = KVCache(model, codec=MiniCache(retain=None))
    >>> out = model(random_ids(1, 10), past_key_values=cache)  # D = 8; 2 KV heads; layers 2, 3 share
    >>> cache.nbytes()["payload"] == 2 * 2 * 10 * 4 * (2 * 8 + (8 + 2))
    True
    """

    lower: MiniCache | None = None
    shared: dict[str, Shared]  # of the pair, held by its lower layer

    def __init__(self, t: float = 0.6, *, retain: float | None = 0.05, start: int | None = None) -> None:
        for name, value in (("t", t), ("retain", retain)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}: {value!r}; allowed: 0..1")
        if start is not None and (isinstance(start, bool) or not isinstance(start, int) or start < 0):
            raise ValueError(f"start: {start!r}; allowed: integers from 0")
        self.t, self.retain, self.start, self.shared = t, retain, start, {}

    def fresh(self) -> MiniCache:
        new = super().fresh()
        new.shared = {}
        return new

    def join(self, codecs: list[Codec]) -> None:
        start = len(codecs) // 2 if self.start is None else self.start
        above = self.layer - start
        if above > 0 and above % 2:
            self.lower, self.shared = codecs[self.layer - 1], codecs[self.layer - 1].shared

    def keep(self, selection: Selection) -> None:
        raise ValueError("MiniCache: two layers share their entries; allowed: policies that keep everything")

    def rewrite(self, k: Tensor, v: Tensor) -> None:
        raise ValueError("MiniCache: two layers share their entries; allowed: policies that merge nothing")

    def older(self) -> tuple[Tensor | None, Tensor | None]:
        which = int(self.lower is not None)
        return tuple(self.shared[name].read(which) if name in self.shared else None for name in "kv")

    def commit(self, ok: Tensor | None) -> None:
        if self.lower is None:
            return
        for name in "kv":
            pair = torch.stack((getattr(self.lower, name), getattr(self, name)))
            real = None if ok is None else ok[..., -pair.shape[3] :]
            self.shared[name] = _merge(self.shared.get(name), pair, real, self.t, self.retain)
            for codec in (self.lower, self):
                setattr(codec, name, None)

    def take_rows(self, rows: LongTensor) -> None:
        super().take_rows(rows)
        if self.lower is None:
            for name in self.shared:
                self.shared[name] = self.shared[name].take_rows(rows)

    def compressed(self) -> dict[str, dict[str, Tensor]]:
        held = {} if self.lower is not None else self.shared  # counted once, in the lower layer
        payload = ("direction", "size", "whole")
        meta = ("row",) if self.retain is None else ("row", "nearest", "farthest")
        return {
            tier: {f"{name}_{part}": getattr(s, part) for name, s in held.items() for part in parts}
            for tier, parts in (("payload", payload), ("meta", meta))
        }


def _merge(old: Shared | None, pair: Tensor, ok: Tensor | None, t: float, retain: float | None) -> Shared:
    """Add the pair's new entries [2, B, G, T, D]; padding (not ok [B, G, T]) is merged."""
    size = pair.norm(dim=-1)
    a, b = torch.nn.functional.normalize(pair, dim=-1)
    distance = angle(a, b)[..., 0] / torch.pi
    real = torch.ones_like(distance, dtype=torch.bool) if ok is None else ok
    nearest = distance.masked_fill(~real, torch.inf).amin(-1, keepdim=True)
    farthest = distance.masked_fill(~real, -torch.inf).amax(-1, keepdim=True)
    if old is not None:
        nearest, farthest = torch.minimum(nearest, old.nearest), torch.maximum(farthest, old.farthest)
    if retain is None:
        merged = torch.ones_like(real)
    else:
        merged = (distance < farthest - retain * (farthest - nearest)) | ~real
        # farthest - 1 · (farthest - nearest) may be off by rounding.
        merged = ~real if retain == 1 else merged
    new = Shared(
        _number(merged), slerp(a, b, t)[merged], size[:, merged], pair[:, ~merged], nearest, farthest
    )  # fmt: skip
    if old is None:
        return new
    shift = torch.where(new.row >= 0, len(old.direction), -old.whole.shape[1])
    return Shared(
        torch.cat((old.row, (new.row + shift).int()), 2), torch.cat((old.direction, new.direction)),
        torch.cat((old.size, new.size), 1), torch.cat((old.whole, new.whole), 1), nearest, farthest,
    )  # fmt: skip


def _number(merged: Tensor) -> Tensor:
    """Number the merged slots 0, 1, ... in row-major order, the others -1, -2, ..."""
    flat = merged.flatten()
    number = torch.where(flat, flat.cumsum(0) - 1, -(~flat).cumsum(0))
    return number.view(merged.shape).int()
