"""Backbone: one view of four families. The identities are in `refimpl/checks/start/backbone.py`."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from refimpl.backbone import Backbone, LinearRef, family, left_padded_positions, raw_mask, use_attention
from refimpl.checks.tiny import FAMILIES, HEADS, LAYERS, WIDTH, random_ids, tiny

each_family = pytest.mark.parametrize("name", FAMILIES)


def left_padding(ids, n_pads):
    mask = torch.ones_like(ids)
    for row, n in enumerate(n_pads):
        mask[row, :n] = 0
    return mask


# --- the class ----------------------------------------------------------------------------------------------
def test_importing_any_part_of_refimpl_imports_no_part_of_transformers():
    program = (
        "import importlib, pkgutil, sys, refimpl\n"
        "for info in pkgutil.walk_packages(refimpl.__path__, 'refimpl.'):\n"
        "    if info.name.endswith('__main__') or '._data' in info.name: continue\n"
        "    importlib.import_module(info.name)\n"
        "    bad = [m for m in sys.modules if m.split('.')[0] == 'transformers']\n"
        "    assert not bad, f'{info.name} imports {bad[0]}'\n"
        "print(sorted(m for m in sys.modules if m.startswith('refimpl.')))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "refimpl.backbone" in done.stdout and "refimpl.trace" in done.stdout


@pytest.mark.parametrize("other", [nn.Linear(2, 2), None, "gpt2"])
def test_another_class_gets_a_type_error_that_lists_the_supported_ones(other):
    with pytest.raises(TypeError, match="GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen2"):
        Backbone(other)


def test_a_class_that_only_has_the_right_name_is_refused():
    impostor = type("LlamaForCausalLM", (nn.Module,), {})
    with pytest.raises(TypeError, match="not supported"):
        family(impostor())


def test_dimensions_of_each_family(tiny_models):
    found = {name: Backbone(model) for name, model in tiny_models.items()}
    assert {name: (bb.H, bb.G, bb.D, bb.d, bb.F) for name, bb in found.items()} == {
        "gpt2": (4, 4, 8, 32, 128), "llama": (4, 2, 8, 32, 40), "mistral": (4, 2, 16, 32, 40),
        "qwen2": (4, 2, 8, 32, 40),
    }  # fmt: skip
    assert [found["mistral"].window(l) for l in range(LAYERS)] == [5, 5, 5]
    assert found["llama"].window(0) is None and found["gpt2"].inv_freq is None


def test_rope_with_frequencies_that_depend_on_length_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError, match="'dynamic' changes its frequencies with length; allowed: .*'yarn'"):
        Backbone(tiny("llama", rope_parameters=rope))


def test_gpt2_with_cross_attention_is_refused():
    with pytest.raises(ValueError, match="add_cross_attention"):
        Backbone(tiny("gpt2", add_cross_attention=True))


@torch.no_grad()
@pytest.mark.parametrize("rope", [
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
], ids=lambda rope: rope["rope_type"])  # fmt: skip
def test_scaled_rotary_types_equal_the_model_and_unrot_undoes_them(rope):
    model, ids = tiny("llama", rope_parameters=rope), random_ids(2, 20)
    bb = Backbone(model)
    torch.testing.assert_close(bb.forward(ids), model(ids).logits, rtol=0, atol=1e-5)
    q = bb.qkv(0, bb.ln1(0, bb.embed(ids, torch.arange(20))))[0]
    torch.testing.assert_close(bb.unrot(bb.rot(q, torch.arange(20)), torch.arange(20)), q, rtol=0, atol=1e-5)


@torch.no_grad()
@each_family
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.5)])
def test_other_dtypes(name, dtype, tolerance):
    model, ids = tiny(name, attention="sdpa").to(dtype), random_ids(2, 9)
    logits = Backbone(model).forward(ids)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=tolerance)


@torch.no_grad()
@each_family
def test_left_padded_positions_give_each_row_what_it_gets_alone(name):
    model, ids = tiny(name), random_ids(3, 10)
    mask = left_padding(ids, (0, 2, 5))
    logits = Backbone(model).forward(ids, mask, left_padded_positions(mask))
    for row, n in enumerate((0, 2, 5)):
        alone = model(ids[row : row + 1, n:]).logits[0]
        torch.testing.assert_close(logits[row, n:], alone, rtol=0, atol=2e-5)


@torch.no_grad()
@each_family
def test_dropout_is_never_applied(name):
    fields = ("attn_pdrop", "resid_pdrop", "embd_pdrop") if name == "gpt2" else ("attention_dropout",)
    dropout = dict.fromkeys(fields, 0.5)
    model, ids = tiny(name, **dropout), random_ids(2, 8)
    expected = model(ids).logits
    torch.testing.assert_close(Backbone(model.train()).forward(ids), expected, rtol=0, atol=1e-5)


@each_family
def test_gradients_reach_every_parameter_but_an_unused_position(name):
    model = tiny(name)
    Backbone(model).forward(random_ids(2, 8)).logsumexp(-1).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_modules_replaced_later_are_used():
    model, ids = tiny("llama"), random_ids(1, 6)
    bb = Backbone(model)
    model.model.layers[1].mlp.down_proj = nn.Linear(40, WIDTH, bias=True)
    torch.testing.assert_close(bb.forward(ids), model(ids).logits, rtol=0, atol=1e-5)
    assert bb.linears()[-8].module is model.model.layers[1].mlp.down_proj


@torch.no_grad()
@each_family
def test_writing_into_a_linear_weight_writes_into_the_model(name):
    model, ids = tiny(name), random_ids(1, 6)
    bb = Backbone(model)
    before = bb.forward(ids)
    ref = next(r for r in bb.linears() if r.layer == 1 and r.role == "k")
    assert isinstance(ref, LinearRef) and tuple(ref.weight.shape) == (bb.G * bb.D, bb.d)
    ref.weight.mul_(2)
    ref.bias is not None and ref.bias.zero_()
    assert (model(ids).logits - before).abs().max() > 1e-3
    torch.testing.assert_close(bb.forward(ids), model(ids).logits, rtol=0, atol=1e-5)


def test_attention_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[2, 5\], got \[2, 4\]"):
        Backbone(tiny("llama")).forward(random_ids(2, 5), torch.ones(2, 4))


def test_positions_beyond_gpt2s_table_are_refused():
    bb = Backbone(tiny("gpt2"))
    with pytest.raises(ValueError, match="pos: 30..34 leaves the learned positions 0..31"):
        bb.embed(random_ids(1, 5), torch.arange(30, 35))


def test_causal_attention_without_a_mask_needs_as_many_keys_as_queries():
    bb = Backbone(tiny("llama"))
    q, k = torch.zeros(1, 4, 1, bb.D), torch.zeros(1, 2, 5, bb.D)
    with pytest.raises(ValueError, match="mask: None means causal, but there are 1 queries, 5 keys"):
        bb.attention(0, q, k, k, None)


# --- use_attention ------------------------------------------------------------------------------------------
def plain_attention(bb, calls):
    """Attention written from the definition; records what it was called with."""

    def attention(module, q, k, v, mask, dropout=0.0, scaling=None, **kw):
        calls.append({"layer": module.layer_idx, "mask": mask, "k": tuple(k.shape), "scaling": scaling})
        S, T = k.shape[2], q.shape[2]
        i, j = torch.arange(S - T, S)[:, None], torch.arange(S)[None]
        visible = (j <= i) & (j > i - (bb.window(module.layer_idx) or S))
        if mask is not None:                          # a sliding cache keeps fewer keys than were seen
            visible = visible & mask.bool()[:, None, None, -S:]
        k, v = (t.repeat_interleave(bb.H // bb.G, dim=1) for t in (k, v))
        weights = (q @ k.mT * scaling).masked_fill(~visible, -1e9).softmax(-1)
        return (weights @ v).transpose(1, 2), weights

    return attention


@torch.no_grad()
@each_family
def test_own_attention_gives_the_models_logits_also_on_padded_rows(name):
    model, ids, calls = tiny(name, attention="sdpa"), random_ids(2, 9), []
    bb = Backbone(model)
    mask = left_padding(ids, (4, 0))
    real, expected = mask.bool(), model(ids, attention_mask=mask).logits
    with use_attention(model, plain_attention(bb, calls)):
        logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
    assert [c["layer"] for c in calls] == list(range(LAYERS))
    assert calls[0]["k"] == (2, bb.G, 9, bb.D), "keys arrive with their G heads"
    assert torch.equal(calls[0]["mask"].bool(), real), "the 2-D padding mask arrives"
    assert calls[0]["scaling"] == pytest.approx(bb.D**-0.5)


@torch.no_grad()
@each_family
def test_generate_works_inside_use_attention(name):
    model, ids, calls = tiny(name, attention="sdpa"), random_ids(2, 6), []
    mask = left_padding(ids, (3, 0))
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **arguments)
    with use_attention(model, plain_attention(Backbone(model), calls)):
        generated = model.generate(ids, **arguments)
    assert torch.equal(generated, expected) and calls


@torch.no_grad()
@each_family
def test_implementation_is_restored_after_success_exception_and_nesting(name):
    model, ids = tiny(name, attention="sdpa"), random_ids(1, 5)
    expected = model(ids).logits

    def broken(*args, **kw):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), use_attention(model, broken):
        model(ids)
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(ids).logits, expected)

    outer, inner = [], []
    with use_attention(model, plain_attention(Backbone(model), outer)):
        with use_attention(model, plain_attention(Backbone(model), inner)):
            model(ids)
        assert (len(outer), len(inner)) == (0, LAYERS)
        model(ids)
    assert (len(outer), len(inner)) == (LAYERS, LAYERS)
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_two_models_keep_their_own_attention():
    a, b, ids, calls_a, calls_b = tiny("llama"), tiny("gpt2"), random_ids(1, 5), [], []
    own_a, own_b = plain_attention(Backbone(a), calls_a), plain_attention(Backbone(b), calls_b)
    with use_attention(a, own_a), use_attention(b, own_b):
        a(ids)
        assert (len(calls_a), len(calls_b)) == (LAYERS, 0)
        b(ids)
    assert (len(calls_a), len(calls_b)) == (LAYERS, LAYERS)


@torch.no_grad()
def test_mask_function_decides_what_arrives_as_mask():
    model, ids, calls = tiny("llama"), random_ids(1, 5), []
    seen = torch.tensor([[0, 1, 1, 1, 1]])
    with use_attention(model, plain_attention(Backbone(model), calls), lambda **kw: seen):
        model(ids)
    assert calls[0]["mask"] is seen
    assert raw_mask(attention_mask=seen, kv_length=5) is seen


@pytest.mark.parametrize(("function", "mask_function"), [(None, raw_mask), (print, "sdpa")])
def test_use_attention_refuses_what_cannot_be_called(function, mask_function):
    model = tiny("llama", attention="sdpa")
    with pytest.raises(TypeError, match="expected a callable"), use_attention(model, function, mask_function):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_use_attention_refuses_other_models():
    with pytest.raises(TypeError, match="not supported"), use_attention(nn.Linear(2, 2), print):
        pass


# --- the trained models -------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-mini", "gpt2-mini", "llama-nano"])
def test_bundled_model_equals_its_backbone(name, bundled):
    model, tokenizer = bundled(name)
    bb = Backbone(model)
    text = "The old woman gave the boy a red key, and the boy ran down to the river to find his friend."
    ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
    torch.testing.assert_close(bb.forward(ids), model(ids).logits, rtol=0, atol=1e-5)
    short = torch.cat((torch.ones(1, 5, dtype=torch.long), ids[:, :-5]), dim=1)
    batch = torch.cat((ids, short))
    mask = left_padding(batch, (0, 5))
    for positions in (None, left_padded_positions(mask)):
        logits = bb.forward(batch, mask, positions)
        expected = model(batch, attention_mask=mask, position_ids=positions).logits
        real = mask.bool()
        torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-5)
    assert bb.H * bb.D == bb.d and bb.H % bb.G == 0 and HEADS == 4
