"""Dynamic Context Pruning: the gate, training's masks against real deletion, the penalty, the script."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from cache_runs import close, generator, run

from refimpl.checks.tiny import FAMILIES, random_ids, tiny
from refimpl.kvcache import KVCache, Random, Reader, release
from refimpl.kvcache.dcp import (
    ContextPruning,
    keep_probabilities,
    load_pruning,
    save_pruning,
    sparse_sigmoid,
    sparsity,
)
from refimpl.kvcache.dcp_policy import DynamicContextPruning, decode
from refimpl.kvcache.dcp_training import PruningRun, alpha_at, pruned_scores, train_pruning, window_scores

INF = math.inf
SCRIPT = Path(__file__).resolve().parents[2] / "data" / "kvcache_adapters.py"


def add_on(bias=1.0, r=8, seed=1, layers=3):
    return ContextPruning(32, layers, r, generator(seed), bias=bias)


def long(family, **changes):
    names = {"gpt2": {"n_positions": 128}}.get(family, {})
    return tiny(family, max_position_embeddings=128, **names, **changes)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return long(request.param)


# --- training's masks are what decoding does ---------------------------------------------------------------
@pytest.mark.parametrize("sizes", [[1] * 30, [30], [11] + [1] * 19, [9, 8, 1, 12]])
def test_step_function_equals_real_deletion(model, sizes):
    pruning, ids = add_on(), random_ids(2, 30)
    with torch.no_grad():
        expected, keeps = pruning(model, ids, INF)
    cache = KVCache(model, DynamicContextPruning(model, pruning))
    close(run(model, cache, ids, sizes), expected)
    for l, keep in enumerate(keeps):
        assert cache.held(l)[:, 0].tolist() == keep[:, -1].sum(-1).tolist()
    assert any(keep[:, -1].sum() < 60 for keep in keeps)


def test_chunked_prefill_hides_and_deletes_at_the_end(model):
    pruning, ids = add_on(), random_ids(2, 24)
    with torch.no_grad():
        expected, keeps = pruning(model, ids, INF)
    cache = KVCache(model, DynamicContextPruning(model, pruning))
    with cache.prefill():
        first = run(model, cache, ids[:, :15], [7, 8])
        assert cache.held(0).tolist() == [[15] * cache._G] * 2
    close(torch.cat((first, run(model, cache, ids[:, 15:], [1] * 9)), 1), expected)
    assert cache.held(1)[:, 0].tolist() == keeps[1][:, -1].sum(-1).tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_left_padding_equals_rows_alone(family):
    model, pruning, ids = long(family), add_on(), random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    cache = KVCache(model, DynamicContextPruning(model, pruning))
    logits = run(model, cache, ids, [12] + [1] * 8, mask)
    with torch.no_grad():
        expected, keeps = pruning(model, ids, INF, mask)
    close(logits[0, 6:], expected[0, 6:])
    close(logits[1], expected[1])
    assert cache.held(0)[0, 0] == keeps[0][0, -1, 6:].sum()
    if family == "llama":  # learned positions are not those of a row alone
        alone = KVCache(model, DynamicContextPruning(model, pruning))
        close(logits[0, 6:], run(model, alone, ids[:1, 6:], [14])[0])


def test_memory_is_freed_and_every_small_key_stored_once():
    model, pruning, ids = long("llama"), add_on(bias=0.3), random_ids(1, 40)
    cache = KVCache(model, DynamicContextPruning(model, pruning))
    run(model, cache, ids, [40])
    held = sum(int(cache.held(l)[0, 0]) for l in range(3))
    assert held < 3 * 40
    size = cache.nbytes()
    assert size["payload"] == held * 2 * 2 * 8 * 4
    assert size["state"] == held * (8 * 4 + 2)  # r numbers for all heads together, and a flag for each head
    assert cache.ledger().total(view="resident") <= sum(size.values()) + 64 * 20


def test_generate_and_beam_search():
    model, pruning, ids = long("llama"), add_on(), random_ids(2, 8)
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None)
    out = model.generate(ids, past_key_values=KVCache(model, DynamicContextPruning(model, pruning)), **kwargs)
    with torch.no_grad():
        logits, _ = pruning(model, out, INF)
    assert torch.equal(logits[:, 7:-1].argmax(-1), out[:, 8:])
    policy = DynamicContextPruning(model, pruning)
    model.generate(ids, past_key_values=KVCache(model, policy), num_beams=2, **kwargs)


def test_nothing_goes_with_a_large_bias(model):
    ids = random_ids(2, 16)
    release(model)
    expected = model(ids).logits
    close(add_on(bias=60.0)(model, ids, 2.0)[0], expected)
    logits, held = decode(model, add_on(bias=60.0), ids)
    close(logits, expected)
    assert held[0, 0].tolist() == list(range(1, 17))


# --- gate and penalty --------------------------------------------------------------------------------------
def test_gate_follows_its_equation():
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)
    for alpha in (1.3, 2.0, 4.0, 8.0):
        p, a = sparse_sigmoid(z, alpha), alpha - 1
        inner = (p > 0) & (p < 1)
        close((p**a - (1 - p) ** a)[inner] / a, z[inner], 1e-6)
        clear = (z.abs() - 1 / a).abs() > 1e-9
        assert torch.equal(inner[clear], (z.abs() < 1 / a)[clear])
    assert sparse_sigmoid(torch.tensor([0.0, 1e-6]), INF).tolist() == [0, 1]


def test_gradient_vanishes_where_the_gate_is_closed():
    z = torch.tensor([-0.5, -0.05, 0.05, 0.5], requires_grad=True)
    sparse_sigmoid(z, 8.0).sum().backward()
    assert (z.grad == 0).tolist() == [True, False, False, True]


def test_what_is_left_never_grows_again():
    gate = torch.rand(2, 9, 9, generator=generator())
    keep = keep_probabilities(gate)
    below = torch.ones(9, 9, dtype=torch.bool).tril()
    assert ((keep[:, 1:] - keep[:, :-1])[:, below[:-1]] <= 0).all()
    assert (keep.diagonal(dim1=1, dim2=2) == 1).all()


def test_penalty_counts_pairs_of_real_tokens_without_the_last_query():
    keep = torch.zeros(1, 4, 4)
    keep[0, 3] = 1  # the last query alone
    assert sparsity([keep]).item() == 0
    keep[0, 2, 1] = 1
    assert sparsity([keep, keep]).item() == pytest.approx(1 / 3)
    assert sparsity([keep], torch.tensor([[0, 1, 1, 1]])).item() == 1


def test_gradients_are_finite_when_gates_close():
    model, pruning = long("llama"), add_on(bias=-1.0)
    logits, keeps = pruning(model, random_ids(2, 20), 8.0)
    assert keeps[0].min() == 0
    (logits.square().mean() + sparsity(keeps)).backward()
    grads = [p.grad for p in (*pruning.parameters(), *model.parameters())]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    model.zero_grad()


# --- training ----------------------------------------------------------------------------------------------
def test_more_gamma_keeps_less():
    ids = random_ids(4, 24)
    kept, changed = [], []
    for gamma in (0.0, 5.0):
        model = long("llama")
        before = model.model.embed_tokens.weight.clone()
        pruning, records = train_pruning(
            model, lambda step: ids, PruningRun(gamma, steps=12, r=4, interaction_only=True, bias=1.0)
        )
        kept.append(pruned_scores(model, pruning, ids)["slots"].mean().item())
        changed.append(bool((model.model.embed_tokens.weight != before).any()))
        assert records[-1]["step"] == 11 and records[0]["alpha"] == 1
    assert kept[1] < kept[0] and changed == [False, False]


def test_whole_training_changes_the_model_and_scores_are_those_of_decoding():
    model, ids = long("gpt2"), random_ids(3, 20)
    before = model.transformer.wte.weight.clone()
    pruning, _ = train_pruning(model, lambda step: ids, PruningRun(1.0, steps=3, r=4, bias=0.5))
    assert (model.transformer.wte.weight != before).any()
    scores = pruned_scores(model, pruning, ids, batch=2)
    logits, held = decode(model, pruning, ids)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    close(scores["nll"], nll.mean(1))
    close(scores["slots"], held.float().mean((0, 2)))


def test_window_scores_are_those_of_the_window_policy():
    from refimpl.kvcache import Window

    model, ids = long("llama"), random_ids(2, 24)
    logits = run(model, KVCache(model, Window(7)), ids, [1] * 24)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    close(window_scores(model, ids, 7)["nll"], nll.mean(1))
    with pytest.raises(ValueError, match="window: 0"):
        window_scores(model, ids, 0)


def test_schedule_of_alpha():
    alphas = [alpha_at(step, 50) for step in range(51)]
    assert alphas[0] == 1 and alphas[-1] == 8 and alphas == sorted(alphas)


def test_saved_and_loaded(tmp_path):
    pruning = add_on()
    save_pruning(tmp_path / "a.safetensors", pruning, revision="abc", gamma=0.3)
    found, about = load_pruning(tmp_path / "a.safetensors", revision="abc")
    assert about["gamma"] == "0.3" and found.r == 8
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), pruning.parameters(), strict=True))
    with pytest.raises(ValueError, match="revision"):
        load_pruning(tmp_path / "a.safetensors", revision="other")
    with pytest.raises(FileNotFoundError):
        load_pruning(tmp_path / "b.safetensors")


def test_script_trains_stores_and_resumes(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("kvcache_adapters", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--device", "cpu", "--tiny"])
    assert script.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    stored = json.loads((tmp_path / "dcp.json").read_text())
    assert {run["settings"]["interaction_only"] for run in stored["runs"]} == {True, False}
    assert len(list((tmp_path / "adapters").glob("*.safetensors"))) == 1
    assert script.main() == 0 and capsys.readouterr().out == ""  # nothing is trained again
    other = ["x", "--out", str(tmp_path / "other"), "--device", "cpu", "--tiny", "--limit-s", "0"]
    monkeypatch.setattr(sys, "argv", other)
    assert script.main() == 1 and "left out" in capsys.readouterr().out
    assert script.window_of_mean(3.0, 5) == 5 and script.window_of_mean(1.0, 5) == 1


# --- bad input ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda m: sparse_sigmoid(torch.zeros(2), 0.9), ValueError, "alpha: 0.9"),
    (lambda m: sparse_sigmoid(torch.zeros(2), math.nan), ValueError, "alpha: nan"),
    (lambda m: sparse_sigmoid(torch.zeros(2, dtype=torch.long), 2.0), TypeError, "z: torch.int64"),
    (lambda m: ContextPruning(32, 0, 4, generator()), ValueError, "n_layers: 0"),
    (lambda m: ContextPruning(32, 3, True, generator()), ValueError, "r: True"),
    (lambda m: ContextPruning(32, 3, 4, None), TypeError, "generator"),
    (lambda m: DynamicContextPruning(m, add_on(layers=2)), ValueError, "2 layers of width 32"),
    (lambda m: DynamicContextPruning(m, add_on(r=3)), ValueError, "r: 3"),
    (lambda m: add_on()(m, random_ids(1, 4), 0.5), ValueError, "alpha: 0.5"),
    (lambda m: add_on()(m, random_ids(1, 4), 2.0, torch.ones(1, 5)), ValueError, "attention_mask"),
    (lambda m: add_on()(m, torch.zeros(1, 0, dtype=torch.long), 2.0), ValueError, "ids"),
    (lambda m: sparsity([torch.ones(1, 2, 2)]), ValueError, "keeps: 2 tokens"),
    (lambda m: PruningRun(-1.0), ValueError, "gamma"),
    (lambda m: PruningRun(0.1, alpha=INF), ValueError, "alpha"),
    (lambda m: KVCache(m, DynamicContextPruning(m, add_on()), reader=Some()), ValueError, "reader"),
])  # fmt: skip
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call(long("llama"))


class Some(Reader):
    pass


def test_slot_states_may_be_vectors():
    model, policy = long("llama"), Random(5, generator())
    policy.slots = {"priority": torch.float32, "vector": (torch.float64, 3)}
    cache = KVCache(model, policy)
    run(model, cache, random_ids(2, 9), [7, 1, 1])
    assert cache.layers[0].states["vector"].shape == (2, 2, 5, 3)
