"""Speed, as ratios to plain transformers: `make bench` writes data/results/bench.json.

One model (llama-mini's geometry; weights do not matter for speed), one thread. Each pair is measured
alternately, seven times after a warm-up; stored are all times, the medians, their ratio, and the interval of
the ratio over the pairs: something is called too slow when the whole interval is. Times are CPU seconds of
this process: with one thread that is wall time, less what other programs on the machine take.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from refimpl.backbone import Backbone
from refimpl.evaluate import bootstrap, token_nll
from refimpl.models import new
from refimpl.results import store
from refimpl.trace import trace
from refimpl.training import TrainConfig, train
from refimpl.world.formats import BY_NAME
from refimpl.world.mix import SHARES
from refimpl.world.rng import Rng

ROOT = Path(__file__).resolve().parents[1]
MODEL = "llama-mini"
RUNS = 7
WORLD_BYTES = 4_000_000
MODULES = ("training", "backbone", "trace", "evaluate", "models")


def seconds(function: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def compare(what: str, unit: str, amount: int, ours: Callable, plain: Callable, required: float) -> dict:
    """Measure a pair alternately: speeds in `amount` per second, and ours divided by the plain one's."""
    ours(), plain()
    times = []
    for run in range(RUNS):  # in turns first: a machine that slows down meanwhile favours neither
        first, second = (ours, plain) if run % 2 else (plain, ours)
        pair = seconds(first), seconds(second)
        times.append(pair if run % 2 else pair[::-1])
    median_ours, median_plain = (statistics.median(column) for column in zip(*times, strict=True))
    interval = bootstrap([math.log(b / a) for a, b in times], rng=np.random.default_rng(0))
    row = {
        "what": what,
        "unit": unit,
        "ours": amount / median_ours,
        "plain": amount / median_plain,
        "ratio": median_plain / median_ours,
        "lo": math.exp(interval.lo),
        "hi": math.exp(interval.hi),
        "required": required,
        "seconds": [[round(a, 4), round(b, 4)] for a, b in times],
    }
    speeds = f"{row['ours']:9.1f} {row['plain']:9.1f} {unit:9}"
    print(f"{what:34} {speeds} {row['ratio']:6.3f}x [{row['lo']:.3f}, {row['hi']:.3f}]", flush=True)
    return row


def world() -> dict:
    """MB per second of generating training text, every format with its share of the bytes."""

    def generate(seed: int) -> int:
        total = 0
        for name, share in SHARES.items():
            form, rng = BY_NAME[name], Rng("bench", name, seed)
            budget = share / sum(SHARES.values()) * WORLD_BYTES
            while budget > 0:
                size = len(form.document(rng).encode())
                budget -= size
                total += size
        return total

    generate(0)
    speeds = []
    for run in range(1, RUNS + 1):
        start = time.process_time()
        speeds.append(generate(run) / 1e6 / (time.process_time() - start))
    row = {"what": "world generation", "unit": "MB/s", "ours": statistics.median(speeds), "required": 2.0,
           "runs": speeds}  # fmt: skip
    print(f"{row['what']:34} {row['ours']:9.2f} {'':9} MB/s", flush=True)
    return row


def training() -> dict:
    """Steps of `refimpl.training.train` and of the loop that one writes down without it."""
    steps, batch, length = 2, 4, 256
    ids = torch.randint(300, 4096, (steps, batch, length), generator=torch.Generator().manual_seed(0))
    model, plain_model = new(MODEL), new(MODEL)

    def ours() -> None:
        config = TrainConfig(steps=steps, batch=batch, lr=1e-4, warmup=0, decay_fraction=0.0)
        train(model, lambda step: ids[step], config, progress=False)

    def plain() -> None:
        plain_model.train()
        optimizer = torch.optim.AdamW(plain_model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
        for step in range(steps):
            plain_model(input_ids=ids[step], labels=ids[step], use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(plain_model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return compare("training step", "tokens/s", steps * batch * length, ours, plain, 0.95)


def generation() -> dict:
    """`generate` of a model that a Backbone views and a trace has been through, and of an untouched one."""
    ids = torch.randint(300, 4096, (1, 32), generator=torch.Generator().manual_seed(0))
    touched, plain = new(MODEL), new(MODEL)
    Backbone(touched).forward(ids)
    trace(touched, ids, record=[("resid_post", 0)], edit={("mlp_out", 0): torch.zeros_like})

    def run(model) -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64,
                       do_sample=False)  # fmt: skip

    what = "generation, hooks inactive"
    return compare(what, "tokens/s", 64, lambda: run(touched), lambda: run(plain), 0.95)


def forward() -> dict:
    """`Backbone.forward` and the model's own."""
    ids = torch.randint(300, 4096, (4, 512), generator=torch.Generator().manual_seed(0))
    model = new(MODEL)
    backbone = Backbone(model)
    passes = 4  # one alone is shorter than the hiccups of a shared machine

    def run(function: Callable) -> None:
        for _ in range(passes):
            function()

    with torch.no_grad():
        return compare("forward pass of the backbone", "tokens/s", passes * ids.numel(),
                       lambda: run(lambda: backbone.forward(ids)),
                       lambda: run(lambda: model(ids, use_cache=False)), 0.95)  # fmt: skip


def evaluation() -> dict:
    """`token_nll` and a loop over the same windows, one at a time."""
    width, n = 256, 4096
    ids = torch.randint(300, 4096, (n,), generator=torch.Generator().manual_seed(0))
    model = new(MODEL)
    stream = torch.cat([torch.zeros(1, dtype=torch.long), ids])

    def naive() -> torch.Tensor:
        parts = []
        with torch.no_grad():
            for start in range(0, n, width):
                window = stream[start : start + width + 1]
                logits = model(window[None, :-1]).logits[0]
                parts.append(F.cross_entropy(logits, window[1:], reduction="none"))
        return torch.cat(parts)

    ours = lambda: token_nll(model, ids, max_len=width)[0]
    torch.testing.assert_close(ours(), naive(), rtol=0, atol=1e-4)
    return compare("perplexity evaluation", "tokens/s", n, ours, naive, 0.95)


def main() -> int:
    """Measure everything; 1 if something is slower than required."""
    torch.set_num_threads(1)
    rows = [world(), training(), generation(), forward(), evaluation()]
    slow = [row["what"] for row in rows if row.get("hi", row["ours"]) < row["required"]]
    ratios = ", ".join(f"{row['what']} {row['ratio']:.2f}" for row in rows[1:])
    sources = [f"refimpl/{name}.py" for name in MODULES]
    sources += [path.relative_to(ROOT).as_posix() for path in (ROOT / "refimpl" / "world").glob("*.py")]
    made = f"world generation {rows[0]['ours']:.1f} MB/s"
    summary = f"{made}; speed as a multiple of plain transformers: {ratios}"
    store(
        ROOT / "data" / "results" / "bench.json", command="make bench", summary=summary, root=ROOT,
        sources=["data/bench.py", *sources],
        threads=torch.get_num_threads(), model=MODEL, rows=rows, slower_than_required=slow,
    )  # fmt: skip
    if slow:
        print(f"slower than required: {', '.join(slow)}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
