"""Rho-1: k = 1 is plain training bit for bit; the choice is per batch, without gradient, without noise."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from refimpl.checks.tiny import FAMILIES, VOCAB, random_ids, tiny
from refimpl.kvcache.prompt.rho1 import (
    RandomLM,
    SelectiveLM,
    mean_loss,
    next_token_losses,
    noise_share,
    noisy_rows,
    select_tokens,
)  # fmt: skip
from refimpl.models import tokenizer_from
from refimpl.paths import data_file
from refimpl.training import IGNORE, TrainConfig, lm_loss, targets, train
from refimpl.world.formats import BY_NAME
from refimpl.world.rng import Rng

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_from(data_file("models", "tokenizer.json"))


def texts(n, key="rho1 test"):
    rng = Rng(key)
    return [BY_NAME["story"].document(rng) for _ in range(n)]


def gradients(model, loss_fn, batch):
    model.zero_grad()
    loss = loss_fn(model, batch)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def padded():
    ids = random_ids(3, 8, seed=2)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[1, 5:] = 1
    return {"input_ids": ids, "attention_mask": mask}


# --- identity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [random_ids(3, 8, seed=2), padded()], ids=["ids", "padded"])
def test_all_tokens_are_plain_language_modelling_bit_for_bit(family, batch):
    model = tiny(family)
    expected, theirs = gradients(model, lm_loss, batch)
    for loss_fn in (SelectiveLM(tiny(family, seed=1), k=1.0), RandomLM(1.0, torch.Generator())):
        got, ours = gradients(model, loss_fn, batch)
        assert torch.equal(got, expected)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_losses_are_the_formula_in_numpy():
    logits, labels = (
        torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)),
        [[4, 0, -100], [2, 2, 1]],
    )
    z = logits.double().numpy()
    expected = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, np.maximum(labels, 0)[..., None], 2)[..., 0]
    expected[0, 2] = 0
    np.testing.assert_allclose(next_token_losses(logits, torch.tensor(labels)).numpy(), expected, atol=1e-6)


# --- the choice ---------------------------------------------------------------------------------------------


def test_unselected_tokens_give_no_gradient_and_all_stay_in_the_input():
    logits = torch.randn(2, 6, VOCAB, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = targets(random_ids(2, 6), pad_id=None)
    keep = torch.zeros(2, 6, dtype=torch.bool)
    keep[0, 1] = keep[1, 3] = True
    mean_loss(logits, labels, keep).backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, keep)
    # A dropped target is still context: the loss of the kept one depends on it.
    model, ids = tiny("llama"), random_ids(2, 6)
    other = ids.clone()
    other[1, 2] = (other[1, 2] + 1) % VOCAB
    two = [mean_loss(model(input_ids=i).logits, labels, keep) for i in (ids, other)]
    assert not torch.equal(*two)


def test_the_top_is_taken_over_the_batch_and_ties_go_to_the_first():
    score = torch.tensor([[9.0, 8.0, 7.0], [1.0, 1.0, 1.0]])
    every = torch.ones(2, 3, dtype=torch.bool)
    assert select_tokens(score, every, 0.5).tolist() == [[True] * 3, [False] * 3]
    assert select_tokens(score, every, 4 / 6).tolist() == [[True] * 3, [True, False, False]]
    assert select_tokens(torch.zeros(2, 3), every, 0.5).tolist() == [[True] * 3, [False] * 3]
    for k in (0.01, 0.3, 0.7, 1.0):
        assert int(select_tokens(score, every, k).sum()) == max(1, round(6 * k))


def test_what_has_no_target_is_never_selected():
    model, batch = tiny("llama"), padded()
    keep = SelectiveLM(tiny("llama", seed=1), k=0.9).selected(model, batch)
    valid = targets(batch, pad_id=1) != IGNORE
    assert int(keep.sum()) == round(0.9 * int(valid.sum())) and not bool((keep & ~valid).any())


def test_the_choice_follows_the_excess_and_the_student_of_the_moment():
    student, reference, ids = tiny("llama"), tiny("llama", seed=1), random_ids(4, 10)
    loss = SelectiveLM(reference, k=0.3)
    labels = targets(ids, pad_id=1)
    excess = torch.stack([next_token_losses(m(input_ids=ids).logits, labels) for m in (student, reference)])
    excess = (excess[0] - excess[1])[:, :-1]
    keep = loss.selected(student, ids)[:, :-1]
    assert excess[keep].min() >= excess[~keep].max()
    with torch.no_grad():
        student.lm_head.weight.mul_(-1)
    assert not torch.equal(loss.selected(student, ids)[:, :-1], keep)


def test_the_reference_stays_as_it_is_and_no_global_chance_is_used():
    student, reference, ids = tiny("llama"), tiny("llama", seed=1).train(), random_ids(2, 8)
    state = torch.random.get_rng_state()
    loss = SelectiveLM(reference, k=0.5)
    loss(student, ids).backward()
    RandomLM(0.5, torch.Generator().manual_seed(0))(student, ids)
    assert not reference.training and all(p.grad is None for p in reference.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_random_choice_is_its_generators():
    model, ids = tiny("llama"), random_ids(2, 8)
    one, two, other = (RandomLM(0.5, torch.Generator().manual_seed(s))(model, ids) for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


# --- noise --------------------------------------------------------------------------------------------------


def test_a_share_of_zero_is_the_text(tokenizer):
    rows, noise = noisy_rows(texts(20), tokenizer, share=0.0, length=32, rng=np.random.default_rng(0))
    assert rows.dtype == np.uint16 and not noise.any() and not rows[:, 0].any()
    text = tokenizer.decode(rows[:, 1:].flatten()[:200].tolist())
    assert text.startswith(texts(20)[0].strip()[:200])


def test_noise_is_where_the_mask_says(tokenizer):
    several = texts(60)
    clean, _ = noisy_rows(several, tokenizer, share=0.0, length=64, rng=np.random.default_rng(0))
    rows, noise = noisy_rows(several, tokenizer, share=0.25, length=64, rng=np.random.default_rng(0))
    again, _ = noisy_rows(several, tokenizer, share=0.25, length=64, rng=np.random.default_rng(0))
    assert np.array_equal(rows, again) and not noise[:, 0].any()
    assert 0.17 < noise[:, 1:].mean() < 0.33
    assert rows[noise].min() >= 32  # no special token
    everything, flags = noisy_rows(several, tokenizer, share=1.0, length=64, rng=np.random.default_rng(0))
    ends = everything[:, 1:] == 0
    assert np.array_equal(flags[:, 1:], ~ends)  # ends of texts are never noise
    known = set(clean.flatten().tolist())
    assert not set(rows[~noise].tolist()) - known


def test_noise_share_reads_the_predicted_token():
    keep = torch.tensor([[True, False, False, False]])
    assert noise_share(keep, torch.tensor([[False, True, False, False]])) == 1.0
    assert noise_share(keep, torch.tensor([[True, False, True, True]])) == 0.0


def test_a_trained_reference_keeps_noise_out(bundled, tokenizer):
    reference, _ = bundled("llama-nano")
    rows, noise = noisy_rows(texts(14), tokenizer, share=0.25, length=96, rng=np.random.default_rng(1))
    from refimpl.models import new

    ids, noise = torch.from_numpy(rows[:12].astype(np.int64)), torch.from_numpy(noise[:12])
    keep = SelectiveLM(reference, k=0.6).selected(new("llama-nano", seed=1), ids)
    assert noise_share(keep, noise) < 0.5 * float(noise[:, 1:].float().mean())


def test_selective_training_learns_the_clean_language_better_than_random():
    """A walk over 46 ids, 30 % of its steps replaced by chance; the reference knows the walk."""
    draw = np.random.default_rng(0)
    after = 2 + draw.permutation(VOCAB - 2)

    def walks(n, noise):
        ids = np.zeros((n, 16), np.int64)
        ids[:, 1] = draw.integers(2, VOCAB, n)
        for t in range(2, 16):
            ids[:, t] = after[ids[:, t - 1] - 2]
            wrong = draw.random(n) < noise
            ids[wrong, t] = draw.integers(2, VOCAB, int(wrong.sum()))
        return torch.from_numpy(ids)

    class Walk(torch.nn.Module):
        def forward(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, VOCAB)
            at = torch.from_numpy(after)[(input_ids - 2).clamp(min=0)]
            return type("Output", (), {"logits": logits.scatter_(2, at[..., None], 8.0)})

    data, clean = walks(512, 0.3), walks(64, 0.0)
    found = {}
    for name, loss_fn in {
        "slm": SelectiveLM(Walk(), k=0.6), "random": RandomLM(0.6, torch.Generator().manual_seed(0)),
    }.items():  # fmt: skip
        config = TrainConfig(steps=40, batch=32, lr=1e-2, warmup=5, seed=0)
        model = tiny("llama", num_hidden_layers=1)
        train(model, lambda step: data[step % 16 * 32 :][:32], config, loss_fn=loss_fn, progress=False)
        found[name] = float(lm_loss(model, clean[:, 2:]).detach())
    assert found["slm"] < 0.8 * found["random"], found


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 0.0, -0.1, 1.01, float("nan"), float("inf"), True, "0.6", None])
def test_shares_out_of_range(k):
    for make in (lambda: SelectiveLM(tiny("llama"), k=k), lambda: RandomLM(k, torch.Generator())):
        with pytest.raises(ValueError, match=r"k must be a share in \(0, 1\]"):
            make()


def test_bad_tensors():
    score, every = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="no position has a target"):
        select_tokens(score, ~every, 0.5)
    with pytest.raises(ValueError, match="score: holds NaN"):
        select_tokens(score.masked_fill(every, torch.nan), every, 0.5)
    for valid in (every[:1], every.float()):
        with pytest.raises(ValueError, match="valid: expected bool"):
            select_tokens(score, valid, 0.5)
    with pytest.raises(ValueError, match="valid: expected bool"):
        select_tokens(score[0], every[0], 0.5)
    with pytest.raises(ValueError, match="labels: expected shape"):
        next_token_losses(torch.zeros(2, 3, 5), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="its vocabulary of 48"):
        SelectiveLM(tiny("llama"))(tiny("llama", vocab_size=50), random_ids(2, 5))
    with pytest.raises(ValueError, match="expected ids or a dict with 'input_ids'"):
        SelectiveLM(tiny("llama"))(tiny("llama"), {"x": random_ids(2, 5)})
    for keep in (every[:1], ~every):
        with pytest.raises(ValueError, match="keep"):
            noise_share(keep, every)


def test_bad_corpora(tokenizer):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="share must be in"):
        noisy_rows(["a"], tokenizer, share=1.5, length=8, rng=rng)
    with pytest.raises(ValueError, match="length must be an integer >= 2"):
        noisy_rows(["a"], tokenizer, share=0.5, length=1, rng=rng)
    for empty in ([], [""], ["Too short."]):
        with pytest.raises(ValueError, match="do not fill one row of 64"):
            noisy_rows(empty, tokenizer, share=0.5, length=64, rng=rng)


# --- the script ---------------------------------------------------------------------------------------------


def test_the_script_runs_at_tiny_size(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "trained_prompt", ROOT / "data" / "kvcache_trained_prompt.py"
    )
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # where dataclasses look up names
    spec.loader.exec_module(script)
    assert script.main(["rho1", "--out", str(tmp_path), "--device", "cpu", "--tiny"]) == 0
    found = json.loads((tmp_path / "results" / "kvcache" / "rho1.json").read_text())
    assert found["complete"] and len(found["runs"]) == 2
    assert set(found["clean_loss"]) == {"clm", "slm", "random", "slm - clm", "slm - random", "clm - random"}
    assert [p["step"] for p in found["runs"][0]["arms"]["slm"]["curve"]] == list(range(7))
    assert (
        script.main(["rho1", "--out", str(tmp_path / "none"), "--device", "cpu", "--tiny", "--limit-s", "0"])
        == 1
    )
    assert not (tmp_path / "none").exists()


def test_losses_average_to_the_unshifted_formula():
    model, ids = tiny("llama"), random_ids(2, 8)
    labels = targets(ids, pad_id=1)
    logits = model(input_ids=ids).logits
    own = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(next_token_losses(logits, labels).sum() / 14, own, atol=1e-6)
