"""Five systems of chapter 4 that the notebooks measure live on llama-nano, on three models and three seeds.

    python data/quantization_models.py             measure what build/quantization_models lacks, then join
    python data/quantization_models.py --only spqr --models llama-nano --jobs 1
    python data/quantization_models.py --quick     2 documents, few items: to see that it runs; stores nothing

HWPQ, SpQR, entropy coding, LLMC's change of the calibration text, and the long-context study with its
remedy: the comparisons of their rows in refimpl/systems.toml, in the settings of the notebooks, but with 32
documents. A cell is one system on one model with one calibration seed (entropy coding has neither text nor
draws): all its arms, on the same documents and questions. Another seed is other stories, other help texts
(moved on as by `study.mixed_ids`) and other draws.

Cells are files of build/quantization_models, so an interrupted run goes on where it stopped; cells made from
other sources or settings are made again. `--join` alone makes data/results/quantization/models.json of what
is there: for each arm and seed a number for each document and a digit for each question, for pairs of arms
`study.compare`. Calibration stays on the CPU, `--device cuda` measures on GPUs, in turn over those there are.
"""

import argparse
import copy
import hashlib
import inspect
import json
import multiprocessing as mp
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.models import load, revision
from refimpl.paths import atomic_write
from refimpl.quantization.calibrate import Stats, calibrate
from refimpl.quantization.entropy import code_sizes
from refimpl.quantization.evaluation.llmc import RECIPE, quantize, with_value
from refimpl.quantization.evaluation.long_context import LargestGroups, position_gap, token_losses
from refimpl.quantization.feedback import Step, feedback_quantize
from refimpl.quantization.gptq import GPTQ
from refimpl.quantization.grids import Grid
from refimpl.quantization.harness import Item, Probe, measure, standard_probe
from refimpl.quantization.hwpq import HWPQ, contribution, ewma_mask
from refimpl.quantization.linear import dense_weight
from refimpl.quantization.model import Recipe, Report, compress_model
from refimpl.quantization.packing import pack_codes, unpack_codes
from refimpl.quantization.pruning.sparsegpt import SparseGPT
from refimpl.quantization.pruning.unstructured import Magnitude, highest
from refimpl.quantization.rtn import RTN
from refimpl.quantization.sparse import pack_mask
from refimpl.quantization.spqr import SpQR, SpQRLinear
from refimpl.quantization.study import compare, mixed_ids
from refimpl.quantization.texts import calibration_ids, evaluation_ids
from refimpl.results import cpu, imported, sha256, store
from refimpl.world.formats import BY_NAME
from refimpl.world.names import known_people
from refimpl.world.people import ATTRIBUTES, STRATA, stratum
from refimpl.world.rng import Rng

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "quantization_models"
RESULT = ROOT / "data" / "results" / "quantization" / "models.json"
MODELS = ("llama-nano", "llama-mini", "gpt2-mini")
SEEDS = (0, 1, 2)
DENSE = "uncompressed"
SHIFT = 13  # help texts between two seeds, as in `study.mixed_ids`
# Where the imports of a system's modules are followed; the rest is not what the numbers are about.
FOLLOWED = ("refimpl.quantization", "refimpl.backbone")
ALWAYS = ("refimpl.backbone", "refimpl.quantization.harness", "refimpl.quantization.texts")

Arm = tuple[str, dict[str, Any]]
Documents = dict[str, LongTensor]
Items = dict[str, list[Item]]


