"""W8A8 layers: integers are multiplied exactly, scales come from where they should."""

import pytest
import torch
import torch.nn.functional as F
from quantization_runs import IDS, logits, shallow, through_a_file

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, tiny
from refimpl.lora import add_lora
from refimpl.quantization import calibrate, compress_model, stats_of
from refimpl.quantization.activations import (
    W8A8,
    Int8Linear,
    affine_product,
    int8_weight,
    integer_product,
    quantize_activations,
)
from refimpl.quantization.grids import Grid, dequantize

CHOICES = [(w, a) for w in ("row", "tensor") for a in ("token", "tensor", "static")]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "tensor", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_are_within_half_a_step(granularity, dtype):
    x = draw(3, 5, 16).to(dtype)
    scale = x.float().abs().max()[None] / 127 if granularity == "static" else None
    q, s = quantize_activations(x, granularity, scale)
    assert q.dtype is torch.int8 and q.shape == x.shape and int(q.abs().max()) == 127
    assert s.shape == ((3, 5, 1) if granularity == "token" else (1,))
    assert s.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert float((q * s - x.to(s.dtype)).abs().div(s).max()) <= 0.5 + 1e-5
    again, _ = quantize_activations(q * s, granularity, scale)
    assert torch.equal(again, q)


def test_a_token_has_its_own_scale_and_a_static_one_clips():
    x = torch.tensor([[1.0, -0.5], [100.0, 0.0], [0.0, 0.0]])
    q, s = quantize_activations(x)
    assert q.tolist() == [[127, -64], [127, 0], [0, 0]] and s[2] == 1
    q, _ = quantize_activations(x, "tensor")
    assert q.tolist() == [[1, -1], [127, 0], [0, 0]]
    q, _ = quantize_activations(x, "static", torch.tensor([1 / 127]))
    assert q.tolist() == [[127, -64], [127, 0], [0, 0]]


# --- integers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_in", [7, 1024, 5000])
def test_the_product_of_integers_is_exact(d_in):
    generator = torch.Generator().manual_seed(0)
    for dtype, lo, hi in ((torch.int8, 100, 128), (torch.int8, -128, 128), (torch.uint8, 200, 256)):
        a, b = (torch.randint(lo, hi, (n, d_in), generator=generator).to(dtype) for n in (3, 4))
        product = integer_product(a, b)
        assert product.dtype is torch.int32 and torch.equal(product.long(), a.long() @ b.long().T)


def test_zero_points_are_corrected_in_integers():
    """The identity, exactly, and against the float product of the dequantized tensors."""
    W, x = draw(12, 64), draw(2, 9, 64, seed=1) + 0.7
    w = Grid(8, "asymmetric", "row", scale_dtype=torch.float32).quantize(W)
    flat = Grid(8, "asymmetric", "row", scale_dtype=torch.float32).quantize(x.flatten(0, 1))
    codes, sx, zx = (t.view(2, 9, -1) for t in flat)
    product = affine_product(codes, zx, w.codes, w.zero)
    exact = (codes.long() - zx.long()) @ (w.codes.long() - w.zero.long()).T
    assert torch.equal(product.long(), exact)
    expected = F.linear(dequantize(flat).view_as(x).double(), dequantize(w).double())
    torch.testing.assert_close(product * sx.double() * w.scale.T.double(), expected, atol=1e-5, rtol=1e-5)
    # Symmetric weights have no zero point, static activations one for all.
    q, s = int8_weight(W)
    one = torch.tensor([131])
    exact = (codes.long() - 131) @ q.long().T
    assert torch.equal(affine_product(codes, one, q).long(), exact)
    assert torch.equal(
        affine_product(codes, one, w.codes, 5).long(), (codes.long() - 131) @ (w.codes.long() - 5).T
    )
    assert not torch.equal(affine_product(codes, zx, q), integer_product(codes, q))


# --- the layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "activations"), CHOICES)
def test_the_layer_is_the_product_of_the_rounded_matrices(weights, activations):
    W, x = draw(12, 40), draw(2, 7, 40, seed=1)
    stats = stats_of(x.flatten(0, -2))
    layer = W8A8(weights, activations)("fc", W, stats)
    q, s = quantize_activations(x, activations, layer._buffers.get("x_scale"))
    torch.testing.assert_close(layer(x), (q * s) @ layer.weight.T, atol=1e-5, rtol=1e-5)
    assert (layer(x) - x @ W.T).abs().max() < 0.3
    assert layer.codes.dtype is torch.int8 and layer.codes.shape == W.shape
    scales = (12 if weights == "row" else 1) + (activations == "static")
    assert layer.nbytes() == W.numel() + 4 * scales
    assert layer.bits_per_weight == 8 + 32 * scales / W.numel()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert layer(x.to(dtype)).dtype is dtype
    assert layer(x[0, 0]).shape == (12,)


