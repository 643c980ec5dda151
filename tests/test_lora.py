"""LoRA starts from the unchanged model, trains its factors alone, merges exactly, and saves little."""

import copy

import pytest
import torch
from torch import nn

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.lora import (
    LoRA,
    add_lora,
    is_target,
    load_lora,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_lora,
    without_lora,
)

TARGETS = {"gpt2": ("c_attn", "mlp.c_proj"), "llama": ("q_proj", "v_proj", "down_proj")}
IDS = random_ids(2, 8)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def adapted(family, *, rank=4, alpha=8.0, trained=True, **changes):
    """A tiny model with factors, the B drawn instead of 0 if `trained`; gives (plain, adapted)."""
    plain = tiny(family, **changes)
    model = copy.deepcopy(plain)
    add_lora(model, TARGETS.get(family, TARGETS["llama"]), rank, alpha, rng())
    if trained:
        generator = rng(1)
        for name, factor in lora_state_dict(model).items():
            if name.endswith("B"):
                factor.normal_(std=0.05, generator=generator)
    return plain, model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_new_factors_leave_the_logits_bitwise_unchanged(family):
    plain, model = adapted(family, trained=False)
    assert torch.equal(logits(model), logits(plain))
    assert all(A.abs().min() > 0 for name, A in lora_state_dict(model).items() if name.endswith("A"))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_model_computes_the_same_and_is_plain_again(family):
    plain, model = adapted(family)
    separate = logits(model)
    assert (separate - logits(plain)).abs().max() > 1e-2
    names = merge_lora(model)
    torch.testing.assert_close(logits(model), separate, atol=1e-5, rtol=0)
    assert model.state_dict().keys() == plain.state_dict().keys() and len(names) >= 6
    assert not any(isinstance(m, LoRA) or m._forward_hooks for m in model.modules())


def test_the_update_is_alpha_over_rank_times_B_A_on_the_fused_projection_of_gpt2():
    plain, model = adapted("gpt2", rank=4, alpha=8.0)
    state = lora_state_dict(model)
    for name in TARGETS["gpt2"]:
        at = f"transformer.h.1.{'attn.c_attn' if name == 'c_attn' else name}"
        A, B, layer = state[f"{at}.lora.A"], state[f"{at}.lora.B"], plain.get_submodule(at)
        assert (A.shape[1], B.shape[0]) == tuple(layer.weight.shape)  # Conv1D: [in, out]
        x = torch.randn(3, A.shape[1], generator=rng(2))
        by_hand = x @ (layer.weight + 2.0 * (B @ A).T) + layer.bias
        torch.testing.assert_close(model.get_submodule(at)(x), by_hand, atol=1e-5, rtol=0)


