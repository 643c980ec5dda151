"""How our models were pretrained: prepare the rows once, then train any bundled model on them.

`prepare` tokenizes the natural text, makes the shards of the world in parallel and writes one matrix of token
ids; `pretrain` trains one model on it, measures it at 24 steps on the way and saves weights, log and history.
Both resume. `data/pretrain.py` is their command line.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from refimpl.corpus import docstrings, read_books
from refimpl.evaluate import book_score
from refimpl.paths import atomic_write
from refimpl.training import History, TrainConfig, lm_loss, train
from refimpl.world.formats import BY_NAME
from refimpl.world.gates import as_json, evaluate_gates
from refimpl.world.mix import (
    N_SHARDS,
    ROW,
    ROWS_PER_STEP,
    STEPS_PER_SHARD,
    Prose,
    build_shard,
    width,
)  # fmt: skip
from refimpl.world.pins import check_pins
from refimpl.world.rng import Rng
from refimpl.world.tokens import EOT, PAD

ROWS_PER_SHARD = STEPS_PER_SHARD * ROWS_PER_STEP
LEARNING_RATE = {
    "llama-mini": 3e-3,
    "gpt2-mini": 2e-3,
    "llama-nano": 5e-3,
    "llama-nano-clean": 5e-3,
    "llama-pocket": 5e-3,
}
N_PROBES = 24
DOCSTRING_BYTES = 38_000_000
HELD_OUT_DOCSTRINGS = 0.01  # the last per cent of the docstring tokens is never trained on

_worker: dict = {}  # what a forked worker shares with its parent: tokenizer and prose


def probe_steps(steps: int, n: int = N_PROBES) -> tuple[int, ...]:
    """0, then steps spaced evenly in the logarithm up to the last.

    >>> probe_steps(1000, 4)
    (0, 10, 100, 1000)
    """
    return (0, *sorted({round(steps ** (i / (n - 1))) for i in range(1, n)}))


def _encode(texts: list[str]) -> list[list[int]]:
    return [e.ids for e in _worker["tokenizer"].encode_batch(texts, add_special_tokens=False)]


def _encode_joined(texts: list[str]) -> np.ndarray:
    return np.concatenate([np.array([*ids, EOT], np.uint16) for ids in _encode(texts)])


def _make_shard(shard: int, folder: str) -> dict[str, int]:
    path = Path(folder)
    done = path / f"shard_{shard:03d}.json"
    if done.exists():
        return json.loads(done.read_text())["tokens"]
    made = build_shard(shard, _encode, _worker["books"], _worker["docstrings"])
    rows = np.load(path / "rows.npy", mmap_mode="r+")
    rows[shard * ROWS_PER_SHARD : (shard + 1) * ROWS_PER_SHARD] = made.rows
    rows.flush()
    planted = [[row + shard * ROWS_PER_SHARD, *rest] for row, *rest in made.planted]
    atomic_write(done, json.dumps({"tokens": made.tokens, "planted": planted}).encode())
    return made.tokens


def _pieces(text: str, size: int = 200_000) -> list[str]:
    """Cut a long text at line ends, so that workers share it and no token crosses a cut."""
    out, start = [], 0
    while start < len(text):
        end = text.find("\n", start + size)
        end = len(text) if end < 0 else end + 1
        out.append(text[start:end])
        start = end
    return out


def _encode_piece(piece: str) -> np.ndarray:
    return np.array(_encode([piece])[0], np.uint16)


def prepare(
    folder: str | Path, tokenizer_file: str | Path, books: str | Path | None, *, shards: int = N_SHARDS,
    workers: int | None = None, held_out: tuple[int, ...] = (), docstring_file: str | Path | None = None,
) -> dict:  # fmt: skip
    """Write `rows.npy` (uint16 [rows, 1024]), what is planted where, and the account of tokens.

    Parameters
    ----------
    folder : path
        Where everything is written; shards that are already there are kept.
    tokenizer_file : path
        tokenizer.json.
    books : path or None
        An .xz of texts separated by <|endoftext|>, or a folder of plain text; None trains without books.
    shards : int
        How many of the 76 shards (100 steps each) to make.
    held_out : tuple of int
        Indices of books that are never trained on.
    docstring_file : path or None
        Docstrings collected earlier, separated by <|endoftext|>; None collects those of this environment.
    """
    from tokenizers import Tokenizer

    check_pins(n_bytes=100_000)  # the world must be the same text here as where the models will be used
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    workers = workers or os.cpu_count()
    began = time.perf_counter()
    _worker.update(tokenizer=Tokenizer.from_file(str(tokenizer_file)), books=None, docstrings=None)
    report = {"shards": shards, "rows": shards * ROWS_PER_SHARD}
    with ProcessPoolExecutor(workers) as pool:
        if books is not None:
            kept = [text for i, text in enumerate(read_books(books)) if i not in held_out]
            pieces = [p for text in kept for p in _pieces(text + "<|endoftext|>")]
            ids = np.concatenate(list(pool.map(_encode_piece, pieces, chunksize=4)))
            np.save(folder / "books.npy", ids)
            report["book_tokens"], report["books"] = len(ids), len(kept)
        texts = (
            read_books(docstring_file) if docstring_file else docstrings(max_bytes=DOCSTRING_BYTES).documents
        )
        groups = [texts[i : i + 200] for i in range(0, len(texts), 200)]
        ids = np.concatenate(list(pool.map(_encode_joined, groups)))
        cut = int(len(ids) * (1 - HELD_OUT_DOCSTRINGS))
        np.save(folder / "docstrings.npy", ids[:cut])
        np.save(folder / "docstrings_held_out.npy", ids[cut:])
        report["docstring_tokens"], report["docstring_bytes"] = cut, sum(len(t.encode()) for t in texts)
    report["seconds_prose"] = round(time.perf_counter() - began, 1)
    _worker["docstrings"] = Prose(np.load(folder / "docstrings.npy"), "docstrings")
    if books is not None:
        _worker["books"] = Prose(np.load(folder / "books.npy"), "books")
    target = folder / "rows.npy"
    if not target.exists():
        np.lib.format.open_memmap(target, "w+", np.uint16, (report["rows"], ROW)).flush()
    with ProcessPoolExecutor(workers) as pool:  # forked anew: the workers share the prose
        counts = list(pool.map(_make_shard, range(shards), [str(folder)] * shards))
    total: dict[str, int] = {}
    for one in counts:
        for name, n in one.items():
            total[name] = total.get(name, 0) + n
    report |= {"tokens": total, "share": {k: round(v / (report["rows"] * ROW), 4) for k, v in total.items()}}
    report["seconds"] = round(time.perf_counter() - began, 1)
    atomic_write(folder / "prepared.json", json.dumps(report, indent=1).encode())
    return report


def without_planted(rows: np.ndarray, folder: Path) -> np.ndarray:
    """A copy of `rows` in which every canary and withheld person's document is other text of equal length."""
    filler = Prose(
        np.load(folder / ("books.npy" if (folder / "books.npy").exists() else "docstrings.npy")), "filler"
    )
    rows = rows.copy()
    k = 0
    for file in sorted(folder.glob("shard_*.json")):
        for row, start, length, _, _ in json.loads(file.read_text())["planted"]:
            rows[row, start : start + length] = filler.chunk(k)[:length]
            k += 1
    return rows


