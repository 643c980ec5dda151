"""Closed forms of sharded training: the paper's table, padding, both layouts, and bad input."""

import subprocess
import sys
from math import prod

import pytest
import torch

from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.sharding import (
    deepspeed_estimate,
    dim0_shard,
    flat_shard,
    sharded,
    units,
    zero_bytes,
)

GPT2 = Arch("gpt2", 131, 24, 32, 128, 3, 4, 4, 8, tied=True)
LLAMA = Arch("llama", 1025, 32, 64, 172, 2, 8, 4, 8, tied=True)
UNTIED = Arch("llama", 97, 32, 24, 40, 3, 3, 1, 8, tied=False, qkv_bias=True)
LLAMA_70B = Arch("llama", 32000, 4096, 8192, 28672, 80, 64, 8, 128, tied=False)
ARCHS = {"gpt2": GPT2, "llama": LLAMA, "untied": UNTIED}
WORLDS = (1, 2, 3, 8)


@pytest.fixture(params=ARCHS)
def arch(request):
    return ARCHS[request.param]


def test_the_papers_table_of_a_7_5_billion_model_on_64_ranks():
    gigabytes = [zero_bytes(7_500_000_000, s, 64, weight=2, grad=2, optim=12) / 1e9 for s in range(4)]
    assert gigabytes == pytest.approx([120, 31.4, 16.6, 1.88], abs=0.05)


def test_deepspeed_counts_two_bytes_more_than_the_paper_sharded():
    """Its 18 are the paper's 14 (2 + 12), and 32-bit gradients beside 16-bit ones."""
    P, N = 10**9, 16
    paper = zero_bytes(P, 2, N, weight=2, grad=2, optim=12)
    assert deepspeed_estimate(P, 2, N) - paper == 4 * P / N
    assert deepspeed_estimate(P, 3, N, largest_layer=1000) == 18 * P // N + 4000


@pytest.mark.parametrize("world", WORLDS)
def test_flat_chunks_are_what_torch_cuts_from_the_padded_buffer(world):
    for numel in range(1, 40):
        stored = -(-numel // world)
        buffer = torch.arange(world * stored).view(world, stored)
        assert [flat_shard(numel, r, world) for r in range(world)] == [
            (stored, int((row < numel).sum())) for row in buffer
        ]


def test_units_hold_every_tensor_once(arch):
    grouped = units(arch)
    assert len(grouped) == arch.layers + 1
    assert sorted(t for tensors in grouped.values() for t in tensors) == sorted(arch.tensors())
    assert all("norm.weight" in n or "emb" in n or ".wt" in n or ".wp" in n or "ln_f" in n or "head" in n
               for n, _ in grouped["root"])  # fmt: skip


def test_stage_zero_and_one_rank_are_the_unsharded_account(arch):
    P, tensors = arch.parameters(), len(arch.tensors())
    assert sharded(arch, Run()).by_kind() == {"weight": 4 * P, "grad": 4 * P, "optim": 8 * P + 4 * tensors}
    assert sharded(arch, Run(world=4)).by_kind() == sharded(arch, Run()).by_kind()
    for stage in (1, 2, 3):
        alone = sharded(arch, Run(zero_stage=stage, world=1)).by_kind("resident")
        assert (alone["weight"], alone["grad"]) == (4 * P, 4 * P)
        assert alone["optim"] == 8 * P + 4 * (arch.layers + 1)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("layout", "stage"), [("flat", 1), ("flat", 2), ("flat", 3), ("fsdp2", 3)])
def test_payloads_of_the_ranks_add_up_to_the_whole(arch, world, layout, stage):
    P, run = arch.parameters(), Run(zero_stage=stage, world=world)
    ledgers = [sharded(arch, run, rank=r, layout=layout) for r in range(world)]
    pieces = len(arch.tensors()) if layout == "fsdp2" else arch.layers + 1
    copies = {"weight": 1 if stage == 3 else world, "grad": world if stage == 1 else 1}
    for kind, whole in copies.items():
        assert sum(ledger.total(kind) for ledger in ledgers) == 4 * P * whole
        assert len({ledger.total(kind, "resident") for ledger in ledgers}) == 1  # every rank stores the same
    assert sum(ledger.total("optim") for ledger in ledgers) == 8 * P + 4 * pieces * world


