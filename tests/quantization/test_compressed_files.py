"""What a compressed model weighs, in memory and on disk, and what comes back from a file."""

import math
import os

import pytest
import torch
from quantization_runs import IDS, logits, shallow

from refimpl.checks.tiny import FAMILIES, tiny
from refimpl.ledger import of_model
from refimpl.models import new
from refimpl.quantization import (
    GPTQ,
    RTN,
    CompressedLinear,
    GridLinear,
    compress_model,
    compressed_names,
    load_compressed,
    save_compressed,
    untie_head,
)
from refimpl.quantization.grids import Grid

# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "scheme", "group"),
    [(2, "full", 8), (3, "asymmetric", 8), (4, "asymmetric", "row"), (8, "restricted", "tensor")],
)
def test_bytes_are_those_of_the_formula_in_memory_and_in_the_file(tmp_path, bits, scheme, group):
    model = tiny("gpt2", hidden_size=64)
    plain = of_model(model).total()
    recipe = RTN(bits, scheme, group)
    report = compress_model(model, recipe, IDS)
    for row in report.rows:
        layer = model.get_submodule(row.name)
        more = layer.bits_per_weight - recipe.bits_per_weight(*row.shape)
        assert 0 <= more * math.prod(row.shape) < 8 * 2 * bits  # the last units of codes and zero points
        tensors = (*layer.buffers(), *layer.parameters())
        assert layer.nbytes() == sum(t.untyped_storage().nbytes() for t in tensors)
    assert report.bytes_before == plain and report.bytes_after == of_model(model).total()
    saved = sum(4 * math.prod(row.shape) + 4 * row.shape[0] - row.nbytes for row in report.rows)
    assert plain - report.bytes_after == saved
    size = save_compressed(model, tmp_path / "m.safetensors")
    assert size == os.path.getsize(tmp_path / "m.safetensors")
    overhead = 200 * len(model.state_dict()) + 2000  # names and offsets
    assert report.bytes_after <= size <= report.bytes_after + overhead
    assert "bits per weight in 12 layers" in str(report)


def test_the_file_of_a_real_model_is_within_two_per_cent_of_its_bytes(tmp_path):
    model = new("llama-nano")
    report = compress_model(model, RTN(4, group=32), IDS[:1])
    size = save_compressed(model, tmp_path / "m.safetensors")
    assert size == pytest.approx(report.bytes_after, rel=0.02)
    assert report.bits == 4 + 20 / 32 and report.bytes_before > 2.2 * report.bytes_after


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [False, True])
def test_a_file_gives_back_every_bit(tmp_path, family, head):
    model = shallow(family)
    if head:
        untie_head(model)
    compress_model(model, GPTQ(3, group=8), IDS, head=head)
    save_compressed(model, tmp_path / "m.safetensors")
    loaded = shallow(family, seed=1)
    assert load_compressed(loaded, tmp_path / "m.safetensors") == compressed_names(model)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert torch.equal(logits(model), logits(loaded))
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight if not head else None
    assert tied or (head and isinstance(loaded.lm_head, GridLinear))


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    from safetensors.torch import save_file

    model = tiny("llama")
    compress_model(model, RTN(4, group=8), IDS)
    file = tmp_path / "m.safetensors"
    save_compressed(model, file)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for target, source, message in [
        (tiny("llama"), tmp_path / "other.safetensors", "was not written by save_compressed"),
        (tiny("gpt2"), file, "the model has no layer model.layers.0"),
        (tiny("llama", intermediate_size=48), file, "gate_proj is .40, 32., the model has .48, 32."),
        (tiny("llama", tie_word_embeddings=False), file, "tied to the embedding, the model's is not"),
        (tiny("llama").bfloat16(), file, "torch.float32 .48, 32., the model has torch.bfloat16"),
        (tiny("llama", vocab_size=50), file, "the model has torch.float32 .50, 32."),
    ]:
        before = {key: t.clone() for key, t in target.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_compressed(target, source)
        after = target.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(ValueError, match="model has no compressed layers"):
        save_compressed(tiny("llama"), file)


# --- the layer ------------------------------------------------------------------------------------


def test_casting_a_model_moves_no_code_and_no_scale():
    model = tiny("llama")
    compress_model(model, RTN(4, group=8), IDS)
    layer = model.get_submodule(compressed_names(model)[0])
    before = {name: t.clone() for name, t in layer.named_buffers()}
    for cast in (model.bfloat16, model.double, model.half, model.float):
        cast()
        for name, t in layer.named_buffers():
            assert torch.equal(t, before[name]) and t.dtype == before[name].dtype
    assert layer(torch.zeros(2, 32, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert layer.to("meta").codes.device.type == "meta"


def test_what_is_stored_is_let_go_of_by_nothing_larger():
    large = torch.zeros(1000, dtype=torch.uint8)
    layer = CompressedLinear((2, 4), {"codes": large[:4]})
    assert layer.codes.untyped_storage().nbytes() == 4 and layer.nbytes() == 4 and layer.bits_per_weight == 4


def test_the_gradient_of_the_input_passes():
    W = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    layer = GridLinear.pack(Grid(4).quantize(W), 4)
    x = torch.ones(2, 16, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 16))
