"""CoT-Influx: two stages, budget and reward are exact; the LLM stays frozen; the pruner learns what pays."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from refimpl.checks.tiny import random_ids, tiny
from refimpl.evaluate import weights_hash
from refimpl.kvcache.prompt.cot_influx import (
    MovingAverage,
    Pruner,
    encode,
    fill,
    prune,
    reinforce_loss,
    reward,
    sample_actions,
)  # fmt: skip
from refimpl.kvcache.prompt.cot_influx_task import KINDS, LIMIT, Task, budgets, make_task, read, rollout
from refimpl.kvcache.prompt.cot_influx_training import (
    kept_by_kind,
    load_pruner,
    prunings,
    train_pruner,
)  # fmt: skip
from refimpl.models import tokenizer_from
from refimpl.paths import data_file
from refimpl.scoring import score_completions

ROOT = Path(__file__).resolve().parents[3]
LONG = {"max_position_embeddings": 128}


def seeded(n=0):
    return torch.Generator().manual_seed(n)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_from(data_file("models", "tokenizer.json"))


@pytest.fixture(scope="module")
def llm():
    return tiny("llama", **LONG)


def small_task(seed=0, k=4):
    ids = random_ids(k + 2, 6, seed=seed).tolist()
    kinds = ["relevant", "irrelevant", "corrupted", "irrelevant"][:k]
    return Task(
        [0, 3], [row[: 2 + i] for i, row in enumerate(ids[:k])], ids[k][:4], ids[k + 1][:2], kinds, ""
    )


def wide(seed=0, Q=3, k=4, N=5, d=8):
    features = torch.randn(Q, k, N, d, generator=seeded(seed))
    mask = torch.arange(N) < torch.randint(1, N + 1, (Q, k), generator=seeded(seed))[..., None]
    return features, mask


def trained(d=8):
    """A pruner with random weights everywhere, so that its choices differ."""
    pruner = Pruner(d, 16, seeded())
    with torch.no_grad():
        for p in pruner.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(1)))
    return pruner


# --- identity and budget ------------------------------------------------------------------------------------


def test_keeping_everything_is_the_plain_prompt(llm):
    tasks = [small_task(0), small_task(1)]
    _, mask = read(llm, tasks, 1)
    got = rollout(llm, tasks, mask)
    plain = score_completions(
        llm, [([*t.head, *(x for shot in t.shots for x in shot), *t.question], t.answer) for t in tasks]
    )
    np.testing.assert_array_equal(got["loss"].numpy(), plain.nll / plain.tokens)
    assert got["correct"].tolist() == plain.exact.tolist()
    pruner = Pruner(llm.config.hidden_size, 8, seeded())
    torch.nn.init.constant_(pruner.shot[3].bias, 1.0)
    features, _ = read(llm, tasks, 1)
    assert torch.equal(prune(pruner, features, mask, torch.tensor([1000, 1000])), mask)


@pytest.mark.parametrize("limit", [0, 1, 4, 9, 1000])
def test_a_pruned_prompt_never_exceeds_its_budget(limit):
    features, mask = wide(Q=40)
    pruner = trained()
    keep = prune(pruner, features, mask, torch.full((40,), limit))
    assert int(keep.sum((1, 2)).max()) <= limit and not bool((keep & ~mask).any())
    kept_shots = keep.any(-1)
    assert not bool((kept_shots & (pruner.shot_logits(features, mask) <= 0)).any())


def test_limit_zero_keeps_nothing_and_a_question_that_is_too_long_is_refused():
    assert not bool(prune(trained(), *wide(), torch.zeros(3, dtype=torch.long)).any())
    task = small_task()
    assert budgets([task], task.fixed).tolist() == [0]
    with pytest.raises(ValueError, match="limit: 5 tokens are fewer than the 6 of a question"):
        budgets([task], 5)


def test_filling_stops_at_the_first_that_does_not_fit():
    score, sizes = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[4, 5, 1]])
    assert fill(score, sizes, torch.tensor([8])).tolist() == [[True, False, False]]
    assert fill(score, sizes, torch.tensor([9])).tolist() == [[True, True, False]]
    assert fill(torch.zeros(1, 3), sizes, torch.tensor([9])).tolist() == [[True, True, False]]
    assert not bool(fill(torch.full((1, 3), -torch.inf), sizes, torch.tensor([99])).any())


# --- actions ------------------------------------------------------------------------------------------------


def test_the_second_stage_never_sees_dropped_shots():
    features, mask = wide()
    pruner = trained()
    # With the first stage's view held fixed, other tokens in dropped shots do not move the log-probability.
    view, token = torch.zeros(3, 4), pruner.token_logits(features)
    pruner.shot_logits, pruner.token_logits = lambda h, m: view, lambda h: token
    actions = sample_actions(pruner, features, mask, 16, seeded())
    assert not bool((actions.tokens & ~(mask & actions.shots[..., None])).any())
    sample = int((actions.shots[:, 0].sum(-1) == 2).nonzero()[0])  # two shots kept, two dropped
    kept = actions.shots[sample, 0]
    other = torch.where(kept[:, None], token, 1 - token)
    pruner.token_logits = lambda h: other
    again = sample_actions(pruner, features, mask, 16, seeded())
    assert torch.equal(again.tokens[sample, 0], actions.tokens[sample, 0])
    assert torch.equal(again.log_prob[sample, 0], actions.log_prob[sample, 0])
    assert not torch.equal(again.log_prob, actions.log_prob)


def test_actions_repeat_with_their_generator_and_leave_the_global_state():
    state = torch.random.get_rng_state()
    pruner = Pruner(8, 16, seeded())
    one, two = (sample_actions(pruner, *wide(), 4, seeded(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.log_prob.shape == (4, 3) and one.tokens.shape == (4, 3, 4, 5)


def test_padding_is_never_read():
    features, mask = wide()
    pruner = trained()
    other = torch.where(mask[..., None], features, torch.full_like(features, 7.0))
    torch.testing.assert_close(pruner.shot_logits(features, mask), pruner.shot_logits(other, mask))
    one, two = (sample_actions(pruner, f, mask, 4, seeded()) for f in (features, other))
    torch.testing.assert_close(one.log_prob, two.log_prob)


def test_before_training_shots_are_tossed_and_tokens_mostly_stay():
    pruner, (features, mask) = Pruner(8, 16, seeded()), wide()
    assert torch.equal(pruner.shot_logits(features, mask).sigmoid(), torch.full((3, 4), 0.5))
    torch.testing.assert_close(pruner.token_logits(features).sigmoid(), torch.full((3, 4, 5), 0.9))


def test_a_baseline_lowers_the_variance_of_the_gradient_and_not_its_mean():
    features, mask = wide(Q=1, k=3, N=2)
    pruner = Pruner(8, 16, seeded())
    value = torch.rand(8, generator=seeded(5)) + 5

    def gradient(baseline, seed):
        actions = sample_actions(pruner, features, mask, 64, seeded(seed))
        r = value[(actions.shots[:, 0] * torch.tensor([1, 2, 4])).sum(-1)][:, None]
        weight = pruner.shot[3].bias
        return torch.autograd.grad(reinforce_loss(actions.log_prob, r, baseline), weight)[0].item()

    with_b, without = (np.array([gradient(b, s) for s in range(150)]) for b in (5.5, 0.0))
    assert with_b.std() < 0.2 * without.std()
    assert abs(with_b.mean() - without.mean()) < 4 * without.std() / 150**0.5


def test_the_moving_average_is_the_formula():
    b = MovingAverage(0.9, start=2.0)
    b.update(torch.tensor([0.0, 2.0]))
    assert b.value == pytest.approx(1.9)


def test_the_reward_has_its_kink_at_the_limit():
    t = torch.arange(1, 400)
    r = reward(torch.full((399,), 0.5), torch.ones(399), t, LIMIT)
    assert int(t[r.argmax()]) == LIMIT and r.max() == pytest.approx(1 / 1.5 + 1)
    slope = r.diff()
    assert bool((slope[: LIMIT - 1] > 0).all()) and bool((slope[LIMIT - 1 :] < 0).all())
    assert slope[LIMIT - 2] == pytest.approx(-slope[LIMIT - 1].item(), rel=0.02)  # 1/T, then -1/T


# --- features -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
def test_features_are_the_hidden_states_of_each_shot_read_alone_after_the_question(family):
    model = tiny(family)
    questions, shots = [[5, 6, 7], [8]], [[[9, 10], [11, 12, 13, 14]], [[15], [16, 17]]]
    features, mask = encode(model, questions, shots, layer=2)
    assert features.shape == (2, 2, 4, 32) and mask.sum(-1).tolist() == [[2, 4], [1, 2]]
    for q in range(2):
        for i in range(2):
            ids = torch.tensor([[0, *questions[q], *shots[q][i]]])
            with torch.no_grad():
                states = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
            n = len(shots[q][i])
            torch.testing.assert_close(features[q, i, :n], states[-n:], atol=1e-5, rtol=1e-5)
            assert not bool(features[q, i, n:].any())


def test_features_know_the_question(llm):
    shots = [[[9, 10], [11, 12]]]
    one, two = (encode(llm, [q], shots, layer=2)[0] for q in ([5, 6], [7, 8]))
    assert not torch.allclose(one, two)


# --- task ---------------------------------------------------------------------------------------------------


def test_tasks_hold_what_they_say(tokenizer):
    for i in range(20):
        task = make_task(i, "eval", tokenizer)
        assert sorted(task.kinds) == sorted(KINDS)
        assert task.fixed + sum(map(len, task.shots)) > LIMIT  # not everything fits
        answer = tokenizer.decode(task.answer).strip()
        for shot, kind in zip(task.shots, task.kinds, strict=True):
            assert (answer in tokenizer.decode(shot)) == (kind == "relevant") or kind == "irrelevant"
        assert make_task(i, "eval", tokenizer) == task
    names = [make_task(i, split, tokenizer).text for i in (0, 1) for split in ("train", "eval")]
    assert len(set(names)) == 4


def test_methods_stay_within_the_limit_and_keep_subsequences(llm):
    tasks = [small_task(i) for i in range(3)]
    pruner = Pruner(llm.config.hidden_size, 8, seeded())
    kept = prunings(pruner, llm, tasks, layer=1, limit=14, generator=seeded())
    assert set(kept) == {"pruner", "random", "first", "similar", "none", "relevant"}
    for keep in kept.values():
        assert int(rollout(llm, tasks, keep)["tokens"].max()) <= 14
    assert kept["first"][:, 0].any(-1).all() and not bool(kept["none"].any())
    assert kept["relevant"].any(-1).tolist() == [[True, False, False, False]] * 3
    assert set(kept_by_kind(pruner, llm, tasks, 1)) == {"relevant", "irrelevant", "corrupted"}


def test_training_raises_the_reward_and_leaves_the_llm_alone(llm, monkeypatch):
    """The environment pays for one kind of shot, told by its first token; reward and gradient are real."""
    from refimpl.kvcache.prompt import cot_influx_training

    def tasks(step):
        out = []
        for i in range(4):
            ids = random_ids(6, 3, seed=100 * step + i)
            ids[:4, 0] = torch.tensor([40, 41, 40, 41])
            rows = ids.tolist()
            out.append(Task([0], rows[:4], rows[4], rows[5], ["relevant", "corrupted"] * 2, ""))
        return out

    def paid(model, asked, keep):
        good = keep[..., 0::2, :].float().mean((-2, -1)) - keep[..., 1::2, :].float().mean((-2, -1))
        return {"loss": (1 - good).clamp(min=0), "correct": good > 0.4,
                "tokens": 4 + keep.sum((-2, -1)).cpu()}  # fmt: skip

    monkeypatch.setattr(cot_influx_training, "rollout", paid)
    before, pruner = weights_hash(llm), Pruner(llm.config.hidden_size, 32, seeded())
    history, rewards = train_pruner(
        pruner, llm, tasks, layer=0, limit=10, updates=60, questions=4, samples=8, lr=1e-2
    )
    assert weights_hash(llm) == before and history.finished and len(rewards) == 60
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.3
    kinds = kept_by_kind(pruner, llm, tasks(1000), 0)
    assert kinds["relevant"][0].min() > kinds["corrupted"][0].max() + 0.3


def test_training_with_the_real_environment_changes_only_the_pruner(llm):
    before, pruner = weights_hash(llm), Pruner(llm.config.hidden_size, 8, seeded())
    old = weights_hash(pruner)
    runs = []
    for _ in range(2):
        pruner = Pruner(llm.config.hidden_size, 8, seeded())
        runs.append(train_pruner(pruner, llm, lambda step: [small_task(step), small_task(step + 9)], layer=1,
                                 limit=14, updates=3, questions=2, samples=2)[1])  # fmt: skip
    assert runs[0] == runs[1] and weights_hash(llm) == before and weights_hash(pruner) != old
    assert all(p.grad is None for p in llm.parameters())


# --- bad input ----------------------------------------------------------------------------------------------


def test_bad_policies():
    features, mask = wide()
    pruner = Pruner(8, 16, seeded())
    for d, hidden in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="must be an integer >= 1"):
            Pruner(d, hidden)
    with pytest.raises(ValueError, match="samples must be an integer >= 1, got 0"):
        sample_actions(pruner, features, mask, 0, seeded())
    for wrong in (mask[:, :2], mask.float()):
        with pytest.raises(ValueError, match="mask: expected bool"):
            pruner.shot_logits(features, wrong)
    with pytest.raises(ValueError, match="every shot needs at least one token"):
        pruner.shot_logits(features, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="features: hold NaN"):
        prune(pruner, features * torch.nan, mask, torch.tensor([9, 9, 9]))
    with pytest.raises(ValueError, match="budget is negative"):
        prune(pruner, features, mask, torch.tensor([9, -1, 9]))
    with pytest.raises(ValueError, match="expected \\[Q, k\\]"):
        prune(pruner, features, mask, torch.tensor([9]))
    with pytest.raises(ValueError, match="score holds NaN"):
        fill(torch.full((1, 2), torch.nan), torch.ones(1, 2), torch.tensor([1]))


def test_bad_rewards():
    one, t = torch.ones(2), torch.tensor([1, 2])
    for loss in (one * torch.nan, -one, one * torch.inf):
        with pytest.raises(ValueError, match="loss: negative or not finite"):
            reward(loss, one, t, 5)
    for tokens, limit in ((t - 1, 5), (t, 0)):
        with pytest.raises(ValueError, match="limit and tokens must be >= 1"):
            reward(one, one, tokens, limit)
    with pytest.raises(ValueError, match="rewards: shape"):
        reinforce_loss(one, one[:1], 0.0)
    with pytest.raises(ValueError, match="rewards: NaN"):
        reinforce_loss(one, one * torch.nan, 0.0)
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="decay must be in"):
            MovingAverage(decay)


def test_bad_tasks(llm, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="split must be 'train' or 'eval'"):
        make_task(0, "test", tokenizer)
    for questions, shots in (
        ([], []),
        ([[5]], [[]]),
        ([[5]], [[[6], []]]),
        ([[5], [6]], [[[6]], [[7], [8]]]),
    ):
        with pytest.raises(ValueError, match="shots: every one of"):
            encode(llm, questions, shots, 1)
    for layer in (-1, 4):
        with pytest.raises(ValueError, match="layer must be in 0..3"):
            encode(llm, [[5]], [[[6]]], layer)
    with pytest.raises(ValueError, match="the encoder's context is 128"):
        encode(llm, [[5]], [[[6] * 200]], 1)
    with pytest.raises(ValueError, match="does not fit 1 tasks"):
        rollout(llm, [small_task()], torch.ones(2, 4, 5, dtype=torch.bool))
    with pytest.raises(FileNotFoundError, match="no pruner at"):
        load_pruner(tmp_path)


# --- the script ---------------------------------------------------------------------------------------------


def test_the_script_runs_at_tiny_size(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "trained_prompt", ROOT / "data" / "kvcache_trained_prompt.py"
    )
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # where dataclasses look up names
    spec.loader.exec_module(script)
    assert script.main(["influx", "--out", str(tmp_path), "--device", "cpu", "--tiny"]) == 0
    found = json.loads((tmp_path / "results" / "kvcache" / "cot_influx.json").read_text())
    assert found["complete"] and found["llm_unchanged"] and len(found["runs"]) == 2
    assert found["most_tokens"] <= LIMIT and {"pruner", "pruner - similar"} <= set(found["reward"])
    folder = tmp_path / "adapters" / "cot_influx"
    assert {f.name for f in folder.iterdir()} == {"pruner.safetensors", "log.json", "card.md"}
    with pytest.raises(ValueError, match="trained on revision random of llama-mini"):
        load_pruner(folder)
    monkeypatch.setattr("refimpl.kvcache.prompt.cot_influx_training.revision", lambda name: "random")
    pruner, layer = load_pruner(folder)
    assert layer == 1 and pruner.shot[1].weight.shape == (16, 32)
