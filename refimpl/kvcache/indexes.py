"""Indexes of keys for maximum inner product search, as RetrievalAttention (2409.10516) compares them.

Every index holds the keys [B, G, M, D] of each KV head apart, is built once, and is then searched by queries
[B, G, R, D], R of which share a KV head's index. `search` returns the slots [B, G, R, k] that it found, -1
for none, and how many keys it computed an inner product with, [B, G, R]: the cost of a search on any machine.
They live on the host. Flat and IVF are a few batched products; a search of the graph takes one Python step
for each hop, all heads together.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import LongTensor, Tensor
from torch.nn.functional import pad

from refimpl.kvcache.policies import _size

__all__ = ["Flat", "Graph", "IVF", "Index"]


class Index:
    """Search for the k keys with the largest inner product; made empty, and copied for every layer."""

    keys: Tensor

    def fresh(self) -> Index:
        """An empty index with the same settings."""
        return copy(self)

    def build(self, keys: Tensor, queries: Tensor) -> None:
        """Index keys [B, G, M, D], of which queries [B, G, n, D] are a sample of what will be asked."""
        raise NotImplementedError

    def search(self, q: Tensor, k: int) -> tuple[LongTensor, LongTensor]:
        """Return slots [B, G, R, min(k, M)] for q [B, G, R, D], and the keys scanned, [B, G, R]."""
        raise NotImplementedError

    def take_rows(self, rows: LongTensor) -> None:
        """Reorder or repeat the rows of the batch: tensors of the index begin with [B, ...]."""
        for name, t in vars(self).items():
            if isinstance(t, Tensor):
                setattr(self, name, t.index_select(0, rows))


class Flat(Index):
    """Compare with every key: exact.

    >>> flat = Flat()
    >>> flat.build(torch.tensor([[[[1., 0.], [0., 3.], [2., 2.]]]]), torch.zeros(1, 1, 0, 2))
    >>> found, scanned = flat.search(torch.tensor([[[[0., 1.]]]]), 2)
    >>> found.tolist(), scanned.tolist()
    ([[[[1, 2]]]], [[[3]]])
    """

    def build(self, keys: Tensor, queries: Tensor) -> None:
        self.keys = keys

    def search(self, q: Tensor, k: int) -> tuple[LongTensor, LongTensor]:
        M = self.keys.shape[2]
        found = (q @ self.keys.mT).topk(min(k, M)).indices
        return found, torch.full(q.shape[:3], M, device=q.device)


class IVF(Index):
    """Compare with the keys of the `probes` clusters whose centres have the largest inner product.

    Clusters are made by k-means over the keys (random keys as first centres, `rounds` rounds of Lloyd's
    algorithm): the index is built for the distribution of keys, not of queries.

    Parameters: clusters >= 1 (customary: the square root of M); 1 <= probes <= clusters; generator, a CPU
    `torch.Generator`; rounds >= 1. Raises ValueError for others, and for fewer keys than clusters (at build).

    >>> ivf = IVF(2, 1, torch.Generator().manual_seed(0))
    >>> ivf.build(torch.tensor([[[[1., 0.], [2., 0.], [-1., 0.]]]]), torch.zeros(1, 1, 0, 2))
    >>> found, scanned = ivf.search(torch.tensor([[[[1., 0.]]]]), 1)
    >>> found.tolist(), scanned.tolist()  # two centres, and the two keys of the better one
    ([[[[1]]]], [[[4]]])
    """

    def __init__(self, clusters: int, probes: int, generator: torch.Generator, rounds: int = 10) -> None:
        self.clusters, self.probes = _size("clusters", clusters, 1), _size("probes", probes, 1)
        if probes > clusters:
            raise ValueError(f"probes: {probes}; allowed: 1..{clusters}, the number of clusters")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        self.generator, self.rounds = generator, _size("rounds", rounds, 1)

    def build(self, keys: Tensor, queries: Tensor) -> None:
        B, G, M, D = keys.shape
        if M < self.clusters:
            raise ValueError(f"clusters: {self.clusters}; allowed: 1..{M}, the number of keys")
        start = torch.rand(B, G, M, generator=self.generator).topk(self.clusters).indices.to(keys.device)
        self.keys, centres = keys, keys.take_along_dim(start[..., None], 2)
        for _ in range(self.rounds):
            own = torch.cdist(keys.float(), centres.float()).argmin(-1)
            total = torch.zeros_like(centres).scatter_add_(2, own[..., None].expand(keys.shape), keys)
            size = torch.zeros_like(centres[..., 0]).scatter_add_(2, own, torch.ones_like(keys[..., 0]))
            # An empty cluster keeps its centre.
            centres = torch.where(size[..., None] > 0, total / size[..., None].clamp(min=1), centres)
        own = torch.cdist(keys.float(), centres.float()).argmin(-1)
        order = own.argsort(dim=-1, stable=True)
        size = torch.zeros(B, G, self.clusters, dtype=torch.long, device=keys.device)
        size.scatter_add_(2, own, torch.ones_like(own))
        place = torch.arange(int(size.max()), device=keys.device)
        at = (size.cumsum(-1) - size)[..., None] + place  # the members of a cluster are neighbours in `order`
        members = order.gather(-1, at.clamp(max=M - 1).flatten(2)).view(at.shape)
        self.centres, self.members = centres, members.masked_fill(place >= size[..., None], -1)

    def search(self, q: Tensor, k: int) -> tuple[LongTensor, LongTensor]:
        best = (q @ self.centres.mT).topk(self.probes).indices  # [B, G, R, probes]
        widest = self.members.shape[-1]
        members = self.members.gather(2, best.flatten(2)[..., None].expand(-1, -1, -1, widest))
        members = members.view(*q.shape[:3], -1)
        scores = _products(q, self.keys, members)
        top = scores.topk(min(k, scores.shape[-1]))
        found = members.gather(-1, top.indices).masked_fill(top.values == -torch.inf, -1)
        return found, (members >= 0).sum(-1) + self.clusters


class Graph(Index):
    """Walk from key to key along links made by queries (after RoarGraph, 2408.08933).

    Attention's queries are not distributed like its keys, so keys that are near each other are not those that
    one query wants. Here keys are linked if they are among the `near` best keys of the same query of the
    prompt. Of a key's candidates (those that share most queries with it), taken by falling inner product with
    it, one stays unless a key that stays already has a larger inner product with the candidate than the key
    itself has; what is free is then filled up with the others. Keys that cannot be reached from the entry,
    the best key of the mean query, get a link from the nearest key that can.

    A search keeps the best `beam` keys seen, and follows the links of the best one not yet followed, until it
    has followed all.

    Parameters: degree >= 1, links of a key; near >= 2, keys of a query; beam >= 1 (k, if that is larger).
    Raises ValueError for others, and for an index without queries (at build).

    >>> draw = torch.Generator().manual_seed(0)
    >>> keys, queries = (torch.randn(1, 1, n, 4, generator=draw) for n in (50, 80))
    >>> graph, flat = Graph(beam=50), Flat()
    >>> graph.build(keys, queries); flat.build(keys, queries)
    >>> graph.search(queries[:, :, :9], 5)[0].equal(flat.search(queries[:, :, :9], 5)[0])
    True
    """

    def __init__(self, degree: int = 16, near: int = 16, beam: int = 64) -> None:
        self.degree, self.near, self.beam = _size("degree", degree, 1), _size("near", near, 2), beam
        _size("beam", beam, 1)

    def build(self, keys: Tensor, queries: Tensor) -> None:
        if not queries.shape[2]:
            raise ValueError("queries: none; allowed: one or more for each KV head, the prompt's")
        self.keys = keys
        self.entry = (queries.mean(2, keepdim=True) @ keys.mT).argmax(-1)  # [B, G, 1]
        heads = [
            [
                _connected(_links(k, q, self.degree, self.near), k, int(entry))
                for k, q, entry in zip(*row, strict=True)
            ]
            for row in zip(keys, queries, self.entry, strict=True)
        ]
        width = max(links.shape[1] for row in heads for links in row)
        padded = [torch.stack([pad(h, (0, width - h.shape[1]), value=-1) for h in row]) for row in heads]
        self.links = torch.stack(padded)  # [B, G, M, width]

    def search(self, q: Tensor, k: int) -> tuple[LongTensor, LongTensor]:
        B, G, R, _ = q.shape
        M, width = self.links.shape[2:]
        beam = min(max(self.beam, k), M)
        ids = self.entry[:, :, None].expand(B, G, R, 1)
        scores = _products(q, self.keys, ids)
        waiting = torch.ones_like(ids, dtype=torch.bool)  # in the beam, links not yet followed
        seen = torch.zeros(B, G, R, M + 1, dtype=torch.bool, device=q.device)  # the last: no key
        seen.scatter_(-1, ids, True)
        while True:
            best = scores.masked_fill(~waiting, -torch.inf).argmax(-1, keepdim=True)
            more = waiting.gather(-1, best)
            if not more.any():
                break
            here = ids.gather(-1, best)
            found = self.links.gather(2, here.flatten(2)[..., None].clamp(min=0).expand(-1, -1, -1, width))
            found = found.view(B, G, R, width).masked_fill(~more, -1)
            waiting = waiting.scatter(-1, best, False)
            place = found.masked_fill(found < 0, M)
            found = found.masked_fill(seen.gather(-1, place), -1)
            seen.scatter_(-1, place, True)
            ids, waiting = torch.cat((ids, found), -1), torch.cat((waiting, found >= 0), -1)
            scores = torch.cat((scores, _products(q, self.keys, found)), -1)
            scores, kept = scores.topk(min(beam, scores.shape[-1]))
            ids, waiting = ids.gather(-1, kept), waiting.gather(-1, kept)
        ids = pad(ids, (0, max(0, min(k, M) - ids.shape[-1])), value=-1)
        return ids[..., : min(k, M)], seen[..., :M].sum(-1)


def _products(q: Tensor, keys: Tensor, index: LongTensor) -> Tensor:
    """q [B, G, R, D] times the keys [B, G, M, D] at index [B, G, R, m]; -inf where the index is -1."""
    B, G, M, _ = keys.shape
    start = torch.arange(0, B * G * M, M, device=keys.device).view(B, G, 1, 1)
    rows = keys.flatten(0, 2).index_select(0, (index.clamp(min=0) + start).flatten()).view(*index.shape, -1)
    return (rows * q[..., None, :]).sum(-1).masked_fill(index < 0, -torch.inf)


def _links(keys: Tensor, queries: Tensor, degree: int, near: int) -> LongTensor:
    """Links [M, degree] of keys [M, D], -1 for none: keys that are among the best of the same queries."""
    M, near = len(keys), min(near, len(keys))
    lists = torch.cat([(part @ keys.T).topk(near).indices for part in queries.split(4096)])
    pairs = (lists[:, :, None] * M + lists[:, None, :]).flatten()
    if M * M <= len(pairs):  # counting is faster than sorting
        shared = torch.bincount(pairs, minlength=M * M)
        code = shared.nonzero()[:, 0]
        shared = shared[code]
    else:
        code, shared = pairs.unique(return_counts=True)
    key, other = code // M, code % M
    key, other, shared = (t[key != other] for t in (key, other, shared))
    order = shared.argsort(descending=True, stable=True)
    order = order[key[order].argsort(stable=True)]  # by key, then by the number of shared queries
    key, other = key[order], other[order]
    count = torch.bincount(key, minlength=M)
    rank = torch.arange(len(key), device=keys.device) - (count.cumsum(0) - count)[key]
    width = min(4 * degree, max(int(count.max()), 1))
    table = torch.full((M, width), -1, device=keys.device)
    table[key[rank < width], rank[rank < width]] = other[rank < width]
    own = (keys[table.clamp(min=0)] @ keys[:, :, None])[..., 0].masked_fill(table < 0, -torch.inf)
    own, order = own.sort(descending=True)
    table = table.gather(1, order)
    candidates = keys[table.clamp(min=0)]
    similar = candidates @ candidates.mT  # [M, width, width]
    stays = torch.zeros_like(table, dtype=torch.bool)
    for c in range(width):  # occlusion, one candidate of every key at a time
        hidden = stays[:, :c] & (similar[:, c, :c] > own[:, c, None])
        stays[:, c] = (table[:, c] >= 0) & ~hidden.any(1)
    first = torch.where(stays, 0, 1) + 2 * (table < 0)  # those that stay, the others, the empty places
    return table.gather(1, first.argsort(dim=1, stable=True))[:, :degree]


def _connected(links: LongTensor, keys: Tensor, entry: int) -> LongTensor:
    """Links [M, degree + extra] by which every key can be reached from the entry."""
    M = len(keys)
    reached = torch.zeros(M, dtype=torch.bool, device=keys.device)
    reached[entry] = True
    similar = -torch.cdist(keys.float(), keys.float())  # by inner product a few hubs would get all new links
    while True:
        front = reached.nonzero()[:, 0]
        while len(front):
            step = links[front].flatten()
            step = step[step >= 0].unique()
            front = step[~reached[step]]
            reached[front] = True
        lost = (~reached).nonzero()[:, 0]
        if not len(lost):
            return links
        source = similar[lost].masked_fill(~reached, -torch.inf).argmax(1)
        extra = links.new_full((M, 1), -1)
        extra[source, 0] = lost  # one new link of a source in a round
        links = torch.cat((links, extra), 1)
