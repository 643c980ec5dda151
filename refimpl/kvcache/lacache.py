"""LaCache: layers keep different tokens, so that together they reach further back."""

from __future__ import annotations

import math

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.policies import KVPolicy, _size
from refimpl.kvcache.view import View

__all__ = ["LaCache"]

LADDERS = ("interleaved", "contiguous")


class LaCache(KVPolicy):
    """Thin old tokens again and again, each layer keeping others of them (2507.14204; survey [74]).

    Above `limit` slots, a cursor cuts the oldest tokens behind the sinks into blocks of b; layer l keeps a of
    each block, from its offset on, and the cursor goes on by these a. Near the newest tokens it starts over
    at the sinks. With L layers, span s and overlap o,

        b = 1 + ceil((L - s) / (s - o)),   a = min(ceil(s / (s - o)), b),   d = b - a dropped per block,
        limit = budget + floor(d / 2), so that the slots held are `budget` on average.

    All layers hold the same number of slots, at positions inside the cache. What is kept depends only on how
    many tokens were seen, not on how they were cut into forwards (the released code approximates several
    rounds at once by wider blocks; here they are done one by one).

    Parameters
    - budget: slots of each head on average; above sink + L, for the newest L tokens are never thinned.
    - n_layers: L, the model's layers.
    - span: s, layers that share a token, 1..L; overlap: o, layers shared by neighbouring steps, 0..s-1.
      d must be positive: with 6 layers (s, o) = (3, 0) or (2, 0), not (4, 2).
    - ladder: "interleaved", offset l mod (d + 1), the released code; "contiguous", offset
      min(floor(l / (s - o)), d), the paper's figure: the layers of a token are neighbours.
    - sink: first tokens that stay, >= 1 (4 in the paper).
    Raises ValueError for others, and `KVCache` for a model of another depth or with learned positions.

    >>> policy = LaCache(16, n_layers=6, span=3)
    >>> policy.block, policy.kept, policy.limit, [policy.offset(l) for l in range(6)]
    (2, 1, 16, [0, 1, 0, 1, 0, 1])
    """

    positions = "compact"

    def __init__(
        self, budget: int, n_layers: int, span: int, overlap: int = 0, ladder: str = "interleaved",
        sink: int = 4,
    ) -> None:  # fmt: skip
        self.n_layers, self.sink = _size("n_layers", n_layers, 2), _size("sink", sink, 1)
        self.span, self.overlap = _size("span", span, 1), _size("overlap", overlap, 0)
        if ladder not in LADDERS:
            raise ValueError(f"ladder: {ladder!r}; allowed: {', '.join(LADDERS)}")
        if not overlap < span <= n_layers:
            raise ValueError(
                f"span, overlap: {span}, {overlap}; allowed: overlap < span <= {n_layers} layers"
            )
        self.ladder = ladder
        self.block = 1 + math.ceil((n_layers - span) / (span - overlap))
        self.kept = min(math.ceil(span / (span - overlap)), self.block)
        self.dropped = self.block - self.kept
        if self.dropped < 1:
            raise ValueError(
                f"span, overlap: {span}, {overlap} keep whole blocks of {self.block}; allowed: less of both"
            )
        self.budget = _size("budget", budget, sink + n_layers + self.kept)
        self.limit = budget + self.dropped // 2
        self.blocks = (self.limit - sink - n_layers) // self.kept  # of one round
        self.steady = self.limit if self.dropped == 1 else None  # every new token thins a block

    def offset(self, layer: int) -> int:
        """Place in each block from which on a layer keeps."""
        if self.ladder == "interleaved":
            return layer % (self.dropped + 1)
        return min(layer // (self.span - self.overlap), self.dropped)

    def keep(self, v: View) -> Tensor | list[slice] | None:
        if v.S <= self.limit:
            return None
        if v.full and v.T == 1:
            return self._step(v)
        # The sinks never go, so the first filled slot tells how many tokens were padding.
        padding = 0 if v.full else v.pos.masked_fill(~v.ok, v.seen).amin(-1, keepdim=True)
        seen = torch.as_tensor(v.seen - padding, device=v.device)
        done, due = self._thinned((seen - v.T).clamp(min=0)), self._thinned(seen)
        kept, rank, offset = v.rank >= 0, v.rank, self.offset(v.layer)
        while bool((done < due).any()):
            first = done % self.blocks
            now = torch.minimum(due - done, self.blocks - first)
            inside = rank - self.sink - self.kept * first
            place = inside % self.block
            step = (place >= offset) & (place < offset + self.kept)
            kept = kept & (step | (inside < 0) | (inside >= self.block * now))
            done = done + now
            rank = (kept.cumsum(-1) - 1).masked_fill(~kept, -1)
        return kept

    def replace(self, v: View) -> LongTensor:
        start, first = self._thin(v, v.seen - 1 - self.limit)
        gone = start + self.kept if first == start else start  # a block is one longer than what it keeps
        return (v.rank == gone).long().argmax(-1)

    def _thin(self, v: View, done: int) -> tuple[int, int]:
        """Where the next block begins after `done` blocks, and from where on it is kept."""
        start = self.sink + self.kept * (done % self.blocks)
        return start, start + self.offset(v.layer)

    def _step(self, v: View) -> list[slice] | None:
        """The same for one more token: at most one block is thinned, and the host knows which."""
        done, due = (
            max(0, seen - self.limit + self.dropped - 1) // self.dropped for seen in (v.seen - 1, v.seen)
        )
        if done == due:
            return None
        start, first = self._thin(v, done)
        parts = [(0, start), (first, first + self.kept), (start + self.block, v.S)]
        if first == start:
            parts[:2] = [(0, first + self.kept)]
        return [slice(a, b) for a, b in parts]

    def _thinned(self, seen: Tensor) -> Tensor:
        """Blocks thinned until `seen` tokens fit into the limit."""
        return (seen - self.limit + self.dropped - 1).clamp(min=0) // self.dropped
