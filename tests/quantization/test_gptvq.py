"""GPTVQ: exact feedback for vectors, better codebooks, true bits, both families, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from quantization_runs import IDS, logits, shallow, through_a_file

from refimpl.checks.tiny import tiny
from refimpl.quantization import GPTQ, RTN, compress_model
from refimpl.quantization.codebooks import CodebookLinear, Codebooks, decode
from refimpl.quantization.feedback import damped
from refimpl.quantization.gptvq import GPTVQ, least_squares, mahalanobis_points


def problem(d_out=64, d_in=32, seed=0):
    """W, and H of correlated inputs of different size."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(500, 8)) @ rng.normal(size=(8, d_in)) + 0.4 * rng.normal(size=(500, d_in))
    X *= rng.uniform(0.3, 2, d_in)
    return torch.from_numpy(rng.normal(size=(d_out, d_in))), torch.from_numpy(2 / 500 * X.T @ X)


def error(W, H, Q):
    difference = W.double() - Q.double()
    return float(((difference @ H) * difference).sum())


def restored(found):
    return decode(found.codes, found.books.dense())


@pytest.mark.parametrize("vdim", [1, 2, 4])
@pytest.mark.parametrize("rows,columns", [(None, None), (32, 16)])
def test_the_loss_of_the_feedback_is_the_error_of_the_outputs(vdim, rows, columns, monkeypatch):
    W, H = problem(128, 32)
    losses = []

    def spy(*args, **kwargs):
        result = real(*args, **kwargs)
        losses.append(result.loss)
        return result

    real = GPTVQ.solve.__globals__["feedback_quantize"]
    monkeypatch.setattr("refimpl.quantization.gptvq.feedback_quantize", spy)
    found = GPTVQ(1, vdim, rows, columns, update=False).solve(W, H)
    assert losses[0] == pytest.approx(error(W, damped(H, 0.01), restored(found)), rel=1e-9)
    R, C = 128 // (rows or 128), 32 // (columns or 32)
    assert found.books.values.shape == (R, C, 1, 2**vdim, vdim)


def test_one_dimension_and_fixed_values_are_gptq(monkeypatch):
    """With the centroids of a uniform grid, GPTVQ in one dimension is GPTQ on that grid."""
    W, H = problem()
    grid = GPTQ(2, "full", "tensor", scale_dtype=torch.float32)
    q = grid.solve(W, H)
    values = ((torch.arange(4) - 2) * q.scale.float()).view(1, 4, 1)
    monkeypatch.setattr("refimpl.quantization.gptvq.kmeans", lambda *args, **more: (values, None))
    monkeypatch.setattr(Codebooks, "store", classmethod(lambda cls, dense, dtype: cls(dense, None)))
    found = GPTVQ(2, 1, update=False).solve(W, H)
    assert torch.equal(found.codes[..., 0], q.codes)


def test_exact_blocks_beat_the_diagonal_rule_and_more_dimensions_beat_fewer():
    exact, official, by_dim = [], [], {1: [], 2: [], 4: []}
    for seed in range(4):
        W, H = problem(256, 32, seed)
        exact.append(error(W, H, restored(GPTVQ(2, 2, store="float16").solve(W, H))))
        official.append(error(W, H, restored(GPTVQ(2, 2, store="float16", exact=False).solve(W, H))))
        for vdim, found in by_dim.items():
            found.append(exact[-1] if vdim == 2 else error(W, H, restored(GPTVQ(2, vdim).solve(W, H))))
    assert sum(exact) < sum(official)
    assert sum(by_dim[4]) < sum(by_dim[2]) < sum(by_dim[1])
    plain = [error(*problem(256, 32, s), RTN(2)("", problem(256, 32, s)[0]).weight) for s in range(4)]
    assert sum(exact) < 0.7 * sum(plain)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_the_update_is_the_least_squares_minimum(shape):
    W, H = problem(24, 16)
    R, C = shape
    codes = torch.randint(0, 4, (24, 8, 1), generator=torch.Generator().manual_seed(0))
    start = torch.randn(R, C, 1, 4, 2, generator=torch.Generator().manual_seed(1)).double()
    errors = [error(W, H, decode(codes, least_squares(W, H, codes, start, steps))) for steps in range(12)]
    assert all(b <= a * (1 + 1e-12) for a, b in zip(errors, errors[1:], strict=False))
    found = least_squares(W, H, codes, start, 200).requires_grad_()
    difference = W - decode(codes, found)
    loss = ((difference @ H) * difference).sum()
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.abs().max() < 1e-4 * loss and float(loss.detach()) <= errors[-1]
    unused = least_squares(W, H, codes * 0, start)
    assert torch.equal(unused[..., 1:, :], start[..., 1:, :])


