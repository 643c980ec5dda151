"""Packed products: equal to the reference, plain in files, honest about what multiplies."""

import copy

import pytest
import torch
from quantization_runs import IDS, logits, shallow
from safetensors import safe_open

from refimpl.checks.tiny import FAMILIES, tiny
from refimpl.lora import add_lora
from refimpl.quantization import (
    GPTQ,
    RTN,
    GridLinear,
    compress_model,
    compressed_names,
    kernels,
    load_compressed,
    save_compressed,
    untie_head,
)
from refimpl.quantization.activations import W8A8, Int8Linear
from refimpl.quantization.awq import awq
from refimpl.quantization.kernels import PackedInt4, PackedInt8, PackedW8A8, pack_for_cpu, unpack_from_cpu

RECIPES = {
    "int8": RTN(8, "restricted"),
    "int8-tensor": RTN(8, "full", "tensor"),
    "int4": RTN(4, group=32),
    "int4-symmetric": RTN(4, "full", 64),
    "int4-row": RTN(4),
    "int4-tensor": RTN(4, "no-clip", "tensor"),
}
W8A8S = {name: W8A8(*name.split("-")) for name in ("row-token", "tensor-tensor")}
NAMES = {"int8": kernels.INT8, "int4": kernels.INT4, "w8a8": kernels.W8A8}


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda kernel: False)


def weight(rows=48, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def tokens(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(recipe, W):
    """A compressed layer with a bias, and the same one packed."""
    plain = recipe("fc", W, None)
    plain.bias = torch.nn.Parameter(tokens(len(W), seed=2), requires_grad=False)
    model = torch.nn.Sequential(plain)
    pack_for_cpu(model)
    return plain, model[0]


def relative(y, expected):
    return float((y - expected).norm() / expected.norm())


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("M", [1, 15, 16, 70])
def test_products_are_the_references_up_to_bfloat16(name, M):
    plain, packed = pair(RECIPES[name], weight())
    assert torch.equal(packed.weight, plain.weight)
    x = tokens(M, 128)
    y, expected = packed(x), plain(x)
    assert y.dtype is torch.float32 and relative(y, expected) < 1e-2
    if kernels.available(kernels.INT8) and kernels.available(kernels.INT4):
        assert packed.kernel in (kernels.INT8, kernels.INT4)
        assert 1e-4 < relative(y, expected), "a product in bfloat16 is not as good as this"
    else:
        assert packed.kernel == kernels.BLOCKS and relative(y, expected) < 1e-5


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_is_lost_where_bfloat16_holds_the_numbers(name):
    """One input of one, scales that are powers of two: the kernel gives W^ itself."""
    plain, _ = pair(RECIPES[name], weight())
    plain.scale = 2.0 ** plain.scale.float().log2().round().half()
    plain.bias = None
    model = torch.nn.Sequential(plain)
    pack_for_cpu(model)
    assert torch.equal(model(torch.eye(128)[:9]), plain.weight.T[:9])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(48, 128), (7, 40), (300, 64)])
def test_without_kernels_blocks_of_rows_are_as_exact_as_float32(no_kernels, monkeypatch, name, shape):
    monkeypatch.setattr(kernels, "BLOCK", 1000)  # more blocks than one
    recipe = RECIPES[name]
    if isinstance(recipe.group, int) and shape[1] % recipe.group:
        recipe = RTN(4, recipe.scheme, 8)
    plain, packed = pair(recipe, weight(*shape))
    assert packed.kernel == kernels.BLOCKS and f"kernel={kernels.BLOCKS}" in repr(packed)
    assert torch.equal(packed.weight, plain.weight) and packed.nbytes() == plain.nbytes()
    for M in (1, 40):
        x = tokens(M, shape[1])
        assert relative(packed(x), plain(x)) < 1e-5


@pytest.mark.parametrize("shape", [(7, 40), (5, 24), (16, 200)])
@pytest.mark.parametrize("recipe", [RTN(8, "full"), RTN(4, group=8)], ids=["int8", "int4"])
def test_shapes_that_the_kernels_do_not_take_go_by_blocks(shape, recipe):
    """Of rows whose length is no multiple of 16, torch's int8 kernel makes wrong sums without a word."""
    plain, packed = pair(recipe, weight(*shape))
    assert packed.kernel == kernels.BLOCKS
    x = tokens(3, shape[1])
    assert relative(packed(x), plain(x)) < 1e-5


@pytest.mark.skipif(not kernels.available(kernels.INT4), reason="this torch has no int4 kernel")
def test_the_int4_kernel_itself_is_exact_in_float32():
    plain, packed = pair(RECIPES["int4"], weight())
    x = tokens(4, 128)
    zero = kernels.unpack_codes(plain.zero, 4, plain.scale.shape).float()
    affine = torch.stack((plain.scale.float(), plain.scale.float() * (8 - zero)), -1).transpose(0, 1)
    y = torch._weight_int4pack_mm_for_cpu(x, packed.packed, 32, affine.contiguous())
    assert relative(y, x @ plain.weight.T) < 1e-5


