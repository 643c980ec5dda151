"""trace and ablate. The identities themselves are in `refimpl/checks/start/trace.py`."""

import pytest
import torch

from refimpl.backbone import Backbone
from refimpl.checks.tiny import FAMILIES, HEADS, LAYERS, random_ids, tiny
from refimpl.trace import SITES, ablate, trace

each_family = pytest.mark.parametrize("name", FAMILIES)


def all_sites(n_layers):
    per_layer = [(name, l) for name in SITES if name not in ("embed", "ln_final") for l in range(n_layers)]
    return [("embed", 0), *per_layer, ("ln_final", 0)]


@each_family
def test_residual_stream_adds_up_exactly(name):
    acts = trace(tiny(name), random_ids(2, 9), record=all_sites(LAYERS)).acts
    for l in range(LAYERS):
        assert torch.equal(acts["resid_mid", l], acts["resid_pre", l] + acts["attn_out", l])
        assert torch.equal(acts["resid_post", l], acts["resid_mid", l] + acts["mlp_out", l])
        if l:
            assert torch.equal(acts["resid_pre", l], acts["resid_post", l - 1])


@each_family
def test_an_edited_site_is_recorded_as_edited_and_moves_only_what_comes_after(name):
    model, ids = tiny(name), random_ids(2, 9)
    sites = all_sites(LAYERS)
    base = trace(model, ids, record=sites)
    edited = trace(model, ids, record=sites, edit={("mlp_out", 1): torch.zeros_like})
    assert not edited.acts["mlp_out", 1].any()
    assert torch.equal(edited.acts["resid_post", 1], edited.acts["resid_mid", 1])
    before = [s for s in sites if s[1] == 0 and s[0] != "ln_final"] + [("resid_mid", 1), ("mlp_post", 1)]
    for site in before:
        assert torch.equal(edited.acts[site], base.acts[site]), site
    assert not torch.equal(edited.acts["resid_pre", 2], base.acts["resid_pre", 2])


@each_family
def test_an_edit_of_one_position_does_not_reach_earlier_ones(name):
    model, ids = tiny(name), random_ids(1, 9)

    def move(x):
        x = x.clone()
        x[:, 5, :7] += 1
        return x

    base, moved = trace(model, ids).logits, trace(model, ids, edit={("resid_pre", 1): move}).logits
    assert torch.equal(moved[:, :5], base[:, :5])
    assert ((moved[:, 5:] - base[:, 5:]).abs().amax(-1) > 1e-4).all()


@each_family
def test_patching_a_whole_residual_from_another_run_restores_that_run(name):
    model = tiny(name)
    clean, corrupt = random_ids(1, 9), random_ids(1, 9, seed=1)
    for site in all_sites(LAYERS):
        if site[0] not in ("embed", "resid_pre", "resid_mid", "resid_post", "ln_final"):
            continue
        kept = trace(model, clean, record=[site]).acts[site]
        patched = trace(model, corrupt, edit={site: lambda x, kept=kept: kept}).logits
        # All positions of one residual site are the whole state of the run at that depth.
        torch.testing.assert_close(patched, trace(model, clean).logits, rtol=0, atol=1e-5)


def test_doubling_v_in_one_kv_head_doubles_z_in_the_query_heads_that_share_it():
    model, ids = tiny("llama"), random_ids(2, 7)            # 4 query heads, 2 KV heads

    def double_head_1(v):
        return v * torch.tensor([1.0, 2.0])[:, None]

    base = trace(model, ids, record=[("z", 1), ("v", 1)])
    edited = trace(model, ids, record=[("z", 1), ("v", 1)], edit={("v", 1): double_head_1})
    assert tuple(base.acts["v", 1].shape[2:]) == (2, 8) and tuple(base.acts["z", 1].shape[2:]) == (HEADS, 8)
    factor = torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None]
    torch.testing.assert_close(edited.acts["z", 1], base.acts["z", 1] * factor, rtol=0, atol=1e-6)


def test_all_sites_but_the_pattern_work_without_eager_attention():
    model, ids = tiny("llama", attention="sdpa"), random_ids(1, 6)
    sites = [s for s in all_sites(LAYERS) if s[0] != "pattern"]
    assert set(trace(model, ids, record=sites).acts) == set(sites)
    with pytest.raises(ValueError, match="'pattern' needs eager attention, the model uses 'sdpa'"):
        trace(model, ids, record=[("pattern", 0)])


@each_family
def test_traces_do_not_depend_on_the_callers_grad_mode(name):
    model, ids = tiny(name), random_ids(1, 6)
    expected = trace(model, ids, record=[("z", 1)])
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            result = trace(model, ids, record=[("z", 1)], edit={("z", 0): lambda x: x})
        assert torch.equal(result.logits, expected.logits) and not result.logits.requires_grad
        assert torch.equal(result.acts["z", 1], expected.acts["z", 1])


def test_gradients_flow_through_edits():
    model, ids = tiny("gpt2"), random_ids(1, 6)
    gate = torch.ones(HEADS, 1, requires_grad=True)
    trace(model, ids, edit={("z", 1): lambda z: z * gate}, grad=True).logits.square().sum().backward()
    assert gate.grad.abs().min() > 0


