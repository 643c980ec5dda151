"""The trained and searched systems of chapter 4, each against its baselines, over three seeds.

    python data/quantization_trained.py            measure what build/quantization_trained lacks, then join
    python data/quantization_trained.py --systems nf4 peqa --seeds 0
    python data/quantization_trained.py --model llama-mini --device cuda      another model, stored beside it
    python data/quantization_trained.py --quick    a few steps, 2 documents: to see that it runs

A cell is one system at one seed: all its arms, which see the same text in the same order and are measured on
the same 32 stories and 32 help texts of 128 tokens. A seed is other training or calibration text, another
order and other draws; the 60 new facts are the same. Cells are files, so an interrupted run goes on where it
stopped; cells made from other sources are made again. `--join` alone makes the stored file of what is there.

Stored are, for each arm and seed, the loss of each document, the divergence from the uncompressed model where
that is the claim (16 documents a kind), and the answer to each question; for pairs of arms `study.compare`.
`--device cuda` trains, searches and measures on a GPU; other compression stays on the CPU.

On 2026-11-23 `edge_llm.bit_widths` was mended for sensitivities that are all equal, and `head_sensitivity`
began to refuse weights that are not finite. No cell meets either, so the stored ones were kept and carry the
new hashes.
"""

import argparse
import copy
import hashlib
import inspect
import json
import multiprocessing as mp
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.footprint.saved_tensors import saved_tensors
from refimpl.lora import add_lora, merge_lora
from refimpl.models import load, revision
from refimpl.paths import atomic_write
from refimpl.quantization.distillation.repair import repair
from refimpl.quantization.distillation.train import Distillation, distil, half_depth
from refimpl.quantization.edge_llm import Policy, make_policy
from refimpl.quantization.edge_llm import compress as edge_compress
from refimpl.quantization.edge_llm_tuning import EarlyExits, tune, vote
from refimpl.quantization.evopress import evolve, random_search
from refimpl.quantization.evopress_database import layer_database
from refimpl.quantization.frozen import compress_frozen
from refimpl.quantization.gptq import GPTQ
from refimpl.quantization.grids import Grid
from refimpl.quantization.harness import Measured, Probe, measure
from refimpl.quantization.hybrid import Hybrid
from refimpl.quantization.linear import compressed_names, dense_weight
from refimpl.quantization.mixllm import MixLLM
from refimpl.quantization.mixllm_rows import row_salience, rows_within, top_rows
from refimpl.quantization.model import compress_model
from refimpl.quantization.nf4 import qlora
from refimpl.quantization.peqa import peqa, short_run, tune_scales
from refimpl.quantization.pruning.bonsai import bonsai
from refimpl.quantization.pruning.gating import gated
from refimpl.quantization.pruning.head_gates import close_gates, train_head_gates
from refimpl.quantization.pruning.head_sensitivity import head_importance, pruning_masks
from refimpl.quantization.pruning.nuteprune import nuteprune
from refimpl.quantization.pruning.slicing import slice_model
from refimpl.quantization.pruning.sparsegpt import SparseGPT
from refimpl.quantization.pruning.subset_pruning import train_subset
from refimpl.quantization.rtn import RTN
from refimpl.quantization.study import (
    compare,
    drawn,
    fact_questions,
    fact_rows,
    measure_heads,
    mixed_ids,
    new_facts,
)
from refimpl.quantization.texts import evaluation_ids
from refimpl.results import imported, sha256, store
from refimpl.training import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]
FOLDER, RESULTS = ROOT / "build" / "quantization_trained", ROOT / "data" / "results" / "quantization"
SEEDS = (0, 1, 2)
MODEL = "llama-nano"
# Where the imports of a system's modules are followed; the rest is not what the numbers are about.
FOLLOWED = ("refimpl.quantization", "refimpl.backbone", "refimpl.gates", "refimpl.lora", "refimpl.training")
ALWAYS = ("refimpl.backbone", "refimpl.quantization.harness", "refimpl.quantization.texts")
DOCUMENTS, LENGTH, TEACHER_ROWS = 32, 128, 16

Arm = tuple[str, dict[str, Any]]
Pairs = tuple[tuple[str, str], ...]


class Run:
    """A model, a seed, and the one probe: what the arms of a cell share."""

    def __init__(self, model: str, seed: int, device: str, quick: bool) -> None:
        self.source, self.tokenizer = load(model)
        self.name, self.seed, self.device = model, seed, device
        self.n, self.length = (2, 64) if quick else (DOCUMENTS, LENGTH)
        self.kl_rows = 2 if quick else TEACHER_ROWS
        self.documents = {
            kind: evaluation_ids(self.tokenizer, self.n, self.length, kind) for kind in ("stories", "topics")
        }

    def model(self) -> nn.Module:
        """A fresh copy on the device that trains."""
        return copy.deepcopy(self.source).to(self.device)

    def ids(self, n: int, length: int) -> LongTensor:
        """Rows of training or calibration text of this seed, on the CPU."""
        return mixed_ids(self.tokenizer, n, length, self.seed)

    def draws(self) -> torch.Generator:
        """A fresh generator of this seed: arms draw alike."""
        return torch.Generator().manual_seed(self.seed)

    def measure(self, model: nn.Module, *, teacher: bool = False, **numbers: Any) -> dict[str, Any]:
        """Documents, and with `teacher` the divergence from the uncompressed model."""
        model = model.to(self.device)
        reference = self.source.to(self.device) if teacher else None
        found = measure(model, Probe(self.documents, {}), reference, kl_rows=self.kl_rows)
        return as_arm(found, numbers)


