"""Speed of compressed weights on a CPU, as ratios: `make bench` writes data/results/quantization/bench.json.

One thread, CPU seconds of this process. What is compared works in turns, `RUNS` of them after one for warming
up; stored are all times, their least, and ratios with the interval over the turns.

- products: a square weight times 1 and 64 tokens, float32 in and out, by every way there is; in the same
  turns the time of reading as many bytes as codes have: one token times fewer rows of floats, which streams
  faster than a sum does. A ratio above 1 is faster.
- generation: tokens of a greedy continuation, and 64 tokens of a prompt, of llama-mini and of a random LLaMA
  whose weights leave the cache, all layers of the blocks compressed.
- seconds: what GPTQ and AWQ of llama-mini take (a peer's: `quantization_peers.py`).

Required: with one token and 4096 x 4096, int8 and int4 are faster than float32, and take at most 1.25 times
as long as torch's kernels called directly in bfloat16 (casting x and scaling y is the rest); the wide model
decodes at least as fast as in float32. Reported: everything else, what is slower too.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.backbone import Backbone
from refimpl.evaluate import bootstrap
from refimpl.models import load
from refimpl.quantization import GPTQ, RTN, CompressedLinear, compress_model
from refimpl.quantization.activations import W8A8
from refimpl.quantization.awq import awq
from refimpl.quantization.kernels import BLOCKS, INT4, INT8, available, pack_for_cpu
from refimpl.quantization.kernels import W8A8 as INT_MM
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.texts import calibration_ids
from refimpl.results import store

ROOT = Path(__file__).resolve().parents[1]
SIZES, TOKENS, GROUP, RUNS, TURN = (256, 1024, 4096), (1, 64), 64, 7, 0.02
MEMORY = 256 * 2**20  # bytes that no cache holds
WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 4096, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}  # fmt: skip
RECIPES = {"int8": RTN(8, "restricted"), "int4": RTN(4, group=GROUP), "w8a8": W8A8()}
CALIBRATION = (32, 256)
REQUIRED = {"over float32": 1.0, "over torch's kernel": 0.8, "generation": 1.0}
Work = Callable[[], Any]


def race(works: dict[str, Work], runs: int, turn: float) -> dict[str, list[float]]:
    """CPU seconds of each piece of work, `runs` turns in rotation, as many repeats in one as `turn` takes."""
    repeats, times = {}, {name: [] for name in works}
    for name, work in works.items():
        work()
        repeats[name] = max(1, math.ceil(turn / max(_seconds(work, 1), 1e-6)))
    for _ in range(runs):
        for name, work in works.items():
            times[name].append(_seconds(work, repeats[name]))
    return times


def _seconds(work: Work, repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats


def ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """How many times as fast, the geometric mean over the turns, with its interval."""
    logs = [math.log(a / b) for a, b in zip(slower, faster, strict=True)]
    found = bootstrap(logs, rng=np.random.default_rng(0))
    return {"ratio": math.exp(found.value), "lo": math.exp(found.lo), "hi": math.exp(found.hi)}


def table(times: dict[str, list[float]], base: str, what: str, **about: dict[str, Any]) -> dict[str, Any]:
    """Rows of a race, printed: least milliseconds, all seconds, how many times as fast as `base`."""
    rows = {}
    for name, seconds in times.items():
        rows[name] = {"ms": 1e3 * min(seconds), f"over {base}": ratio(times[base], seconds)}
        rows[name] |= about.get(name, {}) | {"seconds": [float(f"{t:.4g}") for t in seconds]}
        r = rows[name][f"over {base}"]
        got = f"{r['ratio']:7.2f} x {base} [{r['lo']:.2f}, {r['hi']:.2f}]"
        print(f"{what} {name:26} {rows[name]['ms']:10.3f} ms {got}", flush=True)
    return rows


def packed(recipe: Any, W: Tensor) -> nn.Module:
    """A weight's layer with the products of `refimpl.quantization.kernels`."""
    holder = nn.Sequential(recipe("0", W))
    pack_for_cpu(holder)
    return holder[0]


def dynamic_quantized(W: Tensor) -> nn.Module | None:
    """torch.ao's dynamic int8 layer, where this torch still has it."""
    if not hasattr(torch.ao.quantization, "quantize_dynamic"):
        return None
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight = nn.Parameter(W)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated since torch 2.10
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)


