"""The live tracker's time against torch's MemTracker, and 70 billion parameters without memory.

Writes data/results/footprint/tracker.json. One thread. Both trackers follow the same training step of a
LLaMA of 5.4 million parameters, alternately, after a warm-up; times are CPU seconds of this process. The 70 B
runs, real configuration and fake tensors, each have a process of their own, whose memory is measured.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from refimpl.evaluate import bootstrap
from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.measure import measure_step, peak
from refimpl.footprint.tracker import LiveTracker
from refimpl.results import store

ROOT = Path(__file__).resolve().parents[1]
PAIRS = 5
SMALL = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA2_70B = {
    "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096,
}  # fmt: skip
REQUIRED = {"ratio": 0.5, "seconds": 60, "bytes": 2e9}


def trackers(fake: bool, checkpoint: bool) -> dict[str, Any]:
    """Peaks and times of both trackers on the same step; `ratio` is ours divided by MemTracker's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with FakeTensorMode() if fake else nullcontext():
        with torch.random.fork_rng(devices=[]):
            model = LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation="eager")).train()
        if checkpoint:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.zeros(2, 128, dtype=torch.int64)

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def ours() -> tuple[float, int]:
            with LiveTracker() as tracker:
                tracker.watch(model, optimizer)
                tracker.register([ids], "activation")
                return seconds(step), tracker.peak

        def peer() -> tuple[float, int]:
            tracker = MemTracker()
            tracker.track_external(model, optimizer, ids)
            with tracker:
                took = seconds(step)
            return took, tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

        step(), ours(), peer()
        rows = [(*ours(), *peer(), seconds(step)) for _ in range(PAIRS)]
    times = [(a, b, plain) for a, _, b, _, plain in rows]
    peaks = {size for _, first, _, second, _ in rows for size in (first, second)}
    interval = bootstrap([math.log(a / b) for a, b, _ in times], rng=np.random.default_rng(0))
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    row = {
        "fake": fake, "checkpoint": checkpoint, "peaks": sorted(peaks),
        "ours": medians[0], "mem_tracker": medians[1], "untracked": medians[2],
        "ratio": medians[0] / medians[1], "lo": math.exp(interval.lo), "hi": math.exp(interval.hi),
        "seconds": [[round(t, 4) for t in three] for three in times],
    }  # fmt: skip
    print(
        f"fake {fake!s:5} checkpoint {checkpoint!s:5} {row['ratio']:.3f}x [{row['lo']:.3f}, {row['hi']:.3f}]"
    )
    return row


def seconds(function: Any) -> float:
    """CPU time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def large(attention: str, checkpoint_every: int | None) -> dict[str, Any]:
    """Llama-2-70B in bfloat16, B = 1, S = 4096: bytes of a step, and what finding them out took."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA2_70B, attn_implementation=attention)
    run = Run(1, 4096, dtype="bfloat16", attention=attention, checkpoint_every=checkpoint_every)
    ids = torch.zeros(1, 4096, dtype=torch.int64)
    wall, cpu = time.perf_counter(), time.process_time()
    measured = measure_step(lambda: LlamaForCausalLM(config), lambda: ids, run)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    held = measured.ledger.by_kind("resident")
    return {
        "attention": attention, "checkpoint_every": checkpoint_every, "by_kind": held,
        "after_forward": measured.after_forward,
        "after_forward_without_optimizer": measured.after_forward - held["optim"],
        "peak": measured.peak, "closed_form": peak(Arch.from_config(config), run, measured.ledger),
        "wall_seconds": round(wall, 2), "cpu_seconds": round(cpu, 2),
        "max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def in_a_process(*arguments: str) -> dict[str, Any]:
    """`large` in a fresh process, so that its memory is its own."""
    command = [sys.executable, str(Path(__file__)), *arguments]
    row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"70B {arguments}: {row['cpu_seconds']} s, {row['max_rss'] / 1e9:.2f} GB, peak {row['peak']:,}",
        flush=True,
    )
    return row


def main() -> int:
    """Measure everything; 1 if a total differs or something takes more than required."""
    torch.set_num_threads(1)
    if len(sys.argv) == 3:
        print(json.dumps(large(sys.argv[1], int(sys.argv[2]) or None)))
        return 0
    steps = [trackers(fake, checkpoint) for fake in (False, True) for checkpoint in (False, True)]
    runs = [in_a_process("sdpa", "0"), in_a_process("sdpa", "1"), in_a_process("eager", "0")]
    failures = [f"step {i}: totals differ" for i, row in enumerate(steps) if len(row["peaks"]) > 1]
    failures += [f"step {i}: ratio" for i, row in enumerate(steps) if row["lo"] > REQUIRED["ratio"]]
    failures += [
        f"70B {i}: seconds" for i, row in enumerate(runs) if row["cpu_seconds"] > REQUIRED["seconds"]
    ]
    failures += [f"70B {i}: memory" for i, row in enumerate(runs) if row["max_rss"] > REQUIRED["bytes"]]
    slowest = max(row["ratio"] for row in steps)
    took, memory = max(row["cpu_seconds"] for row in runs), max(row["max_rss"] for row in runs)
    store(
        ROOT / "data" / "results" / "footprint" / "tracker.json",
        command="python data/footprint_bench.py",
        summary=f"live tracker at most {slowest:.2f} x MemTracker's time, same total; "
        f"70 B accounted for in {took:.0f} s and {memory / 1e9:.2f} GB",
        root=ROOT,
        sources=["data/footprint_bench.py", "refimpl/ledger.py"]
        + [f"refimpl/footprint/{n}.py" for n in ("arch", "checkpointing", "measure", "static", "tracker")],
        threads=torch.get_num_threads(), required=REQUIRED, steps=steps, llama2_70b=runs, failures=failures,
    )  # fmt: skip
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