def test_only_a_shared_scale_lets_tokens_influence_each_other():
    W, x = draw(12, 40), draw(6, 40, seed=1)
    large = torch.cat((x, 50 * x[:1]))
    for activations, alone in (("token", True), ("static", True), ("tensor", False)):
        layer = W8A8("row", activations)("fc", W, stats_of(x.flatten(0, -2)))
        assert torch.equal(layer(x), layer(large)[:6]) is alone


def test_a_large_input_channel_hurts_tensors_more_than_tokens():
    """One channel cannot be factored out of the sum; a scale per token only confines it to its tokens."""
    W, x = draw(32, 64), draw(50, 64, seed=1)
    x[:5, 3] *= 60
    errors = {}
    for activations in ("token", "tensor"):
        errors[activations] = (W8A8("row", activations)("fc", W)(x) - x @ W.T)[5:].square().mean()
    assert errors["tensor"] > 100 * errors["token"]


def test_the_gradient_is_that_of_the_dequantized_weight():
    layer, x = W8A8()("fc", draw(6, 16)), draw(2, 16, seed=1)
    plain = layer(x)
    x.requires_grad_()
    y = layer(x)
    assert torch.equal(y.detach(), plain)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * plain @ layer.weight)
    with torch.no_grad():
        assert not layer(x).requires_grad


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("weights", "activations"), [("row", "token"), ("tensor", "static")])
def test_a_whole_model_stays_close_and_comes_back_from_a_file(tmp_path, family, weights, activations):
    model = shallow(family)
    before = logits(model)
    report = compress_model(model, W8A8(weights, activations), IDS)
    error = (logits(model) - before).std()
    assert 0 < error < 0.1 * before.std()
    assert report.bits < 10.1
    assert all(type(model.get_submodule(row.name)) is Int8Linear for row in report.rows)
    through_a_file(model, shallow(family, seed=1), tmp_path)


def test_lora_trains_on_top():
    model = tiny("llama")
    compress_model(model, W8A8(), IDS)
    codes = {name: b.clone() for name, b in model.named_buffers() if name.endswith("codes")}
    before = logits(model)
    added = add_lora(model, ("q_proj", "up_proj"), 2, 4.0, torch.Generator().manual_seed(0))
    assert len(added) == 6 and torch.equal(logits(model), before)
    assert Backbone(model).forward(IDS).shape == before.shape
    model(IDS, labels=IDS).loss.backward()
    updates = [model.get_submodule(name).lora for name in added]
    # B starts at 0, so that A has no gradient yet; the first block's comes through all the others.
    assert all(float(update.B.grad.abs().max()) > 0 for update in updates)
    buffers = dict(model.named_buffers())
    assert all(torch.equal(t, buffers[name]) for name, t in codes.items())


def test_bad_input_is_refused():
    W, x = draw(4, 8), draw(2, 8, seed=1)
    layer, one = W8A8()("fc", W), torch.ones(1)
    int8, uint8 = torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 8, dtype=torch.uint8)
    for call, error, message in [
        (lambda: W8A8("group"), ValueError, "weights must be 'row' or 'tensor', got 'group'"),
        (lambda: W8A8("row", "channel"), ValueError, "activations must be one of token, tensor, static"),
        (lambda: W8A8("row", "static")("fc", W), ValueError, "stats: static scales of fc"),
        (lambda: W8A8()("fc", W.int()), TypeError, "W must be floating point"),
        (lambda: W8A8()("fc", W * torch.nan), ValueError, "W must be finite"),
        (lambda: W8A8()("fc", W[0]), ValueError, "W must be a matrix"),
        (lambda: layer(draw(2, 7)), ValueError, r"x must be \[..., 8\], got \[2, 7\]"),
        (lambda: layer(x * torch.inf), ValueError, "x must be finite"),
        (lambda: layer(x[:0]), ValueError, "x must be finite and not empty"),
        (lambda: layer(x.int()), TypeError, "x must be floating point"),
        (lambda: quantize_activations(x, "row"), ValueError, "granularity must be one of"),
        (lambda: quantize_activations(x, "static"), ValueError, "scale must be given for 'static'"),
        (lambda: quantize_activations(x, "token", one), ValueError, "scale must be given for 'static'"),
        (lambda: integer_product(x, int8), TypeError, "must be int8 or uint8, got torch.float32"),
        (
            lambda: integer_product(uint8.expand(2, 8).repeat(1, 5000), uint8.repeat(1, 5000)),
            ValueError,
            "d_in = 40000, whose sums may leave int32",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
    model = tiny("llama")
    before = logits(model)
    with pytest.raises(ValueError, match="ids"):
        compress_model(model, W8A8("row", "static"), IDS[:0])
    assert torch.equal(logits(model), before)
    assert calibrate(model, IDS)