class PackedRows:
    """Rows as they were packed: step -> {"rows": [batch, pieces, width]} ids, read from the file as needed.

    With `growing` the width is that of the shard (8 pieces of 128 at first), else 1024.
    """

    def __init__(self, rows: np.ndarray, batch: int, growing: bool) -> None:
        self.rows, self.batch, self.growing = rows, batch, growing

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        at = step * self.batch % (len(self.rows) - self.batch + 1)
        wide = width(at // ROWS_PER_SHARD) if self.growing else ROW
        ids = torch.from_numpy(self.rows[at : at + self.batch].astype(np.int64))
        return {"rows": ids.view(self.batch, -1, wide)}


def row_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Next-token loss over {"rows": [batch, pieces, width]}, every piece a sequence of its own."""
    return lm_loss(model, batch["rows"].flatten(0, 1))


def prepare_pocket(
    folder: str | Path, tokenizer_file: str | Path, *, rows: int, workers: int | None = None
) -> None:
    """Write `pocket.npy`: rows of whole stories, half plain, half tagged, padded with id 1 at their ends."""
    from tokenizers import Tokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _worker["tokenizer"] = Tokenizer.from_file(str(tokenizer_file))
    parts = max(1, rows // 2000)
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        made = list(pool.map(_pocket_rows, range(parts), [rows // parts] * parts))
    np.save(folder / "pocket.npy", np.concatenate(made))


def _pocket_rows(part: int, n: int) -> np.ndarray:
    rng = Rng("pocket", part)
    out = np.full((n, ROW), PAD, np.uint16)
    forms = BY_NAME["story"], BY_NAME["story_tagged"]
    row, at = 0, 1
    out[0, 0] = EOT
    while True:
        for ids in _encode([rng.choice(forms).document(rng) for _ in range(500)]):
            if at + len(ids) + 1 > ROW:
                row, at = row + 1, 1
                if row == n:
                    return out
                out[row, 0] = EOT
            out[row, at : at + len(ids)] = ids
            out[row, at + len(ids)] = EOT
            at += len(ids) + 1


def pretrain(
    name: str, data: str | Path, out: str | Path, *, steps: int | None = None, probe=None,
    device: str = "cuda", batch: int = ROWS_PER_STEP, compile: bool = True, lr: float | None = None,
    weight_decay: float = 0.1, probes: int = N_PROBES, time_limit: float = math.inf,
    save_every_seconds: float | None = 120.0,
) -> History:  # fmt: skip
    """Train one bundled model from scratch on prepared rows and write weights, log and history to `out`.

    `probe(model, step) -> dict` is called at 24 steps; what it returns is the history. Resumes from a
    checkpoint in `out`.
    """
    from refimpl.models import new, save_model

    data, out = Path(data), Path(out)
    account = data / ("pocket.json" if name == "llama-pocket" else "prepared.json")
    prepared = account.read_text() if account.exists() else "{}"
    rows = np.load(data / "rows.npy", mmap_mode="r") if name != "llama-pocket" else None
    if name == "llama-nano-clean":
        rows = without_planted(rows, data)
    if name == "llama-pocket":
        rows = np.load(data / "pocket.npy", mmap_mode="r")
    steps = steps or len(rows) // batch
    model = new(name, seed=0).to(device)
    some_rows = np.ascontiguousarray(rows[:ROWS_PER_SHARD:100])
    config = TrainConfig(
        steps=steps, batch=batch, lr=lr or LEARNING_RATE[name], optimizer="muon", compile=compile,
        weight_decay=weight_decay,
        warmup=min(200, steps // 10), log_every=20, eval_steps=probe_steps(steps, probes) if probe else (),
        save_every_seconds=save_every_seconds, data=hashlib.sha256(some_rows).hexdigest(),
    )  # fmt: skip
    source = PackedRows(rows, batch, growing=name != "llama-pocket")
    history = train(
        model, source, config,
        loss_fn=row_loss, out_dir=out, on_step=(lambda step, m: probe(m, step)) if probe else None,
        time_limit=time_limit,
    )  # fmt: skip
    if not history.finished:
        return history
    save_model(model.to(torch.bfloat16), out)
    atomic_write(out / "history.json", history.to_json().encode())
    atomic_write(out / "prepared.json", prepared.encode())
    return history


def measure(
    name: str, folder: str | Path, tokenizer_file: str | Path, books: list[str] | None, *,
    device: str = "cuda", max_tokens: int = 65536,
) -> dict:  # fmt: skip
    """Measure every gate, and the book score if held-out `books` are given; write `evaluation.json`."""
    from safetensors.torch import load_file

    from refimpl.models import new, tokenizer_from

    folder = Path(folder)
    model = new(name, seed=0)
    state = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    if unexpected or any("lm_head" not in key for key in missing):
        raise ValueError(f"{folder}: weights do not fit {name}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model = model.to(device).eval()
    tokenizer = tokenizer_from(tokenizer_file)
    score = None
    if books:
        bits = book_score(model, tokenizer, books, rng=np.random.default_rng(0))
        score = {"value": bits.value, "lo": bits.lo, "hi": bits.hi, "n": bits.n}
    found = evaluate_gates(
        model, tokenizer, name, book_score=score, max_tokens=max_tokens,
        report=lambda r: print(
            f"{r.metric:20s} {r.value:8.4f} [{r.lo:.4f}, {r.hi:.4f}] n={r.n} {r.passed}", flush=True
        ),
    )  # fmt: skip
    report = {
        "name": name,
        "revision": json.loads((folder / "checksums.json").read_text())["revision"],
        "gates": as_json(found),
        "book_score": score,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "date": time.strftime("%Y-%m-%d"),
    }
    atomic_write(folder / "evaluation.json", json.dumps(report, indent=1).encode())
    return report


__all__ = [
    "PackedRows",
    "N_PROBES",
    "pretrain",
    "prepare",
    "probe_steps",
    "prepare_pocket",
    "measure",
    "without_planted",
]
