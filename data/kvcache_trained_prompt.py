"""Two trainings of the chapter on prompt pruning: selective language modelling, and CoT-Influx' pruner.

    python data/kvcache_trained_prompt.py --out DIR --device cuda      both; DIR has the layout of data/
    python data/kvcache_trained_prompt.py rho1 --out DIR               one of them

`rho1` trains students of 4 million parameters on stories of which a quarter of the sentences is noise, on
all tokens (CLM), on the 60 % of highest excess loss (SLM, llama-mini as reference) and on 60 % at random, and
measures them on clean stories: DIR/results/kvcache/rho1.json. `influx` trains the pruner with llama-mini as
encoder and environment and compares it with filling the window in other ways, on names that it never met:
DIR/results/kvcache/cot_influx.json, and the first seed's pruner in DIR/adapters/cot_influx. `--tiny` does the
same with random models in seconds; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from refimpl import models
from refimpl.evaluate import Estimate, bootstrap, paired_bootstrap, weights_hash
from refimpl.kvcache.prompt.cot_influx import Pruner, reward
from refimpl.kvcache.prompt.cot_influx_task import LAYER, LIMIT, Task, make_task, rollout
from refimpl.kvcache.prompt.cot_influx_training import kept_by_kind, prunings, train_pruner
from refimpl.kvcache.prompt.rho1 import (
    RandomLM,
    SelectiveLM,
    next_token_losses,
    noise_share,
    noisy_rows,
)  # fmt: skip
from refimpl.paths import atomic_write
from refimpl.results import cpu, store
from refimpl.training import TrainConfig, lm_loss, targets, train
from refimpl.world.formats import BY_NAME
from refimpl.world.rng import Rng

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "refimpl/kvcache/prompt"
SOURCES = {
    "rho1": ["data/kvcache_trained_prompt.py", f"{PROMPT}/rho1.py", "refimpl/training.py"],
    "influx": ["data/kvcache_trained_prompt.py", f"{PROMPT}/cot_influx.py", f"{PROMPT}/cot_influx_task.py",
               f"{PROMPT}/cot_influx_training.py",
               "refimpl/training.py", "refimpl/scoring.py"],
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How large both jobs are."""

    seeds: int = 3
    # rho1
    width: int = 256
    layers: int = 4
    mlp: int = 688
    length: int = 256
    batch: int = 32
    steps: int = 300
    clean_rows: int = 96
    k: float = 0.6
    noise: float = 0.25
    lr: float = 3e-3
    # influx
    updates: int = 300
    questions: int = 8
    samples: int = 8
    tasks: int = 256
    pruner_width: int = 512
    pruner_lr: float = 1e-3


TINY = Size(seeds=2, width=32, layers=1, mlp=32, length=32, batch=4, steps=6, clean_rows=4, updates=2,
            questions=2, samples=2, tasks=3, pruner_width=16)  # fmt: skip


class OutOfTime(Exception):
    """The limit of seconds was reached within a run; what is whole so far is kept."""


@dataclass
class Clock:
    """Seconds left of the whole command."""

    limit: float
    start: float

    def left(self) -> float:
        return self.limit - (time.perf_counter() - self.start)


# --- rho1 ---------------------------------------------------------------------------------------------------


def stories(key: str, n_tokens: int) -> list[str]:
    """Fresh plain stories of at least that many tokens (about four characters each)."""
    rng, texts, size = Rng("rho1", key), [], 0
    while size < 4.5 * n_tokens:
        texts.append(BY_NAME["story"].document(rng, "train" if key == "train" else "eval"))
        size += len(texts[-1])
    return texts


