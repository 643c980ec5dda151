"""QuIP and QuIP#: the same matrices as the authors' programs, true layers, whole models, refusals.

`data/quantization_golden_quip.py` makes the arrays from the authors' repositories and stores the inputs.
"""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_scripts import load_script
from quantization_runs import IDS, logits, shallow, through_a_file

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, tiny
from refimpl.quantization import (
    GPTQ,
    RTN,
    compress_model,
    output_distortion,
)
from refimpl.quantization.e8p import CODEBOOKS, decode
from refimpl.quantization.feedback import feedback_quantize
from refimpl.quantization.hadamard import RandomHadamard, hadamard_factors, incoherence, kronecker, rotate
from refimpl.quantization.quip import QuIP, QuIPLinear, QuIPSharp, QuIPSharpLinear, ldlq

HERE = Path(__file__).resolve().parent
golden = load_script("quantization_golden_quip")
RECIPES = {
    "quip": QuIP(3), "quip-plain": QuIP(2, rescale=False), "sharp-2": QuIPSharp(2), "sharp-3": QuIPSharp(3),
    "sharp-4": QuIPSharp(4),
}  # fmt: skip


def layer_of(seed=0, d_out=40, d_in=48, outlier=1.0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_out, d_in, generator=generator)
    W[:, 5] *= outlier
    X = torch.randn(400, 8, generator=generator) @ torch.randn(8, d_in, generator=generator)
    X += 0.3 * torch.randn(400, d_in, generator=generator)
    return W, X, SimpleNamespace(H=2 / 400 * X.double().T @ X.double())


# --- the authors' programs ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs():
    stored = np.load(HERE / "golden" / "quip.npz")
    given = [stored[name] for name in ("X", "W", "H")]
    assert hashlib.sha256(b"".join(a.tobytes() for a in given)).hexdigest() in str(stored["about"])
    for commit in golden.COMMITS.values():
        assert commit in str(stored["about"])
    return {
        key: stored[key] if stored[key].dtype.kind == "U" else torch.from_numpy(stored[key]) for key in stored
    }


def test_all_points_are_those_of_the_authors(theirs):
    points = (decode(torch.arange(65536)) * 4).round().to(torch.int8).numpy()
    assert hashlib.sha256(points.tobytes()).hexdigest() == str(theirs["points"])


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_codes_are_those_of_the_authors(theirs, bits):
    values, codes = CODEBOOKS[bits].encode(theirs["X"] * CODEBOOKS[bits].scale)
    joined = sum(codes[:, i].long() << 8 * (bits - 1 - i) for i in range(bits))
    expected = theirs[f"codes_{bits}"].long()
    if bits == 3:  # a whole 16 bits for the residual there
        expected = expected >> 16 << 8 | expected & 255
    assert torch.equal(joined, expected)
    torch.testing.assert_close(values, theirs[f"values_{bits}"], rtol=1e-6, atol=1e-6)


