"""Sparse layers: what they weigh, what comes back, and what is refused."""

import pytest
import torch

from refimpl.checks.tiny import random_ids, tiny
from refimpl.quantization import compress_model, load_compressed, save_compressed
from refimpl.quantization.grids import Grid, Quantized, dequantize
from refimpl.quantization.pruning.unstructured import Magnitude
from refimpl.quantization.sparse import STORAGES, SparseLinear, n_m_mask, pack_mask, unpack_mask

IDS = random_ids(4, 16)


def matrix(rows=16, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (16, 64)])
def test_a_mask_comes_back(storage, shape):
    for seed in range(3):
        score = matrix(*shape, seed)
        keep = n_m_mask(score) if storage == "2:4" else score > 0.3
        keep[0, 0] |= storage != "2:4"
        assert torch.equal(unpack_mask(pack_mask(keep, storage), storage, shape), keep)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_bits_are_those_of_the_formula(share):
    """Bitmap 1 + p b, CSR p (16 + b) and the pointers; 9 and over 16 bits at half the weights."""
    W = matrix(64, 64)
    keep = torch.zeros(64 * 64, dtype=torch.bool)
    keep[: round(share * 4096)] = True
    keep = keep[torch.randperm(4096, generator=torch.Generator().manual_seed(1))].view(64, 64)
    p = int(keep.sum()) / 4096
    for dtype, b in ((torch.float16, 16), (torch.bfloat16, 16), (torch.float32, 32)):
        bits = {s: SparseLinear.pack(W, keep, s, dtype).bits_per_weight for s in ("bitmap", "csr")}
        assert bits == {"bitmap": 1 + p * b, "csr": pytest.approx(p * (16 + b) + 65 * 32 / 4096)}
    q = Grid(4, "full", "row").quantize(W)
    assert SparseLinear.pack_codes(q, keep, 4).bits_per_weight == pytest.approx(
        1 + 4 * p + 16 / 64, abs=0.002
    )


def test_half_the_weights_take_nine_bits_and_csr_saves_nothing():
    keep = n_m_mask(matrix().abs())
    bits = {s: SparseLinear.pack(matrix(), keep, s).bits_per_weight for s in STORAGES}
    assert bits["bitmap"] == bits["2:4"] == 9 and bits["csr"] > 16
    dense = SparseLinear.pack(matrix() * keep, torch.ones_like(keep))  # zeros stored like other numbers
    assert dense.bits_per_weight == 17


def test_two_of_four_in_four_bits_take_three():
    W, keep = matrix(), n_m_mask(matrix().abs())
    layer = SparseLinear.pack_codes(Grid(4, "full", "tensor").quantize(W), keep, 4, "2:4")
    assert layer.bits_per_weight == 3 + 16 / W.numel()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("scheme", ["full", "asymmetric"])
@pytest.mark.parametrize("group", ["tensor", "row", 16])
def test_codes_come_back_on_their_grid(storage, scheme, group):
    W, keep = matrix(), n_m_mask(matrix().abs())
    q = Grid(3, scheme, group).quantize(W)
    layer = SparseLinear.pack_codes(q, keep, 3, storage)
    assert torch.equal(layer.weight, dequantize(q) * keep)
    anything = Quantized(q.codes.masked_fill(~keep, 5), q.scale, q.zero)
    other = SparseLinear.pack_codes(anything, keep, 3, storage)
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), other.buffers(), strict=True))


def test_the_layer_multiplies_by_what_it_stores():
    W, keep, bias = matrix(), matrix(seed=1) > 0, torch.arange(16.0)
    layer = SparseLinear.pack(W, keep, dtype=torch.float32, bias=bias)
    x = matrix(5, seed=2)
    torch.testing.assert_close(layer(x), x @ (W * keep).T + bias)
    assert torch.equal(layer.keep, keep) and layer.sparsity == pytest.approx(1 - keep.float().mean().item())
    before = layer.weight
    assert torch.equal(layer.to(torch.bfloat16).weight, before)


def test_n_of_m_keeps_n_everywhere_and_the_largest():
    score = matrix(8, 48)
    for n, m in ((2, 4), (1, 4), (4, 8), (1, 2), (3, 16)):
        keep = n_m_mask(score, n, m).view(8, -1, m)
        assert (keep.sum(-1) == n).all()
        groups = score.view(8, -1, m)
        lowest = groups.masked_fill(~keep, torch.inf).amin(-1)
        assert (lowest > groups.masked_fill(keep, -torch.inf).amax(-1)).all()
    assert n_m_mask(torch.zeros(1, 4)).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_a_file_holds_exactly_what_the_layers_do(tmp_path, family, sparsity):
    model = tiny(family)
    compress_model(model, Magnitude(sparsity), IDS)
    save_compressed(model, tmp_path / "m.safetensors")
    other = tiny(family, seed=1)
    names = load_compressed(other, tmp_path / "m.safetensors")
    for name in names:
        a, b = model.get_submodule(name), other.get_submodule(name)
        assert a.settings == b.settings and a.nbytes() == b.nbytes()
        assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, other(IDS).logits)


def test_bad_input_is_refused():
    W, keep = matrix(), n_m_mask(matrix().abs())
    nan, huge = W.clone(), W * 1e6
    nan[keep] = torch.nan
    q = Grid(4).quantize(W)
    for call, error, message in [
        (lambda: SparseLinear.pack(W, keep, "coo"), ValueError, "storage must be one of bitmap, 2:4, csr"),
        (lambda: SparseLinear.pack(W, keep.float()), TypeError, "keep must be bool"),
        (lambda: SparseLinear.pack(W, keep[0]), TypeError, "keep must be bool"),
        (lambda: SparseLinear.pack(W[:8], keep), ValueError, r"W must .* the mask's shape \[16, 64\]"),
        (lambda: SparseLinear.pack(W.long(), keep), ValueError, "W must be floating point"),
        (lambda: SparseLinear.pack(W, keep, dtype=torch.int8), ValueError, "dtype must be one of"),
        (lambda: SparseLinear.pack(nan, keep), ValueError, "W must be finite"),
        (lambda: SparseLinear.pack(huge, keep), ValueError, "must fit torch.float16"),
        (lambda: SparseLinear.pack(W, ~(keep | ~keep)), ValueError, "at least one weight"),
        (lambda: SparseLinear.pack(W, W > 0, "2:4"), ValueError, "two in each four"),
        (lambda: SparseLinear.pack(W[:, :6], keep[:, :6], "2:4"), ValueError, "two in each four"),
        (lambda: SparseLinear.pack_codes(q, keep[:8], 4), ValueError, "q must have the mask's shape"),
        (lambda: SparseLinear.pack_codes(q, keep, 2), ValueError, "codes must be"),
        (lambda: pack_mask(torch.ones(1, 40000).bool(), "csr"), ValueError, "at most 32768 columns"),
        (lambda: unpack_mask({}, "coo", (1, 4)), ValueError, "storage must be one of"),
        (lambda: n_m_mask(W, 4, 4), ValueError, "n:m must be integers"),
        (lambda: n_m_mask(W, 2, 5), ValueError, "multiple of 5"),
        (lambda: n_m_mask(W[:0]), ValueError, "multiple of 4"),
        (lambda: n_m_mask(nan), ValueError, "no NaN"),
    ]:
        with pytest.raises(error, match=message):
            call()
