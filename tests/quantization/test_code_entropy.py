"""Entropy coding: exact round trips, sizes between entropy and entropy plus overhead, and what they mean."""

import copy

import numpy as np
import pytest
import torch
from quantization_runs import shallow

from refimpl.backbone import Backbone
from refimpl.checks.tiny import random_ids
from refimpl.quantization import (
    RTN,
    coders,
    compress_model,
    compressed_names,
    load_compressed,
    save_compressed,
)
from refimpl.quantization.coders import (
    huffman_decode,
    huffman_encode,
    huffman_lengths,
    rans_decode,
    rans_encode,
)
from refimpl.quantization.entropy import EntropyRTN, RansLinear, code_sizes, entropy
from refimpl.quantization.grids import Grid

CODERS = {"huffman": (huffman_encode, huffman_decode), "rans": (rans_encode, rans_decode)}
IDS = random_ids(4, 16)


def codes(n, bits, spread, seed=0):
    drawn = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * spread + 2 ** (bits - 1)
    return drawn.round().clamp(0, 2**bits - 1).to(torch.uint8)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(("n", "lane"), [*((n, 64) for n in (1, 2, 40, 63, 64, 65, 150)), (4097, None)])
def test_what_is_decoded_is_what_was_encoded(monkeypatch, coder, n, lane):
    encode, decode = CODERS[coder]
    monkeypatch.setattr(coders, "LANE", lane or coders.LANE)  # short lanes: the same borders, fewer steps
    for bits, spread in ((1, 0.4), (3, 1.0), (8, 30.0), (8, 0.0)):
        given = codes(n, bits, spread)
        assert torch.equal(decode(encode(given, bits), bits, n), given)
    ramp = torch.arange(n).remainder(256).to(torch.uint8)
    assert torch.equal(decode(encode(ramp, 8), 8, n), ramp)


@pytest.mark.parametrize(("bits", "spread"), [(2, 0.3), (4, 0.1), (4, 2.5), (8, 3.0), (8, 40.0)])
def test_sizes_lie_between_entropy_and_entropy_plus_overhead(bits, spread):
    given = codes(50_000, bits, spread)
    H = entropy(given)
    per_code = {name: 8 * len(encode(given, bits)) / len(given) for name, (encode, _) in CODERS.items()}
    table = {"huffman": 8 * 2**bits / len(given), "rans": 16 * 2**bits / len(given)}
    assert H <= per_code["huffman"] <= H + 1.01 + table["huffman"]
    assert H <= per_code["rans"] <= H + 0.02 + table["rans"]
    p = np.bincount(given.numpy()) / len(given)
    np.testing.assert_allclose(H, -(p[p > 0] * np.log2(p[p > 0])).sum())


def test_lengths_are_those_of_huffman_and_never_above_32():
    assert huffman_lengths(np.array([45, 13, 12, 16, 9, 5])).tolist() == [1, 3, 3, 3, 4, 4]
    assert huffman_lengths(np.array([0, 7])).tolist() == [0, 1]
    assert entropy(torch.full((5,), 3, dtype=torch.uint8)) == 0
    fibonacci = [1, 1]
    while len(fibonacci) < 60:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman_lengths(np.array(fibonacci)).astype(int)
    assert 20 < lengths.max() <= 32 and (0.5**lengths).sum() == 1  # a complete code
    dyadic = np.array([8, 4, 2, 1, 1])
    assert (dyadic * huffman_lengths(dyadic)).sum() / 16 == 1.875  # its entropy


def test_normal_weights_in_eight_bits_hold_more_than_seven():
    """Fewer, the longer the rows. One scale and an outlier: few bits, for the codes are wasted."""
    W = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    rows = code_sizes([W], Grid(8, "restricted", "row"))
    assert 7.1 < rows.entropy < 7.5 and rows.entropy < min(rows.rans, rows.huffman) < rows.packed == 8
    W[:, 3] *= 20
    one, fine = (code_sizes([W], Grid(8, "restricted", group)) for group in ("tensor", 16))
    assert one.rans < 4 < fine.rans and one.error > 1.5 * fine.error
    four = code_sizes([W], Grid(4, "restricted", "tensor"))
    assert four.entropy < 0.3 and four.huffman >= 1 and four.rans < four.entropy + 0.05
    assert four.zlib < four.packed  # one code per byte: generic coders see the codes


