"""Codebooks and k-means; and GPTVQ, AQLM and scikit-learn beside ours, from arrays that
`data/quantization_golden_codebooks.py` made."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_scripts import load_script

from refimpl.quantization.aqlm import AQLM, Additive, beam_search
from refimpl.quantization.codebooks import CodebookLinear, Codebooks, decode, kmeans, nearest, random_points
from refimpl.quantization.gptvq import GPTVQ

HERE = Path(__file__).resolve().parent
golden = load_script("quantization_golden_codebooks")


def arrays(peer):
    """What is stored, W and H as tensors."""
    stored = np.load(HERE / "golden" / f"{peer}.npz")
    digest = hashlib.sha256(stored["W"].tobytes() + stored["H"].tobytes()).hexdigest()
    assert digest in str(stored["about"])
    return stored, torch.from_numpy(stored["W"]), torch.from_numpy(stored["H"])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- peers ----------------------------------------------------------------------------------------


def test_kmeans_ends_where_scikit_learn_does():
    stored, W, _ = arrays("kmeans")
    points = W.view(1, -1, golden.GROUP).double()
    centroids, codes = kmeans(points, points[:, : golden.K], iterations=1000)
    inertia = (points[0] - centroids[0, codes[0]]).square().sum()
    torch.testing.assert_close(centroids[0], torch.from_numpy(stored["centroids"]), rtol=1e-9, atol=1e-12)
    assert float(inertia) == pytest.approx(float(stored["inertia"]), rel=1e-9)


@pytest.mark.parametrize("case", golden.GPTVQ)
def test_the_diagonal_rule_is_the_authors_code_and_the_exact_one_is_better(case, monkeypatch):
    stored, W, H = arrays("gptvq")
    vdim, rows, columns, weighted = golden.GPTVQ[case]
    monkeypatch.setattr(Codebooks, "store", classmethod(lambda cls, dense, dtype: cls(dense, None)))
    setting = {"vdim": vdim, "rows": rows, "columns": columns, "iterations": golden.ITERATIONS}
    if not weighted:
        monkeypatch.setattr(
            GPTVQ, "_metric", lambda self, corner, clustering=False: torch.eye(vdim).to(corner)
        )

    def error(Q):
        return float((((W - Q).double() @ H) * (W - Q)).sum())

    def solved(**more):
        found = GPTVQ(2, **setting, **more).solve(W, H)
        return decode(found.codes, found.books.dense())

    theirs, updated = (torch.from_numpy(stored[name]) for name in (case, f"{case}_updated"))
    torch.testing.assert_close(solved(exact=False, update=False), theirs, rtol=1e-4, atol=1e-5)
    # Their 25 steps of Adam go towards our minimum and do not pass it.
    assert error(solved(exact=False)) < error(updated) < error(theirs)
    if weighted and vdim > 1:
        assert error(solved(update=False)) < error(theirs)


def test_beam_search_and_adam_are_those_of_aqlm():
    stored, W, H = arrays("aqlm")
    tensors = {
        name: torch.from_numpy(stored[f"first_{name}"]) for name in ("codes", "codebooks", "scale", "W")
    }
    codes = tensors["codes"].to(torch.uint8)
    first = Additive(codes, tensors["codebooks"], tensors["scale"].flatten())
    torch.testing.assert_close(first.restore(), tensors["W"], rtol=1e-6, atol=1e-7)
    for beam in golden.BEAMS:
        theirs = torch.from_numpy(stored[f"beam_{beam}"])
        same = (beam_search(W, H.float(), first, beam) == theirs).all(-1).all(-1)  # rows; ties round apart
        assert same.double().mean() > 0.95, f"beam {beam}: {int(same.sum())} of {len(same)} rows"
    parameters = [first.codebooks.clone().requires_grad_(), first.scale.clone().requires_grad_()]
    adam = torch.optim.Adam(parameters, lr=1e-4, betas=(0.0, 0.95), amsgrad=True)
    trained = AQLM(steps=golden.STEPS)._descend(W, H.float(), first, parameters, adam)
    for ours, before, name in (
        (trained.codebooks, first.codebooks, "adam_codebooks"),
        (trained.scale, first.scale, "adam_scale"),
    ):
        theirs = torch.from_numpy(stored[name]).view_as(ours)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert (theirs - before).abs().max() > 1e-4


# --- k-means --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sets,v,k,P", [(1, 2, 8, 1), (3, 1, 4, 5), (2, 4, 16, 10)])
def test_no_iteration_raises_the_distance(sets, v, k, P):
    points, root = normal(sets, 60 * P, v), normal(P, v, v, seed=1)
    metric = root @ root.transpose(1, 2) + 0.1 * torch.eye(v)
    of_point = metric.repeat(60, 1, 1)
    start, last = points[:, :k], None
    for iterations in (0, 1, 2, 5, 20, 500):
        centroids, codes = kmeans(points, start, metric=metric, iterations=iterations)
        d = points[:, :, None] - centroids[:, None]
        distances = torch.einsum("gnki,nij,gnkj->gnk", d, of_point, d)
        assert torch.equal(distances.argmin(-1), codes)
        total = distances.amin(-1).sum()
        assert last is None or total <= last * (1 + 1e-12)
        last = total
    again, _ = kmeans(points, centroids, metric=metric, iterations=1)
    torch.testing.assert_close(again, centroids)  # each is the best centre of its cluster


def test_parts_and_empty_clusters(monkeypatch):
    points, start = normal(1, 120, 2), normal(1, 4, 2, seed=1)
    start[0, 3] = 100.0  # no point is near
    expected = kmeans(points, start, iterations=3)
    assert torch.equal(expected[0][0, 3], start[0, 3]) and not (expected[1] == 3).any()
    monkeypatch.setattr("refimpl.quantization.codebooks._ENTRIES", 50)
    assert torch.equal(nearest(points, expected[0], torch.eye(2).double()[None]), expected[1])


def test_random_points_depend_on_the_generator_alone():
    points = normal(30, 2)
    draw = lambda seed: random_points(points, 30, torch.Generator().manual_seed(seed))
    torch.manual_seed(0)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert len(draw(1).unique(dim=0)) == 30


def test_more_dimensions_at_the_same_bits_leave_less_of_a_gaussian():
    """2 bits: 4 values, 16 pairs, 256 quadruples; 0.1175, 0.1098 and 0.0994 per weight at best."""
    found = []
    for v in (1, 2, 4):
        points = normal(1, 16_000 // v, v, dtype=torch.float32)
        start = random_points(points[0], 4**v, torch.Generator().manual_seed(0))[None]
        centroids, codes = kmeans(points, start, iterations=15)
        found.append(float((points[0] - centroids[0, codes[0]]).square().mean()))
    assert 0.125 > found[0] > found[1] + 0.004 > found[2] + 0.008, found


# --- storage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype,bound", [("int8", 0.51 / 127), ("float16", 2**-11)])
def test_stored_codebooks_are_near_and_cost_what_they_say(dtype, bound):
    dense = normal(2, 3, 1, 16, 2)
    dense[0, 0] = 0
    books = Codebooks.store(dense, dtype)
    error = (books.dense() - dense).abs().amax((-2, -1))
    assert bool((error <= bound * dense.abs().amax((-2, -1))).all())
    bytes_each = {"int8": 16 * 2 + 2, "float16": 16 * 2 * 2}[dtype]
    assert sum(t.nbytes for t in books if t is not None) == 6 * bytes_each


@pytest.mark.parametrize("R,C,M,v,bits", [(1, 1, 1, 2, 4), (2, 2, 1, 4, 3), (1, 1, 3, 4, 5)])
def test_a_layer_is_the_sum_of_its_codewords(R, C, M, v, bits):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (8, 24 // v, M), generator=generator).to(torch.uint8)
    books, scale = Codebooks.store(normal(R, C, M, 2**bits, v), "float16"), normal(8, seed=2).half()
    layer = CodebookLinear.pack(codes, books, bits, scale)
    assert torch.equal(layer.unpacked(), codes)
    dense, W = books.dense(), torch.zeros(8, 24)
    for r in range(8):
        for c in range(24):
            own = dense[r // (8 // R), c // (24 // C)]
            value = sum(own[m, int(codes[r, c // v, m]), c % v] for m in range(M))
            W[r, c] = value * scale[r].float()
    torch.testing.assert_close(layer.weight, W, rtol=1e-6, atol=1e-7)
    # The sum over an embedding bag, as an inference kernel takes it.
    if R == C == 1:
        words = codes.long() + torch.arange(M) * 2**bits
        bag = torch.nn.functional.embedding_bag(words.flatten(0, 1), dense.view(-1, v), mode="sum")
        torch.testing.assert_close(bag.view(8, 24) * scale.float()[:, None], W, rtol=1e-6, atol=1e-6)
    code_bytes = {4: 8 * 24 // v // 2, 3: 8 * 24 // v * 3 // 8, 5: 8 * 24 // v * M * 5 // 8}[bits]
    assert layer.nbytes() == code_bytes + R * C * M * 2**bits * v * 2 + 8 * 2


def test_bad_input_is_refused():
    points, start, books = normal(1, 6, 2), normal(1, 3, 2), Codebooks.store(normal(1, 1, 1, 4, 2))
    codes = torch.zeros(2, 3, 1, dtype=torch.uint8)
    generator = torch.Generator()
    for call, error, message in [
        (lambda: kmeans(points.long(), start), ValueError, "points must be floating point"),
        (lambda: kmeans(points[:, :0], start), ValueError, "points must be floating point"),
        (lambda: kmeans(points * torch.nan, start), ValueError, "points must be finite"),
        (lambda: kmeans(points, start[..., :1]), ValueError, r"start must be \[1, k, 2\]"),
        (lambda: kmeans(points, start, metric=torch.ones(4, 2, 2)), ValueError, "P a divisor of 6"),
        (lambda: kmeans(points, start, iterations=-1), ValueError, "iterations must be"),
        (lambda: random_points(points[0], 7, generator), ValueError, "k must be 1 to 6"),
        (lambda: Codebooks.store(normal(1, 1, 1, 4, 2), "int4"), ValueError, "dtype must be one of"),
        (lambda: Codebooks.store(normal(4, 2)), ValueError, "dense must be"),
        (
            lambda: Codebooks.store(1e9 * normal(1, 1, 1, 4, 2), "float16"),
            ValueError,
            "not finite in float16",
        ),
        (lambda: CodebookLinear.pack(codes, books, 3), ValueError, "do not fit codebooks"),
        (lambda: CodebookLinear.pack(codes + 4, books, 2), ValueError, "codes must be"),
        (lambda: CodebookLinear.pack(codes, books, 2, torch.ones(3)), ValueError, r"scale must be \[2\]"),
    ]:
        with pytest.raises(error, match=message):
            call()
