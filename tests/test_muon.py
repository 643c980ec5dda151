"""Our batched Muon is torch's Muon."""

import copy

import pytest
import torch
from torch import nn

from refimpl.muon import Muon, orthogonalized
from refimpl.training import TrainConfig, train

SHAPES = ((16, 16), (16, 16), (48, 16), (16, 48), (4, 16))
SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}


def matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator) / 4) for shape in SHAPES]


def test_equals_torch_over_twenty_steps():
    ours, theirs = matrices(0), matrices(0)
    one, other = Muon(ours, **SETTINGS), torch.optim.Muon(theirs, **SETTINGS)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b, start in zip(ours, theirs, matrices(0), strict=True):
        assert (a - b).norm() < 0.02 * (b - start).norm()  # both compute in bfloat16


def test_orthogonalized_keeps_the_singular_vectors_and_levels_the_values():
    x = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(x).float())
    assert 0.5 < values.min() and values.max() < 1.4
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert torch.allclose(orthogonalized(x).float(), u @ vh, atol=0.25)
    assert torch.equal(orthogonalized(x.mT), orthogonalized(x).mT)


def test_bad_settings_are_refused():
    weight = nn.Parameter(torch.eye(3))
    with pytest.raises(ValueError, match="closure"):
        Muon([weight], adjust_lr_fn="match_rms_adamw").step(lambda: None)
    with pytest.raises(ValueError, match="match_rms_adamw"):
        Muon([weight]).step()
    with pytest.raises(ValueError, match="optimizer must be 'adamw' or 'muon'"):
        TrainConfig(steps=3, batch=1, lr=1.0, warmup=0, optimizer="sgd")


def test_a_killed_run_with_muon_resumes_on_the_same_curve(tmp_path, tiny_models):
    model = tiny_models["llama"]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, model.config.vocab_size, (8, 12), generator=generator)
    config = TrainConfig(steps=12, batch=8, lr=5e-3, warmup=2, optimizer="muon", log_every=1)
    whole, halves = copy.deepcopy(model), copy.deepcopy(model)
    curve = train(whole, lambda step: rows, config, progress=False).losses
    first = train(halves, lambda step: rows, config, out_dir=tmp_path, time_limit=0.0, progress=False)
    assert not first.finished
    again = train(copy.deepcopy(model), lambda step: rows, config, out_dir=tmp_path, progress=False)
    assert curve[-1] < curve[0]
    assert again.losses[-1] == pytest.approx(curve[-1], abs=1e-4)