def test_the_update_never_raises_the_error_of_what_is_stored():
    for seed in range(3):
        W, H = problem(seed=seed)
        with_update, without = (GPTVQ(2, 2, update=u).solve(W, H) for u in (True, False))
        assert torch.equal(with_update.codes, without.codes)
        assert error(W, H, restored(with_update)) < error(W, H, restored(without))


def test_start_points_and_dead_inputs():
    points = torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(0)).double()
    for own, start in zip(points, mahalanobis_points(points, 5), strict=True):
        centred = own - own.mean(0)
        distance = torch.einsum("ni,ij,nj->n", centred, torch.linalg.inv(centred.T @ centred), centred)
        assert torch.equal(start, own[distance.argsort()[[0, 12, 24, 37, 49]]])
    W, H = problem()
    H[5], H[:, 5] = 0, 0
    other = W.clone()
    other[:, 5] += 100
    assert torch.equal(GPTVQ().solve(W, H).codes, GPTVQ().solve(other, H).codes)
    assert torch.equal(GPTVQ().solve(0 * W, H).books.dense(), torch.zeros(1, 1, 1, 16, 2))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_of_codes_and_codebooks(family, tmp_path):
    model, plain = shallow(family), shallow(family)
    report = compress_model(model, GPTVQ(8, 1), IDS)
    before = logits(plain)
    near = (logits(model) - before).std()
    assert near < 0.1 * before.std()
    for row in report.rows:
        layer, old = model.get_submodule(row.name), plain.get_submodule(row.name)
        assert isinstance(layer, CodebookLinear)
        stored = layer.nbytes() - (0 if layer.bias is None else layer.bias.nbytes)
        assert stored == row.shape[0] * row.shape[1] + 256 + 2  # codes, one codebook, its step
        with torch.no_grad():
            (old.weight if family == "llama" else old.weight.T).copy_(layer.weight)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)
    coarse = shallow(family)
    compress_model(coarse, GPTVQ(2, 2), IDS)
    assert (logits(coarse) - before).std() > 4 * near
    through_a_file(coarse, shallow(family, seed=1), tmp_path)


def test_bad_input_is_refused_before_anything_changes():
    W, H = problem()
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    for call, message in [
        (lambda: GPTVQ(0), "bits must be"),
        (lambda: GPTVQ(2.0), "bits must be"),
        (lambda: GPTVQ(2, 3), "vdim must be 1, 2 or 4"),
        (lambda: GPTVQ(3, 4), r"bits \* vdim must be at most 8"),
        (lambda: GPTVQ(rows=0), "rows must be"),
        (lambda: GPTVQ(columns=3), "columns must be a multiple of vdim"),
        (lambda: GPTVQ(store="int4"), "store must be one of int8, float16"),
        (lambda: GPTVQ(damp=-1), "damp must be"),
        (lambda: GPTVQ(iterations=-1), "iterations must be"),
        (lambda: GPTVQ(rows=7).solve(W, H), "multiples of rows = 7"),
        (lambda: GPTVQ(columns=20).solve(W, H), "columns = 20"),
        (lambda: GPTVQ().solve(W[:, :31], H[:31, :31]), "vdim = 2"),
        (lambda: GPTVQ().solve(W[:0], H), r"got \[0, 32\]"),
        (lambda: GPTVQ().solve(W[0], H), "W must be"),
        (lambda: GPTVQ(2, 4, rows=1, columns=16).solve(W, H), "256 centroids for 4 vectors"),
        (lambda: GPTVQ().solve(W * torch.nan, H), "W must be a finite"),
        (lambda: GPTVQ().solve(W.long(), H), "W must be a finite floating-point"),
        (lambda: GPTVQ().solve(W, H[:4, :4]), "H must be finite"),
        (lambda: GPTVQ(exact=False).solve(W, -H), "not positive definite"),
        (lambda: compress_model(model, GPTVQ(2, 4, rows=8), IDS), "256 centroids for 64 vectors"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
