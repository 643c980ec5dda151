"""Train the reading adapter of llama-mini: LoRA on documents in more wordings than pretraining had.

    python data/reading_adapter.py --out build/reading --device cuda --seconds 120
    python data/reading_adapter.py --out build/reading --lr 1e-3 4e-3      two settings, one after the other
    python data/reading_adapter.py --out DIR --device cpu --tiny           a run of seconds, for the test

Half of a batch are documents with questions, their lines in the wording of pretraining or in that of
`refimpl/world/relation_forms_more.py`, with training names; the loss is that of their answers. The other half
is the mix of pretraining without books; its loss is the divergence from the model without the adapter, so
that everything else stays as it was. Held-out wording and evaluation names occur in neither. After training
every gate is measured with the adapter merged. DIR/LABEL/ gets the adapter, its card, and a JSON with
settings, loss curve and gates.
"""

from __future__ import annotations

import argparse
import copy
import os
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from refimpl.corpus import docstrings
from refimpl.lora import add_lora, merge_lora, save_lora, without_lora
from refimpl.models import evaluation, load, revision, tokenizer_from
from refimpl.paths import atomic_write, data_file
from refimpl.results import cpu, store
from refimpl.training import Rows, TrainConfig, train
from refimpl.world.base import Format
from refimpl.world.canaries import canaries_of_shard
from refimpl.world.formats import BY_NAME
from refimpl.world.gates import as_json, evaluate_gates
from refimpl.world.mix import PLANNED_SHARDS, ROW, WARM_SHARDS, world_documents
from refimpl.world.people import people_documents
from refimpl.world.rng import Rng
from refimpl.world.tokens import EOT, PAD

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "data/reading_adapter.py", "refimpl/lora.py", "refimpl/training.py",
    *(f"refimpl/world/{name}.py" for name in (
        "documents", "document_formats", "gates", "mix", "names", "relations", "relation_forms",
        "relation_forms_more",
    )),
)  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
READING = {  # format -> per cent of the documents
    "document_qa": 38, "document_unknown": 42, "document_distractors": 6, "document_counterfactual": 4,
    "document_multihop": 4, "document_long": 4, "facts_that_change": 2,
}  # fmt: skip
FIRST_SHARD = 20  # the first with rows of 1024
PLANTED = 0.06  # of the mix: people who are known, and canaries
PROSE_ROWS = 0.05  # of the rows of the mix
PARTS = 16

_worker: dict = {}  # what a forked worker shares with its parent


# --- rows ---------------------------------------------------------------------------------------------------


def reading_document(form: Format, rng: Rng) -> str:
    """A document of split "train" whose lines are each in the wording of pretraining or in "more"."""
    facts = form.sample(rng, "train")
    share = rng.choice((0.5, 1.0))  # of lines in the new wording
    old, new = (form.render(facts | {"split": wording}, rng).split("\n") for wording in ("train", "more"))
    return "\n".join(b if rng.random() < share else a for a, b in zip(old, new, strict=True))


def encode(texts: list[str]) -> list[list[int]]:
    """Token ids of several texts."""
    return [e.ids for e in _worker["tokenizer"].encode_batch(texts, add_special_tokens=False)]


def pack(documents: list[list[int]], n_rows: int) -> np.ndarray:
    """Rows of whole documents in their order: id 0 first and after each document, padding at the end.

    Raises ValueError when the documents do not fill the rows.
    """
    rows = np.full((n_rows, ROW), PAD, np.uint16)
    rows[:, 0] = EOT
    row, at = 0, 1
    for ids in documents:
        if len(ids) > ROW - 2:
            continue  # none is cut
        if at + len(ids) + 1 > ROW:
            row, at = row + 1, 1
            if row == n_rows:
                return rows
        rows[row, at : at + len(ids) + 1] = [*ids, EOT]
        at += len(ids) + 1
    raise ValueError(f"documents: {len(documents)} fill {row} rows, fewer than {n_rows}")