def as_arm(found: Measured, numbers: dict[str, Any], items: dict[str, np.ndarray] | None = None) -> dict:
    """What is stored of one arm at one seed."""
    tables = {"nll": found.nll} | ({"kl": found.kl} if found.kl else {})
    row = {what: {k: np.round(v, 4).tolist() for k, v in table.items()} for what, table in tables.items()}
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}
    answers = {k: v.astype(int).tolist() for k, v in ({**found.exact, **(items or {})}).items()}
    return row | {"numbers": rounded, "items": answers}


def linear(model: nn.Module) -> tuple[str, ...]:
    """The names of the linear layers inside blocks, as targets of LoRA."""
    return tuple(dict.fromkeys(ref.name for ref in Backbone(model).linears()))


def all_neurons(model: nn.Module) -> Tensor:
    bb = Backbone(model)
    return torch.ones(bb.n_layers, bb.F, dtype=torch.bool)


# ---- the systems, the most telling first ------------------------------------------------------------------


def nf4_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """60 new facts, asked in new wording: LoRA, QLoRA and PEQA."""
    facts = new_facts(s["people"])
    probe = Probe(run.documents, {"facts": fact_questions(run.tokenizer, facts)})
    questions = Probe({}, probe.items)
    rows = fact_rows(run.tokenizer, facts, s["steps"] * s["batch"], s["length"], run.seed)
    at = lambda step: slice(s["batch"] * step, s["batch"] * (step + 1))
    batches = lambda step: {name: ids[at(step)] for name, ids in rows.items()}
    yield "uncompressed", as_arm(measure(run.source.to(run.device), probe), {})
    rates = {"LoRA": s["lr"], "QLoRA": s["lr"], "PEQA 4 bits": s["lr_scales"], "PEQA 3 bits": s["lr_scales"]}
    for arm, lr in [(name, rate) for name, some in rates.items() for rate in some]:
        model = run.model()
        if arm == "LoRA":
            add_lora(model, linear(model), s["rank"], s["alpha"], run.draws())
        elif arm == "QLoRA":
            qlora(model, s["rank"], s["alpha"], run.draws())
        else:
            peqa(model, int(arm.split()[1]))
        half = {}

        def look(step: int, model: nn.Module, half: dict = half) -> None:
            half["facts, half way"] = measure(model, questions).exact["facts"]

        config = replace(short_run(s["steps"], s["batch"], lr), eval_steps=(s["steps"] // 2,))
        history = train(model, batches, config, on_step=look, progress=False)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        numbers = {"loss": history.losses[-1], "trained": trained}
        yield f"{arm}, {lr:g}", as_arm(measure(model, probe), numbers, half)


def nf4_pairs(s: dict[str, Any], arms: Iterable[str]) -> Pairs:
    """Everything against the uncompressed model, and against LoRA at each of its rates."""
    trained = [arm for arm in arms if arm != "uncompressed"]
    loras = [arm for arm in trained if arm.startswith("LoRA")]
    others = [arm for arm in trained if arm not in loras]
    return (*((arm, "uncompressed") for arm in trained), *((a, b) for a in others for b in loras))


def peqa_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """What trained scales recover of 3 bits a row, beside LoRA on the float model for as many steps."""
    batches = drawn(run.ids(s["rows"], s["length"]), s["batch"], run.seed)
    yield "uncompressed", run.measure(run.source)
    rounded = run.model()
    compress_frozen(rounded, RTN(s["bits"]))
    yield "rounded", run.measure(rounded)
    model = run.model()
    report = peqa(model, s["bits"])
    yield "least squares", run.measure(model)
    training = {"steps": s["steps"], "batch": s["batch"]}
    tune_scales(model, batches, lr=s["lr_scales"], **training)
    yield "trained scales", run.measure(model, trained=report.trainable)
    model = run.model()
    add_lora(model, linear(model), s["rank"], s["alpha"], run.draws())
    train(model, batches, short_run(lr=s["lr"], **training), progress=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield "LoRA on floats", run.measure(model, trained=trained)


def distillation_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """A student of every second layer: tokens, the teacher's logits, and its hidden states as well."""
    batches = drawn(run.ids(s["rows"], s["length"]), s["batch"], run.seed)
    yield "copied", run.measure(half_depth(run.source), teacher=True)
    config = TrainConfig(s["steps"], s["batch"], s["lr"], warmup=max(1, s["steps"] // 20))
    for arm, recipe in (
        ("tokens", Distillation(0.0)),
        ("logits", Distillation(s["alpha"], s["temperature"])),
        ("logits and features", Distillation(s["alpha"], s["temperature"], features=s["features"])),
    ):
        teacher = run.model()
        student = half_depth(teacher)
        distil(teacher, student, batches, config, recipe)
        yield arm, run.measure(student, teacher=True)


def nuteprune_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """A quarter removed: with teachers, without, and one shot by the size of contributions, then LoRA."""
    ids = run.ids(s["rows"], s["length"]).to(run.device)
    training = {"steps": s["steps"], "batch": s["batch"]}
    gpt2 = Backbone(run.source).is_gpt2
    yield "uncompressed", run.measure(run.source)
    for arm, teachers in (("progressive", "numerous"), ("no teacher", None)):
        model = run.model()
        report = nuteprune(
            model, ids, sparsity=s["sparsity"], generator=run.draws(), teachers=teachers, ahead=s["ahead"],
            hidden=not gpt2, warmup=s["warmup"], masks_lr=s["masks_lr"], lambdas_lr=s["lambdas_lr"],
            lora_lr=s["lora_lr"], **training,
        )  # fmt: skip
        masks = {kind: m for kind, m in vars(report.masks).items() if m is not None}
        numbers = {"sparsity": report.sparsity} | {kind: int((m > 0).sum()) for kind, m in masks.items()}
        yield arm, run.measure(model, teacher=True, target=s["sparsity"], **numbers)
        if arm == "progressive":
            reached = report.sparsity
    # One shot: heads and neurons by |W| rms(x), as many as the first arm removed.
    found = bonsai(
        run.model(), ids[: s["calibration"]], sparsity=reached, step=min(0.5, max(0.05, reached)),
        block=s["block"], regression=None, generator=run.draws(),
    )  # fmt: skip
    model = run.model()
    bb = Backbone(model)
    add_lora(model, ("c_attn",) if gpt2 else ("q_proj", "v_proj"), 8, 8.0, run.draws())
    with gated(bb, found.heads.float().to(run.device), found.neurons.float().to(run.device)):
        config = short_run(lr=s["lora_lr"], **training)
        train(model, drawn(ids, s["batch"], run.seed), config, progress=False)
    merge_lora(model)
    slice_model(model, found.heads, found.neurons)
    numbers = {"sparsity": found.sparsity, "target": reached}
    numbers |= {"heads": int(found.heads.sum()), "neurons": int(found.neurons.sum())}
    yield "one shot", run.measure(model, teacher=True, **numbers)


def subset_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """K heads: learnt with the weights, learnt and then trained, and Michel's trained for as many steps."""
    ids = run.ids(s["rows"], s["length"]).to(run.device)
    some = ids[: s["importance"]]
    training = {"steps": s["steps"], "batch": s["batch"]}
    bb = Backbone(run.source.to(run.device))
    plain = head_importance(run.source, some, normalise=False).flatten().argsort().cpu()

    def finished(heads: Tensor, model: nn.Module | None = None) -> dict[str, Any]:
        """Cut, and trained unless the weights have been."""
        after = model is None
        model = run.model() if after else model
        slice_model(model, heads, all_neurons(model))
        if after:
            config = short_run(lr=s["weights_lr"], **training)
            train(model, drawn(ids, s["batch"], run.seed), config, progress=False)
        return run.measure(model, heads=int(heads.sum()))

    for k in s["heads"]:
        removed = bb.n_layers * bb.H - k
        michel = pruning_masks(run.source, some, [removed])[0]
        yield f"Michel, then trained, {k}", finished(michel)
        without = torch.ones(bb.n_layers * bb.H, dtype=torch.bool)
        without[plain[:removed]] = False
        yield f"Michel without norm, then trained, {k}", finished(without.view(bb.n_layers, bb.H))
        found = train_subset(run.model(), ids, k, generator=run.draws(), weights_lr=None, **training)
        yield f"pipelined, then trained, {k}", finished(found.heads)
        model = run.model()
        found = train_subset(model, ids, k, generator=run.draws(), weights_lr=s["weights_lr"], **training)
        yield f"joint, {k}", finished(found.heads, model)


def gates_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """Gates at three penalties, and the same training with gates that stay open."""
    ids = run.ids(s["rows"], s["length"]).to(run.device)
    training = {"steps": s["steps"], "batch": s["batch"], "weights_lr": s["weights_lr"]}
    # log a = 20: the gate is 1 for every draw, so the rows are the same ones and nothing is gated.
    for arm, coefficient, initial in (
        ("no gates", 0.0, 20.0), *((f"lambda {c}", c, s["initial"]) for c in s["coefficients"])
    ):  # fmt: skip
        model = run.model()
        found = train_head_gates(
            model,
            ids,
            coefficient,
            generator=run.draws(),
            initial=initial,
            gates_lr=s["gates_lr"],
            **training,
        )
        close_gates(model, found.gates)
        numbers = {"open": found.open, "settled": found.polarised, "expected": found.expected_open[-1]}
        yield arm, run.measure(model, **numbers)


def hybrid_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """Half removed and 4 bits in both orders, either alone at the same bytes; each repaired as well."""
    ids = run.ids(s["calibration"], s["length"])
    batches = drawn(run.ids(s["rows"], s["length"]), s["batch"], run.seed)
    four = Grid(4, group=32)
    yield "uncompressed", run.measure(run.source)
    for arm, recipe, what in (
        ("prune, then 4 bits", Hybrid(0.5, four), "scales"),
        ("4 bits, then prune", Hybrid(0.5, four, "quantize-prune"), "scales"),
        ("prune alone", SparseGPT(s["alone"]), "norms"),
        ("GPTQ 3 bits alone", GPTQ(3, group=32), "scales"),
    ):
        model = copy.deepcopy(run.source.cpu())
        report = compress_model(model, recipe, ids)
        stored = sum(model.get_submodule(name).nbytes() for name in compressed_names(model))
        yield arm, run.measure(model, teacher=True, bits=report.bits, bytes=stored)
        training = {"steps": s["steps"], "batch": s["batch"], "lr": s["lr"][what], "train_what": what}
        trained, _ = repair(model, run.model(), batches, **training)
        after = sum(model.get_submodule(name).nbytes() for name in compressed_names(model))
        numbers = {"bits": report.bits, "bytes": after, "trained": trained}
        yield f"{arm}, repaired", run.measure(model, teacher=True, **numbers)


def mixllm_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """Rows of 8 bits among rows of 2, chosen in four ways, at the same bytes."""
    ids = run.ids(s["calibration"], s["length"])
    salience = row_salience(run.source, ids[: s["sequences"]], Grid(2, "asymmetric", 32))
    W = {name: dense_weight(run.source.get_submodule(name)) for name in salience}
    d_in = {name: w.shape[1] for name, w in W.items()}
    chosen = {"global": top_rows(salience, s["share"])}
    weights = sum(int(rows.sum()) * d_in[name] for name, rows in chosen["global"].items())
    place = lambda scores: -scores.argsort(descending=True).argsort().double() / len(scores)
    generator = run.draws()
    for arm, scores in (
        ("per layer", {name: place(v) for name, v in salience.items()}),
        ("row norms", {name: w.norm(dim=1) for name, w in W.items()}),
        ("random", {name: torch.rand(len(w), generator=generator) for name, w in W.items()}),
    ):
        chosen[arm] = rows_within(scores, d_in, weights)
    chosen["2 bits"] = {name: torch.zeros_like(rows) for name, rows in chosen["global"].items()}
    yield "uncompressed", run.measure(run.source)
    for arm, rows in chosen.items():
        model = copy.deepcopy(run.source.cpu())
        report = compress_model(model, MixLLM(rows, 2, 8, 32), ids)
        yield arm, run.measure(model, bits=report.bits, bytes=sum(row.nbytes for row in report.rows))


def bonsai_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """A tenth and a quarter removed: by regression on 60 and on 40 masks, by its prior, at random."""
    ids = run.ids(s["calibration"], s["length"]).to(run.device)
    yield "uncompressed", run.measure(run.source)
    for sparsity, step in s["sparsity"]:
        for arm, settings in (
            *((f"{n} masks", {"masks": n}) for n in s["masks"]),
            ("prior", {"regression": None}), ("random", {"regression": None, "prior": "random"}),
        ):  # fmt: skip
            model = run.model()
            report = bonsai(
                model, ids, sparsity=sparsity, step=step, block=s["block"], generator=run.draws(), **settings
            )
            numbers: dict[str, Any] = {"sparsity": report.sparsity}
            numbers |= {"heads": int(report.heads.sum()), "neurons": int(report.neurons.sum())}
            if report.fits:
                numbers["tau"] = float(np.mean([fit.tau for fit in report.fits]))
                numbers["prior tau"] = float(np.mean([fit.prior_tau for fit in report.fits]))
            yield f"{arm}, {sparsity:g}", run.measure(model, **numbers)


def sensitivity_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """Heads removed in Michel's order, with and without the norm over a layer, and at random."""
    ids = run.ids(s["calibration"], s["length"]).to(run.device)
    model = run.source.to(run.device)
    bb = Backbone(model)
    total = bb.n_layers * bb.H
    orders = {
        "with norm": head_importance(model, ids).flatten().argsort(),
        "without norm": head_importance(model, ids, normalise=False).flatten().argsort(),
        "random": torch.randperm(total, generator=run.draws()),
    }
    yield "uncompressed", run.measure(model)
    for count in s["removed"]:
        for arm, order in orders.items():
            gates = torch.ones(total, device=run.device)
            gates[order[:count]] = 0
            with gated(bb, gates.view(bb.n_layers, bb.H)):
                yield f"{arm}, {count}", run.measure(model, removed=count)


def evopress_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """GPTQ at 2 to 4 bits a layer, 3 in the mean: found by evolution, by random search, uniform."""
    ids = run.ids(s["search"] + s["calibration"], s["length"])
    model, ids = run.model(), ids.to(run.device)
    recipes = [GPTQ(bits) for bits in (2, 3, 4)]
    search, calibration = ids[: s["search"]], ids[s["search"] :]
    database = layer_database(model, recipes, search, calibration, base=1)
    start = (1,) * len(database.parts)
    budget = {key: s[key] for key in ("generations", "offspring", "stages")}
    for arm, method in (("uniform", None), ("evolution", evolve), ("random search", random_search)):
        found = None if method is None else method(database, start, run.draws(), **budget)
        levels = start if found is None else found.levels
        numbers: dict[str, Any] = {"bytes": database.nbytes(levels)}
        numbers["search kl"] = float(database.losses(levels).mean())
        numbers["moved"] = sum(a != b for a, b in zip(levels, start, strict=True))
        numbers["tokens"] = 0 if found is None else found.tokens
        database.use(levels)
        yield arm, run.measure(copy.deepcopy(model), teacher=True, **numbers)
        database.restore()


def edge_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """Layer-wise sparsity and bits against uniform ones; tuning in windows with a vote against full LoRA."""
    ids = run.ids(s["calibration"], s["length"])
    n_layers = Backbone(run.source.cpu()).n_layers
    low, high = s["bits"]
    policy = make_policy(run.source, ids, sparsity=s["sparsity"], low=low, high=high, n_low=n_layers // 2)
    yield "uncompressed", run.measure(run.source)
    mean = (low + high) // 2
    for arm, each in (
        ("layer-wise sparsity", replace(policy, bits=(8,) * n_layers)),
        ("uniform sparsity", Policy.uniform(n_layers, s["sparsity"], 8)),
        ("layer-wise both", policy),
        ("uniform both", Policy.uniform(n_layers, s["sparsity"], mean)),
    ):
        model = copy.deepcopy(run.source.cpu())
        report = edge_compress(model, each, ids)
        stored = sum(row.nbytes for row in report.rows)
        spread = max(each.sparsity) - min(each.sparsity)
        yield arm, run.measure(model, bits=report.bits, bytes=stored, spread=spread)
    facts = new_facts(s["people"])
    probe = Probe(run.documents, {"facts": fact_questions(run.tokenizer, facts)})
    rows = fact_rows(run.tokenizer, facts, s["rows"], s["fact_length"], run.seed)
    text, mask = rows["input_ids"].to(run.device), (rows["labels"] >= 0).long().to(run.device)
    for arm, stride, steps in (
        ("full LoRA", n_layers, s["steps"]),
        ("windows", s["stride"], s["steps"]),
        ("windows, more steps", s["stride"], s["more"]),
    ):
        generator = run.draws()
        exits = EarlyExits(run.model(), stride, generator=generator)
        last = exits.n_exits - 1
        kept = saved_tensors(lambda exits=exits, e=last: exits.hidden(text[:4], e), exits).total()
        training = {"steps": steps, "batch": s["batch"], "lr": s["lr"], "clip": 1.0}
        done = tune(exits, text, generator=generator, mask=mask, **training)
        numbers = {"loss": float(np.mean(done.loss[-10:])), "saved bytes": kept, "steps": steps}

        def heads(ids: LongTensor, exits: EarlyExits = exits) -> dict[str, Tensor]:
            logits = [one.float() for one in exits(ids.to(run.device))]
            said = {f"exit {e}": one.log_softmax(-1) for e, one in enumerate(logits)}
            return said | {"vote": vote(logits).clamp(min=1e-30).log()}

        for head, found in measure_heads(heads, probe).items():
            if stride != n_layers or head == "vote":
                yield arm if stride == n_layers else f"{arm}, {head}", as_arm(found, numbers)


@dataclass(frozen=True)
class System:
    """`arms` of one cell; `modules` of refimpl.quantization that they call; `settings` on llama-nano, what
    `--quick` and what a model of twelve layers and 96 heads changes in them; `pairs` of arms to compare,
    or a function of settings and arms that gives them."""

    arms: Callable[[Run, dict[str, Any]], Iterator[Arm]]
    modules: tuple[str, ...]
    settings: dict[str, Any]
    small: dict[str, Any]
    pairs: Pairs | Callable[[dict[str, Any], Iterable[str]], Pairs]
    mini: dict[str, Any] = field(default_factory=dict)

    def settings_on(self, model: str) -> dict[str, Any]:
        return self.settings | (self.mini if model.endswith("-mini") else {})

    def compared(self, settings: dict[str, Any], arms: Iterable[str]) -> Pairs:
        return self.pairs(settings, arms) if callable(self.pairs) else self.pairs


TEXT = {"rows": 512, "length": 128, "batch": 2}
TINY = {"rows": 4, "length": 16, "batch": 2, "steps": 2}

# fmt: off
SYSTEMS: dict[str, System] = {
    "nf4": System(
        nf4_arms, ("nf4", "peqa", "study"),
        {"people": 20, "steps": 140, "batch": 8, "length": 64, "lr": (5e-3, 2e-3),
         "lr_scales": (2e-3, 5e-4), "rank": 8, "alpha": 16.0},
        {"people": 1, "steps": 2, "batch": 2},
        nf4_pairs,
    ),
    "peqa": System(
        peqa_arms, ("peqa", "rtn", "frozen", "study"),
        TEXT | {"bits": 3, "steps": 50, "batch": 4, "lr": 2e-3, "lr_scales": 1e-3, "rank": 8, "alpha": 16.0},
        TINY,
        (("least squares", "rounded"), ("trained scales", "least squares"), ("trained scales", "rounded"),
         ("trained scales", "uncompressed"), ("trained scales", "LoRA on floats"),
         ("LoRA on floats", "uncompressed")),
    ),
    "distillation": System(
        distillation_arms, ("distillation.train", "study"),
        TEXT | {"steps": 150, "lr": 1e-3, "alpha": 0.9, "temperature": 2.0, "features": 0.1},
        TINY,
        (("logits", "tokens"), ("logits and features", "tokens"), ("logits and features", "logits"),
         ("tokens", "copied"), ("logits", "copied")),
        {"steps": 600},
    ),
    "nuteprune": System(
        nuteprune_arms, ("pruning.nuteprune", "pruning.bonsai", "peqa", "study"),
        TEXT | {"sparsity": 0.25, "steps": 150, "warmup": 50, "ahead": 5, "masks_lr": 0.3, "lambdas_lr": 1.5,
                "lora_lr": 1e-3, "calibration": 32, "block": 16},
        TINY | {"warmup": 1, "calibration": 2},
        (("progressive", "no teacher"), ("progressive", "one shot"),
         ("no teacher", "one shot"), ("progressive", "uncompressed")),
        {"steps": 400, "warmup": 130},
    ),
    "subset-pruning": System(
        subset_arms,
        ("pruning.subset_pruning", "pruning.head_sensitivity", "pruning.slicing", "peqa", "study"),
        TEXT | {"heads": (12, 8, 4), "steps": 40, "weights_lr": 1e-4, "importance": 32},
        TINY | {"heads": (8,), "importance": 2},
        lambda s, arms: tuple(
            (f"{a}, {k}", f"{b}, {k}")
            for k in s["heads"]
            for a, b in (("joint", "Michel, then trained"), ("joint", "Michel without norm, then trained"),
                         ("pipelined, then trained", "Michel, then trained"),
                         ("pipelined, then trained", "Michel without norm, then trained"),
                         ("joint", "pipelined, then trained"))
        ),
        {"heads": (72, 48, 24), "steps": 200},
    ),
    "head-gates": System(
        gates_arms, ("pruning.head_gates", "study"),
        TEXT | {"coefficients": (0.01, 0.03, 0.1), "steps": 100, "weights_lr": 1e-4, "gates_lr": 0.15,
                "initial": 0.0},
        TINY,
        tuple((f"lambda {c}", "no gates") for c in (0.01, 0.03, 0.1)),
        {"steps": 300},
    ),
    "hybrid-pipeline": System(
        hybrid_arms, ("hybrid", "gptq", "distillation.repair", "study"),
        TEXT | {"calibration": 32, "alone": 0.836, "steps": 50, "lr": {"scales": 2e-4, "norms": 3e-3}},
        TINY | {"calibration": 2},
        (("prune, then 4 bits", "4 bits, then prune"), ("prune, then 4 bits", "prune alone"),
         ("prune, then 4 bits", "GPTQ 3 bits alone"), ("prune, then 4 bits, repaired", "prune, then 4 bits"),
         ("prune, then 4 bits, repaired", "4 bits, then prune, repaired"),
         ("prune, then 4 bits, repaired", "prune alone, repaired"),
         ("prune, then 4 bits, repaired", "GPTQ 3 bits alone, repaired"),
         ("prune, then 4 bits, repaired", "GPTQ 3 bits alone"),
         ("GPTQ 3 bits alone, repaired", "GPTQ 3 bits alone"),
         ("prune, then 4 bits, repaired", "uncompressed")),
    ),
    "mixllm": System(
        mixllm_arms, ("mixllm", "study"),
        {"calibration": 32, "length": 256, "sequences": 16, "share": 0.1},
        {"calibration": 2, "length": 16, "sequences": 2},
        (("global", "per layer"), ("global", "row norms"), ("global", "random"), ("per layer", "random"),
         ("row norms", "random"), ("global", "2 bits")),
    ),
    "bonsai": System(
        bonsai_arms, ("pruning.bonsai", "study"),
        {"calibration": 8, "length": 128, "block": 16, "masks": (60, 40),
         "sparsity": ((0.1, 0.05), (0.25, 0.125))},
        {"calibration": 2, "length": 16, "block": 96, "masks": (10,), "sparsity": ((0.1, 0.1),)},
        lambda s, arms: tuple(
            (f"{a}, {q}", f"{b}, {q}")
            for q in ("0.1", "0.25")
            for many, few in [[f"{n} masks" for n in s["masks"]]]
            for a, b in ((many, "prior"), (few, "prior"), (many, "random"), (few, "random"), (many, few),
                         ("prior", "random"))
        ),
        {"masks": (240, 60)},
    ),
    "head-sensitivity": System(
        sensitivity_arms, ("pruning.head_sensitivity", "study"),
        {"calibration": 32, "length": 128, "removed": (2, 5, 10)},
        {"calibration": 2, "length": 16, "removed": (2,)},
        lambda s, arms: tuple(
            (f"{a}, {n}", b if b == "uncompressed" else f"{b}, {n}")
            for n in s["removed"]
            for a, b in (("with norm", "random"), ("without norm", "random"), ("without norm", "with norm"),
                         ("without norm", "uncompressed"))
        ),
        {"removed": (12, 30, 60)},
    ),
    "evopress": System(
        evopress_arms, ("evopress", "evopress_database", "gptq", "study"),
        {"search": 24, "calibration": 40, "length": 128, "generations": 100, "offspring": 16,
         "stages": ((3, 256), (1, 3072))},
        {"search": 2, "calibration": 2, "length": 16, "generations": 1, "offspring": 2, "stages": ((1, 16),)},
        (("evolution", "uniform"), ("evolution", "random search"), ("random search", "uniform")),
    ),
    "edge-llm": System(
        edge_arms, ("edge_llm", "edge_llm_tuning", "study"),
        {"calibration": 32, "length": 128, "sparsity": 0.3, "bits": (3, 5), "stride": 2, "people": 20,
         "rows": 512, "fact_length": 64, "steps": 80, "more": 240, "batch": 8, "lr": 4e-3},
        {"calibration": 2, "length": 16, "people": 1, "rows": 4, "steps": 6, "more": 6, "batch": 2},
        lambda s, arms: (
         ("layer-wise sparsity", "uniform sparsity"), ("layer-wise both", "uniform both"),
         ("windows, vote", "full LoRA"), ("windows, more steps, vote", "full LoRA"),
         *(("windows, more steps, vote", arm) for arm in arms if "more steps, exit" in arm)),
    ),
}
# fmt: on


# ---- cells ------------------------------------------------------------------------------------------------


Cell = tuple[str, str, int]


def cells(model: str = MODEL) -> list[Cell]:
    """All cells (model, system, seed), seed 0 of everything first."""
    return [(model, system, seed) for seed in SEEDS for system in SYSTEMS]


def cell(key: Cell, quick: bool, device: str) -> dict[str, Any]:
    """All arms of a system at one seed."""
    model, name, seed = key
    system = SYSTEMS[name]
    settings = system.settings_on(model) | (system.small if quick else {})
    run = Run(model, seed, device, quick)
    arms: dict[str, Any] = {}
    for arm, row in system.arms(run, settings):
        arms[arm] = row
    return {"arms": arms}


@cache
def sources_of(system: str) -> tuple[str, ...]:
    """Files that decide the numbers of a system's cells: its modules, and what they import, followed."""
    modules = (*ALWAYS, *(f"refimpl.quantization.{name}" for name in SYSTEMS[system].modules))
    return tuple(imported(modules, ROOT, FOLLOWED))


@cache  # of the files as they were when this process imported them
def state_of(system: str, model: str = MODEL) -> dict[str, Any]:
    """Settings and hashes by which a stored cell is recognised as current."""
    own = (SYSTEMS[system].arms, Run.__init__, Run.ids, Run.draws, Run.measure, as_arm)
    code = hashlib.sha256("".join(map(inspect.getsource, own)).encode()).hexdigest()
    hashes = {file: sha256(ROOT / file) for file in sources_of(system)}
    settings = SYSTEMS[system].settings_on(model) | {"documents": [DOCUMENTS, LENGTH, TEACHER_ROWS]}
    return {"settings": json.loads(json.dumps(settings)), "code": code, "sources": hashes}


def path_of(key: Cell) -> Path:
    return FOLDER / f"{'-'.join(map(str, key))}.json"


def made(key: Cell) -> bool:
    path = path_of(key)
    if not path.is_file():
        return False
    row, state = json.loads(path.read_text()), state_of(key[1], key[0])
    return {what: row[what] for what in state} == state


def work(job: tuple[Cell, bool, str]) -> str:
    """One cell in this process."""
    key, quick, device = job
    torch.set_num_threads(1)
    state, start, used = state_of(key[1], key[0]), time.perf_counter(), time.process_time()
    try:
        row = cell(key, quick, device)
    except Exception as error:  # a system's failure must not cost the other cells
        where = traceback.format_exc(limit=-3)
        return f"{'  '.join(map(str, key)):40} {type(error).__name__}: {str(error)[:160]}\n{where}"
    row |= {"cell": key, **state, "wall_seconds": time.perf_counter() - start}
    row["seconds"] = time.process_time() - used
    if not quick:
        FOLDER.mkdir(parents=True, exist_ok=True)
        atomic_write(path_of(key), json.dumps(row).encode())
    lines = [
        f"{'  '.join(map(str, key)):40} {row['wall_seconds']:7.1f} s, {row['seconds']:7.1f} of a processor"
    ]
    for arm, found in row["arms"].items():
        means = {
            f"{what} {name}": np.mean(values)
            for what in ("nll", "kl", "items")
            for name, values in found.get(what, {}).items()
        }
        told = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        lines.append(f"    {arm:42} {told}  {found['numbers']}")
    return "\n".join(lines)


# ---- the stored file --------------------------------------------------------------------------------------


def pairs_of(arms: dict[str, Any], pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """For each pair `compare` of every document kind, divergence and question list that both arms have."""
    out: dict[str, Any] = {}
    for a, b in pairs:
        seeds = sorted(arms[a]["by_seed"].keys() & arms[b]["by_seed"].keys())
        first, second = ([arms[arm]["by_seed"][seed] for seed in seeds] for arm in (a, b))
        out[f"{a} - {b}"] = found = {}
        for what, prefix in (("nll", ""), ("kl", "kl "), ("items", "")):
            for name in first[0].get(what, {}).keys() & second[0].get(what, {}).keys():
                values = [np.array([row[what][name] for row in rows]) for rows in (first, second)]
                found[prefix + name] = compare(*values)
        out[f"{a} - {b}"] = dict(sorted(found.items()))
    return out


def joined(there: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
    """system -> its settings, arms by seed, pairs."""
    systems: dict[str, Any] = {}
    for name, system in SYSTEMS.items():
        rows = {key[2]: row for key, row in there.items() if key[1] == name}
        if not rows:
            continue
        arms: dict[str, Any] = {}
        for seed, row in sorted(rows.items()):
            for arm, found in row["arms"].items():
                arms.setdefault(arm, {"by_seed": {}})["by_seed"][str(seed)] = found
        settings = rows[min(rows)]["settings"]
        seconds = {str(seed): round(row["seconds"], 1) for seed, row in sorted(rows.items())}
        pairs = pairs_of(arms, system.compared(settings, arms))
        systems[name] = {
            "settings": settings,
            "seconds": seconds,
            "arms": arms,
            "pairs": pairs,
        }
    return systems


def join(model: str) -> int:
    """The stored file, of the cells that are there; 1 if some are missing."""
    wanted = cells(model)
    there = {key: json.loads(path_of(key).read_text()) for key in wanted if made(key)}
    if not there:
        print("no cell is there")
        return 1
    missing = [key for key in wanted if key not in there]
    systems = joined(there)
    used = sorted({file for name in systems for file in sources_of(name)})
    name = "trained.json" if model == MODEL else f"trained-{model}.json"
    store(
        RESULTS / name, command="make results-quantization-trained", root=ROOT, sources=used, threads=1,
        summary=f"{len(systems)} trained or searched systems on {model}, {len(there)} of {len(wanted)} cells",
        model=model, revision=revision(model), seeds=list(SEEDS),
        documents={"n": DOCUMENTS, "length": LENGTH, "teacher": TEACHER_ROWS},
        missing=["  ".join(map(str, key)) for key in missing], systems=systems,
    )  # fmt: skip
    print(f"{len(missing)} missing")
    return 1 if missing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="a bundled model (default: %(default)s)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="SYSTEM", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, metavar="SEED", help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where models train")
    parser.add_argument("--quick", action="store_true", help="tiny amounts, nothing stored")
    parser.add_argument("--join", action="store_true", help="only make the stored file of what is there")
    args = parser.parse_args()
    if args.join:
        return join(args.model)
    for system in SYSTEMS:
        state_of(system, args.model)  # now: a file that changes during the run is not what was imported
    todo = [key for key in cells(args.model) if args.quick or not made(key)]
    todo = [key for key in todo if not args.systems or key[1] in args.systems]
    todo = [key for key in todo if args.seeds is None or key[2] in args.seeds]
    jobs = [(key, args.quick, args.device) for key in todo]
    if args.jobs == 1:
        for job in jobs:
            print(work(job), flush=True)
    else:
        with mp.get_context("spawn").Pool(args.jobs) as pool:
            for line in pool.imap_unordered(work, jobs):
                print(line, flush=True)
    return 0 if args.quick else join(args.model)


if __name__ == "__main__":
    sys.exit(main())
