"""Cross-check with `accelerate estimate-memory`: writes data/results/footprint/accelerate.json.

Run `python data/footprint_accelerate.py` in an environment that has refimpl's packages and accelerate
(`pip install accelerate==1.15.0`). Takes a minute; exit code 1 if a weight byte is unexplained. Per model:

- "command": what `accelerate estimate-memory NAME` says, from its own functions, of a local config.json: only
  its question to the hub is answered here. It builds the model without output head; "training" (Adam) is
  4 times the model in float32, and 8 bytes per parameter in half precision (the largest of its four parts).
- "with_head": accelerate's size of the whole language model in float32.
- "ours": closed forms. Float32 weights; "static" with gradients and AdamW's states; the highest instant of a
  training step of one sequence of at most 4096 tokens, in float32 and under autocast ("step", "step_amp";
  None for the architectures whose training is not accounted).

Buffers go to the meta device too, since without that DeepSeek-V3 asks for tensors of 30 GB while it is built.
"""

import json
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from refimpl.footprint import published
from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.instants import Plan, training
from refimpl.footprint.serving import serving, weight_bytes
from refimpl.results import store

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "data" / "results" / "footprint" / "accelerate.json"
PARTS = "activations.py", "arch.py", "instants.py", "published.py", "published.toml", "serving.py"
SOURCES = ("data/footprint_accelerate.py", *(f"refimpl/footprint/{name}" for name in PARTS))


def theirs(name: str) -> dict[str, Any]:
    """What accelerate says about one published configuration, in bytes."""
    import torch
    from accelerate import init_empty_weights
    from accelerate.commands import estimate
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModelForCausalLM

    empty = partial(init_empty_weights, include_buffers=True)
    hub = SimpleNamespace(config={}, library_name="transformers")
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(estimate, "verify_on_hub", lambda *_: hub),
        patch.object(estimate, "init_empty_weights", empty),
    ):
        (Path(folder) / "config.json").write_text(json.dumps(published.config(name)), encoding="utf-8")
        rows = estimate.gather_data(estimate.estimate_command_parser().parse_args(
            [folder, "--library_name", "transformers"]))  # fmt: skip
        with empty():
            config = AutoConfig.from_pretrained(folder)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    said = {}
    for dtype, layer, total, parts in rows:
        most = max(parts.values())  # -1 in all parts where it has no estimate
        said[dtype] = {"largest_layer": layer, "total": total, "training": most if most > 0 else None}
    return {"command": said, "with_head": calculate_maximum_sizes(model)[0]}


def ours(name: str) -> dict[str, int | None]:
    """The same from closed forms, and what explains the differences."""
    arch = published.arch(name)
    shapes = dict(arch.tensors())
    v3 = published.config(name)["model_type"] == "deepseek_v3"
    most: dict[str, int | None] = {"step": None, "step_amp": None}
    if isinstance(arch, Arch):
        for key in most:
            run = Run(batch=1, length=min(arch.positions, 4096), amp=key == "step_amp")
            most[key] = max(ledger.total() for ledger in training(arch, Plan(run)).values())
    return {
        "weights": weight_bytes(arch, "float32"),
        "head": 4 * prod(shapes.get("lm_head.weight", (0,))),  # 0: tied to the embedding
        "rotary": serving(arch, 1, 1, "float32").total("buffer", "resident"),
        "router_biases": 4 * arch.experts * (arch.layers - arch.dense_layers) if v3 else 0,
        "static": 16 * arch.parameters() + 4 * len(shapes),  # AdamW counts the steps of each tensor
        **most,
    }


def ratios(model: dict[str, Any]) -> list[float | None]:
    """The command's total / weights; its training / static and / step; in half precision / step_amp."""
    full, half = (model["command"][dtype] for dtype in ("float32", "float16"))
    said = {"weights": full["total"], "static": full["training"], "step": full["training"]}
    said["step_amp"] = half["training"]
    return [size / model["ours"][key] if model["ours"][key] else None for key, size in said.items()]


def main() -> int:
    """Compare, print, store."""
    if not find_spec("accelerate"):
        print("accelerate is not installed")
        return 1
    models = {name: theirs(name) | {"ours": ours(name)} for name in published.names()}
    print(f"{'accelerate / ours':32}{'weights':>10}{'static':>10}{'step':>10}{'half':>10}")
    equal = 0
    for name, model in models.items():
        print(f"{name:32}" + "".join(f"{ratio:10.4f}" if ratio else f"{'-':>10}" for ratio in ratios(model)))
        own = model["ours"]
        whole = own["weights"] + own["rotary"] + own["router_biases"]
        equal += (model["with_head"], model["command"]["float32"]["total"]) == (whole, whole - own["head"])
    short, steps = (list(filter(None, (ratios(m)[i] for m in models.values()))) for i in (0, 2))
    summary = (f"accelerate's weights equal to the byte for {equal} of {len(models)} models; its command "
               f"leaves out a head that is not tied (up to {1 - min(short):.1%}); its rule for Adam gives "
               f"{min(steps):.0%} to {max(steps):.0%} of a step's peak")  # fmt: skip
    print(summary)
    store(OUT, command="python data/footprint_accelerate.py", summary=summary, sources=SOURCES, root=ROOT,
          packages=("torch", "transformers", "accelerate"), models=models)  # fmt: skip
    return 0 if equal == len(models) else 1


if __name__ == "__main__":
    sys.exit(main())
