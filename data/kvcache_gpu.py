"""Decoding on a GPU with a LLaMA of 7 billion random weights: tokens per second, and bytes.

    python data/kvcache_gpu.py --out DIR --limit-s 200     measure what DIR lacks
    python data/kvcache_gpu.py --join DIR                  make data/results/kvcache/gpu.json of it

One process and one model (LLaMA-7B's geometry, bfloat16, weights drawn on the device: they do not matter for
speed). A configuration is a method and a context length n. Conventions:

- the prompt is random tokens, fed in chunks inside `cache.prefill()`, so that a method sees the whole of it;
  `held_peak` is the most that was allocated meanwhile above the model's weights.
- *tokens/s*: all methods of a context length decode in turns, `ROUNDS` of `STEPS` tokens each after one to
  warm up, every step timed with the device waited for, because the host's speed drifts: a decoding step is
  bound by Python. Stored are all times, batch / median, and the time against `dynamic`'s with its interval
  over the rounds.
- *device*: milliseconds in which kernels ran, of one step: what a step would cost if launching were free.
- *bytes*: what the cache holds after the prompt, and what the attention of the last step read.
- `full` is this package's full cache, `dynamic` transformers' own with the attention `sdpa`: both baselines.
  Fused attention is PyTorch's own (flash or memory-efficient), not cuDNN's.
- Budgets are those of the papers where these name one: `METHODS`. An error is a configuration's result, and
  the next one starts from an emptied device.

Every result is a file of its own, written at once; a run that is cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from refimpl.evaluate import bootstrap
from refimpl.kvcache import Full, KVCache, StreamingLLM, release
from refimpl.kvcache.attention import NAME
from refimpl.kvcache.d2o import D2O
from refimpl.kvcache.h2o import H2O
from refimpl.kvcache.kivi import KIVI
from refimpl.kvcache.minikv import minikv
from refimpl.kvcache.quest import Quest
from refimpl.kvcache.readers import ReadAll
from refimpl.kvcache.snapkv import SnapKV
from refimpl.paths import atomic_write
from refimpl.results import cpu, sha256, store

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "data" / "results" / "kvcache" / "gpu.json"
SOURCES = ["data/kvcache_gpu.py"] + [
    f"refimpl/kvcache/{name}.py"
    for name in ("attention", "cache", "codecs", "d2o", "flash", "h2o", "kivi", "layer", "minikv", "policies",
                 "quest", "readers", "rope", "slots", "snapkv", "view")
]  # fmt: skip
LLAMA_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 40960,
}  # fmt: skip
TINY = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
CONTEXTS, TINY_CONTEXTS = (4096, 8192, 16384, 32768), (256, 512)
# 16 k first: it is the length of SnapKV's claim; the longest last.
ORDER = (16384, 4096, 32768, 8192)
ROUNDS, STEPS, CHUNK = 8, 4, 1024


def _dynamic(model: nn.Module, n: int) -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _layers(model: nn.Module) -> int:
    return model.config.num_hidden_layers


# H2O: a tenth of the prompt each for heavy and recent; SnapKV: 1024; StreamingLLM: 4 + 2044; Quest: 1024
# read; MiniKV: half the prompt at 2 bits; D2O: a fifth of the prompt, as its released example.
METHODS: dict[str, Callable[[nn.Module, int], Any]] = {
    "full": lambda model, n: KVCache(model, Full()),
    "dynamic": _dynamic,
    "streaming_llm": lambda model, n: KVCache(model, StreamingLLM(min(2044, n // 2), sink=4)),
    "snapkv": lambda model, n: KVCache(model, SnapKV(min(1024, n // 4), window=32)),
    "h2o": lambda model, n: KVCache(model, H2O(n // 10, n // 10)),
    "d2o": lambda model, n: KVCache(model, D2O(0.1, 0.1)),
    "kivi": lambda model, n: KVCache(model, codec=KIVI(2, group=32, residual=128)),
    "minikv": lambda model, n: minikv(model, 0.25, 0.25),
    "quest": lambda model, n: KVCache(
        model, reader=[ReadAll()] * 2 + [Quest(min(1024, n // 4))] * (_layers(model) - 2)
    ),
}


def build(fields: dict[str, Any], device: str, dtype: torch.dtype) -> nn.Module:
    """A LLaMA with random weights, drawn on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="sdpa")).eval()
    finally:
        torch.set_default_dtype(before)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Decoder:
    """One method with its cache: fed a prompt, then timed token by token."""

    def __init__(self, model: nn.Module, method: str, n: int, batch: int, device: str) -> None:
        self.model, self.method, self.device = model, method, device
        self.batch, self.times = batch, []
        cuda = device == "cuda"
        ids = torch.randint(
            0, model.config.vocab_size, (batch, n), generator=torch.Generator().manual_seed(0)
        )
        ids = ids.to(device)
        release(model)  # `dynamic` runs with the model's own attention, the others install theirs
        self.cache = METHODS[method](model, n)
        self.ours = isinstance(self.cache, KVCache)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated() if cuda else 0
        start = time.perf_counter()
        with self.cache.prefill() if self.ours else nullcontext():
            for part in ids.split(CHUNK, 1):
                logits = self.feed(part)
        wait(device)
        self.row: dict[str, Any] = {"prefill_s": time.perf_counter() - start}
        if cuda:
            self.row["held_peak"] = torch.cuda.max_memory_allocated() - base
            self.row["allocated_after_prompt"] = torch.cuda.memory_allocated() - base
        self.row["held"] = self.held()
        self.token = logits[:, -1:].argmax(-1)

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits

    def held(self) -> dict[str, int]:
        return self.cache.nbytes() if self.ours else {"payload": _held(self.cache)}

    def steps(self, count: int) -> list[float]:
        """Seconds of each step."""
        self.model.set_attn_implementation(NAME if self.ours else "sdpa")
        times = []
        for _ in range(count):
            wait(self.device)
            start = time.perf_counter()
            self.token = self.feed(self.token)[:, -1:].argmax(-1)
            wait(self.device)
            times.append(time.perf_counter() - start)
        return times

    def finish(self, against: Decoder | None) -> dict[str, Any]:
        """The row, with the time against another's in the same rounds."""
        seconds = [t for turn in self.times for t in turn]
        self.row["seconds"] = [round(t, 6) for t in seconds]
        self.row["tokens_per_s"] = self.batch / statistics.median(seconds)
        if against is not None:
            pairs = zip(self.times, against.times, strict=True)
            gaps = [math.log(statistics.median(a) / statistics.median(b)) for a, b in pairs]
            found = bootstrap(gaps, rng=np.random.default_rng(0))
            self.row["time_of_dynamic"] = {
                "value": math.exp(found.value), "lo": math.exp(found.lo), "hi": math.exp(found.hi)
            }  # fmt: skip
        if self.device == "cuda":
            self.row["device_ms"] = self.device_ms()
        self.row["held_after"] = self.held()
        self.row["read"] = self.cache.read_bytes() if self.ours else self.held()
        return self.row

    def device_ms(self, count: int = 2) -> float:
        """Milliseconds of kernels in one step."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as found:
            self.steps(count)
        # Kernels only: the operator that launched a kernel carries its time once more.
        kernels = (e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)
        return sum(e.self_device_time_total for e in kernels) / 1e3 / count


def _held(cache: Any) -> int:
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def measure(model: nn.Module, n: int, batch: int, device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """All methods at one length, by name: a row, or the error that stopped it."""
    rows: dict[str, dict[str, Any]] = {}
    decoders: dict[str, Decoder] = {}

    def attempt(method: str, task: Callable[[], Any]) -> Any:
        try:
            return task()
        except Exception as error:  # out of memory at 32 k must not cost the other results
            rows[method] = {"error": traceback.format_exc(limit=-6)}
            decoders.pop(method, None)
            print(f"{method}-{n}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            return None

    for method in METHODS:
        made = attempt(method, lambda method=method: Decoder(model, method, n, batch, device))
        if made is not None:
            decoders[method] = made
    for turn in range(rounds + 1):
        for method, decoder in list(decoders.items()):
            times = attempt(method, lambda decoder=decoder: decoder.steps(STEPS))
            if turn and times is not None:  # the first is to warm up
                decoder.times.append(times)
    for method, decoder in list(decoders.items()):
        row = attempt(method, lambda decoder=decoder: decoder.finish(decoders.get("dynamic")))
        if row is not None:
            rows[method] = row | {"error": None}
    return rows


def finished(path: Path, sources: dict[str, str]) -> bool:
    """Whether a result is there, without error, of these sources."""
    if not path.is_file():
        return False
    row = json.loads(path.read_text())
    return row["error"] is None and row["sources"] == sources


def run(args: argparse.Namespace) -> int:
    """Measure what the folder lacks; 1 if something failed or was left out."""
    start, out = time.perf_counter(), Path(args.out)
    device = args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --tiny --device cpu runs the same path on a CPU")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # cuDNN plans its kernel anew for every length it has not met: 50 ms a token for whoever comes first.
    torch.backends.cuda.enable_cudnn_sdp(False)
    fields = TINY if args.tiny else LLAMA_7B
    contexts = TINY_CONTEXTS if args.tiny else ORDER
    sources = {source: sha256(ROOT / source) for source in SOURCES}
    names = {n: [f"{method}-{n}" for method in METHODS] for n in contexts}
    path = lambda name: out / f"{name}.json"
    todo = [n for n in contexts if not all(finished(path(name), sources) for name in names[n])]
    hardware = torch.cuda.get_device_name() if device == "cuda" else cpu()
    versions = {package: metadata.version(package) for package in ("torch", "transformers")}
    dtype = torch.float32 if args.tiny else torch.bfloat16
    model = build(fields, device, dtype) if todo else None
    for n in todo:
        if time.perf_counter() - start > args.limit_s:
            print(f"{n}: left out: the limit of {args.limit_s:.0f} s is over", flush=True)
            continue
        about = {
            "n": n, "batch": args.batch, "model": fields, "dtype": str(dtype), "tiny": args.tiny,
            "device": device, "hardware": hardware, "sources": sources, "date": time.strftime("%Y-%m-%d"),
            "versions": {"python": sys.version.split()[0], **versions},
        }  # fmt: skip
        for method, row in measure(model, n, args.batch, device, 2 if args.tiny else ROUNDS).items():
            name = f"{method}-{n}"
            row = about | {"name": name, "method": method} | row
            atomic_write(path(name), (json.dumps(row, indent=1) + "\n").encode())
            if row["error"] is None:
                ratio = "{value:.2f} [{lo:.2f}, {hi:.2f}]".format(**row["time_of_dynamic"])
                print(f"{name:22} {row['tokens_per_s']:7.1f} tokens/s, time of dynamic {ratio}, device "
                      f"{row.get('device_ms', 0):6.2f} ms", flush=True)  # fmt: skip
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    every = [name for some in names.values() for name in some]
    missing = [name for name in every if not finished(path(name), sources)]
    print(f"{len(every) - len(missing)} of {len(every)} in {time.perf_counter() - start:.0f} s")
    return 1 if missing else 0


def join(folder: Path, to: Path) -> int:
    """One file of all results; ValueError where they come from other sources or several machines."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not rows:
        raise ValueError(f"{folder}: no results")
    current = {source: sha256(ROOT / source) for source in SOURCES}
    if old := [row["name"] for row in rows if row["sources"] != current]:
        raise ValueError(f"{', '.join(old)}: made from other sources than these; measure again")
    shared = {}
    for key in ("versions", "hardware", "model", "dtype"):
        found = {json.dumps(row[key]) for row in rows}
        if len(found) > 1:
            raise ValueError(f"results of several {key}: {', '.join(sorted(found))}")
        shared[key] = rows[0][key]
    runs = {row["name"]: {k: v for k, v in row.items() if k not in (*shared, "sources")} for row in rows}
    good = {name: row for name, row in runs.items() if row["error"] is None}
    for row in good.values():
        if full := good.get(f"full-{row['n']}"):
            row["share_of_full_bytes"] = sum(row["held"].values()) / sum(full["held"].values())
    best = min(good.values(), key=lambda row: row["time_of_dynamic"]["value"])
    fastest = f"; fastest {best['name']}, {best['time_of_dynamic']['value']:.2f} of dynamic's time"
    result = store(
        to,
        command="python data/kvcache_gpu.py --out DIR; python data/kvcache_gpu.py --join DIR",
        summary=f"decoding with a 7 B model: {len(good)} of {len(runs)} configurations measured{fastest}",
        root=ROOT, sources=SOURCES, hardware=shared["hardware"],
        model=shared["model"], dtype=shared["dtype"], runs=runs,
    )  # fmt: skip
    # Joining may happen on another machine and day than measuring.
    result |= {"versions": shared["versions"], "date": max(row["date"] for row in rows)}
    atomic_write(to, (json.dumps(result, indent=1) + "\n").encode())
    print(f"{to}: {result['summary']}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="DIR", help="measure; one JSON file per result goes here")
    parser.add_argument("--batch", type=int, default=1, help="rows (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a toy model and short prompts")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--limit-s", type=float, default=3600, help="start no configuration after this")
    parser.add_argument("--join", metavar="DIR", help="make one file of the results in this folder")
    parser.add_argument("--to", default=str(RESULT), metavar="FILE", help="which file (default: %(default)s)")
    args = parser.parse_args()
    if bool(args.out) == bool(args.join):
        parser.error("give either --out DIR or --join DIR")
    return run(args) if args.out else join(Path(args.join), Path(args.to))


if __name__ == "__main__":
    sys.exit(main())
