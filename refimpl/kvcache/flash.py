"""FlashAttention: exact attention tile by tile, never holding a matrix of T x S weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Traffic", "flash_attention", "flash_scores", "naive_attention"]


@dataclass
class Traffic:
    """Floats that an attention moves between the large slow memory and the small fast one.

    Counted while it runs: one transfer for every tile read or written. `naive_attention` makes three passes,
    each of which reads its inputs from, and writes its result to, the slow memory.

    Attributes: read, written, in floats; tile, the floats of the largest matrix of scores that existed.

    >>> Traffic(read=6, written=2).moved
    8
    """

    read: int = 0
    written: int = 0
    tile: int = 0

    @property
    def moved(self) -> int:
        """Read and written."""
        return self.read + self.written

    def _load(self, *tensors: Tensor) -> None:
        self.read += sum(t.numel() for t in tensors)

    def _store(self, *tensors: Tensor) -> None:
        self.written += sum(t.numel() for t in tensors)

    def _scores(self, t: Tensor) -> None:
        self.tile = max(self.tile, t.numel())


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True,
    tile: tuple[int, int] = (128, 128), traffic: Traffic | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(q k' · scale) v tile by tile, with an online softmax (FlashAttention, 2205.14135, 2307.08691).

    For a tile of queries the tiles of keys pass by once. With the running maximum m, the running sum l and
    the unnormalised output o of each query, a tile of scores s changes them to

        m' = max(m, max s),   l' = l · exp(m - m') + sum exp(s - m'),   o' = o · exp(m - m') + exp(s - m') v,

    and at the end the output is o / l: the exact attention, of which no T x S matrix was ever held. Tiles
    that causality hides entirely are skipped. The order of loops is FlashAttention-2's. This is the
    algorithm, not a kernel: in PyTorch every tile is still a round trip to memory.

    Parameters
    - q: [B, H, T, D]; k, v: [B, G, S, D]; G divides H, query head h reads KV head h // (H / G).
    - scale: default D^-0.5.
    - causal: query t stands at position S - T + t (the last query sees every key), which differs from
      torch's `is_causal` unless T = S. Needs T <= S.
    - tile: queries and keys in one tile, >= 1; need not divide T and S. GPU kernels take 64 to 256.
    - traffic: a `Traffic` to add the floats moved to.

    Returns the output [B, H, T, D] in q's dtype, and the logarithm of each query's sum exp(q k' · scale),
    [B, H, T], in float32 (float64 for float64). Raises ValueError for empty tensors, shapes, dtypes or
    devices that do not fit, values that are not finite, and parameters out of range.

    >>> draw = torch.Generator().manual_seed(0)
    >>> q, k, v = (torch.randn(1, heads, 50, 8, generator=draw) for heads in (4, 2, 2))
    >>> out, lse = flash_attention(q, k, v, tile=(16, 16))
    >>> expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    >>> torch.allclose(out, expected, atol=1e-6)
    True
    """
    q, k, v, scale, exact = _prepare(q, k, v, scale, causal, tile)
    traffic = Traffic() if traffic is None else traffic
    B, G, R, T, D = q.shape
    S = k.shape[2]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:4], dtype=exact)
    for rows in _tiles(T, tile[0]):
        qi = q[..., rows, :].to(exact) * scale
        traffic._load(qi)
        m = qi.new_full(qi.shape[:4], -torch.inf)
        l, o = torch.zeros_like(m), torch.zeros_like(qi)
        for keys in _tiles(_last(rows, T, S, causal), tile[1]):
            kj, vj = k[:, :, keys].to(exact), v[:, :, keys].to(exact)
            traffic._load(kj, vj)
            s = _scores(qi, kj, rows, keys, S - T, causal)
            traffic._scores(s)
            new = torch.maximum(m, s.amax(-1))
            # The first tile holds key 0, which every query sees: new is finite from here on.
            old = torch.exp(m - new)
            weights = s.sub_(new[..., None]).exp_()
            l = l * old + weights.sum(-1)
            o = o * old[..., None] + (weights.flatten(2, 3) @ vj).view_as(o)
            m = new
        out[..., rows, :], lse[..., rows] = (o / l[..., None]).to(q.dtype), m + l.log()
        traffic._store(o, l)
    return out.flatten(1, 2), lse.flatten(1, 2)


