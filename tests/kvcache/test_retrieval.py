"""RetrievalAttention (spec 24): the merge, the indexes, identity, exact traffic, queries off the keys."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cache_runs import draw, generator
from test_core import LONG, close, dynamic, run

from refimpl.checks.tiny import random_ids, tiny
from refimpl.kvcache import KVCache
from refimpl.kvcache.indexes import IVF, Flat, Graph
from refimpl.kvcache.retrieval import RetrievalAttention, mahalanobis, merge, partial
from refimpl.kvcache.tiers import Offloaded

GOLDEN = Path(__file__).parent / "golden" / "faiss_flat.npz"


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", **LONG)


def recall(found, truth):
    return (truth[..., :, None] == found[..., None, :]).any(-1).float().mean().item()


INDEXES = {"flat": Flat, "ivf": lambda: IVF(4, 4, generator()), "graph": lambda: Graph(beam=400)}


# --- the merge ------------------------------------------------------------------------------------
@pytest.mark.parametrize("split", [1, 7, 19])
def test_merging_two_parts_is_attention_to_both(split):
    shapes = ((2, 3, 5, 8), (2, 3, 20, 8), (2, 3, 20, 8))
    # in float64, so that the scores alone, float32 always, are rounded
    q, k, v = (draw(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes))
    at = torch.randperm(20, generator=generator())
    (a, la), (b, lb) = (partial(q, k[:, :, i], v[:, :, i], 0.7) for i in (at[:split], at[split:]))
    whole, l = partial(q, k, v, 0.7)
    close(merge(a, la, b, lb), whole, 1e-6)
    close(whole, (q @ k.mT * 0.7).softmax(-1) @ v, 1e-6)
    close(torch.logaddexp(la, lb), l, 1e-6)


def test_merging_survives_parts_that_weigh_nothing():
    o = draw(2, 4)
    close(merge(o[0], torch.tensor(300.0), o[1], torch.tensor(-300.0)), o[0])


# --- indexes --------------------------------------------------------------------------------------
def test_flat_equals_faiss():
    with np.load(GOLDEN) as golden:
        keys, queries, found = (torch.from_numpy(golden[name]) for name in ("keys", "queries", "found"))
        assert str(golden["peer"]).startswith("faiss")
    flat = Flat()
    flat.build(keys[None, None], queries[None, None])
    ours, scanned = flat.search(queries[None, None], found.shape[1])
    assert torch.equal(ours[0, 0], found) and scanned.unique().tolist() == [len(keys)]


def test_ivf_scans_what_it_says_and_finds_what_a_loop_finds():
    keys, q = draw(2, 2, 60, 4), draw(2, 2, 5, 4, seed=1)
    ivf = IVF(6, 2, generator())
    ivf.build(keys, q)
    found, scanned = ivf.search(q, 7)
    for b, g, r in torch.cartesian_prod(*map(torch.arange, (2, 2, 5))).tolist():
        centres, query = ivf.centres[b, g], q[b, g, r]
        own = (keys[b, g][:, None] - centres).norm(dim=-1).argmin(-1)
        near = (centres @ query).topk(2).indices
        members = [i for i in range(60) if own[i] in near]
        assert scanned[b, g, r] == 6 + len(members)
        best = sorted(members, key=lambda i: -float(keys[b, g, i] @ query))[:7]
        assert [i for i in found[b, g, r].tolist() if i >= 0] == best
    every = ivf.members[0, 0].flatten()
    assert sorted(every[every >= 0].tolist()) == list(range(60))


def test_every_key_can_be_reached_and_a_wide_beam_is_exact():
    keys, queries = draw(2, 2, 200, 6), draw(2, 2, 90, 6, seed=1) + 1
    graph, flat = Graph(degree=6, near=5, beam=200), Flat()
    for index in (graph, flat):
        index.build(keys, queries)
    found, scanned = graph.search(queries[:, :, :20], 10)
    assert torch.equal(found, flat.search(queries[:, :, :20], 10)[0]) and scanned.unique().tolist() == [200]
    graph.beam = 20
    narrow, scanned = graph.search(queries[:, :, :20], 10)
    assert scanned.max() < 200 and recall(narrow, found) > 0.6


def test_the_graph_of_queries_serves_queries_off_the_keys_better_than_clusters_of_keys():
    """Keys around directions that no query looks along: recall at equal scans, and for keys as queries."""
    gaps = {"query": [], "key": []}
    for seed in range(3):
        keys = draw(1, 1, 600, 16, seed=seed)
        mix = draw(16, 4, seed=50 + seed) @ draw(4, 16, seed=90 + seed)  # queries live in four dimensions
        past, new = (draw(1, 1, n, 16, seed=20 + seed + n) @ mix / 4 + 1 for n in (600, 60))
        flat, graph, ivf = Flat(), Graph(degree=12, near=12, beam=48), IVF(24, 1, generator())
        for index in (flat, graph, ivf):
            index.build(keys, past)
        for kind, q in (("query", new), ("key", keys[:, :, ::10])):
            truth = flat.search(q, 32)[0]
            found, scanned = graph.search(q, 32)
            for ivf.probes in range(1, 25):
                other, cost = ivf.search(q, 32)
                if cost.float().mean() >= scanned.float().mean():
                    break  # clusters may scan more
            gaps[kind].append(recall(found, truth) - recall(other, truth))
    assert min(gaps["query"]) > 0, gaps
    assert sum(gaps["key"]) < sum(gaps["query"]), gaps


# --- the reader -----------------------------------------------------------------------------------
@pytest.mark.parametrize("index", INDEXES)
def test_finding_every_key_gives_plain_attention(llama, index):
    ids, sizes = random_ids(2, 45), [35] + [1] * 10
    expected = dynamic(llama, ids, sizes)
    cache = KVCache(llama, codec=Offloaded(2, 4), reader=RetrievalAttention(29, INDEXES[index]()))
    close(run(llama, cache, ids, sizes), expected)


def test_found_keys_are_far_ones_and_count_once():
    codec = Offloaded(3, 5)
    k, v, q = draw(2, 2, 40, 8), draw(2, 2, 40, 8, seed=1), draw(2, 2, 3, 1, 8, seed=2)
    codec.append(k, v)
    codec.commit(None)
    codec.append(draw(2, 2, 1, 8, seed=3), draw(2, 2, 1, 8, seed=4))  # a token after the build: always read
    reader = RetrievalAttention(6)
    reader.build(codec, q, None)
    out = reader.read(q, codec, 0.6, None)
    k, v = codec.read()
    scores = (q @ k[:, :, None].mT)[:, :, :, 0] * 0.6
    near = torch.tensor([*range(3), *range(35, 41)])
    mask = torch.zeros(2, 2, 3, 41, dtype=torch.bool)
    mask[..., near] = True
    far = scores.masked_fill(mask, -torch.inf).topk(6).indices
    assert not mask.gather(-1, far).any()
    mask.scatter_(-1, far, True)
    expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    close(out[:, :, :, 0], expected)
    union = sum(len(set(far[b, g].flatten().tolist())) for b in range(2) for g in range(2))
    assert reader.read_bytes() == {
        "payload": 2 * 2 * 9 * 16 * 4, "meta": 2 * 2 * 3 * 32 * 8 * 4, "host": union * 16 * 4,
        "moved": 2 * 2 * 3 * (8 + 1) * 4,
    }  # fmt: skip


def test_softmax_over_the_found_alone_is_another_result():
    codec, q = Offloaded(3, 5), draw(1, 1, 2, 1, 8)
    codec.append(draw(1, 1, 40, 8, seed=1), draw(1, 1, 40, 8, seed=2))
    codec.commit(None)
    reader = RetrievalAttention(6)
    reader.build(codec, q, None)
    far = codec.far[0].rows
    top = (q[:, :, :, 0] @ far.mT).topk(6).indices
    keys, values = (
        f.rows.take_along_dim(top.flatten(2)[..., None], 2).view(1, 1, 2, 6, 8) for f in codec.far
    )
    alone = partial(q, keys, values, 0.6)[0]
    assert (reader.read(q, codec, 0.6, None) - alone).abs().max() > 0.1


def test_generated_tokens_stay_reachable(llama):
    ids = random_ids(1, 60)
    cache = KVCache(llama, codec=Offloaded(2, 4), reader=RetrievalAttention(4))
    run(llama, cache, ids, [30] + [1] * 30)
    assert cache.layers[0].codec.k.shape[2] == 2 + 4 + 30


# --- queries are not distributed like keys --------------------------------------------------------
def test_mahalanobis_equals_numpy():
    sample, x = draw(300, 5) @ draw(5, 5, seed=1), draw(20, 5, seed=2)
    inverse = np.linalg.inv(np.cov(sample.double().numpy().T))
    away = x.double().numpy() - sample.double().numpy().mean(0)
    expected = torch.tensor([np.sqrt(a @ inverse @ a) for a in away]).float()
    close(mahalanobis(x, sample), expected, 1e-4)
    assert mahalanobis(x + 30, sample).min() > mahalanobis(sample, sample).max()
    for bad in (sample[:5], sample[:1].expand(50, 5)):
        with pytest.raises(ValueError, match="of full rank"):
            mahalanobis(x, bad)


def test_bad_input():
    for make in (
        lambda: RetrievalAttention(0), lambda: IVF(0, 1, generator()), lambda: Graph(0),
        lambda: Graph(near=1), lambda: Graph(beam=0), lambda: IVF(4, 1, generator(), rounds=0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="allowed: integers from"):
            make()
    with pytest.raises(ValueError, match="probes: 5; allowed: 1..4"):
        IVF(4, 5, generator())
    with pytest.raises(TypeError, match="generator: expected a torch.Generator"):
        IVF(4, 1, 0)
    with pytest.raises(TypeError, match="index: expected an Index, got <class"):
        RetrievalAttention(4, Flat)
    with pytest.raises(ValueError, match="clusters: 9; allowed: 1..5"):
        IVF(9, 1, generator()).build(draw(1, 1, 5, 4), draw(1, 1, 5, 4))
    with pytest.raises(ValueError, match="queries: none"):
        Graph().build(draw(1, 1, 5, 4), draw(1, 1, 0, 4))