def test_the_hadamard_transform_is_that_of_the_authors(theirs):
    for n in (32, 64):
        torch.testing.assert_close(kronecker(torch.eye(n), hadamard_factors(n)), theirs[f"hadamard_{n}"])


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_quip_sharp_returns_the_authors_matrix(theirs, bits, monkeypatch):
    """The whole procedure, with the signs that their program drew."""
    signs = theirs["signs"].float()
    drawn = {golden.ROWS: signs[: golden.ROWS], golden.COLUMNS: signs[golden.ROWS :]}
    monkeypatch.setattr(RandomHadamard, "draw", classmethod(lambda cls, n, generator: cls(drawn[n])))
    layer = QuIPSharp(bits, damp=golden.DAMP)("fc", theirs["W"], SimpleNamespace(H=theirs["H"]))
    torch.testing.assert_close(layer.weight.double(), theirs[f"hat_{bits}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_ldlq_returns_the_authors_codes(theirs, bits):
    W = golden.grid_units(theirs["W"], bits)
    encode = lambda w: (w.round().clamp(0, 2**bits - 1),) * 2
    codes = ldlq(W, theirs["H"], encode, damp=golden.DAMP).codes
    assert torch.equal(codes.to(torch.uint8), theirs[f"ldlq_{bits}"])


# --- the solver and the layers --------------------------------------------------------------------


@pytest.mark.parametrize("vdim", (1, 4, 8))
def test_ldlq_is_feedback_on_the_mirrored_problem(vdim):
    W, _, stats = layer_of(d_out=6, d_in=16)
    encode = lambda w: (w.round(), w.round())
    mirror = torch.arange(16).view(-1, vdim).flip(0).flatten()
    other = feedback_quantize(
        W[:, mirror], stats.H[mirror][:, mirror], lambda step: encode(step.w), vdim=vdim
    )
    found = ldlq(W, stats.H, encode, vdim)
    assert torch.equal(found.Q[:, mirror], other.Q)
    damped = stats.H + 0.01 * stats.H.diagonal().mean() * torch.eye(16)
    error = W.double() - found.Q
    assert found.loss == pytest.approx(float(((error @ damped) * error).sum()), rel=1e-9)


@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_is_its_weight_and_stores_what_it_says(name):
    W, X, stats = layer_of(outlier=10)
    layer = RECIPES[name]("fc", W, stats)
    assert layer.weight.shape == W.shape and layer.weight.dtype is torch.float32
    torch.testing.assert_close(layer(X), X @ layer.weight.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer(X.double()), X.double() @ layer.weight.double().T, rtol=1e-4, atol=1e-3)
    assert layer(X.bfloat16()).dtype is torch.bfloat16
    bits = RECIPES[name].bits
    expected = 40 * 48 * bits / 8 + 4 + 48 * 2 * (name == "quip")
    expected += 8 if isinstance(layer, QuIPLinear) else (40 + 48) / 8
    assert layer.nbytes() == expected
    assert incoherence(layer.rotated()) < incoherence(W)
    assert torch.equal(RECIPES[name]("fc", W, stats).weight, layer.weight)
    assert not torch.allclose(RECIPES[name]("other", W, stats).weight, layer.weight)


def test_more_bits_lose_less_and_eight_lose_nothing():
    W, _, stats = layer_of()
    total = output_distortion(W, 0 * W, stats.H)
    wide = [QuIP(2), QuIP(3), QuIP(4, 3.0), QuIP(8, 6.0)]
    for recipes in (wide, [QuIPSharp(2), QuIPSharp(3), QuIPSharp(4)]):
        losses = [output_distortion(W, r("fc", W, stats).weight, stats.H) / total for r in recipes]
        assert losses == sorted(losses, reverse=True) and losses[-1] < 0.01
        if recipes is wide:
            assert losses[-1] < 1e-4


def test_transforms_save_a_weight_with_outliers():
    """At two bits, with one large weight in each row: QuIP# < QuIP < GPTQ < rounding, in the loss."""
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        W = torch.randn(64, 96, generator=generator)
        W[torch.arange(64), torch.randperm(96, generator=generator)[:64]] = 8.0
        X = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
        stats = SimpleNamespace(H=2 / 400 * X.double().T @ X.double())
        recipes = QuIPSharp(2), QuIP(2), GPTQ(2), RTN(2)
        losses = [output_distortion(W, r("fc", W, stats).weight, stats.H) for r in recipes]
        assert all(1.3 * a < b for a, b in zip(losses[:-1], losses[1:], strict=True)), losses


def test_matrices_of_zeros_and_dead_inputs():
    W, _, stats = layer_of()
    stats.H[3], stats.H[:, 3] = 0, 0
    for recipe in RECIPES.values():
        assert bool(recipe("fc", W, stats).weight.isfinite().all())
        assert bool(recipe("fc", 0 * W, stats).weight.isfinite().all())


# --- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_models_of_both_families_generate_with_it(family):
    model, plain = shallow(family), shallow(family)
    before = logits(plain)
    report = compress_model(
        model, lambda *layer: RECIPES["sharp-4" if "mlp" in layer[0] else "quip"](*layer), IDS
    )
    for row in report.rows:
        layer, old = model.get_submodule(row.name), plain.get_submodule(row.name)
        with torch.no_grad():
            weight = layer.weight if isinstance(old, torch.nn.Linear) else layer.weight.T
            old.weight.copy_(weight)
        assert (layer.bias is None) == (old.bias is None)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(model), before, atol=0.01)
    generated = model.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, plain.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False))
    Backbone(model)


@pytest.mark.parametrize("name", ("quip", "sharp-3", "sharp-4"))
def test_files_bring_the_same_model_back(name, tmp_path):
    model = shallow("llama")
    compress_model(model, RECIPES[name], IDS)
    through_a_file(model, shallow("llama", seed=1), tmp_path)


# --- refusals -------------------------------------------------------------------------------------


def test_bad_recipes_are_refused():
    for bits in (1, 9, 2.0, None):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
            QuIP(bits)
    for bits in (1, 5, 8, None):
        with pytest.raises(ValueError, match="bits must be 2, 3 or 4"):
            QuIPSharp(bits)
    for rms in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rms must be None or a number > 0"):
            QuIPSharp(rms=rms)
    for reach in (0, -2.4, float("nan")):
        with pytest.raises(ValueError, match="reach must be a number > 0"):
            QuIP(reach=reach)
    W, _, stats = layer_of()
    for recipe in (QuIP(damp=-0.1), QuIPSharp(damp=-0.1)):
        with pytest.raises(ValueError, match="damp must be a number >= 0"):
            recipe("fc", W, stats)


