"""LoRC: keys and values of low rank, because the matrices that make them are.

Zhang et al., 2410.03111. With W ~ A B, of rank r, a token's key x W is (x A) B: the cache holds the latent
c = x A, r numbers, and B is applied when it is read. Values: B can be multiplied into the output projection
once and for all, and keys into the query projection, but only where no rotation stands between them.

W is [d, w], in the convention x W: w = D for each KV head by itself (multi-head attention), w = G · D for
all heads of a layer together (grouped-query attention). From the SVD W = U S V', A = U_r S_r = W V_r and
B = V_r'; so c is also (x W) V_r, which is how the codec makes it from the keys that the model hands over.

No code was released, and the paper was read in its abstract and reviews only, which agree with the above and
with ranks that fall with the cumulative condition number; their formula (`progressive_ranks`) and what is
factored under grouped queries are from memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.kvcache.codecs import Codec
from refimpl.kvcache.slots import Padding, Selection

__all__ = ["Latent", "condition_numbers", "progressive_ranks", "right_singular_vectors"]


def condition_numbers(model: nn.Module) -> Tensor:
    """Return kappa(W_k), kappa(W_v) of every layer, float64 [L, 2]: largest over smallest singular value.

    >>> from refimpl.checks.tiny import tiny
    >>> condition_numbers(tiny("llama")).shape
    torch.Size([3, 2])
    """
    found = []
    for k, v in _weights(Backbone(model)):
        values = [torch.linalg.svdvals(w.double()) for w in (k, v)]
        found.append(torch.stack([s[0] / s[-1] for s in values]))
    return torch.stack(found)


def progressive_ranks(kappa: Tensor, r_max: int, r_min: int) -> list[int]:
    """Return the rank of each layer: the more layers an error still passes through, the higher.

    After 2410.03111, from memory. Cumulative condition numbers K_l = prod over j >= l of kappa(W_k^j)
    kappa(W_v^j) bound how an error of layer l grows; in their logarithm the ranks fall linearly from r_max
    in the first layer to r_min in the last:
    r_l = r_max · [1 - (max log K - log K_l) / (max log K - min log K) · (1 - r_min / r_max)], rounded.

    Parameters: kappa [L, 2], finite and at least 1; r_max >= r_min >= 1. Raises ValueError for others.

    >>> progressive_ranks(torch.full((4, 2), 10.0), r_max=16, r_min=4)
    [16, 12, 8, 4]
    """
    if kappa.ndim != 2 or kappa.shape[1] != 2 or not len(kappa):
        raise ValueError(f"kappa: shape {list(kappa.shape)}; allowed: [L, 2]")
    if not (torch.isfinite(kappa).all() and (kappa >= 1).all()):
        raise ValueError("kappa: allowed: finite numbers from 1 (a singular matrix has none)")
    if not 1 <= r_min <= r_max:
        raise ValueError(f"r_min, r_max: {r_min}, {r_max}; allowed: 1 <= r_min <= r_max")
    log = kappa.double().log().sum(1).flip(0).cumsum(0).flip(0)
    span = log.max() - log.min()
    fallen = (log.max() - log) / span if span > 0 else torch.zeros_like(log)
    return [round(r) for r in (r_max - fallen * (r_max - r_min)).tolist()]


def right_singular_vectors(weight: Tensor, groups: int, rank: int) -> Tensor:
    """Return V_r [N, w, r] of each group of columns of a weight [d, N · w], by falling singular value.

    Raises ValueError unless 1 <= rank <= min(d, w) and the columns divide into the groups.

    >>> right_singular_vectors(torch.diag(torch.tensor([1., 3., 2., 5.])), 2, 1).abs().round().tolist()
    [[[0.0], [1.0]], [[0.0], [1.0]]]
    """
    d, columns = weight.shape
    if columns % groups:
        raise ValueError(f"groups: {groups}; allowed: divisors of {columns}, the number of columns")
    w = columns // groups
    if not 1 <= rank <= min(d, w):
        raise ValueError(f"rank: {rank}; allowed: 1..{min(d, w)}")
    parts = weight.double().view(d, groups, w).transpose(0, 1)
    V = torch.linalg.svd(parts, full_matrices=False).Vh[:, :rank].transpose(1, 2)
    return V.to(weight.dtype).contiguous()


class Latent(Codec):
    """Store r numbers in place of w = D (or G · D) for a key, and as many for a value (2410.03111).

    A layer's cache is 2 · N · r_l numbers per token, N = G if heads are factored by themselves, else 1; the
    factors take the place of the weights. Reading gives c B plus the projection's bias, of all tokens at
    every step: memory is saved, not time (`attend` shows what absorbing saves). Rotary keys are
    turned back before they are factored and rotated after they are rebuilt: the rotation depends on the
    position, so no fixed matrix can absorb B.

    Parameters
    - model: one of `refimpl.backbone.FAMILIES`, which stays as it is; the codec is for its caches only.
    - ranks: r_l for each layer, 1..D (per head) or 1..G · D, at most d.
    - per_head: factor each KV head by itself; by default, if H = G.

    Works with every policy if heads are factored by themselves; else all heads of a row have to keep the same
    tokens, and a policy that chooses per head gets a ValueError at its first eviction. Raises ValueError for
    ranks out of range or not one per layer.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import KVCache
    >>> model = tiny("llama")
    >>> cache = KVCache(model, codec=Latent(model, [6, 4, 2]))
    >>> out = model(random_ids(1, 10), past_key_values=cache)
    >>> cache.nbytes()["payload"]  # 2 · (6 + 4 + 2) · 10 tokens · 4 bytes
    960
    """

    c_k: Tensor | None = None
    c_v: Tensor | None = None

    def __init__(self, model: nn.Module, ranks: Sequence[int], *, per_head: bool | None = None) -> None:
        bb = Backbone(model)
        if len(ranks) != bb.n_layers:
            raise ValueError(f"ranks: {len(ranks)} of them; allowed: {bb.n_layers}, one per layer")
        self.G, self.D = bb.G, bb.D
        self.N = bb.G if (bb.H == bb.G if per_head is None else per_head) else 1
        self.rotated = bb.is_gpt2  # nothing to turn back where positions are learned
        self.bases = [
            tuple(right_singular_vectors(w, self.N, rank) for w in pair)
            for pair, rank in zip(_weights(bb), ranks, strict=True)
        ]  # [l] -> V_k, V_v, each [N, w, r]
        refs = {(ref.layer, ref.role): ref for ref in bb.linears()}
        biases = [tuple(refs[l, role].bias for role in "kv") for l in range(bb.n_layers)]
        self.biases = [
            tuple(None if b is None else b.detach().view(bb.G, 1, bb.D) for b in pair) for pair in biases
        ]

    def encode(self, t: Tensor, which: int) -> Tensor:
        """Latents [B, N, T, r] of un-rotated keys (which = 0) or values (1) [B, G, T, D]."""
        bias = self.biases[self.layer][which]
        t = t if bias is None else t - bias
        if self.N == 1:
            t = t.transpose(1, 2).flatten(2)[:, None]
        return t @ self.bases[self.layer][which]

    def decode(self, c: Tensor, which: int) -> Tensor:
        """Keys or values [B, G, S, D] of latents [B, N, S, r]."""
        t = c @ self.bases[self.layer][which].transpose(1, 2)
        if self.N == 1:
            t = t[:, 0].unflatten(-1, (self.G, self.D)).transpose(1, 2)
        bias = self.biases[self.layer][which]
        return t if bias is None else t + bias

    def append(self, k: Tensor, v: Tensor) -> None:
        c_k, c_v = self.encode(k, 0), self.encode(v, 1)
        self.c_k = c_k if self.c_k is None else torch.cat((self.c_k, c_k), 2)
        self.c_v = c_v if self.c_v is None else torch.cat((self.c_v, c_v), 2)

    def read(self, index: LongTensor | None = None) -> tuple[Tensor, Tensor]:
        k, v = self.decode(self.c_k, 0), self.decode(self.c_v, 1)
        return (k, v) if index is None else tuple(t.take_along_dim(index[..., None], 2) for t in (k, v))

    def keep(self, selection: Selection) -> None:
        if self.N == 1:
            selection = self._shared(selection)
        self.c_k, self.c_v = selection.apply(self.c_k), selection.apply(self.c_v)

    def _shared(self, selection: Selection) -> Selection:
        """The one selection that all heads of each row have in common."""
        B, G, S = selection.shape
        if selection.shared:
            return Selection(selection.index, (B, 1, S))
        mask = torch.zeros(B * G * S, dtype=torch.bool, device=selection.rows.device)
        mask[selection.rows] = True
        mask = mask.view(B, G, S)
        if not (mask == mask[:, :1]).all():
            raise ValueError(
                "keep: the heads of a layer share one latent per token and cannot keep different tokens; "
                "allowed: policies that keep the same for all heads, or Latent(per_head=True)"
            )
        return Selection(mask[:, :1], (B, 1, S))

    def pad(self, padding: Padding) -> None:
        if self.N == 1:
            padding = Padding(padding.ok[:, :1].sum(-1))
        self.c_k, self.c_v = padding.apply(self.c_k), padding.apply(self.c_v)

    def rewrite(self, k: Tensor, v: Tensor) -> None:
        self.c_k, self.c_v = self.encode(k, 0), self.encode(v, 1)

    def take_rows(self, rows: LongTensor) -> None:
        self.c_k, self.c_v = self.c_k.index_select(0, rows), self.c_v.index_select(0, rows)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"payload": {} if self.c_k is None else {"c_k": self.c_k, "c_v": self.c_v}, "meta": {}}

    def attend(self, bb: Backbone, q: Tensor, c_k: Tensor, c_v: Tensor, *, absorbed: bool) -> Tensor:
        """Causal attention of this codec's layer over latents, output projection included -> [B, T, d].

        Rebuilt: the heads' keys and values are made first. Absorbed: with B_k, B_v of a query head's group,
        scores are (q B_k') c_k and the output is sum over heads of (weights c_v) (B_v W_o). The bias of a key
        adds the same to all scores of a query, so it drops out; that of a value is added to the output, since
        weights sum to 1. Under a rotation keys are rebuilt in both.

        Parameters: bb, of the model; q [B, H, T, D], not rotated; c_k, c_v [B, N, T, r], from `encode`.
        """
        l, (_, H, T, D), R = self.layer, q.shape, bb.H // bb.G
        pos = torch.arange(T, device=q.device)
        if not absorbed:
            k, v = self.decode(c_k, 0), self.decode(c_v, 1)
            return bb.o_proj(l, bb.attention(l, bb.rot(q, pos), bb.rot(k, pos), v, bb.mask(l, T)))
        V_k, V_v = (self._per_query_head(V, R) for V in self.bases[l])  # [H, D, r]
        if bb.is_gpt2:
            scores = (q @ V_k) @ self._to_heads(c_k, H).transpose(-1, -2)
        else:
            k = bb.rot(self.decode(c_k, 0), pos).repeat_interleave(R, 1)
            scores = bb.rot(q, pos) @ k.transpose(-1, -2)
        weights = (scores * bb.scale(l)).masked_fill(~bb.mask(l, T), -math.inf).softmax(-1)
        role_o = next(ref for ref in bb.linears() if (ref.layer, ref.role) == (l, "o"))
        W_o = role_o.weight.T.view(H, D, bb.d)
        out = torch.einsum("bhtr,hrd->btd", weights @ self._to_heads(c_v, H), V_v.transpose(1, 2) @ W_o)
        if (bias := self.biases[l][1]) is not None:
            out = out + torch.einsum("hd,hde->e", bias[:, 0].repeat_interleave(R, 0), W_o)
        return out if role_o.bias is None else out + role_o.bias

    def _per_query_head(self, V: Tensor, R: int) -> Tensor:
        heads = V if self.N == self.G else V[0].view(self.G, self.D, -1)
        return heads.repeat_interleave(R, 0)

    def _to_heads(self, c: Tensor, H: int) -> Tensor:
        return c.repeat_interleave(H // self.N, 1)


def _weights(bb: Backbone) -> list[tuple[Tensor, Tensor]]:
    """W_k and W_v of every layer as [d, G · D]."""
    refs = {(ref.layer, ref.role): ref for ref in bb.linears()}
    return [tuple(refs[l, role].weight.detach().T for role in "kv") for l in range(bb.n_layers)]
