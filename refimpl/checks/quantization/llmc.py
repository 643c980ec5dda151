"""The check of LLMC's experiments: one factor at a time (spec, section 32; arXiv 2405.06001)."""

import copy
from collections.abc import Callable

import numpy as np

from refimpl.checks import check, require

IMPLEMENTATION = {"llmc": "refimpl.quantization.evaluation.llmc:vary"}
RECIPE = {
    "calib": {"name": "stories", "n_samples": 32, "seq_len": 256, "seed": 0},
    "quant": {
        "method": "GPTQ",
        "weight": {"bit": 3, "symmetric": False, "granularity": "per_group", "group_size": 32},
        "special": {"actorder": False, "percdamp": 0.01, "trans": False, "weight_clip": False},
    },
}


@check
def check_llmc(vary: Callable) -> None:
    """`vary(run, recipe, factor, values, seeds)` -> `.scores`, value -> [seeds, items], and `.gain(a, b)`,
    paired by seed and item."""
    seen: list[dict] = []
    noise = np.random.default_rng(0).normal(0, 5, (10, 40))  # of seeds and items, far above the effect

    def run(recipe: dict) -> np.ndarray:
        seen.append(copy.deepcopy(recipe))
        bits = recipe["quant"]["weight"]["bit"]
        return noise[recipe["calib"]["seed"]] + 0.1 * bits - 1e-3 * recipe["calib"]["n_samples"]

    recipe = copy.deepcopy(RECIPE)
    for factor, values in (("quant.weight.bit", [2, 3, 4]), ("calib.n_samples", [64, 8])):
        seen.clear()
        found = vary(run, recipe, factor, values, seeds=(4, 7))
        require(recipe == RECIPE, f"{factor}: the recipe that was passed in has changed")
        require(len(seen) == 2 * len(values), f"{factor}: {len(seen)} runs, not one per value and seed")
        place, entry = factor.split(".")[:-1], factor.split(".")[-1]
        for value in values:
            for row, seed in enumerate((4, 7)):
                wanted = copy.deepcopy(RECIPE)
                inner = wanted
                for key in place:
                    inner = inner[key]
                inner[entry] = value
                wanted["calib"]["seed"] = seed
                require(
                    wanted in seen,
                    f"{factor} = {value}, seed {seed}: no run in which only this differs from the recipe",
                )
                scores = np.asarray(found.scores[value])
                require(scores.shape == (2, 40), f"{factor}: scores have the shape {scores.shape}")
                same = np.allclose(scores[row], run(wanted))
                require(same, f"{factor} = {value}: the scores are not those of seed {seed}")
    found = vary(run, recipe, "quant.weight.bit", [2, 4], seeds=(0, 1, 2))
    gain = found.gain(4, 2)
    require(abs(gain.value - 0.2) < 1e-9, f"two bits more are worth 0.2, the gain is {gain.value:.4f}")
    require(
        gain.hi - gain.lo < 1e-6,
        f"the gain's interval is {gain.hi - gain.lo:.3f} wide, though every pair of runs differs by 0.2",
    )
    nothing = vary(lambda r: noise[0], recipe, "calib.name", ["stories", "topics"]).gain("topics", "stories")
    zero = nothing.value == nothing.lo == nothing.hi == 0
    require(zero, "a factor that a method does not look at must have a gain of exactly 0")
