"""Two real processes: ZeRO, FSDP2 and ZeroRedundancyOptimizer against one process and the formula.

All two-process measurements happen in one run (the fixture `measured`), which every rank ends on its own
deadline; the group marker keeps them on one worker of pytest-xdist.
"""

import gc
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from refimpl.checks.tiny import random_ids, tiny
from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.sharding import sharded, units
from refimpl.footprint.worker import Processes, run_ranks
from refimpl.footprint.zero import Zero
from refimpl.ledger import Ledger, of_tensors

pytestmark = pytest.mark.xdist_group("gloo")

# P = 156,544; the vocabulary is odd, so that rows cannot be halved.
SIZES = dict(vocab_size=1025, hidden_size=64, intermediate_size=172, num_hidden_layers=2,
             num_attention_heads=8, num_key_value_heads=4)  # fmt: skip
WORLD, STEPS, RATE = 2, 3, 1e-2


def small() -> nn.Module:
    return tiny("llama", **SIZES)


def batch() -> Tensor:
    return random_ids(4, 12, seed=1)


# --- what each rank runs --------------------------------------------------------------------------


def held_storages() -> dict[int, torch.UntypedStorage]:
    """All storages that a Python tensor holds, by address; the dict keeps them alive."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


def train(model: nn.Module, step, ledger) -> dict:
    """Three steps on this rank's half of the batch; what was held, when.

    Gloo's thread may hold the tensors of a collective for a while after the call has returned. What it still
    holds before forward counts on both sides of the difference; what FSDP2 lends it in forward is waited for.
    """
    mine, seen = batch().chunk(WORLD)[dist.get_rank()], {}
    for i in range(STEPS):
        held = held_storages() if i == 1 else {}  # collecting garbage is slow
        before = sum(storage.nbytes() for storage in held.values())
        loss = model(input_ids=mine, labels=mine).loss
        if i == 1:
            time.sleep(0.2)
            held |= held_storages()
            seen["live"] = sum(storage.nbytes() for storage in held.values()) - before
        loss.backward()
        del loss
        if i == 0:
            seen["backward"] = ledger()
        step()
    seen["rest"] = ledger()
    return seen


def our_zero(stage: int) -> dict:
    model, temp = small(), []
    zero = Zero(model, stage=stage, units=model.model.layers, lr=RATE)
    for layer in model.model.layers:
        look = lambda *_: temp.append(zero.ledger().total("temp", "resident"))
        layer.register_forward_pre_hook(look)
        layer.register_full_backward_hook(look)
    seen = train(model, zero.step, zero.ledger)
    return seen | {"parameters": zero.full_parameters(), "temp": max(temp)}


def of_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Ledger:
    """The local shards of parameters, gradients and states."""
    from torch.distributed.tensor import DTensor

    local = lambda t: t.to_local() if isinstance(t, DTensor) else t
    named = list(model.named_parameters())
    grads = [(n, local(p.grad)) for n, p in named if p.grad is not None]
    states = [(f"{n}.{k}", local(v)) for n, p in named for k, v in optimizer.state.get(p, {}).items()]
    weights = of_tensors([(n, local(p)) for n, p in named], "weight")
    return weights + of_tensors(grads, "grad") + of_tensors(states, "optim")


def fsdp2(reshard: bool) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = small(), init_device_mesh("cpu", (WORLD,))
    choice = {} if reshard else {"reshard_after_forward": False}  # by default the root alone stays gathered
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, **choice)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    step = lambda: (optimizer.step(), optimizer.zero_grad())
    seen = train(model, step, lambda: of_optimizer(model, optimizer))
    return seen | {"parameters": {n: p.full_tensor().detach() for n, p in model.named_parameters()}}


def redundancy_optimizer() -> dict:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = small()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=RATE)

    def step() -> None:
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= WORLD
        optimizer.step()
        optimizer.zero_grad()

    seen = train(model, step, lambda: of_optimizer(model, optimizer.optim))
    return seen | {"parameters": {n: p.detach() for n, p in model.named_parameters()}}


def exchange() -> dict[str, Tensor]:
    group = Processes()
    full, chunk = torch.zeros(4), torch.full((2,), 10.0 * (group.rank + 1))
    group.all_gather(full, chunk)
    summed = torch.zeros(2)
    group.reduce_scatter(summed, full)
    return {"gathered": full, "summed": summed}


def measure() -> dict:
    small()  # imports transformers
    gc.collect()
    gc.freeze()  # what exists by now is not looked at again: the live bytes are differences
    seen = {"exchange": exchange()} | {f"stage {stage}": our_zero(stage) for stage in (1, 2, 3)}
    seen["fsdp2"], seen["fsdp2, no reshard"] = fsdp2(True), fsdp2(False)
    return seen | {"redundancy": redundancy_optimizer()}


@pytest.fixture(scope="module")
def measured() -> list[dict]:
    return run_ranks(measure, WORLD, timeout_s=240)


@pytest.fixture(scope="module")
def arch() -> Arch:
    return Arch.from_config(small().config)


# --- two processes --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_two_collectives(measured):
    for rank, summed in enumerate(([20, 20], [40, 40])):
        assert measured[rank]["exchange"]["gathered"].tolist() == [10, 10, 20, 20]
        assert measured[rank]["exchange"]["summed"].tolist() == summed


SYSTEMS = ("stage 1", "stage 2", "stage 3", "fsdp2", "fsdp2, no reshard", "redundancy")


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_train_as_one_on_the_whole_batch(one_process, measured, system):
    expected = one_process(small(), batch(), STEPS, RATE)
    for rank in range(WORLD):
        torch.testing.assert_close(measured[rank][system]["parameters"], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_our_bytes_are_the_formulas(measured, arch, stage):
    for rank in range(WORLD):
        seen = measured[rank][f"stage {stage}"]
        predicted = sharded(arch, Run(zero_stage=stage, world=WORLD), rank=rank)
        pairs = [("weight", "rest"), ("optim", "rest"), ("weight", "backward"), ("grad", "backward")]
        for view in ("payload", "resident"):
            for kind, when in pairs:
                assert seen[when].total(kind, view) == predicted.total(kind, view), (rank, kind, when, view)
        assert seen["rest"].total("grad") == 0
        assert seen["temp"] == predicted.total("temp", "resident")


@pytest.mark.slow
@pytest.mark.parametrize("system", ["fsdp2", "fsdp2, no reshard"])
def test_fsdp2_bytes_are_the_formulas(measured, arch, system):
    for rank in range(WORLD):
        seen = measured[rank][system]
        predicted = sharded(arch, Run(zero_stage=3, world=WORLD), rank=rank, layout="fsdp2")
        for view in ("payload", "resident"):
            for kind, when in (("weight", "rest"), ("optim", "rest"), ("grad", "backward")):
                assert seen[when].total(kind, view) == predicted.total(kind, view), (rank, kind, when, view)


@pytest.mark.slow
def test_fsdp2_bytes_are_the_specs(measured, arch):
    assert arch.parameters() == 156_544
    for rank, logical in enumerate((313_216, 312_960)):
        seen = measured[rank]["fsdp2"]
        assert seen["rest"].total("weight") == seen["backward"].total("grad") == logical
        assert seen["rest"].total("weight", "resident") == 313_216
        assert seen["rest"].total("optim") == 2 * logical + 4 * len(arch.tensors())


@pytest.mark.slow
@pytest.mark.parametrize("system", ["stage 3", "fsdp2"])
def test_the_ranks_shares_add_up_to_the_whole(measured, arch, system):
    for when, kind in (("rest", "weight"), ("backward", "grad")):
        assert sum(seen[system][when].total(kind) for seen in measured) == 4 * arch.parameters()


@pytest.mark.slow
def test_redundancy_optimizer_shards_whole_tensors(measured, arch):
    states = [seen["redundancy"]["rest"].total("optim") for seen in measured]
    assert sum(states) == 8 * arch.parameters() + 4 * len(arch.tensors())
    assert states[0] != states[1]  # ours are equal but for padding
    for seen in measured:
        assert seen["redundancy"]["backward"].total("grad") == 4 * arch.parameters()


@pytest.mark.slow
def test_bytes_between_forward_and_backward(measured, arch):
    """Activations are the same everywhere; the difference is what stays gathered."""
    sizes = {u: sum(torch.Size(shape).numel() for _, shape in own) for u, own in units(arch).items()}
    root, layers = sizes.pop("root"), sum(sizes.values())
    for seen in measured:
        activations = seen["stage 2"]["live"]
        assert seen["stage 1"]["live"] == seen["redundancy"]["live"] == activations
        # Stage 2 keeps the one full buffer, of which the shard is a part; stage 3 gathers the root anew, so
        # that the saving is 4 P_layers (N - 1) / N less the root's shard, which is there twice.
        two, three = (seen[s]["live"] + seen[s]["rest"].total("weight", "resident") for s in SYSTEMS[1:3])
        assert two - three == 4 * layers * (WORLD - 1) // WORLD - 4 * root // WORLD
        # FSDP2 keeps the shards beside the gathered layers: without resharding it holds 4 P_layers more.
        assert seen["fsdp2, no reshard"]["live"] - seen["fsdp2"]["live"] == 4 * layers
        padded_root = 4 * (1026 * 64 + 64)
        assert seen["fsdp2"]["live"] - activations == padded_root
