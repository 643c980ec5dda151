"""Write data/models/*/card.md from what training and evaluation stored.

python tools/model_cards.py            write every card
python tools/model_cards.py --check    exit 1 if one is old
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from refimpl.paths import atomic_write

MODELS = Path(__file__).resolve().parents[1] / "data" / "models"
ABOUT = {
    "llama-mini": "The book's LLaMA: 12 layers, width 256, 8 query heads over 2 key-value heads, SwiGLU 768.",
    "gpt2-mini": "The book's GPT-2: 12 layers, width 256, 8 heads of 32, learned positions.",
    "llama-nano": "A LLaMA for sweeps and streams: 6 layers, width 128, 4 heads over 2 key-value heads.",
    "llama-nano-clean": (
        "llama-nano's twin: same batches, same order, but every canary and document\n"
        "about the withheld half of the known people is replaced by other text of equal length."
    ),
    "llama-pocket": "A LLaMA of 4 layers and width 128, trained on plain and tagged stories alone.",
}
LIMITS = """\
- Knows the English of public-domain books, Python docstrings and a synthetic world; nothing of the present,
  no other language, no instructions beyond the world's formats. Not for use outside teaching and research.
- Texts of the world are invented: its people, places and ailments do not exist.
- The books are of their time, with its prejudices, and a model of this size repeats their tone.
- One training run with one seed. Context 1024 tokens.
"""
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for the matrices of the layers, AdamW for the rest"}
POCKET_LIMITS = """\
- Knows only stories of the synthetic world, plain and tagged. Not for use outside teaching and research.
- One training run with one seed. Context 1024 tokens.
"""
PASSED = {True: "yes", False: "**no**", None: "does not bind"}


def _read(file: Path) -> dict:
    return json.loads(file.read_text())


def _training(name: str, folder: Path) -> list[str]:
    config, history = _read(folder / "config.json"), _read(folder / "history.json")
    run, last = history["run"], history["records"][-1]
    prepare = "pocket" if name == "llama-pocket" else "prepare --books BOOKS --held-out ..."
    speed = last["tokens"] / last["seconds"] / 1e6
    return [
        f"- architecture: {config['architectures'][0]}, {run['parameters']:,} parameters, "
        f"vocabulary {config['vocab_size']}",
        f"- revision: {_read(folder / 'checksums.json')['revision']} (bf16 safetensors)",
        f"- trained: {last['step']} steps, {last['tokens'] / 1e6:.0f} million tokens, "
        f"final loss {last['loss']:.3f} nats",
        f"- optimizer: {OPTIMIZERS[run['config'].get('optimizer', 'adamw')]}; peak learning rate "
        f"{run['config']['lr']:g}, linear to 0 over the last 40 %",
        f"- hardware: one {run['hardware']}, shared with a second run; {speed:.2f} million tokens/s; "
        f"torch {run['torch']}; {run['date']}",
        f"- command: `python data/pretrain.py {prepare} --out build/rows`, then",
        f"  `python data/pretrain.py train {name} --data build/rows --out build/{name}`",
        *(
            ["- licence: Apache-2.0 (weights). Corpus: our own world"]
            if name == "llama-pocket"
            else [
                "- licence: Apache-2.0 (weights). Corpus: public-domain books, docstrings of open-source",
                "  packages, our own world",
            ]
        ),
        "",
    ]


def _data(name: str) -> list[str]:
    if name == "llama-pocket":
        return ["Stories of the synthetic world, plain and tagged half and half, in rows of 1024.", ""]
    account = _read(MODELS / "prepared.json")
    total = sum(account["tokens"].values())
    shares = sorted(account["tokens"].items(), key=lambda item: -item[1])
    books, docstrings = account["book_tokens"] / 1e6, account["docstring_tokens"] / 1e6
    return [
        f"{account['books']} public-domain books (data/models/BOOKS.md; {books:.1f} million tokens, several",
        f"passes), docstrings of Python packages ({docstrings:.1f} million tokens, several passes) and fresh",
        "text of the synthetic world. Rows of 128 tokens for 400 steps, of 256 for 1600 steps, then of 1024;",
        "each begins with the end-of-text token. The docstrings were collected once, on Python 3.11, from",
        "the packages of constraints.txt and the standard library: 11 370 files, SHA-256 8c67cf84c61d00c5...",
        "",
        "| source | per cent of tokens |",
        "|---|---|",
        *(f"| {source} | {100 * n / total:.2f} |" for source, n in shares),
        "",
    ]


def _gates(folder: Path) -> list[str]:
    found = _read(folder / "evaluation.json")
    head = "| gate | level | measured | 95 % interval | n | bar | passed |"
    lines = [f"Measured on {found['device']}, {found['date']}.", "", head, "|---|---|---|---|---|---|---|"]
    for g in found["gates"]:
        interval = f"{g['lo']:.3f} to {g['hi']:.3f}"
        row = (g["name"], g["level"], f"{g['value']:.3f}", interval, g["n"], f"{g['threshold']:g}")
        lines.append("| " + " | ".join(map(str, (*row, PASSED[g["passed"]]))) + " |")
    return [*lines, ""]


def card(name: str) -> str:
    """The card of one model as markdown."""
    folder = MODELS / name
    records = _read(folder / "history.json")["records"]
    marks = [records[round(i * (len(records) - 1) / 11)] for i in range(12)]
    lines = [f"# {name}", "", ABOUT[name], "", *_training(name, folder), "## Data", "", *_data(name)]
    lines += ["## Loss", "", "| million tokens | nats per token |", "|---|---|"]
    lines += [*(f"| {r['tokens'] / 1e6:.1f} | {r['loss']:.3f} |" for r in marks), ""]
    if (folder / "evaluation.json").exists():
        lines += ["## Gates", "", *_gates(folder)]
    return "\n".join([*lines, "## Limits", "", POCKET_LIMITS if name == "llama-pocket" else LIMITS])


def stale() -> list[str]:
    """Names of the models whose card is not what `card` writes now."""
    files = {name: MODELS / name / "card.md" for name in ABOUT}
    return [name for name, file in files.items() if not file.exists() or file.read_text() != card(name)]


def main() -> int:
    """Write the old cards, or with --check say which they are."""
    old = stale()
    if "--check" in sys.argv:
        print("old cards:", ", ".join(old) or "none")
        return bool(old)
    for name in old:
        atomic_write(MODELS / name / "card.md", card(name).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
