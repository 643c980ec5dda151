"""A training step on one GPU at three instants, from the closed forms of the terms of survey Eq. 1.

    loss      all activations and two buffers the size of the logits, but no gradients yet
    backward  all gradients, and the activations of the last layer or recomputed block
    update    all gradients and optimizer states, and the square roots of AdamW's second moments, which
              PyTorch makes for all tensors at once on a GPU (foreach)

Between loss and backward, activations are exchanged for gradients layer by layer, so the highest of the three
is what the step needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from refimpl.footprint.activations import per_layer, saved
from refimpl.footprint.adapters import lora_static, qlora_static
from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.checkpointing import backward_bytes, kept_bytes
from refimpl.footprint.sharding import sharded
from refimpl.footprint.static import static
from refimpl.ledger import Item, Kind, Ledger

__all__ = ["Plan", "training"]

TRAIN = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Plan:
    """A training run and what it trains: "full", "lora" or "qlora" (with `run.lora_rank`)."""

    run: Run
    train: str = "full"


def training(arch: Arch, plan: Plan) -> dict[str, Ledger]:
    """Account the three instants of a training step on one GPU: {"loss", "backward", "update"}.

    Upper bounds: "backward" counts all gradients and one layer's activations (with checkpointing, all kept
    inputs and a recomputed block), which never exist at once; LoRA runs are given the activations of full
    training, although frozen layers whose input nobody else needs do not save it (8 to 26 % less, spec A8).

    Raises ValueError for another `train`, ZeRO beside "full", and what the accounts themselves refuse.

    Examples
    --------
    >>> gpt2 = Arch.from_config({"model_type": "gpt2"})
    >>> instants = training(gpt2, Plan(Run(batch=1, length=1024)))
    >>> {name: round(ledger.total() / 1e9, 2) for name, ledger in instants.items()}
    {'loss': 3.17, 'backward': 2.08, 'update': 2.49}
    """
    run = plan.run
    if plan.train not in TRAIN:
        raise ValueError(f"train must be one of {', '.join(TRAIN)}, got {plan.train!r}")
    if run.zero_stage and plan.train != "full":
        raise ValueError(f"ZeRO is accounted for full training, not for {plan.train}")
    if run.zero_stage:
        buffers = [i for i in static(arch, replace(run, zero_stage=0)).items if i.kind == "buffer"]
        model = sharded(arch, run) + Ledger(tuple(buffers))
    else:
        model = {"full": static, "lora": lora_static, "qlora": qlora_static}[plan.train](arch, run)
    plain = replace(run, checkpoint_every=None, lora_rank=None, zero_stage=0, world=1)
    kept, block = saved(arch, plain).total(view="resident"), per_layer(arch, plain)
    if run.checkpoint_every:
        layers, every = arch.layers, run.checkpoint_every
        boundary = run.tokens * arch.hidden * run.itemsize
        kept += kept_bytes(layers, every, boundary) - layers * block
        block = backward_bytes(layers, every, boundary, block)
    ungraded = tuple(item for item in model.items if item.kind != "grad")
    logits = _item("gradients of the logits", "temp", 2 * 4 * run.tokens * arch.vocab)
    roots = [_item("roots", "temp", model.total("grad", "resident"))] if run.optimizer == "adamw" else []
    return {
        "loss": Ledger((*ungraded, _item("kept for backward", "activation", kept), logits)),
        "backward": Ledger((*model.items, _item("layers in backward", "activation", block))),
        "update": Ledger((*model.items, *roots)),
    }


def _item(name: str, kind: Kind, size: int) -> Item:
    return Item(name, kind, 0, size, size, None)
