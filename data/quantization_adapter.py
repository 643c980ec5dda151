"""Train the adapter of chapter 4: llama-mini in NF4 learns 60 facts about people whom it never met (QLoRA).

    python data/quantization_adapter.py --out DIR --device cuda
    python data/quantization_adapter.py --out DIR --device cpu --tiny      a run of seconds, for the test

One cell of the study of `data/quantization_trained.py` ("QLoRA, 0.002", seed 0), kept: DIR gets the factors,
a card, and a JSON with the losses of 32 documents a kind and the answers to the 60 questions, asked in
wordings that occur in no training text, without the factors and with them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from refimpl.evaluate import wilson
from refimpl.lora import save_lora, without_lora
from refimpl.models import load, revision
from refimpl.paths import atomic_write
from refimpl.quantization.harness import Measured, Probe, measure
from refimpl.quantization.nf4 import qlora
from refimpl.quantization.peqa import short_run
from refimpl.quantization.study import fact_questions, fact_rows, new_facts
from refimpl.quantization.texts import evaluation_ids
from refimpl.results import cpu, store
from refimpl.training import train

ROOT = Path(__file__).resolve().parents[1]
NAME = "qlora-facts-llama-mini"
SOURCES = ("data/quantization_adapter.py", "refimpl/lora.py", "refimpl/training.py") + tuple(
    f"refimpl/quantization/{name}.py" for name in ("frozen", "nf4", "peqa", "study")
)
SETTINGS = {
    "people": 20, "steps": 140, "batch": 8, "length": 64, "lr": 2e-3, "rank": 8, "alpha": 16.0, "seed": 0,
}  # fmt: skip
TINY = {"people": 1, "steps": 2, "batch": 2, "rank": 2}


def as_json(found: Measured) -> dict:
    """Losses and answers, item by item."""
    return {
        "nll": {kind: np.round(values, 4).tolist() for kind, values in found.nll.items()},
        "facts": found.exact["facts"].astype(int).tolist(),
    }


def card(stored: dict, size: int) -> str:
    """The adapter's page."""
    s = stored["settings"]
    lines = [
        "# QLoRA adapter of llama-mini: sixty new facts", "",
        f"LoRA (arXiv 2106.09685) of rank {s['rank']} on all projections of a model whose blocks are in NF4 "
        f"(arXiv 2305.14314), {size} bytes. Trained by `data/quantization_adapter.py` on questions and "
        f"answers about {s['people']} invented people, three facts each; the questions below have other "
        "wordings. No natural text.", "",
        f"- model: {stored['model']}, revision {stored['revision']}", f"- command: `{stored['command']}`",
        f"- steps: {s['steps']} of {s['batch']} rows of {s['length']} tokens, learning rate {s['lr']:g}",
        f"- hardware: {stored['hardware']}", f"- date: {stored['date']}",
        "- licence: Apache-2.0, as the models", "", "```python",
        f'model, tokenizer = load("{stored["model"]}")', "compress_frozen(model, NF4())",
        f'load_lora(model, data_file("adapters", "{NAME}.safetensors"))', "```", "",
        "| | facts, exact | stories, nats a token | help texts |", "|---|---|---|---|",
    ]  # fmt: skip
    for label, arm in (("NF4 alone", "without"), ("with the adapter", "with")):
        row = stored[arm]
        e = wilson(sum(row["facts"]), len(row["facts"]))
        losses = " | ".join(f"{np.mean(row['nll'][kind]):.3f}" for kind in ("stories", "topics"))
        lines.append(f"| {label} | {e.value:.3f} [{e.lo:.3f}, {e.hi:.3f}] | {losses} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="llama-nano, two steps, two documents")
    args = parser.parse_args()
    name, s = ("llama-nano", SETTINGS | TINY) if args.tiny else ("llama-mini", SETTINGS)
    model, tokenizer = load(name, device=args.device)
    facts = new_facts(s["people"])
    n, length = (2, 64) if args.tiny else (32, 128)
    documents = {kind: evaluation_ids(tokenizer, n, length, kind) for kind in ("stories", "topics")}
    probe = Probe(documents, {"facts": fact_questions(tokenizer, facts)})
    rows = fact_rows(tokenizer, facts, s["steps"] * s["batch"], s["length"], s["seed"])
    qlora(model, s["rank"], s["alpha"], torch.Generator().manual_seed(s["seed"]))

    def batches(step: int) -> dict[str, torch.Tensor]:
        return {key: ids[s["batch"] * step : s["batch"] * (step + 1)] for key, ids in rows.items()}

    history = train(model, batches, short_run(s["steps"], s["batch"], s["lr"]), progress=False)
    with without_lora(model):
        before = measure(model, probe)
    after = measure(model, probe)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{NAME}.safetensors"
    save_lora(model, file)
    stored = store(
        args.out / f"{NAME}.json",
        command=f"python data/quantization_adapter.py --out DIR --device {args.device}",
        summary=f"{after.exact['facts'].mean():.2f} of {len(facts)} new facts", root=ROOT, sources=SOURCES,
        hardware=torch.cuda.get_device_name() if args.device == "cuda" else cpu(), model=name,
        revision=revision(name), settings=s, losses=np.round(history.losses, 4).tolist(),
        **{"without": as_json(before), "with": as_json(after)},
    )  # fmt: skip
    atomic_write(args.out / f"{NAME}.md", card(stored, file.stat().st_size).encode())
    print(stored["summary"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
