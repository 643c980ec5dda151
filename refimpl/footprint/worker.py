"""N ranks on one machine, for ZeRO: one function run in several processes, and how these talk.

The ranks meet through a file in a temporary folder and speak gloo over the loopback interface.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group", "Processes", "run_ranks"]


class Group(Protocol):
    """What ZeRO needs of its ranks: who am I, of how many, and two collectives.

    `full` is a flat buffer [N · c], `chunk` one rank's part of it [c].
    """

    rank: int
    world: int

    def all_gather(self, full: Tensor, chunk: Tensor) -> None:
        """Write every rank's `chunk` into `full`, in the order of ranks."""

    def reduce_scatter(self, chunk: Tensor, full: Tensor) -> None:
        """Write the sum over ranks of their `full` into the `chunk`s: rank r gets the r-th."""


class Processes:
    """The processes of `torch.distributed`'s default group (gloo on CPU, NCCL on GPUs) as a `Group`."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def all_gather(self, full: Tensor, chunk: Tensor) -> None:
        """Write every rank's chunk into `full`."""
        dist.all_gather(list(full.chunk(self.world)), chunk)

    def reduce_scatter(self, chunk: Tensor, full: Tensor) -> None:
        """Write this rank's chunk of the sum."""
        dist.reduce_scatter(chunk, list(full.chunk(self.world)))


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Call `function(*args)` in N processes of one gloo group and return their results, by rank.

    The function finds its rank with `torch.distributed.get_rank()`. It must be importable by name (not a
    lambda, nor defined in a notebook), its arguments and results picklable. Each rank computes with one
    thread. No process outlives the call.

    Parameters: function; world, N >= 1 processes; timeout_s, seconds for everything together. Raises
    ValueError for a bad world or timeout, RuntimeError with the traceback of the first rank that fails, and
    TimeoutError where a rank is still silent after `timeout_s`.

    >>> from torch.distributed import get_world_size
    >>> run_ranks(get_world_size, 2)  # doctest: +SKIP
    [2, 2]
    """
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        raise ValueError(f"world must be an integer >= 1, got {world!r}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be > 0, got {timeout_s!r}")
    deadline = time.monotonic() + timeout_s
    context = multiprocessing.get_context("spawn")  # a forked copy of torch's threads may hang
    with tempfile.TemporaryDirectory() as folder:
        ranks: dict[Connection, tuple[int, Any]] = {}
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                call = (theirs, rank, world, Path(folder, "store").as_uri(), timeout_s, function, args)
                process = context.Process(target=_rank, args=call, daemon=True)
                process.start()
                theirs.close()
                ranks[ours] = rank, process
            return _collect(ranks, deadline, timeout_s)
        finally:
            for _, process in ranks.values():
                process.kill()
                process.join()


def _collect(ranks: dict[Connection, tuple[int, Any]], deadline: float, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    silent = dict(ranks)
    while silent:
        ready = wait(list(silent), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            late = sorted(rank for rank, _ in silent.values())
            raise TimeoutError(f"ranks {late} gave no result within {timeout_s} s")
        for pipe in ready:
            rank, _ = silent.pop(pipe)
            try:
                failed, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                failed, value = True, "the process ended without a word"
            if failed:
                raise RuntimeError(f"rank {rank} of {len(ranks)} failed: {value}")
            results[rank] = value
    return [results[rank] for rank in range(len(ranks))]


def _rank(
    pipe: Connection, rank: int, world: int, store: str, timeout_s: float, function: Callable, args: tuple
) -> None:
    """The life of one rank."""
    try:
        torch.set_num_threads(1)
        # Without this gloo looks up the host's own name, which a machine without network may not know.
        loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
        if loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
        )
        # Plain pickle copies tensors; the pipe's own would share memory that ends with this process.
        message = pickle.dumps((False, function(*args)))
        dist.barrier()  # a rank that left early would break the others' last collective
        dist.destroy_process_group()
    except Exception:
        message = pickle.dumps((True, traceback.format_exc()))
    pipe.send_bytes(message)
    pipe.close()
