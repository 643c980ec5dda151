"""The methods of the chapter that compress a whole model in one go, under one name each.

The grid, the notebooks and the evaluation protocols take them from here. A name says method, bits and group
("gptq 3 g32"), or method and sparsity ("wanda 2:4").
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import LongTensor, nn

from refimpl.quantization.activations import W8A8
from refimpl.quantization.aqlm import AQLM
from refimpl.quantization.aser import ASER
from refimpl.quantization.awq import awq
from refimpl.quantization.gptq import GPTQ
from refimpl.quantization.gptvq import GPTVQ
from refimpl.quantization.grids import Grid
from refimpl.quantization.int8 import LLMInt8
from refimpl.quantization.model import Recipe, Report, compress_model
from refimpl.quantization.nf4 import NF4
from refimpl.quantization.pruning.aggressive import aggressive_ptc
from refimpl.quantization.pruning.sparsegpt import SparseGPT
from refimpl.quantization.pruning.unstructured import Magnitude, Wanda
from refimpl.quantization.quip import QuIP, QuIPSharp
from refimpl.quantization.repair import Repair
from refimpl.quantization.rtn import RTN
from refimpl.quantization.slim import SLiM
from refimpl.quantization.smoothquant import smoothquant

__all__ = ["METHODS", "Method", "compress"]

Compressor = Callable[[nn.Module, LongTensor], Report]


@dataclass(frozen=True)
class Method:
    """One row.

    - kind: "rounding", "calibrated", "activations", "codebooks", "repair" or "pruning".
    - apply: (model, calibration ids) -> Report, in place.
    - settings: the call in words, all numbers in it; stored results name it.
    - modules: files of `refimpl.quantization` that it uses besides the core.
    - calibrated: whether the ids matter to the result.
    """

    kind: str
    apply: Compressor
    settings: str
    modules: tuple[str, ...]
    calibrated: bool = True


def compress(name: str, model: nn.Module, ids: LongTensor) -> Report:
    """Compress a model by the method of that name, in place.

    Parameters: `name`, of `METHODS`; `model`, `ids`: as for `compress_model`. Raises ValueError for another
    name, and what the method raises.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> compress("rtn 4 g32", tiny("gpt2"), random_ids(2, 16)).bits
    4.625
    """
    if name not in METHODS:
        raise ValueError(f"name must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name].apply(model, ids)


def _recipe(kind: str, recipe: Recipe, *modules: str, calibrated: bool = True) -> Method:
    apply = lambda model, ids: compress_model(model, recipe, ids)
    return Method(kind, apply, repr(recipe), modules, calibrated)


def _rounding() -> dict[str, Method]:
    found = {}
    sizes = [(8, "row"), (4, "row"), (4, 32), (3, "row"), (3, 32), (2, "row"), (2, 32), (2, 16)]
    for bits in (8, 4, 3):
        recipe = RTN(bits, "restricted", "tensor")
        found[f"algorithm 2, {bits} bits"] = _recipe("rounding", recipe, "rtn", calibrated=False)
    for bits, group in sizes:
        name = f"{bits} {group if group == 'row' else f'g{group}'}"
        found[f"rtn {name}"] = _recipe("rounding", RTN(bits, group=group), "rtn", calibrated=False)
        if bits < 8:
            found[f"gptq {name}"] = _recipe("calibrated", GPTQ(bits, group=group), "gptq")
    found["nf4"] = _recipe("rounding", NF4(), "nf4", "frozen", calibrated=False)
    for bits in (4, 3, 2):
        apply = lambda model, ids, bits=bits: awq(model, ids, bits, 32)
        settings = f"awq(bits={bits}, group=32)"
        found[f"awq {bits} g32"] = Method("calibrated", apply, settings, ("awq", "awq_search"))
    clipped = lambda model, ids: awq(model, ids, 3, 32, ratios=(0.0,))
    settings = "awq(bits=3, group=32, ratios=(0.0,))"
    found["clip 3 g32"] = Method("calibrated", clipped, settings, ("awq", "awq_search"))
    return found


def _activations() -> dict[str, Method]:
    found = {}
    for what in ("token", "tensor"):
        recipe = W8A8(activations=what)
        found[f"w8a8 per {what}"] = _recipe("activations", recipe, "activations", calibrated=False)
    for label, keep in (("llm.int8()", False), ("llm.int8(), float kept", True)):
        recipe = LLMInt8(keep_weight=keep)
        found[label] = _recipe("activations", recipe, "activations", "int8", calibrated=False)
    smoothed = lambda model, ids: smoothquant(model, ids, 0.5, W8A8("row", "tensor")).report
    settings, modules = "smoothquant(0.5, W8A8('row', 'tensor'))", ("activations", "smoothquant")
    found["smoothquant 0.5 per tensor"] = Method("activations", smoothed, settings, modules)
    return found


def _codebooks() -> dict[str, Method]:
    found = {}
    for vdim in (1, 2):
        found[f"gptvq 2 d{vdim}"] = _recipe("codebooks", GPTVQ(2, vdim), "gptvq", "codebooks")
    found["quip 2"] = _recipe("codebooks", QuIP(2), "quip", "hadamard", "e8p")
    for bits in (2, 3, 4):
        found[f"quip# {bits}"] = _recipe("codebooks", QuIPSharp(bits), "quip", "hadamard", "e8p")
    additive = AQLM(2, 4, 4, beam=4, epochs=3, steps=30)
    found["aqlm 2x4 g4"] = _recipe("codebooks", additive, "aqlm", "codebooks")
    return found


def _repairs() -> dict[str, Method]:
    found = {}
    for metric in ("plain", "diagonal", "whitened"):
        recipe = Repair(RTN(3), rank=8, metric=metric)
        found[f"rtn 3 row, {metric} rank 8"] = _recipe("repair", recipe, "rtn", "repair")
    for bits in (8, 6):
        found[f"aser w4a{bits}"] = _recipe("repair", ASER(activation_bits=bits), "rtn", "repair", "aser")
        bare = ASER(rank=0, outliers=0, activation_bits=bits)
        found[f"rtn w4a{bits}"] = _recipe("repair", bare, "rtn", "repair", "aser", calibrated=False)
    for label, recipe in (
        ("slim 4 2:4", SLiM()),
        ("slim 4 2:4, naive adapters", SLiM(adapters="naive")),
        ("slim 4 2:4, no adapters", SLiM(rank=0.0)),
    ):
        found[label] = _recipe("repair", recipe, "slim", "sparse", "repair")
    return found


def _pruning() -> dict[str, Method]:
    found = {}
    modules = ("sparse", "pruning/unstructured", "pruning/sparsegpt")
    for sparsity in (0.25, 0.5, 0.7, "2:4"):
        for label, make in (("magnitude", Magnitude), ("wanda", Wanda), ("sparsegpt", SparseGPT)):
            calibrated = make is not Magnitude
            found[f"{label} {sparsity}"] = _recipe("pruning", make(sparsity), *modules, calibrated=calibrated)
    joint = SparseGPT(0.5, grid=Grid(4, group=32))
    found["sparsegpt 0.5 + 4 g32"] = _recipe("pruning", joint, *modules)
    uneven = lambda model, ids: aggressive_ptc(model, ids, sparsity=0.7, bits=None).report
    settings = "aggressive_ptc(sparsity=0.7, bits=None)"
    found["aggressive 0.7"] = Method("pruning", uneven, settings, (*modules, "pruning/aggressive"))
    return found


METHODS = _rounding() | _activations() | _codebooks() | _repairs() | _pruning()
