"""The checks of RetrievalAttention (kv-cache spec 24): the merge, the reader, and the graph of queries."""

from collections.abc import Callable

import torch

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {
    "retrieval_attention": "refimpl.kvcache.retrieval:RetrievalAttention",
    "retrieval_merge": "refimpl.kvcache.retrieval:merge",
    "retrieval_graph": "refimpl.kvcache.indexes:Graph",
}


@check
def check_retrieval_merge(merge: Callable) -> None:
    """`merge(o1, l1, o2, l2)` of outputs [..., D] and log-sum-exps [...] -> attention to both parts."""
    draw = torch.Generator().manual_seed(0)
    for split in (1, 5, 19):
        scores, v = 3 * torch.randn(4, 7, 20, generator=draw), torch.randn(4, 20, 6, generator=draw)
        parts = []
        for part in (slice(0, split), slice(split, 20)):
            parts += [scores[..., part].softmax(-1) @ v[:, part], scores[..., part].exp().sum(-1).log()]
        require_close(merge(*parts), scores.softmax(-1) @ v, 1e-5, f"{split} keys merged with {20 - split}")


@check
def check_retrieval_attention(RetrievalAttention: Callable) -> None:
    """`RetrievalAttention(k)`, with the exact index, `build(codec, q, ok)`, `read(q, codec, scale, ok)` and
    `read_bytes()`; its codec is `RetrievalAttention(1).codec(first, last)`."""
    draw = torch.Generator().manual_seed(0)
    B, G, R, D, n, new, first, last, scale = 2, 2, 3, 8, 90, 4, 3, 5, 0.6
    k, v = (torch.randn(B, G, n + new, D, generator=draw) for _ in range(2))
    q = torch.randn(B, G, R, 1, D, generator=draw)
    far, near = n - first - last, [*range(first), *range(n - last, n + new)]
    for top in (1, 12, far, 500):
        codec, reader = RetrievalAttention(1).codec(first, last), RetrievalAttention(top)
        codec.append(k[:, :, :n], v[:, :, :n])
        codec.commit(None)
        reader.build(codec, torch.randn(B, G, R, n, D, generator=draw), None)
        codec.append(k[:, :, n:], v[:, :, n:])  # new tokens are always read
        out, union = reader.read(q, codec, scale, None), 0
        for b in range(B):
            for g in range(G):
                slots = set()
                for r in range(R):
                    scores = k[b, g] @ q[b, g, r, 0] * scale
                    found = (scores[first : n - last].topk(min(top, far)).indices + first).tolist()
                    both, slots = near + found, slots | set(found)
                    expected = scores[both].softmax(-1) @ v[b, g, both]
                    require_close(out[b, g, r, 0], expected, 1e-5, f"k = {top}: output of head {(b, g, r)}")
                union += len(slots)
        read, expected = reader.read_bytes(), {
            "payload": B * G * len(near) * 2 * D * 4, "meta": B * G * R * far * D * 4,
            "host": union * 2 * D * 4, "moved": B * G * R * (D + 1) * 4,
        }  # fmt: skip
        require(read == expected, f"k = {top}: {read} bytes read, not {expected}")
    require_error(ValueError, lambda: RetrievalAttention(0), "k = 0")


@check
def check_retrieval_graph(Graph: Callable) -> None:
    """`Graph(degree, near, beam)` with `build(keys, queries)` and `search(q, k)` -> (slots, keys scanned): a
    wide beam finds all, a narrow one nearly all with few scans, for queries that are far from the keys."""
    draw = torch.Generator().manual_seed(0)
    M, D, k = 300, 16, 10
    keys = torch.randn(1, 2, M, D, generator=draw)
    basis = torch.randn(D, 2, generator=draw) @ torch.randn(2, D, generator=draw) / 4
    away = torch.tensor([3.0, -3.0]).repeat(D // 2)
    past, q = (torch.randn(1, 2, n, D, generator=draw) @ basis + away for n in (300, 40))
    truth = (q @ keys.mT).topk(k).indices
    wide = Graph(12, 12, M)
    wide.build(keys, past)
    found, scanned = wide.search(q[:, :, :5], k)
    require(
        torch.equal(found, truth[:, :, :5]),
        "a beam as wide as the keys misses some of the best: some cannot be reached",
    )
    require(
        bool((scanned == M).all()),
        f"a search of all {M} keys says it scanned {scanned.unique().tolist()}",
    )
    narrow = Graph(12, 12, 12)
    narrow.build(keys, past)
    found, scanned = narrow.search(q, k)
    share = (truth[..., :, None] == found[..., None, :]).any(-1).float().mean().item()
    cost = scanned.float().mean().item() / M
    where = "queries like those that the graph was built with, far from the keys, beam 12"
    require(share > 0.96, f"{where}: recall@{k} is {share:.2f}")
    require(cost < 0.25, f"{where}: {cost:.0%} of the keys are scanned")