@pytest.mark.parametrize("name", W8A8S)
def test_integer_products_are_equal_to_those_of_floats(name):
    plain, packed = pair(W8A8S[name], weight(48, 1500))
    assert type(packed) is PackedW8A8
    for x in (tokens(1, 1500), 100 * tokens(2, 30, 1500), tokens(1500), tokens(1500, 6).T):
        assert torch.equal(packed(x), plain(x))


def test_integer_products_without_a_kernel(no_kernels):
    plain, packed = pair(W8A8S["row-token"], weight())
    assert packed.kernel == "products of floats" and torch.equal(
        packed(tokens(3, 128)), plain(tokens(3, 128))
    )


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_inputs_of_any_shape_and_dtype(name):
    plain, packed = pair(RECIPES[name], weight())
    for shape in ((128,), (0, 128), (2, 0, 128), (2, 3, 4, 128)):
        y = packed(tokens(*shape))
        assert y.shape == (*shape[:-1], 48)
        assert y.numel() == 0 or relative(y, plain(tokens(*shape))) < 1e-2
    transposed = tokens(128, 5).T
    assert relative(packed(transposed), plain(transposed)) < 1e-2
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layers = [layer.to(dtype) for layer in (copy.deepcopy(plain), copy.deepcopy(packed))]
        x = tokens(3, 128).to(dtype)
        expected, y = (layer(x) for layer in layers)
        assert y.dtype is dtype and relative(y.float(), expected.float()) < 1e-2
        assert torch.equal(layers[1].weight, plain.weight), "a cast changed W^"
    assert bool(packed(torch.full((1, 128), torch.nan)).isnan().all())


