"""The training loop: resume, checkpoints, several processes, schedule, weighting of micro batches."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from refimpl import training
from refimpl.training import History, Rows, TrainConfig, lm_loss, targets, train

ROOT = Path(__file__).resolve().parent.parent


class TinyLM(nn.Module):
    """A next-token predictor with dropout, a bias and a norm: all that the optimizer treats differently."""

    def __init__(self, vocabulary=17, width=16, dropout=0.1):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocabulary, bias=False)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.3, generator=generator)
        nn.init.zeros_(self.mix.bias)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        h = self.embed(input_ids)
        return SimpleNamespace(logits=self.head(self.drop(self.norm(h + torch.tanh(self.mix(h))))))


def counting(step, rows=8, length=12, vocabulary=17):
    """Rows that count upwards from a random start: learnable, and a function of the step alone."""
    start = np.random.default_rng(step).integers(0, vocabulary, (rows, 1))
    return torch.from_numpy((start + np.arange(length)) % vocabulary)


def small(**changes):
    settings = dict(steps=24, batch=8, lr=1e-2, warmup=4, log_every=1)
    return TrainConfig(**(settings | changes))


# --- learning -------------------------------------------------------------------------------------


def test_it_learns_and_records():
    model = TinyLM()
    history = train(model, counting, small(steps=60, lr=3e-2))
    assert history.losses[0] > 2.5 and history.losses[-1] < 0.6
    assert [r["step"] for r in history.records] == list(range(1, 61))
    assert history.records[-1]["tokens"] == 60 * 8 * 12
    assert set(history.records[0]) == {"step", "tokens", "loss", "lr", "seconds", "grad_norm"}
    assert history.finished and not model.training
    assert History.from_json(history.to_json()) == history


def test_log_every_thins_the_records_but_not_the_training():
    every, third = TinyLM(), TinyLM()
    a, b = train(every, counting, small()), train(third, counting, small(log_every=5))
    assert [r["step"] for r in b.records] == [1, 5, 10, 15, 20, 24]
    assert b.losses == [a.losses[s - 1] for s in (1, 5, 10, 15, 20, 24)]


def test_global_random_state_is_neither_used_nor_changed():
    model = TinyLM()
    torch.manual_seed(1)
    first = train(model, counting, small()).losses
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(99)
    assert train(TinyLM(), counting, small()).losses == first
    assert train(TinyLM(), counting, small(seed=1)).losses != first  # the seed is what dropout depends on


def test_schedule_and_optimizer_equal_a_loop_written_out():
    """The same steps by hand: AdamW with two groups, clipping, the triangle-topped schedule."""
    config = small(steps=12, warmup=3, decay_fraction=0.5, clip=0.5)
    model, twin = TinyLM(dropout=0), TinyLM(dropout=0)
    history = train(model, counting, config)
    decayed = [twin.embed.weight, twin.mix.weight, twin.head.weight]
    rest = [twin.mix.bias, twin.norm.weight, twin.norm.bias]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=0, betas=(0.9, 0.95))
    rates = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    for step, rate in enumerate(rates):
        ids = counting(step)
        logp = twin(ids).logits[:, :-1].log_softmax(-1)
        loss = -logp.gather(-1, ids[:, 1:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in twin.parameters()))
        for p in twin.parameters():
            p.grad *= min(1.0, 0.5 / float(norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate
        optimizer.step()
        record = history.records[step]
        assert record["lr"] == pytest.approx(config.lr * rate)
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_frozen_parameters_stay():
    model = TinyLM()
    model.embed.requires_grad_(False)
    before = model.embed.weight.clone(), model.head.weight.clone()
    train(model, counting, small())
    assert torch.equal(model.embed.weight, before[0]) and not torch.equal(model.head.weight, before[1])


# --- targets and micro batches --------------------------------------------------------------------


def test_targets_of_labels_masks_and_padding():
    ids = torch.tensor([[0, 5, 6, 1, 1]])
    assert targets(ids, 1).tolist() == [[5, 6, -100, -100, -100]]
    assert targets(ids, None).tolist() == [[5, 6, 1, 1, -100]]
    labels = torch.tensor([[-100, -100, 6, 1, -100]])
    assert targets({"input_ids": ids, "labels": labels}, None).tolist() == [[-100, 6, 1, -100, -100]]
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    assert targets({"input_ids": ids, "attention_mask": mask}, None).tolist() == [[5, 6, -100, -100, -100]]
    assert targets({"chosen": ids, "rejected": ids}, None) is None


def test_micro_batches_of_unequal_target_counts_give_the_whole_batch():
    """A mean of means would weigh a row with one target like a row with eleven."""

    def answers_only(step):
        ids = counting(step)
        labels = ids.clone()
        for row in range(8):
            labels[row, : 11 - row] = -100
        return {"input_ids": ids, "labels": labels}

    curves = [
        train(TinyLM(dropout=0), answers_only, small(micro_batch=size)).losses for size in (None, 1, 3, 8)
    ]
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], atol=1e-5)


def test_a_loss_of_its_own_on_a_dict_is_a_mean_over_rows():
    def pairs(step):
        return {"chosen": counting(step), "rejected": counting(step + 1000)}

    def margin(model, batch):
        difference = model(batch["chosen"]).logits.sum((1, 2)) - model(batch["rejected"]).logits.sum((1, 2))
        return -nn.functional.logsigmoid(difference).mean()

    whole = train(TinyLM(dropout=0), pairs, small(steps=8, warmup=1), loss_fn=margin)
    split = train(TinyLM(dropout=0), pairs, small(steps=8, warmup=1, micro_batch=3), loss_fn=margin)
    np.testing.assert_allclose(split.losses, whole.losses, atol=1e-4)


def test_rows_take_each_row_once_per_epoch_and_depend_on_the_step_only():
    tokens = np.arange(40, dtype=np.uint16).reshape(10, 4)
    rows = Rows(tokens, batch=4, seed=3)
    seen = torch.cat([rows(step) for step in range(5)])[:, 0].tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == tokens[:, 0].tolist()
    assert seen[:10] != seen[10:] and seen[:10] != tokens[:, 0].tolist()
    assert torch.equal(rows(2), Rows(tokens, batch=4, seed=3)(2))
    assert not torch.equal(rows(0), Rows(tokens, batch=4, seed=4)(0))


# --- checkpoints ----------------------------------------------------------------------------------

LONG = dict(steps=40, save_every_steps=4, eval_steps=(0, 10, 40), micro_batch=3)


def look(step, model):
    assert not model.training and not torch.is_grad_enabled()
    return {"norm": float(model.head.weight.norm())}


SCRIPT = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_training import LONG, TinyLM, counting, look, small, train

def slow(step):
    time.sleep(float(sys.argv[3]))
    return counting(step)

train(TinyLM(dropout=float(sys.argv[2])), slow, small(**LONG), out_dir=sys.argv[1], on_step=look)
"""