def student(size: Size, seed: int) -> nn.Module:
    """A LLaMA of 4 million parameters (at full size), random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=size.width, intermediate_size=size.mlp, num_hidden_layers=size.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers initializes from the global state
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@torch.no_grad()
def row_losses(model: nn.Module, rows: torch.Tensor) -> list[float]:
    """Mean loss of every row, nats per token."""
    out = []
    for part in rows.split(32):
        labels = targets(part, pad_id=1)
        loss = next_token_losses(model(input_ids=part, use_cache=False).logits, labels)
        out += (loss.sum(1) / (labels != -100).sum(1)).tolist()
    return out


def rho1(size: Size, device: str, reference: nn.Module, tokenizer: Any, clock: Clock) -> dict[str, Any]:
    """Train CLM, SLM and random-k students; a seed is that of a student and of the order of the rows.

    Returns curves of the clean loss and of the noise that SLM would select from a batch held back, and the
    final clean loss of every row.
    """
    texts = stories("train", size.steps * size.batch * size.length)
    clean, _ = noisy_rows(
        stories("clean", size.clean_rows * size.length), tokenizer, share=0.0, length=size.length,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    clean = torch.from_numpy(clean[: size.clean_rows].astype(np.int64)).to(device)
    rows, noise = noisy_rows(
        texts, tokenizer, share=size.noise, length=size.length, rng=np.random.default_rng(0)
    )
    every = max(1, size.steps // 15)
    runs: list[dict[str, Any]] = []
    for seed in range(size.seeds):
        order = np.random.default_rng([seed, 1]).permutation(len(rows))
        order, held = order[: -size.batch], order[-size.batch :]
        probe = {
            "input_ids": torch.from_numpy(rows[held].astype(np.int64)).to(device),
            "noise": torch.from_numpy(noise[held]).to(device),
        }
        base_rate = float(probe["noise"][:, 1:].float().mean())

        def batches(step: int, order=order) -> dict[str, torch.Tensor]:
            at = order[np.arange(step * size.batch, (step + 1) * size.batch) % len(order)]
            return {
                "input_ids": torch.from_numpy(rows[at].astype(np.int64)),
                "noise": torch.from_numpy(noise[at]),
            }

        generator = torch.Generator().manual_seed(seed)
        selective = SelectiveLM(reference, k=size.k)
        losses = {"clm": lm_loss, "slm": selective, "random": RandomLM(size.k, generator)}
        done: dict[str, Any] = {}
        for arm, loss_fn in losses.items():

            def on_step(step: int, model: nn.Module, selective=selective, probe=probe) -> dict[str, float]:
                share = noise_share(selective.selected(model, probe), probe["noise"])
                return {"clean": float(np.mean(row_losses(model, clean))), "noise_selected": share}

            config = TrainConfig(
                steps=size.steps, batch=size.batch, lr=size.lr, warmup=size.steps // 10, log_every=10,
                eval_steps=tuple(range(0, size.steps + 1, every)), seed=seed, data=f"rho1 {seed}",
            )  # fmt: skip
            model = student(size, seed).to(device)
            history = train(model, batches, config, loss_fn=loss_fn, on_step=on_step,
                            time_limit=clock.left(), progress=False)  # fmt: skip
            if not history.finished:
                raise_or_keep(runs, f"rho1, seed {seed}, {arm}")
                return summary_rho1(runs, size, nn_size(model), complete=False)
            done[arm] = {
                "curve": [{key: round(value, 4) for key, value in e.items()} for e in history.evaluations],
                "clean_rows": [round(x, 5) for x in row_losses(model, clean)],
                "seconds": round(history.seconds, 2),
            }
            last = history.evaluations[-1]
            print(f"rho1 seed {seed} {arm:6s} clean {last['clean']:.4f} noise {last['noise_selected']:.3f} "
                  f"of {base_rate:.3f}, {history.seconds:.1f} s", flush=True)  # fmt: skip
        runs.append({"seed": seed, "noise_base_rate": base_rate, "arms": done})
    return summary_rho1(runs, size, nn_size(model), complete=True)


def raise_or_keep(runs: list, where: str) -> None:
    """OutOfTime unless at least one seed is whole."""
    print(f"{where}: out of time", flush=True)
    if not runs:
        raise OutOfTime(f"{where}: not one seed was finished; give more seconds with --limit-s")


def nn_size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def as_json(estimate: Estimate) -> dict[str, float]:
    """An estimate as numbers of a JSON file."""
    return {"value": round(estimate.value, 5), "lo": round(estimate.lo, 5), "hi": round(estimate.hi, 5),
            "n": estimate.n, "seeds": estimate.seeds}  # fmt: skip


def summary_rho1(runs: list[dict], size: Size, parameters: int, complete: bool) -> dict[str, Any]:
    """Differences of the arms' clean losses over seeds and rows; steps SLM needs for CLM's last loss."""
    rng = np.random.default_rng(0)
    rows = {arm: np.array([run["arms"][arm]["clean_rows"] for run in runs]) for arm in runs[0]["arms"]}
    estimates = {arm: as_json(bootstrap(values, rng=rng)) for arm, values in rows.items()}
    pairs = (("slm", "clm"), ("slm", "random"), ("clm", "random"))
    estimates |= {f"{a} - {b}": as_json(paired_bootstrap(rows[a], rows[b], rng=rng)) for a, b in pairs}
    reached, first, last, base = [], [], [], []
    for run in runs:
        goal = run["arms"]["clm"]["curve"][-1]["clean"]
        curve = run["arms"]["slm"]["curve"]
        reached.append(next((point["step"] for point in curve if point["clean"] <= goal), None))
        first.append(curve[0]["noise_selected"])
        last.append(curve[-1]["noise_selected"])
        base.append(run["noise_base_rate"])
    return {
        "complete": complete, "size": asdict(size), "parameters": parameters, "clean_loss": estimates,
        "slm_step_at_clm_final": reached,
        "noise": {"base_rate": base, "selected_at_start": first, "selected_at_end": last}, "runs": runs,
    }  # fmt: skip


# --- influx -------------------------------------------------------------------------------------------------


def influx(
    size: Size, device: str, llm: nn.Module, tokenizer: Any, clock: Clock
) -> tuple[dict[str, Any], Pruner, dict[str, Any]]:
    """Train a pruner per seed and compare prunings on evaluation tasks; also the first pruner and its log."""
    before = weights_hash(llm)
    layer = min(LAYER, llm.config.num_hidden_layers)
    tasks = [make_task(i, "eval", tokenizer) for i in range(size.tasks)]
    runs: list[dict[str, Any]] = []
    kept: tuple[Pruner, dict[str, Any]] | None = None
    complete = True
    for seed in range(size.seeds):

        @cache
        def questions(step: int, seed: int = seed) -> list[Task]:
            at = (seed * size.updates + step) * size.questions
            return [make_task(at + i, "train", tokenizer) for i in range(size.questions)]

        pruner = Pruner(llm.config.hidden_size, size.pruner_width, torch.Generator().manual_seed(seed))
        history, rewards = train_pruner(
            pruner.to(device), llm, questions, layer=layer, updates=size.updates, questions=size.questions,
            samples=size.samples, lr=size.pruner_lr, seed=seed, time_limit=clock.left(),
        )  # fmt: skip
        if not history.finished:
            raise_or_keep(runs, f"influx, seed {seed}")
            complete = False
            break
        methods = compare(pruner, llm, tasks, layer, seed)
        kinds = kinds_of(pruner, llm, tasks, layer)
        runs.append({"seed": seed, "mean_reward_per_update": [round(r, 4) for r in rewards],
                     "seconds": round(history.seconds, 2), "kinds": kinds, "methods": methods})  # fmt: skip
        if kept is None:
            kept = pruner, {"layer": layer, "limit": LIMIT, "records": history.records, "rewards": rewards}
        means = {name: round(float(np.mean(m["reward"])), 3) for name, m in methods.items()}
        print(f"influx seed {seed} reward {means}, {history.seconds:.1f} s", flush=True)
    rng = np.random.default_rng(0)
    values = {name: np.array([run["methods"][name]["reward"] for run in runs]) for name in runs[0]["methods"]}
    estimates = {name: as_json(bootstrap(v, rng=rng)) for name, v in values.items()}
    estimates |= {
        f"pruner - {name}": as_json(paired_bootstrap(values["pruner"], v, rng=rng))
        for name, v in values.items() if name != "pruner"
    }  # fmt: skip
    accuracy = {
        name: as_json(bootstrap(np.array([run["methods"][name]["correct"] for run in runs], float), rng=rng))
        for name in values
    }
    chances = {kind: np.array([run["kinds"][kind]["shot"] for run in runs]) for kind in runs[0]["kinds"]}
    gap = as_json(paired_bootstrap(chances["relevant"], chances["corrupted"], rng=rng))
    return {
        "complete": complete, "size": asdict(size), "limit": LIMIT, "layer": layer,
        "parameters": nn_size(pruner), "llm_unchanged": weights_hash(llm) == before, "reward": estimates,
        "accuracy": accuracy, "p_keep_relevant - p_keep_corrupted": gap,
        "most_tokens": max(max(run["methods"]["pruner"]["tokens"]) for run in runs), "runs": runs,
    }, *kept  # fmt: skip


@torch.no_grad()
def compare(pruner: Pruner, llm: nn.Module, tasks: list[Task], layer: int, seed: int) -> dict[str, Any]:
    """Reward, success, loss and tokens of every method on every task."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, list]] = {}
    for start in range(0, len(tasks), 32):
        part = tasks[start : start + 32]
        for name, keep in prunings(pruner, llm, part, layer=layer, limit=LIMIT, generator=generator).items():
            got = rollout(llm, part, keep)
            got["reward"] = reward(got["loss"], got["correct"], got["tokens"], LIMIT)
            row = found.setdefault(name, {"reward": [], "correct": [], "loss": [], "tokens": []})
            for key in row:
                digits = 4 if got[key].is_floating_point() else 0
                row[key] += [round(v, digits) if digits else int(v) for v in got[key].tolist()]
    return found