@pytest.mark.parametrize("recipe", [RECIPES["int8"], RECIPES["int4"], W8A8S["row-token"]])
def test_gradients_are_the_references(recipe):
    plain, packed = pair(recipe, weight())
    found = []
    for layer in (plain, packed):
        x = tokens(3, 128).requires_grad_()
        layer(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", [RTN(8, "full"), RTN(4, group=32), GPTQ(4, "full", 32), W8A8()], ids=str)
def test_models_compute_what_they_did(family, recipe):
    changes = {"hidden_size": 64} | ({} if family == "gpt2" else {"intermediate_size": 96})
    model = shallow(family, **changes)
    float_logits = logits(model)
    compress_model(model, recipe, IDS)
    expected, names = logits(model), compressed_names(model)
    state = model.state_dict()
    found = pack_for_cpu(model)
    assert tuple(found) == names == compressed_names(model)
    assert relative(logits(model), expected) < 2e-2
    assert not torch.equal(expected, float_logits)
    if kernels.available(kernels.INT4) and not isinstance(recipe, W8A8) and recipe.bits == 4:
        assert set(found.values()) == {kernels.INT4}
    packed = model.state_dict()
    assert packed.keys() == state.keys() and all(torch.equal(packed[key], state[key]) for key in state)
    assert pack_for_cpu(model) == found  # packed already
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert unpack_from_cpu(model) == names and torch.equal(logits(model), expected)
    assert {type(model.get_submodule(name)) for name in names} <= {GridLinear, Int8Linear}


@pytest.mark.parametrize("recipe", [RTN(8, "full"), RTN(4, group=32), W8A8()], ids=["int8", "int4", "w8a8"])
def test_files_hold_the_plain_storage_and_pack_where_they_are_loaded(tmp_path, recipe, monkeypatch):
    model = shallow("llama", hidden_size=64, intermediate_size=96)
    compress_model(model, recipe, IDS)
    save_compressed(model, tmp_path / "plain")
    pack_for_cpu(model)
    save_compressed(model, tmp_path / "packed")
    with safe_open(tmp_path / "plain", "pt") as a, safe_open(tmp_path / "packed", "pt") as b:
        assert set(a.keys()) == set(b.keys())
        assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())  # noqa: SIM118
    again = shallow("llama", seed=1, hidden_size=64, intermediate_size=96)
    load_compressed(again, tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    kept = {type(again.get_submodule(name)) for name in compressed_names(again)}
    assert kept <= {PackedInt8, PackedInt4, PackedW8A8}
    monkeypatch.setattr(kernels, "available", lambda kernel: False)
    elsewhere = shallow("llama", seed=1, hidden_size=64, intermediate_size=96)
    load_compressed(elsewhere, tmp_path / "packed")
    assert relative(logits(elsewhere), logits(model)) < 2e-2
    layers = [elsewhere.get_submodule(name) for name in compressed_names(elsewhere)]
    assert all(layer.kernel in (kernels.BLOCKS, "products of floats") for layer in layers)


def test_the_bytes_in_memory():
    plain8, packed8 = pair(RECIPES["int8"], weight(256, 256))
    plain4, packed4 = pair(RECIPES["int4-symmetric"], weight(256, 256))
    assert packed8.nbytes() == plain8.nbytes()
    pairs = 4 * 256 * 4 if packed4.kernel == kernels.INT4 else 0  # two bfloat16 for a group of 64
    assert packed4.nbytes() == plain4.nbytes() + pairs
    for layer in (packed8, packed4):
        assert layer.nbytes() == sum(t.untyped_storage().nbytes() for t in (*layer.buffers(), layer.bias))


def test_lora_trains_on_packed_layers():
    model = shallow("llama", hidden_size=64, intermediate_size=96)
    compress_model(model, RTN(4, group=32), IDS)
    twin = copy.deepcopy(model)
    pack_for_cpu(model)
    losses = []
    for each in (model, twin):
        add_lora(each, ("q_proj", "down_proj"), 2, 4, torch.Generator().manual_seed(0))
        loss = each(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.detach())
        assert any(p.grad is not None and p.grad.norm() > 0 for p in each.parameters())
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


def test_what_has_no_packed_product_stays_and_says_why():
    model = shallow("gpt2", hidden_size=64)
    choice = {"c_attn": RTN(3, group=32), "attn.c_proj": RTN(8), "c_fc": RTN(8, "full", 32)}
    rest = RTN(4, "full", group=1)
    compress_model(
        model,
        lambda name, W, stats: next((r for key, r in choice.items() if key in name), rest)(name, W, stats),
        IDS,
    )
    expected, found = logits(model), pack_for_cpu(model)
    reasons = [found[f"transformer.h.0.{name}"] for name in
               ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
    assert reasons == ["unchanged: 3 bits", "unchanged: 8 bits with zero points",
                       "unchanged: 8 bits in groups", "unchanged: groups of odd length"]  # fmt: skip
    assert torch.equal(logits(model), expected)
    scaled = shallow("gpt2", hidden_size=64)
    awq(scaled, IDS, 4, 32)
    assert pack_for_cpu(scaled)["transformer.h.0.mlp.c_proj"] == "unchanged: ScaledLinear"


def test_a_compressed_head_is_packed_too():
    model = shallow("llama", hidden_size=64, intermediate_size=96)
    untie_head(model)
    compress_model(model, RTN(8, "full"), IDS, head=True)
    expected = logits(model)
    assert "lm_head" in pack_for_cpu(model) and relative(logits(model), expected) < 2e-2


# --- refused --------------------------------------------------------------------------------------


def test_bad_models_and_inputs_are_refused():
    with pytest.raises(ValueError, match="no compressed layers"):
        pack_for_cpu(tiny("llama"))
    model = tiny("llama")
    compress_model(model, RTN(8, "full"), IDS)
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\..* is on meta"):
        pack_for_cpu(model)
    assert all(type(model.get_submodule(name)) is GridLinear for name in compressed_names(model))
    assert unpack_from_cpu(tiny("llama")) == ()
    _, packed = pair(RECIPES["int4"], weight())
    for bad in (tokens(3, 127), tokens(3, 129)):
        with pytest.raises(ValueError, match=r"x must be \[\.\.\., 128\]"):
            packed(bad)
    with pytest.raises(ValueError, match="unpack_from_cpu"):
        packed(tokens(3, 128).to("meta"))
    with pytest.raises(ValueError, match="kernel must be one of"):
        kernels.available("_weight_int2pack_mm")


@pytest.mark.parametrize(
    ("cls", "recipe", "match"),
    [
        (PackedInt8, RTN(4, group=32), "4 bits"),
        (PackedInt8, RTN(8), "zero points"),
        (PackedInt8, RTN(8, "full", 32), "groups"),
        (PackedInt4, RTN(3, group=32), "3 bits"),
        (PackedInt4, RTN(4, group=1), "odd"),
    ],
)
def test_layers_of_another_storage_are_refused(cls, recipe, match):
    plain = recipe("fc", weight())
    with pytest.raises(ValueError, match=match):
        cls((48, 128), dict(plain.named_buffers()), **plain.settings)


def test_codes_of_another_shape_are_refused():
    for cls, recipe in ((PackedInt8, RTN(8, "full")), (PackedInt4, RTN(4, group=32))):
        plain = recipe("fc", weight())
        with pytest.raises(ValueError, match="packed must be"):
            cls((49, 128), dict(plain.named_buffers()), **plain.settings)


@pytest.mark.parametrize("name", NAMES.values())
def test_a_kernel_that_is_missing_wrong_or_failing_is_not_available(monkeypatch, name):
    kernels.available.cache_clear()
    try:
        monkeypatch.delattr(torch, name)
        assert not kernels.available(name)
        for broken in (_raises, lambda *args: torch.zeros(1)):
            kernels.available.cache_clear()
            monkeypatch.setattr(torch, name, broken, raising=False)
            assert not kernels.available(name)
    finally:
        monkeypatch.undo()
        kernels.available.cache_clear()


def _raises(*args):
    raise NotImplementedError("no such kernel here")
