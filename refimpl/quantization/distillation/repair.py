"""Distillation as repair: a compressed model learns from the model it was made of.

Masks and integers stay as they are, bit for bit; what can move are the norms, the scales of codes (as PEQA,
arXiv 2305.14152) or low-rank factors beside the codes (LoRA, arXiv 2106.09685). Afterwards all of it is
storage again.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.backbone import Backbone
from refimpl.lora import add_lora, remove_lora
from refimpl.quantization.distillation.train import Distillation, check_pair, distil
from refimpl.quantization.linear import CompressedLinear, GridLinear, compressed_names, put_module
from refimpl.quantization.peqa import PEQALinear, short_run
from refimpl.quantization.repair import RepairedLinear
from refimpl.quantization.sparse import SparseLinear
from refimpl.training import Batch, History

__all__ = ["TRAINED", "repair"]

TRAINED = ("norms", "scales", "lora")


def repair(
    model: nn.Module,
    teacher: nn.Module,
    batches: Callable[[int], Batch],
    *,
    steps: int,
    batch: int,
    lr: float,
    train_what: str = "scales",
    rank: int = 8,
    generator: torch.Generator | None = None,
    loss: Distillation = Distillation(alpha=1.0, temperature=1.0),  # noqa: B008
) -> tuple[int, History]:
    """Distil into what can move while masks and integers stay as they are, bit for bit, in place.

    The learning rate rises for a twentieth of the steps and then falls linearly to 0; no weight decay.

    Parameters
    ----------
    model : with compressed layers, without LoRA factors. All its parameters end up frozen.
    teacher, batches, loss : as for `distil`; by default KL alone, which needs no labels.
    steps, batch, lr : updates (a few hundred here), rows, highest learning rate (usual here: 1e-3 to 5e-3;
        scales 1e-4 to 1e-3, about 1/100 of their size).
    train_what : "norms", the norms' weights and biases, 0 bytes more; "scales", those of a `GridLinear` or a
        `SparseLinear`, in float32 meanwhile and then rounded back to the stored dtype, 0 bytes more; "lora",
        factors on every compressed layer, which end as the float16 `L` and `R` of a `RepairedLinear`.
    rank, generator : of "lora": r, and what draws A.

    Returns how many numbers were trained, and the history. Raises ValueError for a model that has nothing to
    train and another `train_what`, and as `distil` and `add_lora`, before anything is changed.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.quantization import RTN, compress_model
    >>> teacher, model = tiny("llama"), tiny("llama")
    >>> report = compress_model(model, RTN(3, group=8), random_ids(4, 16))
    >>> rows = lambda step: random_ids(4, 16, seed=step)
    >>> repair(model, teacher, rows, steps=2, batch=4, lr=3e-4)[0]      # scales: weights / 8
    2592
    """
    names = compressed_names(model)
    if not names:
        raise ValueError("model has no compressed layers; compress_model makes them")
    if train_what not in TRAINED:
        raise ValueError(f"train_what must be one of {', '.join(TRAINED)}, got {train_what!r}")
    layers = {name: model.get_submodule(name) for name in names}
    # Only of these two W^ is known to be scale times integers.
    without = [
        name for name, m in layers.items()
        if type(m) not in (GridLinear, SparseLinear) or "scale" not in m._buffers
    ]  # fmt: skip
    if train_what == "scales" and without:
        raise ValueError(f"train_what: {without[0]} has no codes with scales; train norms or lora")
    check_pair(teacher, model, loss)
    config = short_run(steps, batch, lr)  # checked before anything is changed
    if train_what == "lora":
        add_lora(model, names, rank, rank, generator)  # freezes the rest
    else:
        model.requires_grad_(False)
    if train_what == "norms":
        bb = Backbone(model)
        norms = [norm for l in range(bb.n_layers) for norm in (bb.layer(l).ln1, bb.layer(l).ln2)]
        for norm in [*norms, bb.final_norm]:
            norm.requires_grad_()
    elif train_what == "scales":
        for name, layer in layers.items():
            put_module(model, name, _TrainedScales(layer))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    try:
        history = distil(teacher, model, batches, config, loss)
    finally:
        # What was trained becomes storage again, also of a run that was cut short.
        for name, layer in layers.items():
            if train_what == "lora":
                L, R = layer.lora.scale * layer.lora.B.detach(), layer.lora.A.detach()
                layers[name] = RepairedLinear.repair(layer, L, R)
            elif train_what == "scales":
                trained_layer = model.get_submodule(name)
                layers[name] = trained_layer.stored(trained_layer.scale.detach().to(layer.scale.dtype))
        if train_what == "lora":
            remove_lora(model)
        for name, layer in layers.items():
            put_module(model, name, layer)
        model.requires_grad_(False)
    return trained, history


class _TrainedScales(PEQALinear):
    """A layer of codes, sparse or not, whose scale is a parameter for the time of training."""

    def __init__(self, layer: CompressedLinear) -> None:
        shape, tensors = (layer.out_features, layer.in_features), dict(layer.named_buffers())
        super().__init__(shape, tensors | {"scale": layer.scale.float()}, layer.bias, **layer.settings)
        self.kind = type(layer)

    def stored(self, scale: Tensor) -> CompressedLinear:
        """The layer it was made of, with another scale."""
        shape = self.out_features, self.in_features
        return self.kind(shape, {**dict(self.named_buffers()), "scale": scale}, self.bias, **self.settings)

    def dequantize(self) -> Tensor:
        return self.stored(self.scale.detach()).dequantize()

    def integers(self) -> Tensor:
        """What the scale multiplies, 0 for a pruned weight."""
        return self.stored(torch.ones_like(self.scale)).dequantize()
