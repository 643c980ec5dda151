"""The checks of ZeRO (footprint spec A9): threads stand in for ranks, so no process group is needed."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {
    "zero": "refimpl.footprint.zero:Zero",
    "zero_bytes": "refimpl.footprint.sharding:zero_bytes",
    "fsdp_shard": "refimpl.footprint.sharding:dim0_shard",
}
WORLD, STEPS = 3, 3
# A large epsilon lets the scale of the gradients through, which Adam's division would hide.
ADAMW = {"lr": 1e-2, "eps": 1e-2}


@check
def check_zero(Zero: Callable) -> None:
    """`Zero(model, *, stage, units, group, lr, eps)` with `step()`, `full_parameters()` and `ledger()`: three
    ranks train as one process does on the whole batch, and hold the bytes of their stage."""
    batch = torch.randn(2 * WORLD, 5, generator=_seed(1), dtype=torch.float64)
    whole = _Tied()
    optimizer = torch.optim.AdamW(whole.parameters(), **ADAMW)
    for _ in range(STEPS):
        optimizer.zero_grad()
        whole(batch).square().mean().backward()
        optimizer.step()
    # The root holds a tied 4 x 5 matrix and a bias, each layer a 4 x 4 matrix and a bias: 3 divides none.
    units = {"root": 4 * 5 + 5, "layers.0": 4 * 4 + 4, "layers.1": 4 * 4 + 4}
    P = sum(units.values())
    own = [
        sum(min(max(n - r * -(-n // WORLD), 0), -(-n // WORLD)) for n in units.values()) for r in range(WORLD)
    ]

    for stage in (1, 2, 3):

        def one_rank(group: "_Threads", stage: int = stage) -> tuple[dict, dict, dict, dict]:
            model = _Tied()
            zero = Zero(model, stage=stage, units=model.layers, group=group, **ADAMW)
            mine, held = batch.chunk(WORLD)[group.rank], {}
            for _ in range(STEPS):
                loss = model(mine).square().mean()
                between = zero.ledger().by_kind()
                loss.backward()
                held = zero.ledger().by_kind()
                zero.step()
            return zero.full_parameters(), between, held, zero.ledger().by_kind()

        payload_of_states = []
        for rank, (parameters, between, held, after) in enumerate(_run(one_rank)):
            where = f"stage {stage}, rank {rank} of {WORLD}"
            names = dict(whole.named_parameters())
            require(set(parameters) == set(names), f"{where}: full_parameters() names {sorted(parameters)}")
            for name, expected in names.items():
                require_close(parameters[name], expected.detach(), 1e-9,
                              f"{where}: {name} after {STEPS} steps, against one process")  # fmt: skip
            expected = {
                "weight": 8 * (own[rank] if stage == 3 else P),
                "grad": 8 * (P if stage == 1 else own[rank]),
            }
            for kind, size in expected.items():
                require(held.get(kind) == size,
                        f"{where}: {held.get(kind)} bytes of {kind} after backward, not {size}")  # fmt: skip
            states = 2 * 8 * own[rank] + 4 * len(units)
            require(held.get("optim") == states,
                    f"{where}: {held.get('optim')} bytes of optimizer states, not {states}")  # fmt: skip
            gathered = 8 * units["root"] if stage == 3 else 0
            require(between.get("temp", 0) == gathered,
                    f"{where}: {between.get('temp', 0)} bytes gathered between forward and backward, not "
                    f"{gathered} (the root alone stays)")  # fmt: skip
            require(not after.get("temp") and not after.get("grad"),
                    f"{where}: gathered parameters or gradients outlive step(): {after}")  # fmt: skip
            payload_of_states.append(held["optim"] - 4 * len(units))
        moments = sum(payload_of_states)
        require(moments == 16 * P, f"stage {stage}: all ranks' moments are {moments} bytes, not {16 * P}")
    require_error(ValueError, lambda: Zero(_Tied(), stage=4, units=[]), "stage 4")


@check
def check_zero_bytes(zero_bytes: Callable) -> None:
    """`zero_bytes(parameters, stage, world, *, weight, grad, optim)` -> the paper's bytes per rank."""
    P, N = 1_200_000, 8
    for sizes in ((4, 4, 8), (2, 2, 12)):
        weight, grad, optim = sizes
        expected = (
            P * (weight + grad + optim),
            P * (weight + grad) + P * optim / N,
            P * weight + P * (grad + optim) / N,
            P * (weight + grad + optim) / N,
        )
        for stage, size in enumerate(expected):
            got = zero_bytes(P, stage, N, weight=weight, grad=grad, optim=optim)
            require(got == size, f"stage {stage}, weight/grad/optim {sizes}, N={N}: {got} bytes, not {size}")
    alone = {zero_bytes(P, stage, 1) for stage in range(4)}
    require(
        alone == {16 * P}, f"one rank holds 16P = {16 * P} bytes of float32 AdamW at every stage: {alone}"
    )
    require_error(ValueError, lambda: zero_bytes(P, 4, N), "stage 4")
    require_error(ValueError, lambda: zero_bytes(P, 1, 0), "a world of no ranks")