def test_removed_and_switched_off_give_back_the_plain_model():
    plain, model = adapted("llama")
    changed = logits(model)
    with without_lora(model):
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), changed)
    remove_lora(model)
    assert torch.equal(logits(model), logits(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_switch_is_set_back_after_an_error_inside():
    _, model = adapted("llama")
    changed = logits(model)
    with pytest.raises(KeyError), without_lora(model):
        raise KeyError
    assert torch.equal(logits(model), changed)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_the_factors_train(family):
    plain, model = adapted(family, trained=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before, after = plain.state_dict(), model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    fresh = lora_state_dict(adapted(family, trained=False)[1])
    assert all(not torch.equal(after[name], fresh[name]) for name in fresh)
    assert logits(model).sub(logits(plain)).abs().max() > 1e-3


def test_a_copy_has_factors_of_its_own():
    _, model = adapted("llama")
    twin, before = copy.deepcopy(model), logits(model)
    remove_lora(twin)
    assert torch.equal(logits(model), before)


def test_file_gives_the_same_logits_and_stable_names(tmp_path):
    plain, model = adapted("gpt2")
    save_lora(model, tmp_path / "lora.safetensors")
    names = load_lora(plain, tmp_path / "lora.safetensors")
    assert torch.equal(logits(plain), logits(model))
    assert names[0] == "transformer.h.0.attn.c_attn"
    assert set(lora_state_dict(plain)) == {f"{name}.lora.{factor}" for name in names for factor in "AB"}
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == set(lora_state_dict(plain))


def saved_numels(model, forward):
    """Elements of every storage that autograd keeps, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    return sorted(kept.values()), result


def test_a_frozen_linear_saves_no_input_and_the_factors_save_x_and_a_thin_product():
    frozen = nn.Linear(32, 48).requires_grad_(False)
    x = torch.randn(5, 32, generator=rng(), requires_grad=True)
    assert saved_numels(frozen, lambda: frozen(x))[0] == []
    model = nn.Sequential(nn.Linear(32, 48))
    assert saved_numels(model, lambda: model(x))[0] == [5 * 32]
    add_lora(model, ["0"], 4, 4.0, rng())
    assert saved_numels(model, lambda: model(x))[0] == [5 * 4, 5 * 32]  # no [48, 32]: BA is never made


def test_layers_below_the_first_trained_one_save_nothing():
    saved = {}
    for layers in (1, 2, 3):
        model = tiny("llama", num_hidden_layers=layers)
        add_lora(model, [f"layers.{layers - 1}.mlp.down_proj"], 4, 4.0, rng())
        saved[layers], _ = saved_numels(model, lambda: model(IDS, labels=IDS).loss)  # noqa: B023
    assert saved[1] == saved[2] == saved[3]
    below = tiny("llama")
    add_lora(below, ["layers.0.mlp.down_proj"], 4, 4.0, rng())
    assert sum(saved_numels(below, lambda: below(IDS, labels=IDS).loss)[0]) > 2 * sum(saved[3])


def checkpointed_gradients(reentrant, input_grads):
    _, model = adapted("llama")
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if not input_grads:  # enabling checkpoints has switched them on
            model.disable_input_require_grads()
    loss = model(IDS, labels=IDS, use_cache=False).loss
    if loss.requires_grad:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_over_frozen_embeddings_lose_every_gradient_unless_the_input_requires_one():
    expected = checkpointed_gradients(None, False)
    assert all(grad is None for grad in checkpointed_gradients(True, False).values())  # the trap
    for reentrant, input_grads in ((True, True), (False, False)):
        got = checkpointed_gradients(reentrant, input_grads)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_factors_follow_dtype_and_device():
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))
    add_lora(layer, ["0"], 2, 2.0, rng())
    assert layer[0].lora.A.is_meta and layer[0].lora.A.dtype is torch.bfloat16


def test_is_target_matches_whole_parts_from_the_end():
    assert is_target("a.q_proj", ["q_proj"]) and is_target("q_proj", ["q_proj"])
    assert not is_target("a.q_proj", ["proj"]) and not is_target("q_proj.a", ["q_proj"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": ()}, ValueError, "targets must be one or more"),
        ({"targets": "q_proj"}, ValueError, "in a list or tuple"),
        ({"targets": ["q_proj", "c_attn"]}, ValueError, "'c_attn'; linear layers are down_proj"),
        ({"targets": ["self_attn"]}, TypeError, "LlamaAttention"),
        ({"targets": ["embed_tokens"]}, TypeError, "Embedding"),
        ({"targets": ["lm_head"]}, ValueError, "tied"),
        ({"rank": 0}, ValueError, "rank must be an integer from 1 to 32"),
        ({"rank": 33}, ValueError, "got 33"),
        ({"rank": 2.0}, ValueError, "got 2.0"),
        ({"alpha": 0}, ValueError, "alpha"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(changes, error, message):
    model = tiny("llama")
    names = model.state_dict().keys()
    with pytest.raises(error, match=message):
        add_lora(model, **({"targets": ["q_proj"], "rank": 4, "alpha": 8.0, "generator": rng()} | changes))
    assert model.state_dict().keys() == names and all(p.requires_grad for p in model.parameters())


def test_adding_twice_and_taking_what_is_not_there_are_refused(tmp_path):
    plain, model = adapted("llama")
    with pytest.raises(ValueError, match="has LoRA factors already"):
        add_lora(model, ["q_proj"], 4, 8.0, rng())
    for function in (merge_lora, remove_lora, lora_state_dict, lambda m: save_lora(m, tmp_path / "x")):
        with pytest.raises(ValueError, match="no LoRA factors"):
            function(plain)
    save_lora(model, tmp_path / "lora")
    for other in (tiny("gpt2"), tiny("llama", num_hidden_layers=1), tiny("llama", hidden_size=64)):
        with pytest.raises(ValueError, match="file"):
            load_lora(other, tmp_path / "lora")
        assert all(p.requires_grad for p in other.parameters())


def test_a_file_of_another_kind_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file(
        {"model.layers.0.self_attn.q_proj.lora.A": torch.zeros(2, 32)}, tmp_path / "half", {"alpha": "1"}
    )
    with pytest.raises(ValueError, match="does not hold pairs"):
        load_lora(tiny("llama"), tmp_path / "half")