def start_script(tmp_path, out, *, dropout, pause, launcher=()):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), str(out), str(dropout), str(pause)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )


def test_killed_and_resumed_run_has_the_same_curve(tmp_path):
    whole = train(TinyLM(), counting, small(**LONG), on_step=look)
    process = start_script(tmp_path, tmp_path, dropout=0.1, pause=0.05)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0, 1))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    interrupted = json.loads((tmp_path / "log.json").read_text())
    assert 4 <= interrupted["step"] < 40
    resumed = train(TinyLM(), counting, small(**LONG), out_dir=tmp_path, on_step=look)
    assert resumed.run["resumed"] == 1
    np.testing.assert_allclose(resumed.losses, whole.losses, atol=1e-4)
    assert [r["step"] for r in resumed.records] == list(range(1, 41))
    assert [e["step"] for e in resumed.evaluations] == [0, 10, 40]
    assert resumed.evaluations[-1]["norm"] == pytest.approx(whole.evaluations[-1]["norm"], abs=1e-4)


def test_two_processes_give_the_losses_of_one(tmp_path):
    one = train(TinyLM(dropout=0), counting, small(**LONG), on_step=look)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = start_script(tmp_path, tmp_path / "two", dropout=0, pause=0, launcher=launcher)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    two = History.from_json((tmp_path / "two" / "log.json").read_text())
    assert (one.run["processes"], two.run["processes"]) == (1, 2)
    np.testing.assert_allclose(two.losses, one.losses, atol=1e-4)
    norms = [e["norm"] for e in two.evaluations]
    np.testing.assert_allclose(norms, [e["norm"] for e in one.evaluations], atol=1e-4)


def test_time_limit_saves_and_the_next_call_goes_on(tmp_path):
    config = small(save_every_seconds=1000.0)
    whole = train(TinyLM(), counting, config)
    part = train(TinyLM(), counting, config, out_dir=tmp_path, time_limit=0)
    assert part.step == 1 and not part.finished
    model = TinyLM()
    done = train(model, counting, config, out_dir=tmp_path)
    assert done.finished and done.losses == whole.losses
    weights = [p.clone() for p in model.parameters()]
    again = TinyLM()
    assert train(again, counting, config, out_dir=tmp_path).losses == done.losses  # nothing left to do
    assert all(torch.equal(p, w) for p, w in zip(again.parameters(), weights, strict=True))