def reading_rows(part: int, n_rows: int) -> np.ndarray:
    """Rows of documents with questions, in mixed wording."""
    rng, documents, tokens = Rng("reading adapter", part), [], 0
    names, limits = list(READING), np.cumsum(list(READING.values())).tolist()
    while tokens < (n_rows + 1) * ROW:  # what a row leaves empty is more than what is missing here
        ids = encode([reading_document(BY_NAME[names[rng.weighted(limits)]], rng) for _ in range(100)])
        documents += ids
        tokens += sum(len(d) + 1 for d in ids if len(d) <= ROW - 2)
    return pack(documents, n_rows)


def mixed_rows(part: int, n_rows: int) -> np.ndarray:
    """Rows of the mix of one shard of pretraining: its formats, people and canaries in their proportions."""
    shard = FIRST_SHARD + part
    budget = (n_rows + 1) * ROW
    texts = world_documents(shard, 1.6 * budget, lambda some: [len(ids) for ids in encode(some)])
    documents = [text for some in texts.values() for text in some]
    at = shard - WARM_SHARDS
    planted = [text for text, _ in people_documents(at, PLANNED_SHARDS)]
    planted += [canary.text for canary in canaries_of_shard(at, PLANNED_SHARDS)]
    rng = Rng("reading adapter, mix", part)
    rng.shuffle(planted)
    documents += planted[: round(PLANTED * len(documents))]
    rng.shuffle(documents)
    return pack(encode(documents), n_rows)


def prose_rows(part: int, n_rows: int) -> np.ndarray:
    """Rows of the docstrings of this environment, cut."""
    need = n_rows * (ROW - 1)
    texts = docstrings(max_bytes=5 * need).documents
    ids = np.concatenate([np.array([*ids, EOT], np.uint16) for ids in encode(texts)])
    rows = np.full((n_rows, ROW), EOT, np.uint16)
    rows[:, 1:] = np.resize(ids, need).reshape(n_rows, ROW - 1)
    return rows


