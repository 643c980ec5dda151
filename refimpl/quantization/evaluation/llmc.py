"""LLMC: a method of quantization as a recipe, and one factor of it varied at a time.

Implements the driver of arXiv 2405.06001 (ref 24) in miniature. A recipe is a nested dict with the keys of
the toolkit's YAML files (`calib`, `quant`: `method`, `weight`, `special`), so that `json` or `yaml` can hold
it. The paper's experiments change one entry and keep the rest, seeds included: the domain of the calibration
text, its size, and which of clipping, scaling and error feedback are on. `special.trans` with GPTQ is the
toolkit's combination of two runs, AWQ's transformation saved and GPTQ applied to it.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from refimpl.backbone import Backbone
from refimpl.evaluate import Estimate, paired_bootstrap
from refimpl.quantization.awq import awq
from refimpl.quantization.fold import fold
from refimpl.quantization.gptq import GPTQ
from refimpl.quantization.model import Report, compress_model
from refimpl.quantization.rtn import RTN
from refimpl.quantization.texts import calibration_ids

__all__ = ["RECIPE", "Variation", "quantize", "vary", "with_value"]

RECIPE: dict[str, Any] = {
    "calib": {"name": "stories", "n_samples": 32, "seq_len": 256, "seed": 0},
    "quant": {
        "method": "GPTQ",
        "weight": {"bit": 3, "symmetric": False, "granularity": "per_group", "group_size": 32},
        "special": {"actorder": False, "percdamp": 0.01, "trans": False, "weight_clip": False},
    },
}
METHODS = {
    "RTN": {"weight_clip"},
    "Awq": {"trans", "weight_clip"},
    "GPTQ": {"actorder", "percdamp", "trans", "weight_clip"},
}
_GRANULARITY = {"per_tensor": "tensor", "per_channel": "row"}

Recipe = Mapping[str, Any]


@dataclass(frozen=True)
class Variation:
    """One factor varied: `scores`, its value -> [seeds, items], the same items and seeds for all values."""

    factor: str
    scores: dict[Any, np.ndarray]

    def gain(self, value: Any, other: Any, seed: int = 0) -> Estimate:
        """Mean score at `value` minus that at `other`, paired by seed and item; ValueError for a value that
        was not tried."""
        for wanted in (value, other):
            if wanted not in self.scores:
                raise ValueError(
                    f"{self.factor} was tried at {', '.join(map(str, self.scores))}, not {wanted}"
                )
        a, b = self.scores[value], self.scores[other]
        rng = np.random.default_rng(seed)
        if len(a) == 1:
            return paired_bootstrap(a[0], b[0], rng=rng)
        return paired_bootstrap(a, b, rng=rng)

    def __str__(self) -> str:
        first = next(iter(self.scores))
        lines = [f"{self.factor}: mean score, and its difference to {first}"]
        for value, scores in self.scores.items():
            moved = "" if value == first else f"  {self.gain(value, first)}"
            lines.append(f"  {value!s:>12}  {scores.mean():.4f}{moved}")
        return "\n".join(lines)


def with_value(recipe: Recipe, factor: str, value: Any) -> dict[str, Any]:
    """A copy of a recipe with one entry, named by its path ("calib.n_samples"), changed.

    Raises ValueError for an entry that the recipe does not have.

    >>> with_value(RECIPE, "quant.weight.bit", 2)["quant"]["weight"]["bit"], RECIPE["quant"]["weight"]["bit"]
    (2, 3)
    """
    new = copy.deepcopy(dict(recipe))
    *path, last = factor.split(".")
    place: Any = new
    for key in path:
        place = place.get(key) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        raise ValueError(f"factor must name an entry of the recipe, got {factor!r}")
    place[last] = value
    return new


def vary(
    run: Callable[[dict[str, Any]], np.ndarray],
    recipe: Recipe,
    factor: str,
    values: Sequence[Any],
    seeds: Sequence[int] = (0,),
) -> Variation:
    """Run a recipe at several values of one entry, everything else as it is.

    Parameters: `run`, recipe -> scores [items], always of the same items; `recipe`, which stays as it is;
    `factor`, the entry's path; `values`, hashable; `seeds`, put into "calib.seed", the same for every value.
    Raises ValueError without values or seeds, for a factor that is not in the recipe or is the seed itself,
    and for runs that return other shapes.

    >>> run = lambda recipe: np.array([recipe["quant"]["weight"]["bit"], 0.0])
    >>> found = vary(run, RECIPE, "quant.weight.bit", [2, 4])
    >>> found.gain(4, 2).value
    1.0
    """
    if not values or not seeds:
        raise ValueError("values and seeds must not be empty")
    if factor == "calib.seed":
        raise ValueError("factor: the seed is not a factor, give seeds instead")
    recipes = {value: with_value(recipe, factor, value) for value in values}
    found = {
        value: np.array([run(with_value(one, "calib.seed", seed)) for seed in seeds], float)
        for value, one in recipes.items()
    }
    if len({scores.shape for scores in found.values()}) > 1 or next(iter(found.values())).ndim != 2:
        raise ValueError(
            f"run must return [items], the same for all, got {[s.shape for s in found.values()]}"
        )
    return Variation(factor, found)


def quantize(model: nn.Module, tokenizer: Any, recipe: Recipe, *, batch: int = 8) -> Report:
    """Quantize a model as a recipe says, in place.

    The recipe's entries:

    - calib: `name`, "stories" or "topics"; `n_samples` rows of `seq_len` tokens; `seed`.
    - quant.method: "RTN", "Awq" (scales and clips by the error of outputs) or "GPTQ".
    - quant.weight: `bit` 2 to 8; `symmetric` (the scheme "full"); `granularity`, "per_tensor",
      "per_channel" or "per_group" with `group_size`.
    - quant.special: `weight_clip`, for RTN and GPTQ the range of least squares, for Awq its own search;
      `trans`, AWQ's scales, for GPTQ folded into the model first; `actorder`, `percdamp`: GPTQ's. Entries
      that the method does not know are refused unless they are False or GPTQ's default.

    Raises ValueError for a missing or unknown entry or a value that is not allowed, before the model changes.
    """
    _check_keys("recipe", recipe, {"calib", "quant"})
    calib, quant = recipe["calib"], recipe["quant"]
    _check_keys("calib", calib, {"name", "n_samples", "seq_len", "seed"})
    _check_keys("quant", quant, {"method", "weight", "special"})
    weight, special, method = quant["weight"], quant["special"], quant["method"]
    _check_keys("quant.weight", weight, {"bit", "symmetric", "granularity", "group_size"})
    if method not in METHODS:
        raise ValueError(f"quant.method must be one of {', '.join(METHODS)}, got {method!r}")
    _check_keys("quant.special", special, METHODS["GPTQ"])
    plain = RECIPE["quant"]["special"]
    if idle := [k for k in special if k not in METHODS[method] and special[k] != plain[k]]:
        raise ValueError(f"quant.special.{idle[0]} does nothing in {method}; it must be {plain[idle[0]]}")
    group = _GRANULARITY.get(weight["granularity"], weight["group_size"])
    if weight["granularity"] not in (*_GRANULARITY, "per_group"):
        raise ValueError(
            f"quant.weight.granularity is {weight['granularity']!r}, not per_tensor, _channel, _group"
        )
    bits, scheme = weight["bit"], "full" if weight["symmetric"] else "asymmetric"
    clip_norm = 2.0 if special["weight_clip"] else None
    ids = calibration_ids(tokenizer, calib["n_samples"], calib["seq_len"], calib["name"], calib["seed"])
    if method == "RTN":
        return compress_model(model, RTN(bits, scheme, group, clip_norm), ids, batch=batch)
    if method == "Awq":
        ratios = {} if special["trans"] else {"ratios": (0.0,)}
        return awq(model, ids, bits, group, scheme=scheme, clip=special["weight_clip"], batch=batch, **ratios)
    solver = GPTQ(
        bits, scheme, group, clip_norm, act_order=special["actorder"], damp=special["percdamp"]
    )  # fmt: skip
    if special["trans"]:
        if Backbone(model).is_gpt2:
            raise ValueError("quant.special.trans with GPTQ: nothing can be folded through GPT-2's GELU")
        searched = awq(copy.deepcopy(model), ids, bits, group, scheme=scheme, clip=False, batch=batch)
        for one in searched.searches:
            fold(Backbone(model), one.layer, one.site, one.scale)
    return compress_model(model, solver, ids, batch=batch)


def _check_keys(what: str, found: Recipe, wanted: set[str]) -> None:
    if not isinstance(found, Mapping) or set(found) != wanted:
        got = ", ".join(found) if isinstance(found, Mapping) else repr(found)
        raise ValueError(f"{what} must have the entries {', '.join(sorted(wanted))}, got {got}")
