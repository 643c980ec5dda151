"""Bytes and speed beside kvpress: writes data/results/kvcache/peers.json (and the golden file first).

Run `python data/kvcache_peers.py` in an environment with refimpl's packages and the peer, made by
`pip install torch==2.13.0 transformers==5.2.0 kvpress==0.5.5`. Takes minutes; exit code 1 if refimpl is
slower per decoded token, or if its ragged heads free nothing.

Both decode the same tokens with the same 3-layer model, in turns in one process. "prompt": evict once, after
the prompt; "every step": evict after each token as well, in kvpress by DecodingPress with interval 1.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import kvcache_golden as golden  # noqa: E402

from refimpl.kvcache import KVCache, KVPolicy, StreamingLLM, release  # noqa: E402
from refimpl.kvcache.snapkv import AdaSnapKV, SnapKV  # noqa: E402
from refimpl.kvcache.tova import TOVA  # noqa: E402
from refimpl.results import store  # noqa: E402

OUT = ROOT / "data" / "results" / "kvcache" / "peers.json"
SOURCES = ("data/kvcache_golden.py", "data/kvcache_peers.py", "refimpl/kvcache/attention.py",
           "refimpl/kvcache/cache.py", "refimpl/kvcache/codecs.py", "refimpl/kvcache/layer.py",
           "refimpl/kvcache/places.py", "refimpl/kvcache/policies.py", "refimpl/kvcache/slots.py",
           "refimpl/kvcache/snapkv.py", "refimpl/kvcache/steps.py", "refimpl/kvcache/tova.py",
           "refimpl/kvcache/view.py")  # fmt: skip
N, LENGTHS, STEPS, RUNS = golden.KEPT, (128, 1024), 64, 25


def once(policy: type[KVPolicy]) -> type[KVPolicy]:
    """The policy, after the prompt only."""

    class Once(policy):
        once = True

    return Once


class InPlace(StreamingLLM):
    positions, stretches = "original", False


# name -> (kvpress' press, our policy), both made for a cache of N of n tokens
PAIRS: dict[str, tuple[str, Callable[[], KVPolicy]]] = {
    "SnapKV, prompt": ("SnapKV", lambda: SnapKV(N, golden.WINDOW, golden.KERNEL)),
    "TOVA, prompt": ("TOVA", lambda: once(TOVA)(N, newest=True)),
    "TOVA, every step": ("Decoding(TOVA)", lambda: TOVA(N, newest=True)),
    "StreamingLLM, prompt": ("StreamingLLM", lambda: once(InPlace)(N - golden.SINK)),
    "StreamingLLM, every step": ("Decoding(StreamingLLM)", lambda: InPlace(N - golden.SINK)),
    "StreamingLLM with compact positions, every step":
        ("Decoding(StreamingLLM)", lambda: StreamingLLM(N - golden.SINK)),
}  # fmt: skip
MORE = "StreamingLLM with compact positions"  # kvpress turns no keys in decoding: its time is of less work


def main() -> int:
    """Golden file, bytes, speed; print, store."""
    golden.main()
    heads = ragged_bytes()
    print("ragged heads", heads, flush=True)
    speed = {f"{name}, {n} tokens": compare(name, n) for name in PAIRS for n in LENGTHS}
    alike = [name for name in speed if not name.startswith(MORE)]
    worst = max(alike, key=lambda name: speed[name]["ratio"])
    frees = heads["refimpl"]["after"] < heads["refimpl"]["before"]
    best = min(speed[name]["ratio"] for name in alike)
    summary = (
        f"golden arrays of kvpress {importlib.metadata.version('kvpress')}; AdaKV's eviction frees "
        f"{heads['kvpress']['before'] - heads['kvpress']['after']} bytes there, "
        f"{heads['refimpl']['before'] - heads['refimpl']['after']} of {heads['refimpl']['before']} here; a "
        f"token takes {best:.2f} to {speed[worst]['ratio']:.2f} of its time (median of {RUNS} turns)"
    )
    print(summary)
    store(
        OUT, command="python data/kvcache_peers.py", summary=summary, sources=SOURCES, root=ROOT,
        peers={name: importlib.metadata.version(name) for name in golden.PEERS}, kept=N, steps=STEPS,
        runs=RUNS, golden=golden.fingerprint(), ragged_heads=heads, seconds_per_token=speed,
    )  # fmt: skip
    return 0 if frees and speed[worst]["ratio"] <= 1 else 1


@torch.no_grad()
def ragged_bytes() -> dict[str, dict[str, int]]:
    """Bytes of keys and values before and after AdaKV evicts 90 of 128 tokens per head."""
    from transformers import DynamicCache

    ids, llama, cache = golden.tokens(golden.PROMPT), golden.model("sdpa"), DynamicCache()
    with golden.press("AdaKV(SnapKV)")(llama):
        llama(ids, past_key_values=cache)
    stored = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    theirs = sum(t.untyped_storage().nbytes() for t in stored)
    full, ours = KVCache(llama), KVCache(llama, AdaSnapKV(N, golden.WINDOW, golden.KERNEL))
    for ragged in (full, ours):
        llama(ids, past_key_values=ragged)
    before, after = (c.ledger().total(view="resident") for c in (full, ours))
    slots = ours.nbytes()
    return {
        "kvpress": {"before": full.nbytes()["payload"], "after": theirs},
        "refimpl": {"before": full.nbytes()["payload"], "after": slots["payload"]},
        "refimpl, positions and counts included": {"before": before, "after": after},
    }


def compare(name: str, n: int) -> dict[str, object]:
    """Median CPU seconds per decoded token of both, interleaved, and the ratio of ours to theirs."""
    case, policy = PAIRS[name]
    times: dict[str, list[float]] = {"kvpress": [], "refimpl": []}
    theirs, ours = golden.model("sdpa", 2048), golden.model("sdpa", 2048)
    for turn in range(RUNS + 1):
        seconds = kvpress_seconds(theirs, case, n), our_seconds(ours, policy(), n)
        if turn:  # the first is for warming up
            for who, value in zip(times, seconds, strict=True):
                times[who].append(value)
    medians = {who: statistics.median(values) for who, values in times.items()}
    ratio = medians["refimpl"] / medians["kvpress"]
    print(
        f"{name}, {n} tokens: {ratio:.2f}", {k: f"{v * 1e3:.2f} ms" for k, v in medians.items()}, flush=True
    )
    return medians | {"ratio": ratio, "ratios": [b / a for a, b in zip(*times.values(), strict=True)]}


@torch.no_grad()
def kvpress_seconds(llama: torch.nn.Module, case: str, n: int) -> float:
    from transformers import DynamicCache

    ids, cache = long_tokens(n + STEPS), DynamicCache()
    with golden.press(case, ratio=1 - (N + 0.5) / n)(llama):
        llama(ids[:, :n], past_key_values=cache)
        if case.startswith("Decoding"):
            return decode(llama, cache, ids, n)
    return decode(llama, cache, ids, n)


@torch.no_grad()
def our_seconds(llama: torch.nn.Module, policy: KVPolicy, n: int) -> float:
    ids, cache = long_tokens(n + STEPS), KVCache(llama, policy)
    llama(ids[:, :n], past_key_values=cache)
    seconds = decode(llama, cache, ids, n)
    release(llama)
    return seconds


def decode(llama: torch.nn.Module, cache: object, ids: torch.Tensor, n: int) -> float:
    """CPU seconds per token after the prompt; the first step, which may shrink a cache, is not timed."""
    for i in range(STEPS):
        if i == 1:
            start = time.process_time()
        at = torch.tensor([[n + i]])
        llama(ids[:, n + i : n + i + 1], past_key_values=cache, position_ids=at)
    return (time.process_time() - start) / (STEPS - 1)


def long_tokens(n: int) -> torch.LongTensor:
    """Ids [1, n]."""
    draw = torch.Generator().manual_seed(golden.SEED)
    return torch.randint(2, golden.VOCAB, (1, n), generator=draw)


if __name__ == "__main__":
    sys.exit(main())