def make_rows(n_rows: int, tokenizer_file: Path, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """(reading, ordinary), n_rows each, made in parallel; the same for any number of workers."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker["tokenizer"] = Tokenizer.from_file(str(tokenizer_file))
    n_prose = max(1, round(PROSE_ROWS * n_rows))
    parts = min(PARTS, n_rows)
    jobs = [(prose_rows, 0, n_prose)]
    for make, n in ((mixed_rows, n_rows - n_prose), (reading_rows, n_rows)):
        sizes = [n // parts + (i < n % parts) for i in range(parts)]
        jobs += [(make, i, size) for i, size in enumerate(sizes) if size]
    with ProcessPoolExecutor(workers) as pool:
        made = [pool.submit(make, part, size) for make, part, size in jobs]
        rows = {make: [] for make, _, _ in jobs}
        for (make, _, _), future in zip(jobs, made, strict=True):
            rows[make].append(future.result())
    ordinary = np.concatenate([*rows.get(mixed_rows, []), *rows[prose_rows]])
    return np.concatenate(rows[reading_rows]), ordinary


class Batches:
    """step -> {"input_ids", "answers"}: the first half of a batch reads, the second is ordinary.

    `answers` marks the tokens that follow "Answer:" up to the end of their line.
    """

    def __init__(self, reading: np.ndarray, ordinary: np.ndarray, batch: int, marks: tuple[int, ...]) -> None:
        self.reading = Rows(reading, batch // 2, seed=0)
        self.ordinary = Rows(ordinary, batch // 2, seed=1)
        self.marks = marks

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        ids = torch.cat([self.reading(step), self.ordinary(step)])
        return {"input_ids": ids, "answers": answer_mask(ids, self.marks)}


def answer_marks(tokenizer) -> tuple[int, int, int]:
    """The ids of "Answer", ":" and the end of a line."""
    (word, colon), (end,) = tokenizer("Answer:")["input_ids"], tokenizer("\n")["input_ids"]
    return word, colon, end


def answer_mask(ids: torch.Tensor, marks: tuple[int, ...]) -> torch.Tensor:
    """Which tokens [B, T] belong to an answer, the end of its line included."""
    word, colon, end = marks
    at = torch.arange(ids.shape[1]).expand_as(ids)
    opens = F.pad((ids[:, :-1] == word) & (ids[:, 1:] == colon), (1, 0))
    opened = torch.where(opens, at, -1).cummax(1).values
    closed = torch.where(ids == end, at, -1).cummax(1).values
    return F.pad((opened > closed)[:, :-1], (1, 0))


# --- training -----------------------------------------------------------------------------------------------


class ReadingLoss:
    """Cross-entropy of the answers of the reading half + weight x KL(base || adapted) on the other half."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, half = batch["input_ids"], len(batch["input_ids"]) // 2
        logits = model(input_ids=ids, use_cache=False).logits
        asked = batch["answers"][:half, 1:]
        answers = F.cross_entropy(logits[:half, :-1][asked].float(), ids[:half, 1:][asked])
        with torch.no_grad(), without_lora(model):
            base = model(input_ids=ids[half:], use_cache=False).logits
        there = ids[half:] != PAD
        new, old = (F.log_softmax(x[there].float(), -1) for x in (logits[half:], base))
        return answers + self.weight * F.kl_div(new, old, log_target=True, reduction="batchmean")


def fit(model, batches: Batches, steps: int, args: argparse.Namespace, rank: int, lr: float):
    """Add factors to the model and train them; returns the history."""
    add_lora(model, TARGETS, rank, 2.0 * rank, torch.Generator().manual_seed(0))
    warmup = max(1, steps // 20) if steps > 1 else 0
    config = TrainConfig(
        steps=steps, batch=args.batch, lr=lr, warmup=warmup, decay_fraction=(steps - warmup) / steps,
        weight_decay=0.0, log_every=20, data="reading adapter",
    )  # fmt: skip
    return train(model, batches, config, loss_fn=ReadingLoss(args.kl))


def steps_in(seconds: float, model, batches: Batches, args: argparse.Namespace, rank: int) -> int:
    """How many steps take so long, from the time of twelve; the model is left as it was."""
    trial = fit(copy.deepcopy(model), batches, 12, args, rank, 1e-6)
    first, last = trial.records[0], trial.records[-1]
    return max(20, int(seconds * (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])))


def one_setting(
    model, tokenizer, batches: Batches, args: argparse.Namespace, rank: int, lr: float, steps: int
) -> dict:
    """Train one adapter, write it, merge it, measure the gates, write both."""
    folder = args.out / f"r{rank}-lr{lr:g}-kl{args.kl:g}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"reading-{args.model}.safetensors"
    began = time.perf_counter()
    history = fit(model, batches, steps, args, rank, lr)
    save_lora(model, file)
    trained = time.perf_counter()
    merge_lora(model)
    only = ("qa",) if args.tiny else ()
    found = evaluate_gates(
        model, tokenizer, args.model, quick=args.tiny, only=only,
        max_tokens=65536 if args.device.startswith("cuda") else 2048,
        report=lambda r: print(f"{r.metric:20} {r.value:8.4f} [{r.lo:.4f}, {r.hi:.4f}] n={r.n} {r.passed}",
                               flush=True),
    )  # fmt: skip
    gates = as_json(found)
    values = {gate["metric"]: gate["value"] for gate in gates}
    missed = [gate["name"] for gate in gates if gate["level"] == "must" and gate["passed"] is False]
    line = "must gates missed: " + (", ".join(missed) or "none")
    told = [name for name in ("qa", "false_unknown", "unknown") if name in values]
    line += "".join(f"; {name} {values[name]:.3f}" for name in told)
    words = ["DIR" if word == str(args.out) else word for word in sys.argv[1:]]
    stored = store(
        file.with_suffix(".json"),
        command=shlex.join(["python", "data/reading_adapter.py", *words]),
        summary=f"LoRA of rank {rank} for {args.model}, lr {lr:g}: {line}",
        sources=SOURCES, root=ROOT, packages=("torch", "transformers", "tokenizers", "numpy"),
        hardware=torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu(),
        model=args.model, revision=revision(args.model),
        settings={"rank": rank, "alpha": 2.0 * rank, "lr": lr, "kl": args.kl, "steps": steps,
                  "batch": args.batch, "rows": args.rows, "targets": TARGETS, "reading": READING},
        seconds={"training": round(trained - began, 1), "gates": round(time.perf_counter() - trained, 1)},
        tokens=history.tokens, records=history.records, gates=gates,
    )  # fmt: skip
    atomic_write(file.with_suffix(".md"), card(stored, file.stat().st_size).encode())
    print(stored["summary"], stored["seconds"], flush=True)
    return stored


def card(stored: dict, size: int) -> str:
    """What the adapter is, and every gate with and without it."""
    before = {gate["name"]: gate for gate in evaluation(stored["model"])["gates"]}
    settings = stored["settings"]
    lines = [
        f"# Reading adapter of {stored['model']}", "",
        f"LoRA (arXiv 2106.09685) of rank {settings['rank']} on all projections, {size} bytes. Trained by "
        "`data/reading_adapter.py` on documents of the synthetic world in more wordings than pretraining "
        "had; held-out wording and evaluation names are not among them. No natural text beyond docstrings.",
        "",
        f"- model: {stored['model']}, revision {stored['revision']}", f"- command: `{stored['command']}`",
        f"- steps: {settings['steps']} of {settings['batch']} rows, learning rate {settings['lr']:g}",
        f"- hardware: {stored['hardware']}", f"- date: {stored['date']}",
        "- licence: Apache-2.0, as the models",
        "", "```python", f'model, tokenizer = load("{stored["model"]}")',
        f'load_lora(model, data_file("adapters", "reading-{stored["model"]}.safetensors"))', "```",
        "", "| gate | level | required | without | with the adapter |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for gate in stored["gates"]:
        old = before.get(gate["name"])
        was = f"{old['value']:.3f} [{old['lo']:.3f}, {old['hi']:.3f}]" if old else "not measured"
        lines.append(
            f"| {gate['name']} | {gate['level']} | {gate['threshold']:g} | {was} | "
            f"{gate['value']:.3f} [{gate['lo']:.3f}, {gate['hi']:.3f}] |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Make the rows once, then train and measure every setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=120, help="of training, each setting")
    parser.add_argument("--steps", type=int, help="of training, in place of --seconds")
    parser.add_argument("--rank", type=int, nargs="+", default=[8])
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--kl", type=float, default=1.0, help="weight of the divergence from the model")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step, half of them reading")
    parser.add_argument("--rows", type=int, default=20_000, help="rows of each half")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--model", default="llama-mini")
    parser.add_argument("--tiny", action="store_true", help="the smallest model, two steps, one gate")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.steps, args.batch, args.rows, args.rank = "llama-nano", 2, 2, 3, [2]
    began = time.perf_counter()
    tokenizer_file = data_file("models", "tokenizer.json")
    reading, ordinary = make_rows(args.rows, tokenizer_file, args.workers)
    print(f"{args.rows} rows of each half in {time.perf_counter() - began:.0f} s", flush=True)
    tokenizer = tokenizer_from(tokenizer_file)
    batches = Batches(reading, ordinary, args.batch, answer_marks(tokenizer))
    steps = args.steps
    for rank in args.rank:
        for lr in args.lr:
            model, _ = load(args.model, device=args.device)
            steps = steps or steps_in(args.seconds, model, batches, args, rank)
            print(f"rank {rank}, lr {lr:g}: {steps} steps", flush=True)
            one_setting(model, tokenizer, batches, args, rank, lr, steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