@check
def check_fsdp_shard(dim0_shard: Callable) -> None:
    """`dim0_shard(shape, rank, world)` -> (stored, own) elements, as `torch.chunk` cuts dimension 0."""
    for shape in ((8, 3), (9, 3), (5, 2, 2), (3,), (2, 7), (1025, 4)):
        for world in (1, 2, 4, 5):
            chunks = [c.numel() for c in torch.empty(shape, device="meta").chunk(world)]
            chunks += [0] * (world - len(chunks))
            for rank in range(world):
                got, expected = tuple(dim0_shard(shape, rank, world)), (chunks[0], chunks[rank])
                require(got == expected,
                        f"{shape}, rank {rank} of {world}: (stored, own) {got}, not {expected}")  # fmt: skip
    require_error(ValueError, lambda: dim0_shard((), 0, 2), "a scalar")
    require_error(ValueError, lambda: dim0_shard((4, 4), 2, 2), "rank 2 of 2")


def _seed(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


class _Tied(nn.Module):
    """x -> W^T layers(W x) + b in float64: a tied matrix in the root and two layers, weights drawn anew."""

    def __init__(self) -> None:
        super().__init__()
        draw = _seed(0)
        self.tied = nn.Parameter(torch.empty(4, 5, dtype=torch.float64))
        self.bias = nn.Parameter(torch.empty(5, dtype=torch.float64))
        with torch.random.fork_rng(devices=[]):  # the constructors draw from the global generator
            self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.tied.T
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x @ self.tied + self.bias


class _Threads:
    """One rank's view of N threads that exchange tensors."""

    def __init__(self, rank: int, world: int, table: list, barrier: threading.Barrier) -> None:
        self.rank, self.world, self.table, self.barrier = rank, world, table, barrier

    def all_gather(self, full: Tensor, chunk: Tensor) -> None:
        full.copy_(torch.cat(self._exchange(chunk)))

    def reduce_scatter(self, chunk: Tensor, full: Tensor) -> None:
        chunk.copy_(torch.stack(self._exchange(full)).sum(0).chunk(self.world)[self.rank])

    def _exchange(self, mine: Tensor) -> list[Tensor]:
        self.table[self.rank] = mine.detach().clone()
        self.barrier.wait()
        everyone = list(self.table)
        self.barrier.wait()
        return everyone


def _run(function: Callable[[_Threads], Any]) -> list[Any]:
    """Call the function once for each rank, in threads; raise the first rank's error, if any."""
    barrier, table = threading.Barrier(WORLD, timeout=60), [None] * WORLD
    results: list[Any] = [None] * WORLD
    errors: list[BaseException] = []

    def call(rank: int) -> None:
        try:
            results[rank] = function(_Threads(rank, WORLD, table, barrier))
        except threading.BrokenBarrierError as error:
            errors.append(error)
        except Exception as error:
            errors.insert(0, error)
            barrier.abort()  # or the others would wait for this rank

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors and isinstance(errors[0], threading.BrokenBarrierError):
        raise AssertionError(
            "the ranks wait for each other: they do not call the same collectives in one order"
        )
    if errors:
        raise errors[0]
    return results