class Run:
    """A model, a seed and a device: what the arms of a cell share."""

    def __init__(self, model: str, seed: int, device: str) -> None:
        self.source, self.tokenizer = load(model)
        self.name, self.seed, self.device = model, seed, device

    def topics(self, rows: int, length: int) -> LongTensor:
        """Help texts of this seed to calibrate on."""
        return calibration_ids(self.tokenizer, rows, length, "topics", SHIFT * self.seed)

    def compressed(self, recipe: Recipe, ids: LongTensor) -> tuple[nn.Module, dict[str, Any]]:
        """A compressed copy, and the bits and bytes that it takes."""
        model = copy.deepcopy(self.source)
        return model, sizes(compress_model(model, recipe, ids))

    def measure(self, model: nn.Module, documents: Documents, items: Items, **numbers: Any) -> dict[str, Any]:
        """What is stored of one arm at one seed."""
        # A copy: the source must stay on the CPU, where the next arm is made of it.
        found = measure(copy.deepcopy(model).to(self.device), Probe(documents, items))
        answers = {name: "".join(map(str, v.astype(int))) for name, v in found.exact.items()}
        return as_arm(found.nll, answers, **numbers)


def as_arm(nll: dict[str, np.ndarray], items: dict[str, str], **numbers: Any) -> dict[str, Any]:
    """`nll`: a number for each document; `items`: a digit for each question, 1 where the answer is right."""
    rounded = {name: np.round(values, 5).tolist() for name, values in nll.items()}
    return {"nll": rounded, "items": items, "numbers": numbers}


def sizes(report: Report) -> dict[str, Any]:
    return {"bits": round(report.bits, 5), "bytes": report.bytes_after}


# ---- the systems ------------------------------------------------------------------------------------------


def hwpq_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """Half of the weights, kept in FP8, against two prunings with floats; FP8 without pruning. And how far
    masks agree, by minimum and mean over the matrices."""
    documents = {
        kind: evaluation_ids(run.tokenizer, s["documents"], s["measured"], kind)
        for kind in ("stories", "topics")
    }
    ids = mixed_ids(run.tokenizer, s["rows"], s["length"], run.seed)
    yield DENSE, run.measure(run.source, documents, {})
    half = s["sparsity"]
    masks = {"sorted as magnitude": [], "moving as sorted": []}
    for name, stats in calibrate(run.source, ids[:8]).items():
        W = dense_weight(run.source.get_submodule(name))
        L = contribution(W, stats.sqnorm)
        in_order = highest(L.flatten(), half).view(L.shape)
        masks["sorted as magnitude"].append(alike(in_order, Magnitude(half).mask(W)))
        masks["moving as sorted"].append(alike(in_order, ewma_mask(L, half)))
    shares = {what: [round(float(f(v)), 5) for f in (min, np.mean)] for what, v in masks.items()}
    for arm, recipe, told in (
        ("half, FP8", HWPQ(half), shares),
        ("FP8 alone", HWPQ(0), {}),
        ("magnitude", Magnitude(half), {}),
        ("SparseGPT", SparseGPT(half), {}),
    ):
        model, size = run.compressed(recipe, ids)
        yield arm, run.measure(model, documents, {}, **size, **told)


def alike(a: Tensor, b: Tensor) -> float:
    return float((a == b).double().mean())


def spqr_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """SpQR, as many floats at random places, and GPTQ at about its bytes, in two ways."""
    documents = {"topics": evaluation_ids(run.tokenizer, s["documents"], s["measured"], "topics")}
    ids = run.topics(s["rows"], s["length"])
    spqr, counts, draws = SpQR(3, threshold=s["threshold"]), {}, torch.Generator().manual_seed(run.seed)

    def counted(name: str, weight: Tensor, stats: Stats) -> SpQRLinear:
        layer = spqr(name, weight, stats)
        counts[name] = layer.values.numel() if "values" in layer._buffers else 0
        return layer

    def at_random(name: str, weight: Tensor, stats: Stats) -> SpQRLinear:
        return with_random_floats(name, weight, stats, counts[name], draws)

    yield DENSE, run.measure(run.source, documents, {})
    for arm, recipe in (
        ("SpQR", counted), ("random floats", at_random), ("GPTQ 3 bits g16", GPTQ(3, group=16)),
        ("GPTQ 4 bits row", GPTQ(4)),
    ):  # fmt: skip
        model, size = run.compressed(recipe, ids)
        if arm == "SpQR":
            numel = sum(run.source.get_submodule(name).weight.numel() for name in counts)
            size["floats"] = round(sum(counts.values()) / numel, 5)
        yield arm, run.measure(model, documents, {}, **size)