def test_the_users_own_hooks_stay_and_see_the_run():
    model, ids, seen = tiny("llama"), random_ids(1, 6), []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda m, a, out: seen.append(out))
    result = trace(model, ids, record=[("mlp_out", 1)])
    assert len(seen) == 1 and torch.equal(seen[0], result.acts["mlp_out", 1])
    model(ids)
    assert len(seen) == 2
    handle.remove()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"record": [("resid", 0)]}, "expected .name, layer. with a name of embed, resid_pre, v, pattern"),
    ({"record": ["resid_pre"]}, "expected .name, layer."),
    ({"record": [["z", 1]]}, "expected .name, layer."),
    ({"record": [("z", 3)]}, "'z' has layers 0..2"),
    ({"record": [("ln_final", 2)]}, "'ln_final' has layers 0..0"),
    ({"edit": {("pattern", 0): lambda x: x}}, "record only"),
    ({"edit": {("z", 0): lambda x: None}}, "got NoneType"),
    ({"edit": {("z", 0): lambda x: x.double()}}, "float64"),
    ({"inputs_embeds": torch.zeros(1, 6, 31)}, r"expected shape \[1, 6, 32\], got \[1, 6, 31\]"),
])  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        trace(tiny("gpt2"), random_ids(1, 6), **arguments)


def test_ids_may_be_left_out_with_inputs_embeds_only():
    model = tiny("gpt2")
    embeds = model.get_input_embeddings()(random_ids(1, 6)).detach()
    assert torch.equal(trace(model, None, inputs_embeds=embeds).logits, trace(model, random_ids(1, 6)).logits)
    with pytest.raises(ValueError, match="give token ids"):
        trace(model, None)


# --- ablate -------------------------------------------------------------------------------------------------
def run_edit(mask, mode, x):
    return ablate({("z", 0): mask}, mode)["z", 0](x)


def test_ablation_modes_by_hand():
    x = torch.arange(12.0).view(3, 2, 2)                    # [B, T, F]
    mask = torch.tensor([False, True])
    assert run_edit(mask, "zero", x)[..., 1].tolist() == [[0, 0], [0, 0], [0, 0]]
    assert run_edit(mask, "mean", x)[..., 1].tolist() == [[6, 6], [6, 6], [6, 6]]
    assert run_edit(mask, "resample", x)[..., 1].tolist() == [[9, 11], [1, 3], [5, 7]]
    for mode in ("zero", "mean", "resample"):
        assert torch.equal(run_edit(mask, mode, x)[..., 0], x[..., 0]), "unmasked units stay"
        assert torch.equal(run_edit(torch.zeros(2, dtype=torch.bool), mode, x), x)


@each_family
@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_ablated_heads_and_neurons_change_the_logits_and_only_they_change(name, mode):
    model, ids = tiny(name), random_ids(3, 8)
    F = Backbone(model).F
    heads = torch.tensor([False, True, False, True])[:, None]
    neurons = torch.arange(F) % 2 == 0
    edit = ablate({("z", 0): heads, ("mlp_post", 2): neurons}, mode)
    sites = [("z", 0), ("mlp_post", 2)]
    base, cut = trace(model, ids, record=sites), trace(model, ids, record=sites, edit=edit)
    assert (base.logits - cut.logits).abs().max() > 1e-3
    assert torch.equal(base.acts["z", 0][:, :, [0, 2]], cut.acts["z", 0][:, :, [0, 2]])
    assert not torch.equal(base.acts["z", 0][:, :, [1, 3]], cut.acts["z", 0][:, :, [1, 3]])
    nothing = ablate({("z", 0): torch.zeros_like(heads), ("mlp_post", 2): torch.zeros_like(neurons)}, mode)
    assert torch.equal(trace(model, ids, edit=nothing).logits, base.logits)


def test_bad_ablations_are_refused():
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="mode: 'noise'; allowed: zero, mean, resample"):
        ablate({}, "noise")
    with pytest.raises(TypeError, match="expected a boolean tensor, got torch.float32"):
        ablate({("z", 0): torch.ones(3)}, "zero")
    with pytest.raises(ValueError, match=r"\[4\] does not broadcast to \[1, 2, 3\]"):
        run_edit(torch.ones(4, dtype=torch.bool), "zero", x)
    with pytest.raises(ValueError, match="only one"):
        run_edit(torch.ones(3, dtype=torch.bool), "resample", x)


# --- the trained models -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama-mini", "gpt2-mini", "llama-nano"])
def test_trace_on_a_bundled_model(name, bundled):
    model, tokenizer = bundled(name)
    ids = torch.tensor([[0, *tokenizer("The cat sat on the mat and looked at the moon.")["input_ids"]]])
    with torch.no_grad():
        base = model(ids).logits
    L = model.config.num_hidden_layers
    result = trace(model, ids, record=[("resid_post", L - 1), ("ln_final", 0)])
    assert torch.equal(result.logits, base)
    bb = Backbone(model)
    with torch.no_grad():
        logits = bb.head(bb.ln_final(result.acts["resid_post", L - 1]))
    torch.testing.assert_close(logits, base, rtol=0, atol=1e-5)
    assert (trace(model, ids, edit={("mlp_out", L // 2): torch.zeros_like}).logits - base).abs().max() > 1e-2