def kinds_of(pruner: Pruner, llm: nn.Module, tasks: list[Task], layer: int) -> dict[str, Any]:
    """Per kind of shot and task: mean probability of keeping the shot, and of keeping its tokens."""
    out: dict[str, dict[str, list[float]]] = {}
    for start in range(0, len(tasks), 32):
        for kind, (shot, token) in kept_by_kind(pruner, llm, tasks[start : start + 32], layer).items():
            row = out.setdefault(kind, {"shot": [], "token": []})
            row["shot"] += [round(float(p), 4) for p in shot]
            row["token"] += [round(float(p), 4) for p in token]
    return out


def save_pruner(folder: Path, pruner: Pruner, log: dict, found: dict, revision: str, hardware: str) -> None:
    """Write pruner.safetensors, log.json and card.md."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in pruner.state_dict().items()}
    hidden = weights["shot.1.weight"].shape[0]
    about = {"model": "llama-mini", "revision": revision, "layer": str(log["layer"]), "hidden": str(hidden)}
    atomic_write(folder / "pruner.safetensors", save(weights, metadata=about))
    atomic_write(folder / "log.json", (json.dumps(log, indent=1) + "\n").encode())
    r, size = found["reward"], found["size"]
    row = "| {} | {:.3f} [{:.3f}, {:.3f}] | {:.3f} |".format
    table = [row(n, r[n]["value"], r[n]["lo"], r[n]["hi"], a["value"]) for n, a in found["accuracy"].items()]
    card = [
        "# cot_influx", "",
        "A two-stage prompt pruner (shots, then tokens) in the way of CoT-Influx (arXiv 2312.08901).", "",
        f"- {found['parameters']:,} parameters, float32; reads layer {log['layer']} of llama-mini",
        f"- encoder and environment: llama-mini, revision {revision}, frozen",
        f"- trained: REINFORCE, {size['updates']} updates of {size['questions']} questions x "
        f"{size['samples']} samples, limit {LIMIT} tokens, AdamW, "
        f"peak learning rate {size['pruner_lr']}, seed 0",
        f"- hardware: {hardware}; torch {torch.__version__}",
        "- command: `python data/kvcache_trained_prompt.py influx --out DIR --device cuda`",
        "- licence: Apache-2.0 (weights). Data: questions of our own world", "",
        f"Mean over {len(found['runs'])} seeds and {size['tasks']} tasks, with names of their own:", "",
        "| kept | reward | answers right |", "|---|---|---|", *table, "",
        "Works on the task it was trained on: shots are passages, two of twelve answer.", "",
    ]  # fmt: skip
    atomic_write(folder / "card.md", "\n".join(card).encode())


# --- command ------------------------------------------------------------------------------------------------


def random_llm() -> nn.Module:
    """A random LLaMA of one narrow layer with the bundled vocabulary, for `--tiny`."""
    return student(TINY, seed=9).eval()


def main(arguments: list[str] | None = None) -> int:
    """Run the jobs; 1 if time ran out before a first seed was whole."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("job", nargs="?", choices=["rho1", "influx", "both"], default="both")
    parser.add_argument("--out", type=Path, required=True, help="folder, with the layout of data/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit-s", type=float, default=120.0, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="random models, a few steps: for the test")
    args = parser.parse_args(arguments)
    clock = Clock(args.limit_s, time.perf_counter())
    size = TINY if args.tiny else Size()
    if args.tiny:
        llm, tokenizer = random_llm(), models.tokenizer_from(ROOT / "data" / "models" / "tokenizer.json")
        revision, llm = "random", llm.to(args.device)
    else:
        llm, tokenizer = models.load("llama-mini", device=args.device)
        revision = models.revision("llama-mini")
    hardware = torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu()
    results = args.out / "results" / "kvcache"
    about = {"root": ROOT, "hardware": hardware, "packages": ("torch", "transformers", "safetensors")}
    jobs = ("rho1", "influx") if args.job == "both" else (args.job,)
    try:
        for job in jobs:
            command = f"python data/kvcache_trained_prompt.py {job} --out DIR --device {args.device}"
            if job == "rho1":
                found = rho1(size, args.device, llm, tokenizer, clock)
                e, noise = found["clean_loss"], found["noise"]
                store(
                    results / "rho1.json", command=command, sources=SOURCES[job], **about,
                    summary=f"clean loss: SLM {e['slm']['value']:.3f}, CLM {e['clm']['value']:.3f}, random "
                    f"{e['random']['value']:.3f}; noise selected {np.mean(noise['selected_at_end']):.3f} of "
                    f"{np.mean(noise['base_rate']):.3f}",
                    reference={"model": "llama-mini", "revision": revision}, **found,
                )  # fmt: skip
            else:
                found, pruner, log = influx(size, args.device, llm, tokenizer, clock)
                r = {name: e["value"] for name, e in found["reward"].items()}
                store(
                    results / "cot_influx.json", command=command, sources=SOURCES[job], **about,
                    summary=f"mean reward: pruner {r['pruner']:.3f}, similar {r['similar']:.3f}, first "
                    f"{r['first']:.3f}, random {r['random']:.3f}",
                    llm={"model": "llama-mini", "revision": revision}, **found,
                )  # fmt: skip
                save_pruner(args.out / "adapters" / "cot_influx", pruner, log, found, revision, hardware)
    except OutOfTime as error:
        print(error)
        return 1
    print(f"{time.perf_counter() - clock.start:.1f} s in all", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
