"""Gates on heads and neurons, and models from which the closed ones are cut out."""

import copy

import pytest
import torch
import torch.nn.functional as F

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.lora import add_lora
from refimpl.quantization import RTN, compress_model
from refimpl.quantization.pruning.gating import gated
from refimpl.quantization.pruning.slicing import (
    NoHeads,
    RepeatHeads,
    load_sliced,
    save_sliced,
    slice_model,
)

IDS = random_ids(3, 12)
GROUPED = [f for f in FAMILIES if f != "gpt2"]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def all_kept(bb):
    return torch.ones(bb.n_layers, bb.H).bool(), torch.ones(bb.n_layers, bb.F).bool()


def masks_like(bb, kind):
    """Keep masks: some of both; layers without heads; layers without neurons; nothing at all."""
    heads, neurons = all_kept(bb)
    drawn = torch.rand(bb.n_layers, bb.F, generator=torch.Generator().manual_seed(1))
    if kind == "uneven":
        heads[0, 3], heads[1, :2], heads[2, 0], heads[2, 2] = False, False, False, False
        neurons = drawn > 0.4
    elif kind == "headless":
        heads[0], heads[2, 1] = False, False
    elif kind == "no neurons":
        neurons[0], neurons[2, 5:] = False, False
    elif kind == "nothing":
        heads[:], neurons[:] = False, False
    return heads, neurons