def flash_scores(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True,
    tile: tuple[int, int] = (128, 128), traffic: Traffic | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention that also returns how much each key received: column sums of the softmax weights.

    What H2O and its like need of a prompt, with memory that grows with T + S instead of T · S: the selective
    kernel of MiniKV (2411.18077, [72]). A weight cannot be summed over queries before its row is normalised,
    so it takes two passes. The first is `flash_attention`. The second takes the tiles in the other order and
    computes each again: a tile of keys stays, the queries pass by with their normalisers,

        sum over t of exp(q_t k_i' · scale - lse_t).

    Parameters as for `flash_attention`. Returns the output [B, H, T, D] and the sums [B, H, S], float32
    (float64 for float64): `.unflatten(1, (G, -1)).sum(2)` is what `H2O` accumulates. Raises the same errors.

    >>> q, k = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    >>> flash_scores(q, k, k, tile=(2, 2))[1]  # 1 + 1/2 + 1/3, 1/2 + 1/3, 1/3
    tensor([[[1.8333, 0.8333, 0.3333]]])
    """
    traffic = Traffic() if traffic is None else traffic
    out, lse = flash_attention(q, k, v, scale=scale, causal=causal, tile=tile, traffic=traffic)
    q, k, v, scale, exact = _prepare(q, k, v, scale, causal, tile)
    T, S = q.shape[3], k.shape[2]
    lse = lse.view(q.shape[:4])
    sums = torch.zeros(*q.shape[:3], S, dtype=exact, device=q.device)
    for keys in _tiles(S, tile[1]):
        kj = k[:, :, keys].to(exact)
        traffic._load(kj)
        for rows in _tiles(T, tile[0]):
            if causal and rows.stop - 1 + S - T < keys.start:
                continue
            qi, normaliser = q[..., rows, :].to(exact) * scale, lse[..., rows]
            traffic._load(qi, normaliser)
            s = _scores(qi, kj, rows, keys, S - T, causal)
            traffic._scores(s)
            sums[..., keys] += s.sub_(normaliser[..., None]).exp_().sum(3)
        traffic._store(sums[..., keys])
    return out, sums.flatten(1, 2)


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True,
    traffic: Traffic | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same output and column sums from whole matrices [B, H, T, S]: scores, softmax, product.

    Parameters, returns and errors as for `flash_scores`, without tiles.

    >>> q, k = torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 3, 4)
    >>> traffic = Traffic()
    >>> out, sums = naive_attention(q, k, k, traffic=traffic)
    >>> traffic.tile, traffic.moved  # 9 scores, written and read twice (three times for the sums)
    (9, 96)
    """
    q, k, v, scale, exact = _prepare(q, k, v, scale, causal, (1, 1))
    traffic = Traffic() if traffic is None else traffic
    T, S = q.shape[3], k.shape[2]
    everything = slice(0, T), slice(0, S)
    s = _scores(q.to(exact) * scale, k.to(exact), *everything, S - T, causal)
    traffic._load(q, k)
    traffic._store(s)
    weights = s.softmax(-1)
    traffic._load(s)
    traffic._store(weights)
    out = (weights.flatten(2, 3) @ v.to(exact)).view(q.shape).to(q.dtype)
    traffic._load(weights, v)
    traffic._store(out)
    sums = weights.sum(3)
    traffic._load(weights)
    traffic._store(sums)
    traffic._scores(s)
    return out.flatten(1, 2), sums.flatten(1, 2)


def _tiles(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _last(rows: slice, T: int, S: int, causal: bool) -> int:
    """Keys that the last query of a tile sees."""
    return rows.stop + S - T if causal else S


def _scores(qi: Tensor, kj: Tensor, rows: slice, keys: slice, shift: int, causal: bool) -> Tensor:
    """Scores [B, G, R, t, s] of one tile, -inf where query t stands before key s."""
    s = (qi.flatten(2, 3) @ kj.transpose(-1, -2)).unflatten(2, qi.shape[2:4])
    if causal and keys.stop - 1 > rows.start + shift:  # not below the diagonal as a whole
        at = torch.arange(rows.start, rows.stop, device=qi.device)[:, None] + shift
        s = s.masked_fill_(torch.arange(keys.start, keys.stop, device=qi.device) > at, -torch.inf)
    return s


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, tile: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, float, torch.dtype]:
    """Check everything; q as [B, G, R, T, D], the scale, and the dtype to compute in."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.ndim != 4 or not t.numel():
            got = f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name}: {got}; allowed: floats with four dimensions, none of them 0")
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{name}: {t.dtype} on {t.device}; allowed: as q, {q.dtype} on {q.device}")
        if not torch.isfinite(t).all():
            raise ValueError(f"{name}: holds NaN or infinity; allowed: finite values")
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    if k.shape != (B, G, S, D) or v.shape != k.shape:
        raise ValueError(f"k, v: shapes {list(k.shape)}, {list(v.shape)}; allowed: twice [{B}, G, S, {D}]")
    if H % G:
        raise ValueError(f"k: {G} heads; allowed: divisors of {H}, the heads of q")
    if causal and T > S:
        raise ValueError(f"q: {T} queries for {S} keys; allowed with causal=True: at most {S}")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale: {scale}; allowed: positive numbers")
    sizes = tile if isinstance(tile, tuple) and len(tile) == 2 else (0,)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"tile: {tile!r}; allowed: two integers from 1, queries and keys")
    exact = torch.promote_types(q.dtype, torch.float32)
    return q.unflatten(1, (G, H // G)), k, v, D**-0.5 if scale is None else scale, exact
