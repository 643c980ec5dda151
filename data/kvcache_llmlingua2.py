"""Train the token classifier of LLMLingua-2 and its causal ablation: data/adapters/llmlingua2.*

`python data/kvcache_llmlingua2.py` makes texts of the synthetic world, lets the offline teacher compress
them with injected noise, annotates, filters, trains, measures, and writes into --out `llmlingua2.safetensors`
(float16), `llmlingua2.json` (log: date, hardware, command, seeds, numbers) and `llmlingua2.md` (card). Needs
this checkout, torch, transformers, safetensors and numpy. With the defaults at most 4 minutes of one CPU
thread; on a GPU `--device cuda --texts 8000 --steps 2000 --batch 32 --test 300` takes about one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout need not be installed

from refimpl import models  # noqa: E402
from refimpl.evaluate import bootstrap, paired_bootstrap  # noqa: E402
from refimpl.kvcache.prompt import distill  # noqa: E402
from refimpl.kvcache.prompt.llmlingua2 import TokenClassifier, load_classifier, save_classifier  # noqa: E402
from refimpl.kvcache.prompt.units import token_losses  # noqa: E402
from refimpl.paths import atomic_write  # noqa: E402
from refimpl.results import store  # noqa: E402
from refimpl.world.rng import Rng  # noqa: E402

PROMPT = "refimpl/kvcache/prompt"
SOURCES = (
    "data/kvcache_llmlingua2.py",
    *(f"{PROMPT}/{n}.py" for n in ("annotation", "distill", "llmlingua2")),
)
GEOMETRY = {"layers": 4, "width": 128, "heads": 4}
CARD = """# llmlingua2: a token classifier for prompt pruning

{parameters:,} parameters, {layers} layers of width {width}, vocabulary of the bundled tokenizer, context 512;
stored in float16 ({bytes:,} bytes). Made by `{command}` on {date}, {hardware}, in {seconds:.0f} s.

**Data.** {texts} biographies of the synthetic world (split "train"), a filler sentence behind every fourth
sentence; compressed by the offline teacher `distill.WorldTeacher` (per fact: subject, value, date, one word
for the relation) with injected noise (`distill.Noisy`); {trusted} of them pass both filters. No text from
anywhere else.

**Measured** (F1 of the kept tokens against the noise-free teacher, mean over {test} texts, 95 % bootstrap
interval, each text cut to as many tokens as the teacher keeps):

{table}

**Limits.** It knows the sentences of the synthetic world and nothing else. Licence Apache-2.0.
"""


def main() -> int:
    """Make data, train, measure, write."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--out", type=Path, default=ROOT / "data" / "adapters")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--texts", type=int, default=2400)
    arguments.add_argument("--steps", type=int, default=150)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--test", type=int, default=100, help="texts per split on which F1 is measured")
    arguments.add_argument("--seed", type=int, default=0)
    a = arguments.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    surprised, tokenizer = models.load("llama-mini", device=a.device)
    teacher = distill.WorldTeacher()
    texts = [distill.make_text(Rng("llmlingua2", a.seed, i), "train") for i in range(a.texts)]
    pairs = distill.make_pairs(texts, distill.Noisy(teacher, Rng("llmlingua2 noise", a.seed)), tokenizer)
    trusted = distill.keep_trusted(pairs)
    made = time.perf_counter() - start
    print(f"{len(texts)} texts, {len(trusted)} pass the filters; {made:.0f} s")

    students, losses = {}, {}
    for name, causal in (("student", False), ("causal student", True)):
        students[name], losses[name] = distill.train(
            trusted, seed=a.seed, steps=a.steps, batch=a.batch, device=a.device, causal=causal, **GEOMETRY
        )
        print(f"{name}: loss {losses[name][0]:.3f} -> {np.mean(losses[name][-10:]):.3f}")
    a.out.mkdir(parents=True, exist_ok=True)
    weights = a.out / "llmlingua2.safetensors"
    save_classifier(students["student"], weights)
    students["student"] = load_classifier(weights).to(a.device)  # what ships is measured, rounding included
    seconds = time.perf_counter() - start

    measured = {}
    for split in ("train", "eval"):
        test = [distill.make_text(Rng("llmlingua2 test", i), split) for i in range(a.test)]
        gold = distill.make_pairs(test, teacher, tokenizer)
        scored = {name: probabilities(model, gold, a.device) for name, model in students.items()}
        scored["surprisal of llama-mini"] = token_losses(surprised, [torch.tensor(p.ids) for p in gold])
        measured[split] = {name: distill.f1(scores, gold) for name, scores in scored.items()}
    table, numbers = report(measured)
    print(table)

    options = [f"--{name} {value}" for name, value in vars(a).items() if name != "out"]
    command = " ".join(["python data/kvcache_llmlingua2.py", *options])
    log = store(
        a.out / "llmlingua2.json", command=command, sources=SOURCES, root=ROOT,
        hardware=torch.cuda.get_device_name() if a.device.startswith("cuda") else None,
        packages=("torch", "transformers", "safetensors", "numpy"),
        summary="LLMLingua-2: the token classifier and its causal ablation",
        seed=a.seed, texts=a.texts, trusted=len(trusted), steps=a.steps, batch=a.batch, geometry=GEOMETRY,
        seconds=round(seconds, 1), seconds_of_data=round(made, 1), bytes=weights.stat().st_size,
        llama_mini=models.revision("llama-mini"), f1=numbers,
        f1_items={s: {n: v.round(4).tolist() for n, v in by.items()} for s, by in measured.items()},
        losses={n: np.round(values, 4).tolist()[:: max(1, a.steps // 100)] for n, values in losses.items()},
    )  # fmt: skip
    card = CARD.format(
        parameters=sum(p.numel() for p in students["student"].parameters()), **GEOMETRY, table=table,
        test=a.test, texts=a.texts, trusted=len(trusted), seconds=seconds, bytes=weights.stat().st_size,
        **{key: log[key] for key in ("command", "date", "hardware")},
    )  # fmt: skip
    atomic_write(a.out / "llmlingua2.md", card.encode())
    print(f"{time.perf_counter() - start:.0f} s in all, {seconds:.0f} s without measuring")
    return 0


@torch.no_grad()
def probabilities(model: TokenClassifier, pairs: list[distill.Pair], device: str) -> list[torch.Tensor]:
    """p(keep) of every token of every text."""
    out = []
    for first in range(0, len(pairs), 32):
        part = pairs[first : first + 32]
        ids, labels = distill.batch_of(part, device)
        keep = model(ids, labels != -100).softmax(-1)[..., 1]
        out += [row[: len(pair.ids)] for row, pair in zip(keep, part, strict=True)]
    return out


def report(measured: dict[str, dict[str, np.ndarray]]) -> tuple[str, dict]:
    """A table for the card, and estimates and paired differences for the log."""
    lines, numbers = ["| split | scores | F1 | student minus it |", "|---|---|---|---|"], {}
    for split, by in measured.items():
        for name, values in by.items():
            rng = np.random.default_rng(0)
            own = bootstrap(values, rng=rng)
            gap = paired_bootstrap(by["student"], values, rng=rng)
            lines.append(f"| {split} | {name} | {own} | {gap if name != 'student' else ''} |")
            numbers[f"{split}: {name}"] = {
                "f1": [own.value, own.lo, own.hi],
                "gap": [gap.value, gap.lo, gap.hi],
            }
    return "\n".join(lines), numbers


if __name__ == "__main__":
    raise SystemExit(main())