def products(d: int, M: int, runs: int, turn: float) -> dict[str, Any]:
    """Every way to multiply a weight [d, d] with M tokens."""
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(d, d, generator=generator), torch.randn(M, d, generator=generator)
    half, x_half = W.bfloat16(), x.bfloat16()
    plain, ours = RECIPES["int4"]("", W), {name: packed(r, W) for name, r in RECIPES.items()}
    works: dict[str, Work] = {"float32": lambda: F.linear(x, W), "bfloat16": lambda: F.linear(x_half, half)}
    works |= {f"ours {name}": lambda layer=layer: layer(x) for name, layer in ours.items()}
    stored = {"float32": W.nbytes, "bfloat16": half.nbytes, "ours int8": d * d, "ours int4": d * d // 2}
    int8, int4, w8a8 = ours.values()
    if int8.kernel == INT8:
        call8 = lambda x, scale: torch._weight_int8pack_mm(x, int8.signed, scale)
        scale = int8.scale.flatten().float()
        scale_half = scale.bfloat16()
        works["torch int8"] = lambda: call8(x_half, scale_half)
        if d < 4096 or M == 1:
            works["torch int8, float32 x"] = lambda: call8(x, scale)
    if int4.kernel == INT4:
        call4 = lambda x, affine: torch._weight_int4pack_mm_for_cpu(x, int4.packed, GROUP, affine)
        affine = int4.affine.float()
        works["torch int4"] = lambda: call4(x_half, int4.affine)
        if d < 4096 or M == 1:
            works["torch int4, float32 x"] = lambda: call4(x, affine)
    if w8a8.kernel == INT_MM:
        codes = torch.randint(-127, 128, (M, d), generator=generator, dtype=torch.int8)
        works["torch int8 x int8"] = lambda: torch._int_mm(codes, w8a8.codes.T)
    if (dynamic := dynamic_quantized(W)) is not None:
        works["torch.ao dynamic int8"] = lambda: dynamic(x)
    blocks = without_kernel(plain)
    works["int4, no kernel: blocks"] = lambda: blocks(x)
    works["int4, unpacked whole"] = lambda: plain(x)
    for name, rows in {"1 byte": d // 4, "half a byte": d // 8}.items():
        works[f"reading {name}"] = lambda part=W[:rows]: torch.mv(part, x[0])
    exact = {name: F.linear(x.double(), layer.weight.double()) for name, layer in ours.items()}
    errors = {
        f"ours {name}": {"relative_error": float((layer(x) - exact[name]).norm() / exact[name].norm())}
        for name, layer in ours.items()
    }
    with torch.no_grad():
        times = race(works, runs, turn)
    rows = table(times, "float32", f"{d:4} x {d:4}, M = {M:2}:", **errors)
    for name, nbytes in stored.items():
        rows[name]["gigabytes_per_second"] = nbytes / min(times[name]) / 1e9
    limits = {"ours int8": "1 byte", "ours int4": "half a byte"}
    for name, nbytes in limits.items():
        rows[name]["over reading its bytes"] = ratio(times[f"reading {nbytes}"], times[name])
    for name in ("int8", "int4"):
        if f"torch {name}" in rows:
            rows[f"ours {name}"]["over torch's kernel"] = ratio(times[f"torch {name}"], times[f"ours {name}"])
    return rows


def without_kernel(plain: CompressedLinear) -> nn.Module:
    """The layer as it is where torch has no int4 kernel."""
    from refimpl.quantization import kernels

    real = kernels.available
    try:
        kernels.available = lambda kernel: False
        layer = packed(lambda name, W: plain, torch.empty(0))
    finally:
        kernels.available = real
    assert layer.kernel == BLOCKS
    return layer


def bandwidth(runs: int, nbytes: int = MEMORY) -> dict[str, float]:
    """Gigabytes per second from and to memory: sum and product (one token) read, a copy also writes."""
    a = torch.ones(nbytes // 2**14, 2**12)
    b = torch.empty_like(a)
    times = race({"sum": a.sum, "product": lambda: torch.mv(a, a[0]), "copy": lambda: b.copy_(a)}, runs, 0.0)
    moved = {"sum": nbytes, "product": nbytes, "copy": 2 * nbytes}
    found = {name: moved[name] / min(seconds) / 1e9 for name, seconds in times.items()}
    print({name: f"{speed:.1f} GB/s" for name, speed in found.items()}, flush=True)
    return found


class Speaker:
    """A model that continues greedily, one token at a time, from a cache with a prompt in it."""

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self.model, self.prompt = model, prompt
        self.read()

    @torch.no_grad()
    def read(self) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache()
        out = self.model(self.prompt, past_key_values=self.cache, logits_to_keep=1)
        self.token = out.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def say(self) -> None:
        out = self.model(self.token, past_key_values=self.cache, logits_to_keep=1)
        self.token = out.logits[:, -1:].argmax(-1)
        more = self.cache.get_seq_length() - self.prompt.shape[1]
        if more >= self.prompt.shape[1]:
            self.cache.crop(-more)


def compressed(model: nn.Module, recipe: Any, pack: bool = True) -> nn.Module:
    """A copy whose blocks' layers are compressed by a recipe that needs no statistics."""
    names = dict.fromkeys(ref.name for ref in Backbone(model).linears())
    layers = {name: recipe(name, dense_weight(model.get_submodule(name)), None) for name in names}
    memo = {id(model.get_submodule(name)): nn.Linear(1, 1, device="meta") for name in names}
    small = copy.deepcopy(model, memo)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(small.get_submodule(parent), child, layer)
    if pack:
        pack_for_cpu(small)
    return small


def generation(model: nn.Module, what: str, runs: int, turn: float, whole: bool = True) -> dict[str, Any]:
    """Decoding, then prompts, of a model in float32, in bfloat16 and compressed. `whole`: also decoding with
    layers that unpack all of W^ for each product, which takes seconds a token in a large model."""
    models = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16()}
    models |= {f"ours {name}": compressed(model, recipe) for name, recipe in RECIPES.items()}
    if whole:
        models["int4, unpacked whole"] = compressed(model, RECIPES["int4"], pack=False)
    nbytes = {name: {"bytes": sum(t.nbytes for t in _tensors(m))} for name, m in models.items()}
    prompt = torch.randint(300, 4096, (1, 64), generator=torch.Generator().manual_seed(0))
    speakers = {name: Speaker(m, prompt) for name, m in models.items()}
    times = race({name: speaker.say for name, speaker in speakers.items()}, runs, turn)
    rows = table(times, "float32", f"{what}, a token:", **nbytes)
    for row in rows.values():
        row["tokens_per_second"] = 1e3 / row["ms"]
    reads = {name: s.read for name, s in speakers.items() if name != "int4, unpacked whole"}
    prompts = race(reads, max(2, runs // 2), turn)
    return {"decode": rows, "prompt": table(prompts, "float32", f"{what}, a prompt of 64:")}


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def wide(config: dict[str, Any]) -> nn.Module:
    """A LLaMA of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def quantizing(name: str, rows: int, length: int) -> dict[str, float]:
    """CPU seconds of GPTQ and of AWQ, 4 bits in groups of 128."""
    found = {}
    works = {
        "gptq": lambda model, ids: compress_model(model, GPTQ(4, group=128), ids),
        "awq": lambda model, ids: awq(model, ids, 4, 128),
    }
    for method, work in works.items():
        model, tokenizer = load(name)
        ids = calibration_ids(tokenizer, rows, length)
        start = time.process_time()
        work(model, ids)
        found[method] = time.process_time() - start
        print(f"{method} of {name}: {found[method]:.1f} CPU seconds", flush=True)
    return found


def slower(results: dict[str, Any], decode: dict[str, Any]) -> list[str]:
    """What is below the required ratio, beyond the interval; nothing is where there is no kernel."""
    found = []
    rows = results[f"{SIZES[-1]}, 1"]
    for name, kernel in (("int8", INT8), ("int4", INT4)):
        if not available(kernel):
            continue
        for what in ("over float32", "over torch's kernel"):
            if rows[f"ours {name}"][what]["hi"] < REQUIRED[what]:
                found.append(f"{name}, one token: {what}")
        if decode[f"ours {name}"]["over float32"]["hi"] < REQUIRED["generation"]:
            found.append(f"{name}: tokens of the wide model")
    return found


def main() -> int:
    """Measure everything; 1 if something is slower than required."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing stored")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        for d in SIZES[:2]:
            products(d, 1, 2, 0.002)
        small = WIDE | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        bandwidth(2, 2**24)
        generation(wide(small), "small", 2, 0.01)
        quantizing("llama-nano", 4, 64)
        return 0
    memory = bandwidth(RUNS)
    results = {f"{d}, {M}": products(d, M, RUNS, TURN) for d in SIZES for M in TOKENS}
    mini = generation(load("llama-mini")[0], "llama-mini", RUNS, 0.1)
    large = generation(wide(WIDE), "wide", RUNS, TURN, whole=False)
    seconds = quantizing("llama-mini", *CALIBRATION)
    missed = slower(results, large["decode"])
    print("\n".join(f"slower than required: {what}" for what in missed))
    one, said = results[f"{SIZES[-1]}, 1"], large["decode"]
    over = lambda rows, name: rows[name]["over float32"]["ratio"]
    store(
        ROOT / "data" / "results" / "quantization" / "bench.json", command="make bench", root=ROOT,
        summary=f"one token, 4096 x 4096: int8 {over(one, 'ours int8'):.1f} x, "
        f"int4 {over(one, 'ours int4'):.1f} x float32; decoding: wide model "
        f"{over(said, 'ours int8'):.1f} x, {over(said, 'ours int4'):.1f} x, llama-mini "
        f"{over(mini['decode'], 'ours int8'):.2f} x, {over(mini['decode'], 'ours int4'):.2f} x; "
        f"GPTQ {seconds['gptq']:.0f} s, AWQ {seconds['awq']:.0f} s of llama-mini",
        sources=["data/quantization_bench.py"] + [
            f"refimpl/quantization/{name}.py"
            for name in ("activations", "awq", "awq_search", "calibrate", "feedback", "gptq", "grids",
                         "kernels", "linear", "model", "packing", "rtn")
        ],
        threads=torch.get_num_threads(), group=GROUP, calibration=CALIBRATION, required=REQUIRED,
        gigabytes_per_second=memory, products=results, llama_mini=mini, wide={"config": WIDE, **large},
        seconds=seconds, slower_than_required=missed,
    )  # fmt: skip
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
