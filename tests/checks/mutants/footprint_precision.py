"""Plausible but wrong mixed precision that the checks of `footprint/precision.py` must reject."""

import torch

from refimpl.footprint.precision import MasterWeights, actual_saving, eq2_saving
from refimpl.ledger import Ledger, of_tensors


class NoMasterCopy(MasterWeights):
    """The optimizer starts every step from the rounded weights."""

    def step(self):
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.data.copy_(weight.data)
        return super().step()


class LossNotScaled(MasterWeights):
    """Gradients of the plain loss; the scale is not used at all."""

    def backward(self, loss):
        loss.backward()

    def step(self):
        scale, self.loss_scale = self.loss_scale, None
        taken = super().step()
        self.loss_scale = scale
        return taken


class GradientNotUnscaled(MasterWeights):
    """Adam hides it, since it does not see the gradient's scale; SGD does not."""

    def step(self):
        scale, self.loss_scale = self.loss_scale, None if self.loss_scale is None else 1.0
        taken = super().step()
        self.loss_scale = scale
        return taken


class OverflowNotLeftOut(MasterWeights):
    """Infinite gradients are clamped to the largest float16 and the step is made."""

    def step(self):
        for weight in self.weights:
            if weight.grad is not None:
                weight.grad.nan_to_num_()
        return super().step()


class ScaleNeverGrows(MasterWeights):
    def step(self):
        self.good_steps = 0
        return super().step()


class GradientsIn32Bits(MasterWeights):
    """Megatron's float32 gradients, reported where 2 bytes are asked for."""

    def ledger(self):
        kept = tuple(item for item in super().ledger().items if item.kind != "grad")
        wide = [(n, w.grad.float()) for n, w in zip(self.names, self.weights, strict=True)]
        return Ledger(kept) + of_tensors(wide, "grad")


class BuffersRoundedToo(MasterWeights):
    """`model.to(dtype)`, which rounds RoPE's frequencies."""

    def __init__(self, model, make_optimizer, dtype=torch.bfloat16, loss_scale=None, interval=2000):
        super().__init__(model, make_optimizer, dtype, loss_scale, interval)
        model.to(dtype)


def equation_2_for_every_regime(regime):
    actual_saving(regime)  # refuses an unknown one
    saved = 0 if regime == "float32" else int(eq2_saving(4, 4))
    return {"model and gradients": saved, "all": saved}


def _equation_2_for(regime):
    def mutant(asked):
        return equation_2_for_every_regime(asked) if asked == regime else actual_saving(asked)

    return mutant


MUTANTS = [
    ("mixed_precision", "no master copy: updates start from the rounded weights", NoMasterCopy),
    ("mixed_precision", "the loss is not scaled", LossNotScaled),
    ("mixed_precision", "gradients keep the loss scale", GradientNotUnscaled),
    ("mixed_precision", "a step that overflows is made with clamped gradients", OverflowNotLeftOut),
    ("mixed_precision", "the loss scale never grows", ScaleNeverGrows),
    ("mixed_precision", "gradients of 4 bytes", GradientsIn32Bits),
    ("mixed_precision", "RoPE's frequencies are rounded with the weights", BuffersRoundedToo),
    ("mixed_precision_saving", "Eq. 2 as printed for every regime", equation_2_for_every_regime),
    ("mixed_precision_saving", "autocast halves weights and gradients", _equation_2_for("autocast")),
    ("mixed_precision_saving", "the master copy is forgotten", _equation_2_for("master")),
    ("mixed_precision_saving", "pure bfloat16 keeps float32 moments", _equation_2_for("bfloat16")),
]