@pytest.mark.parametrize("stage", range(4))
def test_the_papers_form_is_the_limit_without_padding(stage):
    """On 70 B parameters and 64 ranks the exact bytes are within 0.1 % of the paper's."""
    states = sharded(LLAMA_70B, Run(zero_stage=stage, world=64 if stage else 1))
    exact = states.total(view="resident") - states.total("temp", "resident")
    assert exact == pytest.approx(zero_bytes(LLAMA_70B.parameters(), stage, 64), rel=1e-3)


def test_stage_three_gathers_the_root_and_the_largest_layer():
    run = Run(zero_stage=3, world=3)
    grouped = {u: sum(prod(shape) for _, shape in t) for u, t in units(LLAMA).items()}
    root, layer = grouped["root"], grouped["model.layers.0"]
    temp = [item for item in sharded(LLAMA, run).items if item.kind == "temp"]
    assert [item.payload for item in temp] == [4 * root, 4 * layer]
    assert [item.resident for item in temp] == [12 * -(-root // 3), 12 * -(-layer // 3)]
    rows = [item for item in sharded(LLAMA, run, layout="fsdp2").items if item.kind == "temp"]
    assert rows[0].resident == 12 * (
        342 * 64 + 22
    )  # 1025 rows in chunks of 342, the norm's 64 in chunks of 22


def test_dtype_and_optimizer_move_the_bytes():
    run = dict(zero_stage=3, world=2)
    full = sharded(LLAMA, Run(**run)).by_kind()
    half = sharded(LLAMA, Run(dtype="bfloat16", **run)).by_kind()
    assert half == {"weight": full["weight"] // 2, "grad": full["grad"] // 2, "temp": full["temp"] // 2,
                    "optim": (full["optim"] - 12) // 2 + 12}  # fmt: skip
    assert sharded(LLAMA, Run(optimizer="momentum", **run)).total("optim") == (full["optim"] - 12) // 2
    assert "optim" not in sharded(LLAMA, Run(optimizer="sgd", **run)).by_kind()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sharded(LLAMA, Run(world=2), rank=2), "rank must be an integer from 0 to 1, got 2"),
        (lambda: sharded(LLAMA, Run(world=2), rank=-1), "rank must be .* got -1"),
        (
            lambda: sharded(LLAMA, Run(), layout="rows"),
            r"layout must be one of \('flat', 'fsdp2'\), got 'rows'",
        ),
        (lambda: sharded(LLAMA, Run(zero_stage=2), layout="fsdp2"), "zero_stage must be 3, got 2"),
        (lambda: sharded(LLAMA, Run(optimizer="adafactor")), "optimizer must be one of .* got 'adafactor'"),
        (lambda: sharded(LLAMA, Run(lora_rank=8)), "lora_rank must be None"),
        (lambda: flat_shard(0, 0, 2), "numel must be an integer >= 1, got 0"),
        (lambda: flat_shard(4, 0, 0), "world must be an integer >= 1, got 0"),
        (lambda: flat_shard(4.0, 0, 2), "numel must be an integer >= 1, got 4.0"),
        (lambda: dim0_shard((), 0, 2), "shape must have a dimension 0"),
        (lambda: zero_bytes(10, 4, 2), r"stage must be one of \(0, 1, 2, 3\), got 4"),
        (lambda: zero_bytes(0, 1, 2), "parameters must be an integer >= 1, got 0"),
        (lambda: deepspeed_estimate(10, 1, 2), r"stage must be one of \(2, 3\), got 1"),
        (lambda: deepspeed_estimate(10, 3, 2), "largest_layer must be"),
        (lambda: deepspeed_estimate(10, 2, 2, largest_layer=5), "largest_layer must be"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sharding_imports_no_transformers():
    code = "import sys, refimpl.footprint.zero; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
