"""Which slots of a layer stay: one selection, applied alike to keys, values, positions and slot states.

A selection that keeps the same number of slots for every row of the batch and every KV head gives tensors
[B, G, n, ...]. One that does not ("ragged") gives flat ones [N, ...]: what the first head of the first row
keeps, then what the second keeps, and so on, so that a head that keeps less also occupies less.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import LongTensor, Tensor

__all__ = ["Padding", "Selection", "Stretches", "all_but", "best"]

CONTIGUOUS = torch.contiguous_format


class Selection:
    """The slots that stay, in the order in which they are stored.

    Parameters
    - keep: True at the slots that stay, bool [S] (the same for all heads) or [B, G, S]; or their indices in
      ascending order, long [n] or [B, G, n]; or, the same for all heads, the stretches that stay, a list of
      slices in ascending order (nothing then waits for the device).
    - shape: (B, G, S).
    - ok: [B, G, S], False at slots that hold nothing (padding), which never stay; None if all are filled.

    Attributes: counts, slots kept, an int or, ragged, [B, G]; shared, whether all heads keep the same slots;
    rows, indices of what stays into a tensor flattened to [B · G · S, ...]; slices, those given, or None.
    Raises ValueError for a `keep` of another type or shape, and for one that keeps nothing at all.

    >>> keys = torch.arange(4.).view(1, 2, 2, 1)  # B = 1, G = 2, S = 2, D = 1
    >>> Selection(torch.tensor([False, True]), (1, 2, 2)).apply(keys).flatten().tolist()
    [1.0, 3.0]
    >>> Selection([slice(1, 2)], (1, 2, 2)).apply(keys).flatten().tolist()
    [1.0, 3.0]
    >>> ragged = Selection(torch.tensor([[[True, True], [False, True]]]), (1, 2, 2))
    >>> ragged.counts.tolist(), ragged.apply(keys).flatten().tolist()
    ([[2, 1]], [0.0, 1.0, 3.0])
    """

    counts: int | LongTensor

    def __init__(
        self, keep: Tensor | list[slice], shape: tuple[int, int, int], ok: Tensor | None = None
    ) -> None:
        self.shape = shape
        _check(keep, shape)
        if ok is not None:
            keep = as_mask(keep, shape, ok.device) & ok
        self.slices = keep if isinstance(keep, list) else None
        self.shared = self.slices is not None or keep.ndim == 1
        if self.slices is not None:
            self.counts = sum(part.stop - part.start for part in keep)
        elif keep.ndim == 1:
            self.index = keep.nonzero().flatten() if keep.dtype == torch.bool else keep
            self.counts = len(self.index)
        elif keep.dtype == torch.bool:
            self.rows = keep.flatten().nonzero().flatten()
            counts = keep.sum(-1)
            if not len(self.rows):
                raise ValueError("keep: nothing stays, in no head; allowed: one slot or more")
            least, most = (int(c) for c in counts.aminmax())
            self.counts = most if least == most else counts
        else:
            B, G, S = shape
            first = torch.arange(0, B * G * S, S, device=keep.device)
            self.rows = (keep.reshape(B * G, -1) + first[:, None]).flatten()
            self.counts = keep.shape[-1]

    @cached_property
    def index(self) -> LongTensor:
        """Indices [n] of what stays, if all heads keep the same slots."""
        return torch.cat([torch.arange(part.start, part.stop) for part in self.slices])

    @cached_property
    def rows(self) -> LongTensor:
        # Gathering rows of a flat tensor is far faster than selecting along an inner dimension.
        B, G, S = self.shape
        first = torch.arange(0, B * G * S, S, device=self.index.device)
        return (self.index + first[:, None]).flatten()

    @property
    def ragged(self) -> bool:
        """Whether heads or rows keep different numbers of slots."""
        return isinstance(self.counts, Tensor)

    def apply(self, t: Tensor) -> Tensor:
        """Gather [B, G, S, ...] into a fresh contiguous tensor, [B, G, n, ...] or, ragged, [N, ...].

        Where all heads keep the same slots, also [S] into [n].
        """
        dim = 2 if t.ndim > 1 else 0
        if self.slices is not None:
            parts = [t.narrow(dim, part.start, part.stop - part.start) for part in self.slices]
            return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone(memory_format=CONTIGUOUS)
        if t.ndim == 1:
            return t.index_select(0, self.index)
        kept = t.flatten(0, 2).index_select(0, self.rows)
        return kept if self.ragged else kept.view(*self.shape[:2], self.counts, *t.shape[3:])


class Padding:
    """How flat tensors [N, ...] are laid out as [B, G, S, ...] while attention runs: right-aligned.

    Parameters: counts [B, G], the slots that each head holds; room, slots to add behind them.
    Attributes: index [B, G, S] into the flat tensor; ok [B, G, S], True where a slot is real or room.

    >>> pad = Padding(torch.tensor([[2, 1]]), room=1)
    >>> pad.apply(torch.tensor([5., 6., 7.]), 9).tolist()
    [[[5.0, 6.0, 9.0], [7.0, 7.0, 9.0]]]
    >>> pad.ok.tolist()
    [[[True, True, True], [False, True, True]]]
    """

    def __init__(self, counts: LongTensor, room: int = 0) -> None:
        self.room = room
        flat = counts.flatten()
        most = int(flat.max())
        ends, counts = flat.cumsum(0).view(*counts.shape, 1), counts[..., None]
        back = torch.arange(most, -room, -1, device=counts.device)  # distance from a head's end
        self.ok = back <= counts
        # A padded slot repeats an entry of the head, room its last one: finite, and hidden or written over.
        self.index = (ends - back.clamp(1).minimum(counts)).clamp_(0)

    def apply(self, flat: Tensor, new: Tensor | float | None = None) -> Tensor:
        """Lay [N, ...] out as [B, G, S, ...], with `new` [B, G, room, ...] where there is room."""
        out = flat.index_select(0, self.index.flatten()).view(*self.index.shape, *flat.shape[1:])
        if self.room:
            out[:, :, -self.room :] = new
        return out


class Stretches:
    """Which stretches of the text the slots of a layer are, counted on the host.

    Iterating gives, in order, (position - slot, which is one number inside a stretch, slice of its slots).

    >>> held = Stretches()
    >>> held.append(seen=0, T=10)
    >>> held.keep(Selection([slice(0, 2), slice(6, 10)], (1, 1, 10)))
    >>> held.append(seen=10, T=1)
    >>> list(held)
    [(0, slice(0, 2, None)), (4, slice(2, 7, None))]
    """

    def __init__(self) -> None:
        self.parts: list[list[int]] = []  # [position - slot, first slot, behind the last slot]
        self.known = True  # until something but slices says what stays

    def append(self, seen: int, T: int) -> None:
        """T new tokens, after `seen` others, behind the last slot."""
        stop = self.parts[-1][2] if self.parts else 0
        self._add(seen - stop, stop, stop + T)

    def slides(self, seen: int) -> bool:
        """Whether they are a window that ends with the last token seen and, before it, first tokens."""
        *earlier, (shift, _, stop) = self.parts
        return self.known and shift + stop == seen and not any(part[0] for part in earlier)

    def slide(self) -> None:
        """Follow a token that takes the place of one of the last stretch."""
        self.parts[-1][0] += 1

    def keep(self, selection: Selection) -> None:
        """Follow an eviction."""
        if selection.slices is None:
            self.known = False
            return
        old, self.parts, stop = self.parts, [], 0
        for kept in selection.slices:
            for shift, first, last in old:
                first, last = max(first, kept.start), min(last, kept.stop)
                if first < last:
                    self._add(shift + first - stop, stop, stop + last - first)
                    stop += last - first

    def _add(self, shift: int, first: int, stop: int) -> None:
        if self.parts and self.parts[-1][0] == shift:
            self.parts[-1][2] = stop
        else:
            self.parts.append([shift, first, stop])

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        return ((shift, slice(first, stop)) for shift, first, stop in self.parts)


def best(score: Tensor, n: int) -> LongTensor:
    """Return the indices [..., n] of the n largest scores [..., S], in ascending order of index.

    Raises ValueError unless 1 <= n <= S.

    >>> best(torch.tensor([3., 9., 1., 7.]), 2).tolist()
    [1, 3]
    """
    if not 1 <= n <= score.shape[-1]:
        raise ValueError(f"n: {n}; allowed: 1..{score.shape[-1]}, the number of scores")
    if n == score.shape[-1] - 1:  # a decoding step drops one: no need to sort
        return all_but(score.argmin(-1, keepdim=True), n + 1)
    return score.topk(n, sorted=False).indices.sort().values


def all_but(dropped: LongTensor, S: int) -> LongTensor:
    """Return the indices [..., S - 1] of all S slots but one, `dropped` [..., 1].

    >>> all_but(torch.tensor([[1], [2]]), 3).tolist()
    [[0, 2], [0, 1]]
    """
    kept = torch.arange(S - 1, device=dropped.device)
    return kept + (kept >= dropped)


def as_mask(
    keep: Tensor | list[slice], shape: tuple[int, int, int], device: torch.device | None = None
) -> Tensor:
    """The selection as a bool mask [B, G, S]; `device` is needed for slices, which have none."""
    if isinstance(keep, list):
        mask = torch.zeros(shape[2], dtype=torch.bool, device=device)
        for part in keep:
            mask[part] = True
        return mask.expand(shape)
    if keep.dtype == torch.bool:
        return keep.expand(shape)
    mask = torch.zeros(shape, dtype=torch.bool, device=keep.device)
    return mask.scatter(-1, keep.expand(*shape[:2], -1), True)


def _check(keep: Tensor | list[slice], shape: tuple[int, int, int]) -> None:
    B, G, S = shape
    if isinstance(keep, list):
        ends = [end for part in keep for end in (part.start, part.stop)]
        if not keep or any(part.start >= part.stop for part in keep) or ends != sorted(ends):
            raise ValueError(f"keep: {keep}; allowed: slices in ascending order, none of them empty")
        if ends[0] < 0 or ends[-1] > S:
            raise ValueError(f"keep: slots {ends[0]}..{ends[-1] - 1}, but the layer has {S}")
        return
    if not isinstance(keep, Tensor) or keep.dtype not in (torch.bool, torch.long):
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise ValueError(f"keep: expected a mask (bool), indices (long) or a list of slices, got {got}")
    fits = keep.shape[:-1] in ((), (B, G)) and (keep.dtype == torch.long or keep.shape[-1] == S)
    if not fits or keep.ndim == 0:
        raise ValueError(
            f"keep: shape {list(keep.shape)}; allowed: a mask [{S}] or [{B}, {G}, {S}], "
            f"or indices [n] or [{B}, {G}, n]"
        )
    if keep.dtype == torch.long and keep.shape[-1] > S:
        raise ValueError(f"keep: {keep.shape[-1]} indices, but the layer has {S} slots")