def test_sizes_are_sums_over_matrices_and_scales_are_counted():
    A, B = (torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)) for rows in (64, 128))
    grid = Grid(4, group=32)
    both, a, b = code_sizes([A, B], grid), code_sizes([A], grid), code_sizes([B], grid)
    for field in ("packed", "entropy", "huffman", "rans", "zlib", "lzma", "side"):
        np.testing.assert_allclose(getattr(both, field), (getattr(a, field) + 2 * getattr(b, field)) / 3)
    assert both.packed == 4 and both.side == (16 + 4) / 32
    coded = 8 * len(rans_encode(grid.quantize(A).codes, 4)) / A.numel()
    assert a.rans == coded and EntropyRTN(4, group=32)("a", A).bits_per_weight == coded + a.side


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_coded_model_is_the_packed_model(family, tmp_path):
    narrow = {"hidden_size": 16} | ({} if family == "gpt2" else {"intermediate_size": 24})
    model, packed = (shallow(family, **narrow) for _ in range(2))
    report = compress_model(model, EntropyRTN(4, group=8), IDS)
    other = compress_model(packed, RTN(4, group=8), IDS)
    with torch.no_grad():
        expected = packed(IDS).logits
        assert torch.equal(model(IDS).logits, expected)
        size = save_compressed(model, tmp_path / "m.safetensors")
        again = shallow(family, seed=1, **narrow)
        load_compressed(again, tmp_path / "m.safetensors")
        assert torch.equal(again(IDS).logits, expected)
    assert all(isinstance(again.get_submodule(name), RansLinear) for name in compressed_names(again))
    assert report.bytes_after - other.bytes_after == sum(
        mine.nbytes - theirs.nbytes for mine, theirs in zip(report.rows, other.rows, strict=True)
    )
    assert size > report.bytes_after


def test_coding_pays_where_codes_are_uneven():
    W = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) ** 3
    packed, coded = (Recipe(4, "restricted", "row")("fc", W) for Recipe in (RTN, EntropyRTN))
    assert torch.equal(packed.weight, coded.weight) and coded.nbytes() < 0.7 * packed.nbytes()


def test_bad_input_is_refused():
    good = codes(100, 4, 2.0)
    for call, error, message in [
        (lambda: entropy(good.int()), TypeError, "codes must be uint8"),
        (lambda: entropy(good[:0]), ValueError, "got none"),
        (lambda: code_sizes([], Grid(4)), ValueError, "weights must be one or more"),
        (lambda: code_sizes([torch.full((2, 2), torch.nan)], Grid(4)), ValueError, "W must be finite"),
        (lambda: EntropyRTN(1), ValueError, "bits must be"),
    ]:
        with pytest.raises(error, match=message):
            call()
    for encode, decode in CODERS.values():
        with pytest.raises(TypeError, match="codes must be uint8"):
            encode(good.int(), 4)
        with pytest.raises(ValueError, match="got none"):
            encode(good[:0], 4)
        with pytest.raises(ValueError, match="from 0 to 7, got a code"):
            encode(good, 3)
        for bits in (0, 9, 2.0):
            with pytest.raises(ValueError, match="bits must be an integer from 1 to 8"):
                encode(good, bits)
        data = encode(codes(5000, 4, 2.0), 4)
        for short in (data[:3], data[: len(data) // 2 // 2 * 2]):
            with pytest.raises(ValueError, match="too short"):
                decode(short, 4, 5000)
    with pytest.raises(ValueError, match="too long"):
        rans_decode(rans_encode(good, 4) + bytes(2), 4, 100)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("fault", ["nan", "group", "ids"])
def test_a_refused_model_is_as_it_was(family, fault):
    """NaN and the group that does not divide d_in are met in the last layer, after all others were coded."""
    narrow = {"hidden_size": 16} | ({"n_inner": 20} if family == "gpt2" else {"intermediate_size": 20})
    model = shallow(family, **narrow)
    if fault == "nan":
        with torch.no_grad():
            Backbone(model).layer(0).down.weight[3, 5] = torch.nan
    before = copy.deepcopy(model.state_dict())
    recipe = EntropyRTN(4, group=8 if fault == "group" else 4)
    words = {"nan": "W must be finite", "group": "group must divide", "ids": "ids"}
    with pytest.raises(ValueError, match=words[fault]):
        compress_model(model, recipe, IDS[:0] if fault == "ids" else IDS)
    after = model.state_dict()
    assert after.keys() == before.keys() and not compressed_names(model)
    assert all(torch.equal(v.nan_to_num(9.0), before[k].nan_to_num(9.0)) for k, v in after.items())
