"""A recipe for `run_ranks`: one small LLaMA trained by replicas, by ZeRO 1 to 3 and by FSDP2.

Spawned processes import what they run, so this cannot stand in a notebook. Every system starts from the same
weights and sees the same batches; what each rank held and sent comes back (Rajbhandari et al., arXiv
1910.02054, the sharding terms of survey Eq. 1).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.footprint.static import measure_static
from refimpl.footprint.worker import Processes
from refimpl.footprint.zero import Zero
from refimpl.ledger import Ledger, of_tensors

__all__ = ["SYSTEMS", "RankReport", "make_llama", "train_rank"]

SYSTEMS = ("replicas", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class RankReport:
    """What one rank saw of one system.

    backward, rest : what the rank held after the first backward pass, and after the last step.
    gathered : most bytes of parameters that ZeRO 3 gathered at once; 0 for stages that gather none.
    sent : bytes that left this rank in one step; None for FSDP2, whose collectives are its own.
    seconds : median over the steps after the first (one thread per rank).
    parameters : the whole trained parameters by name.
    """

    backward: Ledger
    rest: Ledger
    gathered: int
    sent: int | None
    seconds: float
    parameters: dict[str, Tensor]


def make_llama(config: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """Return a random LLaMA of `transformers` in train mode, the same in every process.

    Parameters: config, fields of `LlamaConfig`; seed, of its weights. Leaves the global generator as it is.

    >>> model = make_llama({"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
    ...                     "num_hidden_layers": 1, "num_attention_heads": 2})
    >>> model.training, model.num_parameters()
    (True, 616)
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**config)).train()


def train_rank(
    config: Mapping[str, Any], ids: Tensor, systems: Sequence[str] = SYSTEMS, steps: int = 4, lr: float = 1e-3
) -> dict[str, RankReport]:
    """Train a fresh model by each system on this rank's rows of `ids`; to be called by `run_ranks`.

    Parameters
    ----------
    config : of `make_llama`.
    ids : token ids [B, S], the labels as well; B a multiple of the ranks. Rank r takes the r-th part.
    systems : of `SYSTEMS`. "replicas" is plain data parallelism: all-reduced gradients, nothing sharded.
    steps, lr : AdamW steps on this one batch, 2 or more, and their size.

    Raises ValueError for an unknown system, fewer than 2 steps, and rows that do not divide.

    Examples
    --------
    >>> from refimpl.footprint.worker import run_ranks
    >>> reports = run_ranks(train_rank, 2, config, ids)  # doctest: +SKIP
    >>> reports[1]["zero3"].rest.by_kind()               # doctest: +SKIP
    """
    unknown = [name for name in systems if name not in SYSTEMS]
    if unknown:
        raise ValueError(f"systems must be of {', '.join(SYSTEMS)}, got {unknown[0]!r}")
    if steps < 2:
        raise ValueError(f"steps must be an integer >= 2, got {steps!r}")
    group = _Counted()
    if ids.dim() != 2 or len(ids) == 0 or len(ids) % group.world:
        raise ValueError(f"ids must be [B, S], B a multiple of {group.world} ranks, got {list(ids.shape)}")
    mine = ids.chunk(group.world)[group.rank]
    return {name: _train(name, make_llama(config), mine, steps, lr, group) for name in systems}


def _train(name: str, model: nn.Module, ids: Tensor, steps: int, lr: float, group: _Counted) -> RankReport:
    gathered = [0]
    if name.startswith("zero"):
        zero = Zero(model, stage=int(name[-1]), units=model.model.layers, group=group, lr=lr)
        step, held, whole = zero.step, zero.ledger, zero.full_parameters
        for layer in model.model.layers:
            look = lambda *_: gathered.append(zero.ledger().total("temp", "resident"))
            layer.register_forward_pre_hook(look)
            layer.register_full_backward_hook(look)
    else:
        make = _fsdp2 if name == "fsdp2" else _replicas
        step, held, whole = make(model, lr, group)
    seconds, sent = [], []
    for i in range(steps):
        start, before = time.perf_counter(), group.sent
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if i == 0:
            backward = held()
        step()
        seconds.append(time.perf_counter() - start)
        sent.append(group.sent - before)
    rest, sent_last = held(), None if name == "fsdp2" else sent[-1]
    return RankReport(backward, rest, max(gathered), sent_last, median(seconds[1:]), whole())


def _replicas(model: nn.Module, lr: float, group: _Counted) -> tuple[Callable, Callable, Callable]:
    """Plain data parallelism. Its all-reduce is a reduce-scatter and an all-gather, as in a ring."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    parameters = list(model.parameters())

    def step() -> None:
        full = torch.cat([p.grad.flatten() for p in parameters])
        full = nn.functional.pad(full, (0, -len(full) % group.world))
        chunk = full.new_empty(len(full) // group.world)
        group.reduce_scatter(chunk, full)
        group.all_gather(full, chunk / group.world)
        means = full[: sum(p.numel() for p in parameters)].split([p.numel() for p in parameters])
        for p, mean in zip(parameters, means, strict=True):
            p.grad.copy_(mean.view_as(p))
        optimizer.step()
        optimizer.zero_grad()

    held = lambda: _no_buffers(measure_static(model, optimizer))
    return step, held, lambda: {name: p.detach().clone() for name, p in model.named_parameters()}


def _fsdp2(model: nn.Module, lr: float, group: _Counted) -> tuple[Callable, Callable, Callable]:
    """torch's own: each layer a unit, the rest the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (group.world,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def held() -> Ledger:
        named = list(model.named_parameters())
        grads = [(name, _local(p.grad)) for name, p in named if p.grad is not None]
        states = [(f"{n}.{k}", _local(v)) for n, p in named for k, v in optimizer.state.get(p, {}).items()]
        weights = of_tensors([(name, _local(p)) for name, p in named], "weight")
        return weights + of_tensors(grads, "grad") + of_tensors(states, "optim")

    return step, held, lambda: {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}


def _local(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _no_buffers(ledger: Ledger) -> Ledger:
    return Ledger(tuple(item for item in ledger.items if item.kind != "buffer"))


class _Counted(Processes):
    """The default group; counts the bytes that its two collectives make this rank send."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def all_gather(self, full: Tensor, chunk: Tensor) -> None:
        self.sent += chunk.nbytes * (self.world - 1)
        super().all_gather(full, chunk)

    def reduce_scatter(self, chunk: Tensor, full: Tensor) -> None:
        self.sent += chunk.nbytes * (self.world - 1)
        super().reduce_scatter(chunk, full)
