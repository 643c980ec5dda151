"""The byte ledger against closed forms, saved files and hand-counted cases."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from refimpl import checks
from refimpl.checks.tiny import tiny
from refimpl.ledger import Item, Ledger, of_file, of_model, of_tensors


def test_the_check_passes():
    checks.run("ledger")


def gpt2_parameters(V, S, h, L):
    return V * h + S * h + L * (12 * h * h + 13 * h) + 2 * h


def llama_parameters(V, h, f, L, a, kv, d, tied):
    return V * h * (1 if tied else 2) + L * (2 * a * d * h + 2 * kv * d * h + 3 * h * f + 2 * h) + h


def test_parameters_of_gpt2_follow_the_closed_form():
    import transformers

    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    ledger = of_model(model)
    assert gpt2_parameters(50257, 1024, 768, 12) == 124_439_808
    assert sum(i.numel for i in ledger.items if i.kind == "weight") == 124_439_808
    assert ledger.total("weight") == ledger.total("weight", "resident") == 4 * 124_439_808


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_llama_follow_the_closed_form_tied_and_untied(tied):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=256, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=768, max_position_embeddings=1024, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    n = llama_parameters(4096, 256, 768, 12, 8, 2, 32, tied)
    assert of_model(model).total("weight") == 4 * n
    assert of_model(model, stored_as=torch.bfloat16).total("weight") == 2 * n
    assert of_model(model, stored_as=torch.bfloat16).total("weight", "resident") == 4 * n
    doubled = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
    assert doubled - n == (4096 * 256 if tied else 0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_payload_is_what_a_saved_file_holds(family, tied, tmp_path):
    model = tiny(family, tie_word_embeddings=tied)
    path = tmp_path / "model.safetensors"
    save_model(model, str(path), metadata={"format": "pt"})
    header = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert of_model(model).total() == of_file(path).total() == path.stat().st_size - 8 - header
    assert of_file(path).total(view="resident") == 0


def test_buffers_left_out_of_files_are_resident_only():
    ledger = of_model(tiny("llama"))
    assert ledger.by_kind("payload")["buffer"] == 0 < ledger.by_kind("resident")["buffer"]


def test_sum_over_layers_is_the_total():
    model = tiny("llama", tie_word_embeddings=False)
    parts = [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head]
    parts.append(model.model.rotary_emb)
    total = sum((of_model(part) for part in parts), Ledger())
    for view in ("payload", "resident"):
        assert total.by_kind(view) == of_model(model).by_kind(view)


def test_adding_ledgers_that_share_a_storage_is_refused():
    model = tiny("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="share a storage"):
        of_model(model.model) + of_model(model.lm_head)


def test_storages_of_dead_tensors_are_not_mistaken_for_new_ones():
    ledger = Ledger()
    for i in range(50):
        ledger = ledger + of_tensors([(f"t{i}", torch.zeros(1000))], "temp")
    assert ledger.total() == 50 * 4000


def test_parameter_and_buffer_of_one_storage_count_once():
    layer = nn.Linear(4, 4, bias=False)
    layer.register_buffer("view", layer.weight.data[0])
    assert of_model(layer).by_kind("resident") == {"weight": 64, "buffer": 0}


def test_optimizer_states_are_two_moments_and_a_step_per_tensor():
    model = tiny("gpt2")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[2, 3, 4]])).logits.sum().backward()
    optimizer.step()
    states = [
        (f"{i}.{key}", t)
        for i, state in enumerate(optimizer.state.values())
        for key, t in state.items()
    ]
    n_tensors = len(list(model.parameters()))
    assert of_tensors(states, "optim").total() == 2 * of_model(model).total("weight") + 4 * n_tensors


def test_self_overlapping_windows_count_their_elements_once():
    rolling = torch.zeros(100).unfold(0, 10, 1)
    assert rolling.numel() == 910
    ledger = of_tensors([("windows", rolling), ("part", rolling[:, 0])], "activation")
    assert (ledger.total(), ledger.items[0].numel, ledger.items[1].payload) == (400, 100, 0)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_fake_and_sparse_tensors_count():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        big = torch.zeros(100_000, 10_000)
        ledger = of_tensors([("a", big[:10]), ("b", big[5:15])], "kv")
    assert (ledger.total(), ledger.total(view="resident")) == (15 * 40_000, 4_000_000_000)
    dense = torch.eye(8)
    csr = of_tensors([("w", dense.to_sparse_csr())], "weight")
    assert csr.total() == 8 * 4 + 8 * 8 + 9 * 8
    assert [i.name for i in csr.items] == ["w.crow_indices", "w.col_indices", "w.values"]
    assert of_tensors([("w", dense.to_sparse())], "weight").total() == 2 * 8 * 8 + 8 * 4


def test_stored_as_leaves_integers_alone():
    named = [("codes", torch.zeros(10, dtype=torch.uint8)), ("scale", torch.zeros(4))]
    assert of_tensors(named, "weight", stored_as=torch.float16).total() == 10 + 8


def test_difference_subtracts_in_both_views_and_drops_what_is_equal():
    keep = torch.zeros(10)
    before = of_tensors([("keep", keep), ("gone", torch.zeros(5)), ("grown", torch.zeros(8)[:2])], "kv")
    after = of_tensors([("keep", keep), ("grown", torch.zeros(8)[:6]), ("new", torch.zeros(3))], "kv")
    change = after - before
    assert {i.name: i.payload for i in change.items} == {"grown": 16, "new": 12, "gone": -20}
    for view in ("payload", "resident"):
        assert change.total(view=view) == after.total(view=view) - before.total(view=view)
    assert (after - after).items == ()
    with pytest.raises(ValueError, match="two items"):
        of_tensors([("x", torch.zeros(1)), ("x", torch.zeros(1))], "kv") - after


def test_compression_ratio_of_the_identity_is_one_and_of_masked_weights_too():
    model = tiny("llama")
    base = of_model(model)
    assert base.cr(base) == 1.0
    with torch.no_grad():
        for p in model.parameters():
            p[p.abs() < 0.1] = 0  # pruned by mask: no byte is saved
    assert of_model(model).cr(base, view="resident") == 1.0
    with pytest.raises(ValueError, match="no compression ratio"):
        Ledger().cr(base)


def test_the_table_shows_kinds_in_order_and_sums():
    ledger = of_tensors([("i", torch.zeros(1000))], "index") + of_tensors([("w", torch.zeros(2))], "weight")
    lines = str(ledger).splitlines()
    assert [line.split()[0] for line in lines] == ["kind", "weight", "index", "total"]
    assert lines[-1].split()[1:] == ["2", "1,002", "4,008", "4,008"]
    assert len({len(line) for line in lines}) == 1


def test_files_are_counted_without_reading_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, path)
    ledger = of_file(path, "index")
    assert {(i.name, i.kind, i.numel, i.payload) for i in ledger.items} == {
        ("a", "index", 12, 48),
        ("b", "index", 5, 10),
    }


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    for size, message in [(-1, "header says 400"), (20, "complete"), (3, "complete")]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=message):
            of_file(path)
    path.write_bytes(struct.pack("<Q", 2) + json.dumps({}).encode())
    assert of_file(path).items == ()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="kind must be one of weight, meta"):
        Item("x", "weights", 1, 4, 4, None)
    with pytest.raises(ValueError, match="view must be"):
        Ledger().total(view="peak")
    with pytest.raises(ValueError, match="kind must be"):
        Ledger().total("cache")
    with pytest.raises(ValueError, match="kind must be"):
        of_file("missing", "cache")
    with pytest.raises(FileNotFoundError):
        of_file("missing")
    with pytest.raises(TypeError, match="'w' must be a tensor, got NoneType"):
        of_tensors([("w", None)], "weight")
