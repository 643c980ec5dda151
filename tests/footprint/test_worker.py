"""The worker: results by rank, failures reported, nothing left hanging."""

import os
import time

import pytest
import torch.distributed as dist

from refimpl.footprint.worker import run_ranks

pytestmark = pytest.mark.xdist_group("gloo")


def fail_on_rank_one():
    if dist.get_rank() == 1:
        raise OSError("no more disk")
    dist.barrier()


def sleep():
    time.sleep(60)


def die():
    os._exit(3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "world", "error", "message", "timeout_s"),
    [
        (fail_on_rank_one, 2, RuntimeError, "rank 1 of 2 failed(.|\n)*no more disk", 120),
        (die, 1, RuntimeError, "ended without a word", 120),
        (sleep, 1, TimeoutError, "gave no result within 2", 2),
    ],
)
def test_a_failing_rank_is_reported_and_hangs_nothing(function, world, error, message, timeout_s):
    with pytest.raises(error, match=message):
        run_ranks(function, world, timeout_s=timeout_s)


def test_bad_worlds_and_timeouts_are_refused():
    for world in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="world must be an integer >= 1"):
            run_ranks(sleep, world)
    with pytest.raises(ValueError, match="timeout_s must be > 0"):
        run_ranks(sleep, 2, timeout_s=0)
