"""The notebook's recipe: it trains as one process does, holds the formula's bytes, sends the paper's."""

import pytest
import torch
import torch.distributed as dist

from refimpl.checks.tiny import random_ids
from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.sharding import sharded, units
from refimpl.footprint.worker import run_ranks
from refimpl.footprint.zero_demo import SYSTEMS, make_llama, train_rank

pytestmark = pytest.mark.xdist_group("gloo")

CONFIG = dict(vocab_size=49, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
WORLD, STEPS, RATE = 2, 3, 1e-2
IDS = random_ids(4, 8, seed=1)


@pytest.fixture(scope="module")
def reports():
    return run_ranks(train_rank, WORLD, CONFIG, IDS, SYSTEMS, STEPS, RATE, timeout_s=240)


@pytest.fixture(scope="module")
def arch():
    return Arch.from_config(make_llama(CONFIG).config)


@pytest.mark.slow
def test_every_system_trains_as_one_process(reports):
    model = make_llama(CONFIG)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    for rank in range(WORLD):
        for system in SYSTEMS:
            for name, p in model.named_parameters():
                trained = reports[rank][system].parameters[name]
                torch.testing.assert_close(trained, p.detach(), rtol=0, atol=1e-5)
                assert not torch.equal(trained, start[name])


@pytest.mark.slow
def test_bytes_per_rank_are_the_closed_form(reports, arch):
    for rank in range(WORLD):
        for stage, system in enumerate(("replicas", "zero1", "zero2", "zero3")):
            seen = reports[rank][system]
            run = Run(zero_stage=stage, world=WORLD if stage else 1)
            predicted = sharded(arch, run, rank=rank if stage else 0)
            assert seen.backward.total("grad", "resident") == predicted.total("grad", "resident")
            for kind in ("weight", "optim"):
                assert seen.rest.total(kind, "resident") == predicted.total(kind, "resident"), (system, kind)
            assert seen.gathered == predicted.total("temp", "resident")
        predicted = sharded(arch, Run(zero_stage=3, world=WORLD), rank=rank, layout="fsdp2")
        rest = reports[rank]["fsdp2"].rest
        assert rest.total("weight", "resident") == predicted.total("weight", "resident")
        assert rest.total("optim", "resident") == predicted.total("optim", "resident")


@pytest.mark.slow
def test_stages_one_and_two_send_what_replicas_send_and_stage_three_half_as_much_again(reports, arch):
    chunks = {unit: 4 * -(-sum(torch.Size(s).numel() for _, s in tensors) // WORLD)
              for unit, tensors in units(arch).items()}  # fmt: skip
    root, layers = chunks.pop("root"), sum(chunks.values())
    for seen in reports:
        assert seen["zero1"].sent == seen["zero2"].sent == 2 * (root + layers) * (WORLD - 1)
        assert seen["zero3"].sent == (2 * root + 3 * layers) * (WORLD - 1)
        assert abs(seen["replicas"].sent - seen["zero1"].sent) <= 8 * len(chunks)  # padding
        assert seen["fsdp2"].sent is None


@pytest.mark.parametrize(("change", "words"), [
    ({"systems": ("zero4",)}, "systems must be of replicas"),
    ({"steps": 1}, "steps must be an integer >= 2"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_runs(change, words):
    with pytest.raises(ValueError, match=words):
        train_rank(CONFIG, IDS, **change)


def test_rows_that_do_not_divide_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for ids in (IDS[:0], IDS[0]):
            with pytest.raises(ValueError, match="B a multiple of 1 ranks"):
                train_rank(CONFIG, ids)
    finally:
        dist.destroy_process_group()


def test_the_model_is_the_same_every_time_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, two = make_llama(CONFIG), make_llama(CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(make_llama(CONFIG, seed=1).lm_head.weight, one.lm_head.weight)
    assert torch.equal(torch.get_rng_state(), before)