# --- gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_of_one_change_nothing_and_leave_no_hooks(family):
    bb = Backbone(tiny(family))
    plain = logits(bb.model)
    with gated(bb, *(keep.float() for keep in all_kept(bb))):
        assert torch.equal(logits(bb.model), plain)
    assert not any(m._forward_pre_hooks for m in bb.model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_scales_the_columns_of_the_output_matrix(family):
    bb = Backbone(tiny(family))
    generator = torch.Generator().manual_seed(0)
    heads = torch.rand(bb.n_layers, bb.H, generator=generator)
    neurons = torch.rand(bb.n_layers, bb.F, generator=generator)
    scaled = copy.deepcopy(bb.model)
    with torch.no_grad():
        for ref in Backbone(scaled).linears():
            if ref.role == "o":
                ref.weight.mul_(heads[ref.layer].repeat_interleave(bb.D))
            if ref.role == "down":
                ref.weight.mul_(neurons[ref.layer])
    with gated(bb, heads, neurons), torch.no_grad():
        torch.testing.assert_close(logits(bb.model), logits(scaled), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bb.forward(IDS), logits(scaled), rtol=1e-4, atol=1e-4)


def test_gates_of_a_batch_and_nested_gates():
    bb = Backbone(tiny("llama"))
    tables = torch.rand(3, bb.n_layers, bb.H, generator=torch.Generator().manual_seed(0))
    with gated(bb, tables):
        together = logits(bb.model)
    for row, table in enumerate(tables):
        with gated(bb, table):
            torch.testing.assert_close(logits(bb.model)[row], together[row])
    with gated(bb, tables[0]), gated(bb, tables[1]):
        nested = logits(bb.model)
    with gated(bb, tables[0] * tables[1]):
        torch.testing.assert_close(logits(bb.model), nested)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_gradient_of_a_gate_is_its_finite_difference(family):
    bb = Backbone(tiny(family).double())
    heads = torch.ones(bb.n_layers, bb.H, dtype=torch.float64, requires_grad=True)
    neurons = torch.ones(bb.n_layers, bb.F, dtype=torch.float64, requires_grad=True)

    def loss():
        with gated(bb, heads, neurons):  # bb: transformers' eager attention and its loss are in float32
            return F.cross_entropy(bb.forward(IDS)[:, :-1].transpose(1, 2), IDS[:, 1:])

    grads = torch.autograd.grad(loss(), (heads, neurons))
    for table, grad in zip((heads, neurons), grads, strict=True):
        for l, unit in ((0, 0), (2, 3)):
            ends = []
            for step in (1e-2, -1e-2):  # LLaMA norms compute in float32, whatever the model
                with torch.no_grad():
                    table[l, unit] += step
                    ends.append(float(loss()))
                    table[l, unit] -= step
            assert float(grad[l, unit]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-3, abs=3e-5)


@pytest.mark.parametrize(
    ("heads", "neurons", "error", "words"),
    [
        (torch.ones(3, 5), None, ValueError, r"heads: expected \[3, 4\] or \[B, 3, 4\], got \[3, 5\]"),
        (torch.ones(4), None, ValueError, "heads"),
        (torch.ones(3, 4).bool(), None, TypeError, "float"),
        (None, torch.ones(3, 41), ValueError, "neurons"),
        (None, [[1.0]], TypeError, "neurons"),
    ],
)
def test_gates_of_another_type_or_shape_are_refused(heads, neurons, error, words):
    bb = Backbone(tiny("llama"))
    with pytest.raises(error, match=words), gated(bb, heads, neurons):
        pass
    assert not any(m._forward_pre_hooks for m in bb.model.modules())


def test_hooks_are_removed_after_an_error():
    bb = Backbone(tiny("llama"))
    with pytest.raises(ZeroDivisionError), gated(bb, torch.zeros(3, 4)):
        raise ZeroDivisionError
    assert not any(m._forward_pre_hooks for m in bb.model.modules())


# --- slices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "uneven", "headless", "no neurons", "nothing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sliced_model_computes_what_the_gated_one_does(family, kind):
    bb = Backbone(tiny(family))
    heads, neurons = masks_like(bb, kind)
    with gated(bb, heads.float(), neurons.float()):
        expected = logits(bb.model)
    before = bb.model.num_parameters()
    slice_model(bb.model, heads, neurons)
    torch.testing.assert_close(logits(bb.model), expected, rtol=0, atol=1e-4)
    assert before - bb.model.num_parameters() == _saved(bb, heads, neurons)


def _saved(bb, heads, neurons):
    """Parameters of what goes: a head's rows and columns, biases included, and a neuron's."""
    queries = int((~heads).sum())
    keys = queries if bb.is_gpt2 else int((~heads.unflatten(1, (bb.G, -1)).any(-1)).sum())
    lost = int((~neurons).sum())
    if bb.is_gpt2:
        return queries * bb.D * (4 * bb.d + 3) + lost * (2 * bb.d + 1)
    biases = bb.D * (queries + 2 * keys) * (bb.family == "Qwen2ForCausalLM")
    return 2 * (queries + keys) * bb.D * bb.d + 3 * lost * bb.d + biases


@pytest.mark.parametrize(
    ("kept", "stored", "given", "share"),
    [
        ("11110000", 1, 1, 4),  # a K/V head went
        ("11001100", 2, 2, 2),  # even: two queries each
        ("11111100", 2, 3, 2),  # four and two: the first twice
        ("11100001", 2, 4, 1),  # three and one
    ],
)
def test_kv_heads_are_repeated_where_queries_are_uneven(kept, stored, given, share):
    model = tiny("llama", num_attention_heads=8, hidden_size=64)
    bb = Backbone(model)
    heads, neurons = all_kept(bb)
    heads[1] = torch.tensor([c == "1" for c in kept])
    with gated(bb, heads.float()):
        expected = logits(model)
    slice_model(model, heads, neurons)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    attn = model.model.layers[1].self_attn
    assert attn.num_key_value_groups == share and isinstance(attn.k_proj, RepeatHeads) == (given > stored)
    assert sum(p.numel() for p in attn.k_proj.parameters()) == stored * bb.D * bb.d
    cache = model(IDS, use_cache=True).past_key_values
    assert cache.layers[1].keys.shape[1] == given and cache.layers[0].keys.shape[1] == 2


@pytest.mark.parametrize("kind", ["uneven", "headless"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sliced_model_generates_with_its_cache_as_without(family, kind):
    model = tiny(family)
    slice_model(model, *masks_like(Backbone(model), kind))
    one = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=True, eos_token_id=None)
    other = model.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False, eos_token_id=None)
    assert one.shape == (3, 18) and torch.equal(one, other)
    cache = model(IDS[:, :8], use_cache=True).past_key_values
    assert cache.get_seq_length() == 8  # the next position, also where layer 0 has no heads
    rest = model(IDS[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(IDS).logits[:, 8:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", GROUPED)
def test_backbone_still_works_on_llama_like_models_with_a_head_in_every_layer(family):
    model = tiny(family)
    slice_model(model, *masks_like(Backbone(model), "uneven"))
    with torch.no_grad():
        torch.testing.assert_close(Backbone(model).forward(IDS), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "kind", "error"),
    [
        ("llama", "headless", AttributeError),
        ("gpt2", "headless", AttributeError),
        ("gpt2", "uneven", (ValueError, RuntimeError)),
    ],
)
def test_backbone_raises_where_it_does_not_work(family, kind, error):
    model = tiny(family)
    slice_model(model, *masks_like(Backbone(model), kind))
    with pytest.raises(error):
        Backbone(model).forward(IDS)


def test_a_sliced_model_can_be_compressed_and_trained_unless_kv_heads_are_repeated():
    even, uneven = tiny("llama"), tiny("llama")
    heads, neurons = all_kept(Backbone(even))
    heads[1, ::2], neurons[:, ::3] = False, False
    slice_model(even, heads, neurons)
    slice_model(uneven, *masks_like(Backbone(uneven), "uneven"))
    added = add_lora(copy.deepcopy(even), ["k_proj"], 2, 4, torch.Generator())
    assert len(added) == 3
    assert compress_model(even, RTN(8, group="row"), IDS).bits > 8
    for use in (
        lambda: add_lora(uneven, ["k_proj"], 2, 4, torch.Generator()),
        lambda: compress_model(uneven, RTN(8, group=8), IDS),
    ):
        with pytest.raises(TypeError, match="RepeatHeads"):
            use()


@pytest.mark.parametrize("kind", ["uneven", "headless", "nothing"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sliced_model_survives_a_file(family, kind, tmp_path):
    model, fresh = tiny(family), tiny(family, seed=1)
    slice_model(model, *masks_like(Backbone(model), kind))
    save_sliced(model, tmp_path / "sliced.safetensors")
    load_sliced(fresh, tmp_path / "sliced.safetensors")
    assert torch.equal(logits(fresh), logits(model))
    assert fresh.num_parameters() == model.num_parameters()
    assert all(torch.equal(a, b) for a, b in zip(fresh.kept, model.kept, strict=True))


def test_files_that_do_not_fit_are_refused_and_nothing_changes(tmp_path):
    from safetensors.torch import save_file

    file, other = tmp_path / "sliced.safetensors", tmp_path / "other.safetensors"
    model = tiny("llama")
    with pytest.raises(ValueError, match="not sliced"):
        save_sliced(model, file)
    slice_model(model, *masks_like(Backbone(model), "uneven"))
    save_sliced(model, file)
    for wrong in (tiny("llama", num_hidden_layers=2), tiny("llama", vocab_size=64), tiny("gpt2")):
        before = logits(wrong)
        with pytest.raises(ValueError):
            load_sliced(wrong, file)
        assert torch.equal(logits(wrong), before) and "kept" not in vars(wrong)
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="not written by save_sliced"):
        load_sliced(tiny("llama"), other)


def test_bad_masks_and_models_are_refused_and_nothing_changes():
    model = tiny("llama")
    before = logits(model)
    heads, neurons = all_kept(Backbone(model))
    with pytest.raises(TypeError, match="heads: expected a BoolTensor"):
        slice_model(model, heads.float(), neurons)
    with pytest.raises(ValueError, match=r"neurons: expected \[3, 40\], got \[3, 39\]"):
        slice_model(model, heads, neurons[:, 1:])
    with pytest.raises(ValueError, match=r"heads: expected \[3, 4\], got \[2, 4\]"):
        slice_model(model, heads[1:], neurons)
    assert torch.equal(logits(model), before)
    with_lora = tiny("llama")
    add_lora(with_lora, ["down_proj"], 2, 4, torch.Generator())
    with pytest.raises(ValueError, match="LoRA"):
        slice_model(with_lora, heads, neurons)
    compressed = tiny("llama")
    compress_model(compressed, RTN(8, group=8), IDS)
    with pytest.raises(TypeError, match="GridLinear"):
        slice_model(compressed, heads, neurons)
    slice_model(model, heads, neurons)
    with pytest.raises(ValueError, match="sliced already"):
        slice_model(model, heads, neurons)
    with pytest.raises(TypeError, match="not supported"):
        slice_model(torch.nn.Linear(2, 2), heads, neurons)


def test_attention_without_heads_is_its_bias():
    bias = torch.arange(4.0)
    out, weights = NoHeads(bias, 0)(torch.ones(2, 3, 4))
    assert torch.equal(out, bias.expand(2, 3, 4)) and weights is None