def test_another_configuration_or_model_is_refused_before_anything_changes(tmp_path):
    config = small(steps=6, warmup=1, data="mix 1")
    train(TinyLM(), counting, config, out_dir=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    model = TinyLM()
    start = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="lr: 0.01 in the checkpoint, 0.02 now"):
        train(model, counting, small(steps=6, warmup=1, lr=0.02, data="mix 1"), out_dir=tmp_path)
    with pytest.raises(ValueError, match="data: 'mix 1' in the checkpoint, 'mix 2' now"):
        train(model, counting, small(steps=6, warmup=1, data="mix 2"), out_dir=tmp_path)
    with pytest.raises(ValueError, match=r"mix.bias: \[16\] in the checkpoint, \[20\] now"):
        train(TinyLM(width=20), counting, config, out_dir=tmp_path)
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), start, strict=True))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    (tmp_path / "checkpoint.safetensors").write_bytes(before[:500])
    with pytest.raises(ValueError, match="damaged"):
        train(TinyLM(), counting, config, out_dir=tmp_path)


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    import safetensors.torch

    train(TinyLM(), counting, small(), out_dir=tmp_path, time_limit=0)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left.*untouched"):
        train(TinyLM(), counting, small(), out_dir=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors", "log.json"]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"warmup": 20}, "do not fit into steps=24"),
        ({"decay_fraction": 1.5}, "decay_fraction must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"micro_batch": 0}, "micro_batch must be"),
        ({"eval_steps": (25,)}, "eval_steps must be in 0..24"),
    ],
)
def test_config_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_bad_batches_and_losses():
    with pytest.raises(ValueError, match=r"batch has shape \[3, 12\], but config.batch=8"):
        train(TinyLM(), lambda step: counting(step, rows=3), small())
    with pytest.raises(ValueError, match="no target token"):
        nothing = torch.full((8, 12), -100)
        train(TinyLM(), lambda step: {"input_ids": counting(step), "labels": nothing}, small())
    with pytest.raises(FloatingPointError, match="step 1"):
        train(TinyLM(), counting, small(), loss_fn=lambda model, batch: lm_loss(model, batch) * float("nan"))
    frozen = TinyLM().requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad"):
        train(frozen, counting, small())
    with pytest.raises(ValueError, match="1..3"):
        Rows(np.zeros((3, 4), np.uint16), batch=4)
    with pytest.raises(ValueError, match="integer array"):
        Rows(np.zeros((3, 4)), batch=2)


# --- transformers models --------------------------------------------------------------------------


def tiny_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def test_lm_loss_equals_transformers():
    model = tiny_llama()
    ids = torch.randint(2, 64, (3, 20), generator=torch.Generator().manual_seed(0))
    assert lm_loss(model, ids).item() == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-6)
    padded = ids.clone()
    padded[:, 12:] = 1
    short = ids[:, :12]
    assert lm_loss(model, padded).item() == pytest.approx(model(short, labels=short).loss.item(), abs=1e-6)


def test_attention_is_causal_without_a_mask_even_when_compiled_and_restored_after():
    """What makes the GPU run fast: the traced graph must call sdpa with is_causal, not with a mask tensor."""
    model = tiny_llama()
    ids = torch.randint(2, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    seen = []

    def backend(graph, example):
        seen.extend(n.kwargs for n in graph.graph.nodes if "scaled_dot_product" in str(n.target))
        return graph.forward

    plain = lm_loss(model, ids)
    with training._CausalAttention(model) as attention:
        compiled = torch.compile(training._Objective(model, lm_loss), backend=backend, dynamic=False)
        torch.testing.assert_close(compiled(ids), plain)
        assert model.config._attn_implementation != "sdpa"
        with attention.ordinary():
            assert model.config._attn_implementation == "sdpa"
        compiled(ids)  # an evaluation between two steps must not make torch.compile start again
        # With padding the mask is made as ever.
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        masked = model(ids, attention_mask=mask).logits
    assert len(seen) == 2 and all(k.get("attn_mask") is None and k["is_causal"] for k in seen)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(masked[:, 4:], model(ids, attention_mask=mask).logits[:, 4:])


def test_llama_trains_and_padding_row_is_left_alone():
    model = tiny_llama()
    history = train(model, lambda step: counting(step, vocabulary=17), small(steps=40, lr=1e-2))
    assert history.losses[-1] < 0.7 * history.losses[0]
    assert history.run["parameters"] == sum(p.numel() for p in model.parameters())


def test_progress_is_silent_under_ci(monkeypatch, capsys):
    monkeypatch.setenv("CI", "1")
    bar = training._progress_bar(10, 0, enabled=True)
    assert bar.disable
    monkeypatch.delenv("CI")
    assert not training._progress_bar(10, 0, enabled=True).disable
    assert training._progress_bar(10, 0, enabled=False).disable