def with_random_floats(
    name: str, W: Tensor, stats: Stats, count: int, draws: torch.Generator
) -> SpQRLinear:  # fmt: skip
    """The control of notebook 04_02: `count` floats anywhere, grids fitted to all weights, with feedback."""
    bits, group, meta = 3, 16, 3
    plain = SpQR(bits, group=group, meta_bits=meta, threshold=float("inf"))(name, W, stats)
    if not count:
        return plain
    stored, small = dict(plain.named_buffers()), (len(W), W.shape[1] // group)
    scale, zero = (
        spread(stored[f"{key}_min"], plain) + spread(stored[f"{key}_step"], plain)
        * unpack_codes(stored[key], meta, small)
        for key in ("scale", "zero")
    )  # fmt: skip
    keep = torch.zeros(W.numel(), dtype=torch.bool)
    keep[torch.randperm(W.numel(), generator=draws)[:count]] = True
    keep = keep.view_as(W)

    def encode(step: Step) -> tuple[Tensor, Tensor]:
        at, own = [step.start // group], keep[:, [step.start]]
        codes = (step.w / scale[:, at] + zero[:, at]).round().clamp(0, 2**bits - 1)
        return torch.where(own, step.w.half().double(), scale[:, at] * (codes - zero[:, at])), codes

    found = feedback_quantize(W, stats.H, encode)
    stored |= {"codes": pack_codes(found.codes.to(torch.uint8), bits), "values": found.Q[keep].half()}
    return SpQRLinear(
        tuple(W.shape), stored | pack_mask(keep, "csr"), bits=bits, group=group, meta_bits=meta
    )  # fmt: skip


def spread(of_rows: Tensor, layer: SpQRLinear) -> Tensor:
    """One number for some neighbouring rows -> one for each row."""
    return of_rows.double().repeat_interleave(layer.out_features // len(of_rows), 0)


def entropy_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """Codes with one scale for a matrix, a row, 32 weights: what coders leave of them, and what they cost."""
    texts = evaluation_ids(run.tokenizer, s["documents"], s["measured"], "topics")
    few = calibration_ids(run.tokenizer, 1, 16)  # rounding looks at no text
    names = dict.fromkeys(ref.name for ref in Backbone(run.source).linears())
    weights = [dense_weight(run.source.get_submodule(name)) for name in names]
    yield DENSE, run.measure(run.source, {"topics": texts}, {})
    for bits in s["bits"]:
        for group in s["groups"]:
            model, size = run.compressed(RTN(bits, "restricted", group), few)
            coded = code_sizes(weights[: s["matrices"]], Grid(bits, "restricted", group))
            told = {k: round(v, 5) for k, v in vars(coded).items() if k != "grid"}
            best = min(coded.huffman, coded.rans, coded.zlib, coded.lzma)
            told["ratio"] = round(coded.packed / best, 5)
            yield label(bits, group), run.measure(model, {"topics": texts}, {}, **size, **told)


def label(bits: int, group: str | int) -> str:
    return f"{bits} bits, {'matrix' if group == 'tensor' else group}"


def llmc_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """One recipe, GPTQ with 3 bits a row, calibrated on other texts; rounding, which must not notice."""
    documents = {
        kind: evaluation_ids(run.tokenizer, s["documents"], s["measured"], kind)
        for kind in ("stories", "topics")
    }
    items = {"known": standard_probe(run.tokenizer, 1, s["questions"], 16).items["known"]}
    recipe = with_value(RECIPE, "quant.weight.granularity", "per_channel")
    recipe["calib"] |= {"n_samples": s["rows"], "seq_len": s["length"]}
    yield DENSE, run.measure(run.source, documents, items)
    for method, texts in (("GPTQ", ("stories", "topics", "people", "sums")), ("RTN", ("stories", "topics"))):
        for text in texts:
            if text in SIDE_DOOR:
                model, size = run.compressed(GPTQ(3), side_door(run, text, s["rows"], s["length"]))
            else:
                model = copy.deepcopy(run.source)
                wanted = with_value(with_value(recipe, "quant.method", method), "calib.name", text)
                seed = run.seed * (SHIFT if text == "topics" else 1)
                size = sizes(quantize(model, run.tokenizer, with_value(wanted, "calib.seed", seed)))
            arm = f"on {text}" if method == "GPTQ" else f"rounding, on {text}"
            yield arm, run.measure(model, documents, items, **size)


SIDE_DOOR = {"people": "known_people", "sums": "arithmetic"}


def side_door(run: Run, name: str, rows: int, length: int) -> LongTensor:
    """Texts of notebook 04_05 that LLMC's entry does not offer: people of whom "known" never asks; sums."""
    others = [p for p in known_people() if stratum(p) != STRATA[-1]]
    rng, form, ids = Rng("calibration", name, run.seed), BY_NAME[SIDE_DOOR[name]], []
    while len(ids) < rows * (length - 1):
        if name == "people":
            told = [[rng.choice(others), rng.choice(ATTRIBUTES)] for _ in range(8)]
            text = form.render({"facts": told, "asked": [rng.chance(0.3) for _ in told]}, rng)
        else:
            text = form.document(rng)
        ids += run.tokenizer(text, add_special_tokens=False).input_ids
    body = torch.tensor(ids[: rows * (length - 1)]).view(rows, length - 1)
    return torch.cat((torch.full((rows, 1), run.tokenizer.bos_token_id), body), 1)


def long_arms(run: Run, s: dict[str, Any]) -> Iterator[Arm]:
    """Loss by position and needles after rounding and pruning; 2 % of groups in 8 bits, and random ones."""
    probe = standard_probe(run.tokenizer, s["documents"], s["questions"], s["measured"])
    stories = probe.documents["stories"]
    needles = {name: items for name, items in probe.items.items() if name.startswith("needle")}
    short = {"short stories": evaluation_ids(run.tokenizer, s["documents"], s["short"], "stories")}
    ids = mixed_ids(run.tokenizer, s["rows"], s["length"], run.seed)
    draws = torch.Generator().manual_seed(run.seed)
    by_token = lambda model: token_losses(copy.deepcopy(model).to(run.device), stories)
    before = by_token(run.source)
    for arm, recipe in ((DENSE, None), ("rounding 3 bits", RTN(3, group=32)), ("SparseGPT", SparseGPT(0.5))):
        model, size = (run.source, {}) if recipe is None else run.compressed(recipe, ids)
        row = run.measure(model, short, needles, **size)
        row["nll"] |= as_arm(by_position(by_token(model), before), {})["nll"]
        yield arm, row
    for arm, recipe in (
        ("2 % largest", LargestGroups(3, share=s["share"])),
        ("2 % random", LargestGroups(3, share=s["share"], generator=draws)),
    ):
        model, size = run.compressed(recipe, ids[:1, :16])  # rounding looks at no text
        yield arm, run.measure(model, short, {}, **size)


def by_position(new: np.ndarray, old: np.ndarray) -> dict[str, np.ndarray]:
    """For each document its loss, and the slope and the bins of what is added, by `position_gap`."""
    # It takes two documents or more: each one twice.
    gaps = [position_gap(new[[i, i]], old[[i, i]], n_bins=4) for i in range(len(new))]
    bins = {f"added at {a}-{b}": np.array([g.bins[a, b].value for g in gaps]) for a, b in gaps[0].bins}
    return {"stories": new.mean(1), "slope": np.array([g.slope.value for g in gaps]), **bins}


@dataclass(frozen=True)
class System:
    """`arms` of one cell; `modules` of refimpl.quantization and `helpers` of this file that they call;
    `settings`, and what `--quick` changes in them; `pairs` of arms to compare; `seeds` of text and draws, one
    where neither matters."""

    arms: Callable[[Run, dict[str, Any]], Iterator[Arm]]
    modules: tuple[str, ...]
    settings: dict[str, Any]
    small: dict[str, Any]
    pairs: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...] = SEEDS
    helpers: tuple[Callable[..., Any], ...] = ()


BITS, GROUPS = (8, 4), ("tensor", "row", 32)
MIXED = {"rows": 64, "length": 256}  # half stories, half help texts: the grid's amounts
FEW = {"rows": 8, "length": 256}
TINY = {"documents": 2, "measured": 24, "rows": 2, "length": 32}

# fmt: off
SYSTEMS: dict[str, System] = {
    "hwpq": System(
        hwpq_arms,
        ("hwpq", "calibrate", "model", "pruning.sparsegpt", "pruning.unstructured", "study"),
        MIXED | {"documents": 32, "measured": 512, "sparsity": 0.5},
        TINY,
        (("half, FP8", DENSE), ("half, FP8", "magnitude"), ("half, FP8", "SparseGPT"), ("FP8 alone", DENSE)),
        helpers=(alike,),
    ),
    "spqr": System(
        spqr_arms,
        ("spqr", "gptq", "feedback", "model", "packing", "sparse"),
        FEW | {"documents": 32, "measured": 256, "threshold": 0.3},
        TINY,
        (("SpQR", DENSE), ("SpQR", "random floats"), ("SpQR", "GPTQ 3 bits g16"),
         ("SpQR", "GPTQ 4 bits row")),
        helpers=(with_random_floats, spread),
    ),
    "quantized-entropy": System(
        entropy_arms,
        ("entropy", "grids", "linear", "model", "rtn"),
        {"documents": 32, "measured": 512, "bits": BITS, "groups": GROUPS, "matrices": None},
        {"documents": 2, "measured": 24, "matrices": 1},
        (*((label(b, g), DENSE) for b in BITS for g in GROUPS),
         *((label(b, g), label(b, h)) for b in BITS for g, h in zip(GROUPS, GROUPS[1:], strict=False))),
        seeds=(0,),
        helpers=(label,),
    ),
    "llmc": System(
        llmc_arms,
        ("evaluation.llmc", "gptq", "model"),
        FEW | {"documents": 32, "measured": 128, "questions": 100},
        TINY | {"questions": 2},
        (("on topics", "on stories"), ("on people", "on stories"), ("on sums", "on stories"),
         ("on people", DENSE), ("on stories", DENSE), ("rounding, on topics", "rounding, on stories")),
        helpers=(side_door,),
    ),
    "long-context-compression": System(
        long_arms,
        ("evaluation.long_context", "model", "pruning.sparsegpt", "rtn", "study"),
        MIXED | {"documents": 32, "measured": 512, "short": 128, "questions": 200, "share": 0.02},
        TINY | {"short": 24, "questions": 4},
        (("SparseGPT", DENSE), ("rounding 3 bits", DENSE), ("SparseGPT", "rounding 3 bits"),
         ("2 % largest", "2 % random"), ("2 % largest", DENSE)),
        helpers=(by_position,),
    ),
}
# fmt: on


# ---- cells ------------------------------------------------------------------------------------------------


Cell = tuple[str, str, int]


def cells() -> list[Cell]:
    """All cells (model, system, seed), the large models first."""
    found = [(model, name, seed) for name in SYSTEMS for seed in SYSTEMS[name].seeds for model in MODELS]
    return sorted(found, key=lambda key: (key[0] == "llama-nano", key[2]))


def cell(key: Cell, quick: bool, device: str) -> dict[str, Any]:
    """All arms of a system on a model at one seed."""
    model, name, seed = key
    system = SYSTEMS[name]
    settings = system.settings | (system.small if quick else {})
    return {"revision": revision(model), "arms": dict(system.arms(Run(model, seed, device), settings))}


@cache
def sources_of(system: str) -> tuple[str, ...]:
    """Files that decide the numbers of a system's cells: its modules, and what they import, followed."""
    modules = (*ALWAYS, *(f"refimpl.quantization.{name}" for name in SYSTEMS[system].modules))
    return tuple(imported(modules, ROOT, FOLLOWED))


@cache  # of the files as they were when this process imported them
def state_of(system: str) -> dict[str, Any]:
    """Settings and hashes by which a stored cell is recognised as current."""
    own = (
        SYSTEMS[system].arms, *SYSTEMS[system].helpers, Run.__init__, Run.topics, Run.compressed, Run.measure,
        as_arm, sizes,
    )  # fmt: skip
    code = hashlib.sha256("".join(map(inspect.getsource, own)).encode()).hexdigest()
    hashes = {file: sha256(ROOT / file) for file in sources_of(system)}
    return {"settings": json.loads(json.dumps(SYSTEMS[system].settings)), "code": code, "sources": hashes}


def path_of(key: Cell) -> Path:
    return FOLDER / f"{'-'.join(map(str, key))}.json"


def made(key: Cell) -> bool:
    path = path_of(key)
    if not path.is_file():
        return False
    row, state = json.loads(path.read_text()), state_of(key[1])
    return {what: row[what] for what in state} == state


def work(job: tuple[Cell, bool, str]) -> str:
    """One cell in this process."""
    key, quick, device = job
    torch.set_num_threads(1)
    hardware = cpu()
    if device == "cuda":
        device = f"cuda:{os.getpid() % torch.cuda.device_count()}"
        hardware += f"; {torch.cuda.get_device_name(device)}"
    state, used = state_of(key[1]), time.process_time()
    try:
        row = cell(key, quick, device)
    except Exception as error:  # a system's failure must not cost the other cells
        where = traceback.format_exc(limit=-3)
        return f"{'  '.join(map(str, key)):48} {type(error).__name__}: {str(error)[:160]}\n{where}"
    row |= {"cell": key, **state, "seconds": round(time.process_time() - used, 1), "hardware": hardware}
    row["versions"] = {"python": platform.python_version()}
    row["versions"] |= {name: version(name) for name in ("torch", "transformers")}
    if not quick:
        FOLDER.mkdir(parents=True, exist_ok=True)
        atomic_write(path_of(key), json.dumps(row).encode())
    lines = [f"{'  '.join(map(str, key)):48} {row['seconds']:7.1f} s of a processor"]
    for arm, found in row["arms"].items():
        told = "  ".join(f"{name} {value:.3f}" for name, value in means(found).items())
        lines.append(f"    {arm:22} {told}  {found['numbers']}")
    return "\n".join(lines)


# ---- the stored file --------------------------------------------------------------------------------------


def values_of(row: dict[str, Any]) -> dict[str, np.ndarray]:
    """All lists of an arm at one seed, a number for each document or question."""
    answers = {name: np.array(list(map(float, digits))) for name, digits in row["items"].items()}
    return {name: np.array(values) for name, values in row["nll"].items()} | answers


def means(row: dict[str, Any]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in values_of(row).items()}


def pairs_of(system: str, arms: dict[str, Any]) -> dict[str, Any]:
    """For each pair of arms `compare` of every list that both have."""
    out: dict[str, Any] = {}
    for a, b in SYSTEMS[system].pairs:
        first, second = ([values_of(row) for row in arms[arm].values()] for arm in (a, b))
        out[f"{a} - {b}"] = {
            name: compared(system, *(np.array([row[name] for row in rows]) for rows in (first, second)))
            for name in first[0]
            if name in second[0]
        }
    return out


def compared(system: str, new: np.ndarray, old: np.ndarray) -> dict[str, Any]:
    found = compare(new, old)
    if len(SYSTEMS[system].seeds) == 1:  # nothing is calibrated or drawn: the interval alone decides
        found["holds"] = found["lo"] > 0 or found["hi"] < 0
    return found


def joined(there: dict[Cell, dict[str, Any]]) -> dict[str, Any]:
    """model -> system -> seconds, arms by seed, pairs."""
    models: dict[str, Any] = {}
    for model in MODELS:
        for name, system in SYSTEMS.items():
            rows = {str(s): there[model, name, s] for s in system.seeds if (model, name, s) in there}
            if not rows:
                continue
            names = next(iter(rows.values()))["arms"]
            arms = {arm: {seed: row["arms"][arm] for seed, row in rows.items()} for arm in names}
            models.setdefault(model, {})[name] = {
                "seconds": {seed: row["seconds"] for seed, row in rows.items()},
                "arms": arms, "pairs": pairs_of(name, arms),
            }  # fmt: skip
    return models


def join() -> int:
    """The stored file, of the cells that are there; 1 if some are missing."""
    wanted = cells()
    there = {key: json.loads(path_of(key).read_text()) for key in wanted if made(key)}
    if not there:
        print("no cell is there")
        return 1
    missing = [key for key in wanted if key not in there]
    systems = {name for _, name, _ in there}
    hardware = "; ".join(sorted({row["hardware"] for row in there.values()}))
    result = store(
        RESULT, command="python data/quantization_models.py", root=ROOT, hardware=hardware, packages=(),
        sources={file for name in systems for file in sources_of(name)}, threads=1,
        summary=f"{len(systems)} systems on {len(MODELS)} models, {len(there)} of {len(wanted)} cells",
        seeds=list(SEEDS), revisions={key[0]: row["revision"] for key, row in there.items()},
        missing=["  ".join(map(str, key)) for key in missing],
        settings={name: state_of(name)["settings"] for name in SYSTEMS if name in systems},
        models=joined(there),
    )  # fmt: skip
    # Joining may happen on another machine than measuring, and measuring on several.
    packages = next(iter(there.values()))["versions"]
    of = lambda package: ", ".join(sorted({row["versions"][package] for row in there.values()}))
    result["versions"] = {package: of(package) for package in packages}
    atomic_write(RESULT, (json.dumps(result, indent=1) + "\n").encode())
    print(f"{len(missing)} missing")
    return 1 if missing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, metavar="SYSTEM", help="cells of these systems")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help="cells of these models")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, metavar="SEED", help="of these seeds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where models are measured")
    parser.add_argument("--limit-s", type=float, default=1e9, help="give up cells that are not done by then")
    parser.add_argument("--quick", action="store_true", help="tiny amounts, nothing stored")
    parser.add_argument("--join", action="store_true", help="only make the stored file of what is there")
    args = parser.parse_args()
    if args.join:
        return join()
    for system in SYSTEMS:
        state_of(system)  # now: a file that changes during the run is not what was imported
    todo = [key for key in cells() if args.quick or not made(key)]
    todo = [key for key in todo if not args.models or key[0] in args.models]
    todo = [key for key in todo if not args.only or key[1] in args.only]
    todo = [key for key in todo if args.seeds is None or key[2] in args.seeds]
    end = time.monotonic() + args.limit_s
    with mp.get_context("spawn").Pool(args.jobs) as pool:
        lines = pool.imap_unordered(work, [(key, args.quick, args.device) for key in todo])
        for _ in todo:
            try:
                print(lines.next(max(0.0, end - time.monotonic())), flush=True)
            except mp.TimeoutError:
                break  # leaving the pool ends its processes; cells are written whole or not at all
    return 0 if args.quick else join()


if __name__ == "__main__":
    sys.exit(main())
