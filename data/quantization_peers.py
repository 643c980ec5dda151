"""GPTQ and AWQ beside llm-compressor: writes data/results/quantization/peers.json.

    python data/quantization_peers.py --peer PYTHON [--runs 3] [--methods gptq awq] [--quick]

PYTHON is the interpreter of an environment of its own, made by `pip install torch==2.13.0
llmcompressor==0.14.0.1`. Both sides compress llama-mini with the same calibration tokens, 4 bits, asymmetric,
groups of 128, in processes of their own with one thread, in turns; counted are the CPU seconds of the call
that compresses, without imports and loading. Then both models' perplexity is measured here, by the weights
that their codes stand for. Exit code 1 if refimpl takes longer, or if its perplexity is worse beyond the
paired interval over the documents.

The same settings. GPTQ: damping 0.01, columns in their order. AWQ: 20 exponents from 0 to 1 in steps of 1/19,
scales of activations alone, no clipping, which the peer does not have. What differs: refimpl's GPTQ collects
a layer's inputs behind the layers of its block that were compressed before it, the peer's behind the blocks
before; refimpl's inputs are multiplied in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "data" / "results" / "quantization" / "peers.json"
METHODS, CALIBRATION, BITS, GROUP = ("gptq", "awq"), (32, 256), 4, 128
STEPS = tuple(i / 19 for i in range(20))


def theirs(method: str, folder: Path) -> dict[str, Any]:
    """One run of llm-compressor."""
    import importlib.metadata

    from compressed_tensors.quantization import forward_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoTokenizer, LlamaForCausalLM

    IntermediatesCache.pin_memory = lambda self, index: None  # it pins memory for a GPU, there or not
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = torch.from_numpy(np.load(folder / "ids.npy"))
    grid = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": "W4A16_ASYM"}
    recipe = {
        "gptq": lambda: [GPTQModifier(**grid, block_size=128, dampening_frac=0.01, actorder=None)],
        "awq": lambda: [AWQModifier(duo_scaling=False), QuantizationModifier(**grid)],
    }[method]()
    batches = torch.utils.data.DataLoader([{"input_ids": row} for row in rows], batch_size=8)

    def compress() -> None:
        oneshot(model=model, processor=tokenizer, dataset=batches, recipe=recipe,
                num_calibration_samples=len(rows), max_seq_length=rows.shape[1])  # fmt: skip

    seconds = timed(compress)
    weights = {name: p.detach() for name, p in model.named_parameters() if "weight_" not in name}
    with torch.no_grad():
        for name, module in model.named_modules():
            scheme = getattr(module, "quantization_scheme", None)
            if scheme is not None and scheme.weights is not None:
                weights[f"{name}.weight"] = forward_quantize(module, module.weight, "weight", scheme.weights)
    packages = ("llmcompressor", "compressed-tensors", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return seconds | {"versions": versions, "weights": weights}


def ours(method: str, folder: Path) -> dict[str, Any]:
    """One run of refimpl."""
    from transformers import LlamaForCausalLM

    from refimpl.quantization import GPTQ, CompressedLinear, compress_model
    from refimpl.quantization.awq import awq

    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(np.load(folder / "ids.npy"))
    work = {
        "gptq": lambda: compress_model(model, GPTQ(BITS, group=GROUP), ids),
        "awq": lambda: awq(model, ids, BITS, GROUP, ratios=STEPS, clip=False),
    }[method]
    seconds = timed(work)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            weights[f"{name}.weight"] = module.weight
    return seconds | {"weights": weights}


def timed(work: Callable[[], object]) -> dict[str, float]:
    """CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return {"seconds": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def one_run(who: str, method: str, folder: Path) -> None:
    """In a process of its own: compress, leave weights and seconds in the folder."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    found = {"theirs": theirs, "ours": ours}[who](method, folder)
    weights = {name: w.float().contiguous() for name, w in found.pop("weights").items()}
    save_file(weights, folder / f"{who}_{method}.safetensors")
    (folder / f"{who}_{method}.json").write_text(json.dumps(found))


def run(python: str, who: str, method: str, folder: Path) -> dict[str, Any]:
    """Start that process and read what it left."""
    command = [python, str(Path(__file__).resolve()), "--one", who, method, str(folder)]
    path = {"PYTHONPATH": str(ROOT)} if who == "ours" else {}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=os.environ | quiet | path, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{who} {method} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads((folder / f"{who}_{method}.json").read_text())


def nll(folder: Path, who: str, method: str, name: str, ids: torch.Tensor) -> np.ndarray:
    """Nats per token of every document by the weights that a run left."""
    from safetensors.torch import load_file

    from refimpl.models import load
    from refimpl.quantization.texts import document_nll

    model = load(name)[0]
    weights = load_file(folder / f"{who}_{method}.safetensors")
    missing = model.load_state_dict(weights, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise RuntimeError(f"{who} {method} left other weights: {missing}")
    return document_nll(model, ids)


def compare(method: str, peer: str, folder: Path, name: str, runs: int, ids: torch.Tensor) -> dict[str, Any]:
    """Seconds of both in turns, their ratio, and perplexities."""
    from refimpl.evaluate import paired_bootstrap

    sides: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
    for _ in range(runs):
        for who, found in sides.items():
            found.append(run(peer if who == "theirs" else sys.executable, who, method, folder))
            print(f"{method} {who}: {found[-1]['seconds']:.1f} CPU seconds", flush=True)
    seconds = {who: [row["seconds"] for row in rows] for who, rows in sides.items()}
    ratios = [b / a for a, b in zip(seconds["theirs"], seconds["ours"], strict=True)]
    nlls = {who: nll(folder, who, method, name, ids) for who in sides}
    gap = paired_bootstrap(nlls["ours"], nlls["theirs"], rng=np.random.default_rng(0))
    row = {
        "ratio": statistics.median(ratios), "ratios": ratios, "seconds": seconds,
        "wall": {who: [row["wall"] for row in rows] for who, rows in sides.items()},
        "perplexity": {who: math.exp(float(n.mean())) for who, n in nlls.items()},
        "nll_ours_minus_theirs": {"value": gap.value, "lo": gap.lo, "hi": gap.hi},
        "versions": sides["theirs"][0]["versions"],
    }  # fmt: skip
    print(f"{method}: ratio {row['ratio']:.2f}, perplexity {row['perplexity']}", flush=True)
    return row


def main() -> int:
    """Compare; 1 if refimpl is slower, or worse beyond the interval."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="interpreter of the environment with llm-compressor")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--quick", action="store_true", help="llama-nano, one run, nothing stored")
    parser.add_argument(
        "--one", nargs=3, metavar=("WHO", "METHOD", "FOLDER"), help="a single run, as started"
    )
    args = parser.parse_args()
    if args.one:
        one_run(args.one[0], args.one[1], Path(args.one[2]))
        return 0
    if not args.peer:
        parser.error("--peer is needed")
    from refimpl.models import load
    from refimpl.quantization.texts import calibration_ids, evaluation_ids
    from refimpl.results import store

    name = "llama-nano" if args.quick else "llama-mini"
    shape, runs = ((4, 64), 1) if args.quick else (CALIBRATION, args.runs)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, tokenizer = load(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        np.save(folder / "ids.npy", calibration_ids(tokenizer, *shape).numpy())
        ids = evaluation_ids(tokenizer, 8 if args.quick else 32)
        rows = {m: compare(m, args.peer, folder, name, runs, ids) for m in args.methods}
    missed = [
        m for m, row in rows.items() if row["ratio"] > 1 or row["nll_ours_minus_theirs"]["lo"] > 0
    ]  # fmt: skip
    summary = "; ".join(
        f"{m.upper()} of {name}: {row['ratio']:.2f} of llm-compressor's CPU seconds, perplexity "
        f"{row['perplexity']['ours']:.3f} and {row['perplexity']['theirs']:.3f}"
        for m, row in rows.items()
    )
    print(summary)
    if not args.quick:
        store(
            OUT, command="python data/quantization_peers.py --peer PYTHON", summary=summary, root=ROOT,
            sources=["data/quantization_peers.py"] + [
                f"refimpl/quantization/{part}.py"
                for part in ("awq", "awq_search", "calibrate", "feedback", "gptq", "grids", "linear", "model")
            ],
            model=name, calibration=shape, bits=BITS, group=GROUP, runs=runs, methods=rows, missed=missed,
        )  # fmt: skip
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
