"""Truncated SVD of the stored keys and values (survey, Eq. 8-10): n tokens of a head in rank r."""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import torch
from torch import LongTensor, Tensor

from refimpl.kvcache.codecs import DenseTail

__all__ = ["KVSVD", "compression_ratio", "factor", "low_rank_scores"]

Update = Literal["project", "refactor"]


def factor(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A = U_r S_r [..., n, r] and B = V_r [..., D, r] of x = U S V' [..., n, D] (survey, Eq. 8-9).

    A B' is the nearest matrix of that rank (Eckart-Young): its squared error is the sum of the squared
    singular values left out. In half precision the SVD is computed in float32.
    Raises ValueError unless 1 <= rank <= min(n, D).

    >>> x = torch.tensor([[3., 0.], [0., 1.]])
    >>> a, b = factor(x, 1)
    >>> (a @ b.T - x).square().sum()  # the dropped singular value is 1
    tensor(1.)
    """
    n, D = x.shape[-2:]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(n, D):
        raise ValueError(f"rank: {rank!r}; allowed: 1..{min(n, D)} for {n} tokens of {D} channels")
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    u, s, vt = torch.linalg.svd(wide, full_matrices=False)
    a, b = u[..., :rank] * s[..., None, :rank], vt[..., :rank, :].transpose(-1, -2)
    return tuple(t.to(x.dtype).contiguous() for t in (a, b))


def low_rank_scores(q: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return q K_r' = (q B) A' [..., T, n] without building K_r = A B': r (D + n) products a query, not D n.

    Parameters: q [..., T, D], a [..., n, r], b [..., D, r]. Only for keys as the query meets them: keys
    factored before their rotation must be built and rotated.

    >>> low_rank_scores(torch.ones(1, 2), torch.ones(3, 1), torch.ones(2, 1)).tolist()
    [[2.0, 2.0, 2.0]]
    """
    return (q @ b) @ a.transpose(-1, -2)


def compression_ratio(n: int, d: int, rank: int) -> float:
    """Return the survey's Eq. 10: n d / (r (n + d + 1)), numbers of K over those of U_r, S_r and V_r.

    Warns (UserWarning) if the factors are no smaller than K, that is for r >= n d / (n + d + 1): with d = 32
    at most r = 30 saves anything, however long the text. Raises ValueError for sizes below 1.

    >>> compression_ratio(512, 32, 8)
    3.75...
    """
    for name, size in (("n", n), ("d", d), ("rank", rank)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: {size!r}; allowed: integers from 1")
    ratio = n * d / (rank * (n + d + 1))
    if ratio <= 1:
        warnings.warn(f"rank {rank} saves nothing for {n} x {d}: compression ratio {ratio:.3f}", stacklevel=2)
    return ratio


class KVSVD(DenseTail):
    """Keys (and values) of each KV head as A B', of rank r (survey, Eq. 8-10).

    At the end of the prefill the n keys of a head are factored; new ones wait in a dense residual, and when
    R are waiting, their coefficients k B on the frozen B join A ("project"), or all are factored again
    ("refactor": the old ones as they were read). S is not stored apart, so a head's keys take r (n + D)
    numbers, one r less than in Eq. 10. Until as many tokens as the rank are there, all stay dense.

    Parameters
    - rank: of the keys, 1..D. value_rank: of the values; None: they stay dense.
    - residual: R, 1 or more tokens. update: "project" or "refactor".
    - rotated: False factors keys before RoPE and rotates what is read (not for GPT-2).

    Raises ValueError for others (a rank above D at the first forward), and for a policy that evicts or merges
    after the prefill, or leaves heads with different numbers of slots. Padding is factored as zeros.

    >>> codec = KVSVD(2, residual=4)
    >>> codec.append(torch.ones(1, 1, 10, 8), torch.ones(1, 1, 10, 8))
    >>> codec.commit(None)
    >>> codec.nbytes()  # 2 · (10 + 8) and 10 · 8 float32
    {'payload': 464, 'meta': 0}
    """

    factors: dict[str, tuple[Tensor, Tensor]]

    def __init__(
        self, rank: int, *, value_rank: int | None = None, residual: int = 32, update: Update = "project",
        rotated: bool = True,
    ) -> None:  # fmt: skip
        sizes = [("rank", rank), ("residual", residual)]
        for name, size in sizes if value_rank is None else [*sizes, ("value_rank", value_rank)]:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: {size!r}; allowed: integers from 1")
        if update not in get_args(Update):
            raise ValueError(f"update: {update!r}; allowed: {', '.join(get_args(Update))}")
        self.ranks = {"k": rank} | ({} if value_rank is None else {"v": value_rank})
        self.residual, self.update, self.rotated, self.factors = residual, update, rotated, {}

    def fresh(self) -> KVSVD:
        new = super().fresh()
        new.factors = {}
        return new

    def append(self, k: Tensor, v: Tensor) -> None:
        for name, rank in self.ranks.items():
            if rank > k.shape[-1]:
                full = {"k": "rank", "v": "value_rank"}[name]
                raise ValueError(f"{full}: {rank}; allowed: 1..{k.shape[-1]}, the head dim")
        super().append(k, v)

    def older(self) -> tuple[Tensor | None, Tensor | None]:
        built = {name: a @ b.transpose(-1, -2) for name, (a, b) in self.factors.items()}
        return built.get("k"), built.get("v")

    def commit(self, ok: Tensor | None) -> None:
        for name, rank in self.ranks.items():
            tail = getattr(self, name)
            waiting = 0 if tail is None else tail.shape[2]
            if waiting < (self.residual if name in self.factors else rank):
                continue
            if ok is not None:
                tail = tail * ok[..., -waiting:, None]  # rows of zeros change no singular vector
            if name not in self.factors:
                self.factors[name] = factor(tail, rank)
            elif self.update == "project":
                a, b = self.factors[name]
                self.factors[name] = torch.cat((a, tail @ b), 2), b
            else:
                a, b = self.factors[name]
                self.factors[name] = factor(torch.cat((a @ b.transpose(-1, -2), tail), 2), rank)
            setattr(self, name, None)

    def take_rows(self, rows: LongTensor) -> None:
        super().take_rows(rows)
        for name, pair in self.factors.items():
            self.factors[name] = tuple(t.index_select(0, rows) for t in pair)

    def compressed(self) -> dict[str, dict[str, Tensor]]:
        named = {}
        for name, (a, b) in self.factors.items():
            named |= {f"{name}_a": a, f"{name}_b": b}
        return {"payload": named, "meta": {}}
