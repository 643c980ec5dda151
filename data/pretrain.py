"""Pretrain the bundled models.

    python data/pretrain.py --books BOOKS          everything below for all five models, into build/
    python data/pretrain.py prepare --books BOOKS --held-out 13 25 ... --out build/rows
    python data/pretrain.py train llama-mini --data build/rows --out build/llama-mini
    python data/pretrain.py measure llama-mini --out build/llama-mini --books BOOKS --held-out 13 25 ...

BOOKS is an .xz of texts separated by <|endoftext|> or a folder of plain text; without it the models train on
docstrings and the world alone, and the book score does not apply. `train` resumes a killed run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from refimpl import pretraining
from refimpl.corpus import read_books

TOKENIZER = Path("data/models/tokenizer.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", default="all", choices=("all", "prepare", "pocket", "train", "measure")
    )
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--books", type=Path)
    parser.add_argument("--held-out", type=int, nargs="*", default=[])
    parser.add_argument("--data", type=Path, default=Path("build/rows"))
    parser.add_argument("--out", type=Path, default=Path("build/rows"))
    parser.add_argument("--shards", type=int, default=pretraining.N_SHARDS)
    parser.add_argument("--rows", type=int, default=120_000, help="rows of the pocket model's stories")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=pretraining.ROWS_PER_STEP)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lr", type=float, help="learning rate; default: the one of the shipped model")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--probes", type=int, default=pretraining.N_PROBES, help="how often to measure")
    parser.add_argument("--no-probe", action="store_true")
    parser.add_argument(
        "--docstrings", type=Path, help="collected docstrings; default: those of this environment"
    )
    args = parser.parse_args()
    if args.what != "all":
        run(args)
        return
    rows = args.data
    for what in ("prepare", "pocket"):
        if not (rows / ("prepared.json" if what == "prepare" else "pocket.npy")).exists():
            run(replace(args, what=what, out=rows))
    for name in pretraining.LEARNING_RATE:
        out = rows.parent / name
        if not (out / "model.safetensors").exists():
            run(replace(args, what="train", name=name, out=out, no_probe=name == "llama-pocket"))
        if name != "llama-pocket" and not (out / "evaluation.json").exists():
            run(replace(args, what="measure", name=name, out=out))


def replace(args: argparse.Namespace, **changes) -> argparse.Namespace:
    """The same arguments with some changed."""
    return argparse.Namespace(**{**vars(args), **changes})


def run(args: argparse.Namespace) -> None:
    """One step: prepare, pocket, train or measure."""
    if args.what == "prepare":
        report = pretraining.prepare(
            args.out, TOKENIZER, args.books, shards=args.shards, workers=args.workers,
            held_out=tuple(args.held_out), docstring_file=args.docstrings,
        )  # fmt: skip
        print(json.dumps(report, indent=1))
    elif args.what == "pocket":
        pretraining.prepare_pocket(args.out, TOKENIZER, rows=args.rows, workers=args.workers)
    elif args.what == "train":
        from refimpl.models import tokenizer_from
        from refimpl.probes import Probe, natural_rows

        probe = None if args.no_probe else Probe(tokenizer_from(TOKENIZER), natural_rows(args.data))
        history = pretraining.pretrain(
            args.name, args.data, args.out, steps=args.steps, probe=probe, batch=args.batch,
            probes=args.probes, device=args.device, compile=not args.no_compile, lr=args.lr,
            weight_decay=args.weight_decay,
        )  # fmt: skip
        speed = history.tokens / history.seconds
        print(args.name, history.step, "steps", history.losses[-1], f"{speed:.0f} tokens/s")
    else:
        books = (
            [t for i, t in enumerate(read_books(args.books)) if i in args.held_out] if args.books else None
        )
        pretraining.measure(args.name, args.out, TOKENIZER, books, device=args.device)


if __name__ == "__main__":
    main()