@pytest.mark.parametrize("recipe", (QuIP(2), QuIPSharp(2)))
def test_bad_matrices_are_refused(recipe):
    W, _, stats = layer_of()
    for bad in (W[0], W[:0], W.long(), W.masked_fill(W > 2, float("nan"))):
        with pytest.raises(ValueError, match="weight must be a finite floating-point matrix"):
            recipe("fc", bad, stats)
    with pytest.raises(ValueError, match=r"H must be finite, \[48, 48\]"):
        recipe("fc", W, SimpleNamespace(H=torch.eye(40)))
    with pytest.raises(ValueError, match="H must be finite"):
        recipe("fc", W, SimpleNamespace(H=stats.H * float("nan")))
    for vdim in (0, 5):
        with pytest.raises(ValueError, match="vdim must be a divisor of d_in = 48"):
            ldlq(W, stats.H, lambda w: (w, w), vdim)


def test_a_width_that_is_no_multiple_of_eight_is_refused_and_nothing_changes():
    with pytest.raises(ValueError, match="multiple of 8"):
        QuIPSharp(2)("fc", torch.ones(8, 12), SimpleNamespace(H=torch.eye(12)))
    model = tiny("llama", intermediate_size=36)
    before = logits(model)
    with pytest.raises(ValueError, match="multiple of 8"):
        compress_model(model, QuIPSharp(2), IDS)
    assert torch.equal(logits(model), before)
    assert isinstance(QuIP(2)("fc", torch.ones(8, 12), SimpleNamespace(H=torch.eye(12))), QuIPLinear)


def test_rotation_by_stored_signs_is_the_rotation_that_was_rounded():
    W, _, stats = layer_of()
    layer = QuIPSharp(4)("fc", W, stats)
    rotated, _ = rotate(W, stats.H, *layer.transforms())
    assert isinstance(layer, QuIPSharpLinear)
    assert float((layer.rotated() - rotated).square().mean()) < 0.02 * float(rotated.square().mean())


# --- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_brings_the_logits_nearer_to_those_of_the_plain_model(family):
    """QuIP at 8 bits: within 5 %, and QuIP# at 4, its most, within 25 % of the spread of the logits."""
    before = logits(shallow(family))

    def error(recipe):
        model = shallow(family)
        compress_model(model, recipe, IDS)
        return float((logits(model) - before).std() / before.std())

    wide = [error(QuIP(bits, 6.0)) for bits in (3, 4, 8)]
    sharp = [error(QuIPSharp(bits)) for bits in (2, 3, 4)]
    assert wide[1] < 0.7 * wide[0] and wide[2] < 0.1 * wide[1] and wide[2] < 0.05
    assert sharp[1] < 0.75 * sharp[0] and sharp[2] < 0.75 * sharp[1] and sharp[2] < 0.25


def unrotated(recipe, rotated, stats):
    """W whose W' under the transforms of this recipe is the given matrix."""
    left, right = recipe("fc", torch.ones_like(rotated), stats).transforms()
    return left.inverse(right.inverse(rotated.double()).T).T.float()


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_quip_sharp_returns_weights_that_lie_on_its_grid(bits):
    _, _, stats = layer_of()
    book = CODEBOOKS[bits]
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1)) * book.scale
    points, codes = book.encode(x)
    # Of sums of two points some have a first point that is nearer than their own; they are found otherwise.
    own = (book.encode(points)[1] == codes).all(1)
    points, codes = points[own][:240], codes[own][:240]
    assert len(points) == 240 and (bits == 4 or bool(own.all()))
    for size in (1.0, 0.01):
        W = unrotated(QuIPSharp(bits), size * points.view(40, 48), stats)
        layer = QuIPSharp(bits, rms=float(points.square().mean().sqrt()))("fc", W, stats)
        assert torch.equal(layer.codes.flatten(0, 1), codes)
        torch.testing.assert_close(layer.weight, W, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_quip_returns_weights_that_lie_on_its_grid(bits):
    _, _, stats = layer_of()
    codes = torch.randint(2**bits, (40, 48), generator=torch.Generator().manual_seed(1))
    values = codes * (2 / (2**bits - 1)) - 1
    W = unrotated(QuIP(bits, rescale=False), values, stats)
    layer = QuIP(bits, 1 / float(values.square().mean().sqrt()), rescale=False)("fc", W, stats)
    assert float(layer.range) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(layer.weight, W, rtol=0, atol=1e-5)
