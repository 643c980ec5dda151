"""ZeRO in one process: its neutral setting, accumulation, checkpointing, evaluation, bad input."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from refimpl.checks.tiny import random_ids, tiny
from refimpl.footprint.sharding import flat_shard
from refimpl.footprint.zero import Zero

STEPS, RATE = 3, 1e-2


def small(family: str = "llama") -> nn.Module:
    return tiny(family, intermediate_size=43) if family == "llama" else tiny(family)


def batch() -> Tensor:
    return random_ids(4, 12, seed=1)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
def test_one_rank_is_plain_adamw(one_process, alone, family, stage):
    # In float64: the gradient of a key bias is zero, and AdamW would blow up float32's rounding of it.
    model = small(family).double()
    expected = one_process(small(family).double(), batch(), STEPS, RATE)
    zero = Zero(model, stage=stage, units=layers_of(model), lr=RATE)
    for _ in range(STEPS):
        model(input_ids=batch(), labels=batch()).loss.backward()
        zero.step()
    for name, p in zero.full_parameters().items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_micro_batches_accumulate(one_process, alone, stage):
    model = small().double()
    zero = Zero(model, stage=stage, units=layers_of(model), lr=RATE)
    for _ in range(STEPS):
        for part in batch().chunk(2):
            (model(input_ids=part, labels=part).loss / 2).backward()
        zero.step()
    expected = one_process(small().double(), batch(), STEPS, RATE)
    for name, p in zero.full_parameters().items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("stage", [2, 3])
def test_gradient_checkpointing_changes_nothing(one_process, alone, stage):
    model = small().double().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    zero = Zero(model, stage=stage, units=layers_of(model), lr=RATE)
    for _ in range(STEPS):
        model(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
        zero.step()
    expected = one_process(small().double(), batch(), STEPS, RATE)
    for name, p in zero.full_parameters().items():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-9)


def test_stage_three_evaluates_and_holds_nothing_gathered_afterwards(alone):
    model = small()
    with torch.no_grad():
        expected = model(input_ids=batch()).logits
        zero = Zero(model, stage=3, units=layers_of(model))
        assert sum(p.numel() for p in model.parameters()) == 0
        torch.testing.assert_close(model(input_ids=batch()).logits, expected, rtol=0, atol=0)
    assert zero.ledger().by_kind() == {"weight": 4 * sum(p.numel() for p in small().parameters())}


def test_a_forward_without_backward_leaves_no_stale_root(alone):
    model = small()
    zero = Zero(model, stage=3, units=layers_of(model), lr=RATE)
    model(input_ids=batch(), labels=batch()).loss.backward()
    model(input_ids=batch())  # gathers the root, and no backward frees it
    zero.step()
    with torch.no_grad():
        logits = model(input_ids=batch()).logits
    fresh = small()
    fresh.load_state_dict(zero.full_parameters(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(logits, fresh(input_ids=batch()).logits, rtol=0, atol=0)


# --- bad input ------------------------------------------------------------------------------------


def frozen(model):
    layers_of(model)[0].self_attn.q_proj.weight.requires_grad_(False)


def mixed(model):
    layers_of(model)[0].bfloat16()


def shared(model):
    layers_of(model)[1].mlp = layers_of(model)[0].mlp


def shared_with_root(model):
    model.model.norm.weight = layers_of(model)[0].input_layernorm.weight


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (frozen, "is frozen"),
        (mixed, "mixes dtypes"),
        (shared, "shared with"),
        (shared_with_root, "shared with"),
    ],
)
def test_a_model_that_cannot_be_sharded_stays_as_it_was(alone, spoil, message):
    model = small()
    spoil(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        Zero(model, stage=3, units=layers_of(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_bad_arguments(alone):
    model = small()
    with pytest.raises(ValueError, match="stage must be 1, 2 or 3, got 0"):
        Zero(model, stage=0, units=[])
    with pytest.raises(ValueError, match="not a submodule"):
        Zero(model, stage=1, units=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="not a submodule"):
        Zero(model, stage=1, units=[model])
    with pytest.raises(ValueError, match="nested"):
        Zero(model, stage=1, units=[model.model.layers, model.model.layers[0]])
    with pytest.raises(ValueError, match="no parameters"):
        Zero(nn.ReLU(), stage=1, units=[])
    with pytest.raises(ValueError, match="Invalid learning rate"):
        Zero(model, stage=3, units=[], lr=-1.0)
    assert all(p.numel() for p in model.parameters())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_without_gradients_changes_nothing(alone, stage):
    zero = Zero(small(), stage=stage, units=[])
    before = zero.full_parameters()
    with pytest.raises(ValueError, match="root"):
        zero.step()
    assert all(torch.equal(p, before[name]) for name, p in zero.full_parameters().items())


class Disagreeing:
    """A second rank whose numbers differ from mine."""

    rank, world = 0, 2

    def all_gather(self, full, chunk):
        full.copy_(torch.cat([chunk, chunk + 1]))


def test_ranks_that_start_from_different_parameters_are_refused():
    with pytest.raises(ValueError, match="differs between the ranks"):
        Zero(nn.Linear(2, 2), stage=1, units=[], group=Disagreeing())


def test_more_ranks_than_elements():
    assert [flat_shard(2, rank, 4) for rank in range(4)] == [(1, 1), (1, 1), (1, 0), (1, 0)]


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x, both):
        return (self.always(x) + (self.sometimes(x) if both else 0)).sum()


def test_a_micro_batch_that_misses_parameters_of_a_unit_is_refused(alone):
    model = Branch()
    zero = Zero(model, stage=2, units=[])
    for both in (True, False):
        model(torch.ones(2, 3), both).backward()
    with pytest.raises(ValueError, match="without a gradient"):
        zero.step()
