"""Distil a teacher into a student: what is trained, what is held fixed, and where the student comes from.

The survey names distillation without a system (its refs 9 and 121); here are its two common forms, the losses
of `refimpl.quantization.distillation.losses` in the training loop of the book, and the start that DistilBERT
(arXiv 1910.01108, section 3) made usual: a student of half the layers, copied from the teacher's.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refimpl.backbone import Backbone
from refimpl.lora import LoRA
from refimpl.quantization.distillation.losses import TopK, check_settings, feature_loss, kd_loss, top_k
from refimpl.quantization.linear import dense_weight
from refimpl.training import Batch, History, TrainConfig, _pad_id, targets, train

__all__ = ["Distillation", "check_pair", "distil", "half_depth", "layer_map", "store"]


@dataclass(frozen=True)
class Distillation:
    """Settings of the loss: a T^2 KL + (1 - a) CE + b sum_l mean (P_l h_s,l - h_t,m(l))^2.

    Parameters: `alpha` a, 0 to 1, usual 0.5 to 0.9; `temperature` T > 0, usual 1 to 4; `direction` of the KL,
    "forward" or "reverse"; `features` b >= 0, to be chosen so that the term is about as large as the first
    one: it goes with the square of the hidden states. Raises ValueError otherwise.
    """

    alpha: float = 0.5
    temperature: float = 2.0
    direction: str = "forward"
    features: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self.alpha, self.temperature, self.direction)
        if isinstance(self.features, bool) or not 0 <= self.features < math.inf:
            raise ValueError(f"features must be a finite number >= 0, got {self.features!r}")

    def loss_fn(
        self, teacher: nn.Module | None, projections: Sequence[nn.Module] | None = None
    ) -> Callable[[nn.Module, Batch], Tensor]:
        """The loss as `refimpl.training.train` wants it, (student, batch) -> mean over target tokens.

        Parameters: `teacher`, in evaluation mode; None: batches hold its stored distributions (`store`).
        `projections`, one for each layer of the student that is compared, see `feature_loss`.
        """

        def loss(student: nn.Module, batch: Batch) -> Tensor:
            given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
            labels = targets(given, _pad_id(student))
            out = _forward(student, given, hidden=self.features > 0)
            settings = {n: getattr(self, n) for n in ("alpha", "temperature", "direction")}
            if teacher is None:
                temperature = float(given["teacher_temperature"][0])
                known = TopK(given["teacher_ids"], given["teacher_log_probs"], temperature)
                return kd_loss(out.logits, known, labels, **settings)
            if self.alpha == 0 and self.features == 0:
                return kd_loss(out.logits, out.logits, labels, **settings)
            with torch.no_grad():
                wanted = _forward(teacher, given, hidden=self.features > 0)
            total = kd_loss(out.logits, wanted.logits, labels, **settings)
            if self.features == 0:
                return total
            # hidden_states[0] is the embedding, [l] the output of block l - 1; the last one has passed the
            # final norm, of student and teacher alike.
            h_s, h_t = out.hidden_states, wanted.hidden_states
            pairs = layer_map(len(h_s) - 1, len(h_t) - 1)
            return total + self.features * feature_loss(h_s[1:], [h_t[m] for m in pairs], labels, projections)

        return loss


def distil(
    teacher: nn.Module | None,
    student: nn.Module,
    batches: Callable[[int], Batch],
    config: TrainConfig,
    recipe: Distillation = Distillation(),  # noqa: B008
    *,
    generator: torch.Generator | None = None,
) -> History:
    """Train a student, in place, towards a teacher, which stays as it is.

    Parameters
    ----------
    teacher : a causal language model of transformers with the student's vocabulary, on its device, in
        evaluation mode meanwhile; None: batches of `store`.
    student : likewise; `requires_grad` off for what stays frozen. It shares no parameter with the teacher.
    batches, config : as for `refimpl.training.train`; `labels` of -100 and padding count in no loss.
    recipe : the loss; its alpha = 0 and features = 0 is plain training.
    generator : draws the projections, which are trained and then dropped; for features > 0 where the two have
        other widths.

    Raises ValueError for another vocabulary, shared parameters, a missing generator, features of a stored
    teacher, and as `train`.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> teacher = tiny("llama")
    >>> config = TrainConfig(steps=8, batch=2, lr=3e-3, warmup=2)
    >>> history = distil(teacher, half_depth(teacher), lambda step: random_ids(2, 16), config)
    >>> history.losses[-1] < history.losses[0]
    True
    """
    check_pair(teacher, student, recipe)
    projections = _projections(teacher, student, generator) if recipe.features else None
    loss = recipe.loss_fn(teacher, projections)
    mode = teacher is not None and teacher.training
    try:
        if teacher is not None:
            teacher.eval()
        if projections is None:
            return train(student, batches, config, loss_fn=loss, progress=False)
        joint = _Joint(student, projections)
        return train(joint, batches, config, loss_fn=lambda m, b: loss(m.student, b), progress=False)
    finally:
        if mode:
            teacher.train()


def store(teacher: nn.Module, batch: Batch, k: int = 50, temperature: float = 2.0) -> dict[str, Tensor]:
    """A batch with the teacher's k likeliest tokens at each position beside it, for `distil(None, ...)`.

    Parameters: `batch`, as for `refimpl.training.lm_loss`; `k` and `temperature`, as for `top_k`. The keys
    "teacher_ids" [B, T, k], "teacher_log_probs" [B, T, k + 1] and "teacher_temperature" [B] are added.
    """
    given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    with torch.no_grad():
        found = top_k(_forward(teacher, given).logits, k, temperature)
    rows = torch.full((len(given["input_ids"]),), float(temperature), dtype=torch.float64)
    stored = {"ids": found.ids, "log_probs": found.log_probs, "temperature": rows}
    return given | {f"teacher_{name}": tensor for name, tensor in stored.items()}


def half_depth(teacher: nn.Module) -> nn.Module:
    """A new model of layers 0, 2, 4, ... of a teacher, everything else copied too.

    Parameters: `teacher`, of a family of `refimpl.backbone`, with two layers or more, neither compressed nor
    sliced, without LoRA factors. Raises TypeError or ValueError for others.

    >>> from refimpl.checks.tiny import tiny
    >>> half_depth(tiny("gpt2", num_hidden_layers=4)).config.num_hidden_layers
    2
    """
    bb = Backbone(teacher)
    if bb.n_layers < 2:
        raise ValueError(f"teacher must have two layers or more, got {bb.n_layers}")
    if "kept" in vars(teacher) or any(isinstance(module, LoRA) for module in teacher.modules()):
        raise ValueError("teacher is sliced or has LoRA factors; give the plain model")
    for ref in bb.linears():
        dense_weight(ref.module)  # refuses compressed layers
    kept = range(0, bb.n_layers, 2)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[l] for l in kept]
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which the copies replace
        student = type(teacher)(config)
    blocks = "transformer.h." if bb.is_gpt2 else "model.layers."
    place = {str(l): str(i) for i, l in enumerate(kept)}
    state = {}
    for key, tensor in teacher.state_dict().items():
        l, _, rest = key.removeprefix(blocks).partition(".")
        if not key.startswith(blocks):
            state[key] = tensor
        elif l in place:
            state[f"{blocks}{place[l]}.{rest}"] = tensor
    first = next(teacher.parameters())
    student.to(first.device, first.dtype).load_state_dict(state)
    return student.eval()


def layer_map(student: int, teacher: int) -> list[int]:
    """After how many of the teacher's blocks the student's block l should be: ceil((l + 1) n_t / n_s).

    Evenly spread (TinyBERT's uniform map): a block that `half_depth` copied from 2l stands for 2l and 2l + 1.

    >>> layer_map(3, 6), layer_map(2, 3)
    ([2, 4, 6], [2, 3])
    """
    if not 1 <= student <= teacher:
        raise ValueError(f"student must have 1 to {teacher} layers, as the teacher, got {student}")
    return [-(-(l + 1) * teacher // student) for l in range(student)]


class _Joint(nn.Module):
    """A student and its projections, trained as one model."""

    def __init__(self, student: nn.Module, projections: nn.ModuleList) -> None:
        super().__init__()
        self.student, self.projections, self.config = student, projections, student.config


def _forward(model: nn.Module, given: Mapping[str, Tensor], hidden: bool = False) -> Any:
    mask = given.get("attention_mask")
    return model(given["input_ids"], attention_mask=mask, use_cache=False, output_hidden_states=hidden)


def check_pair(teacher: nn.Module | None, student: nn.Module, recipe: Distillation) -> None:
    """Raise ValueError for a teacher and a student that `distil` refuses."""
    if teacher is None:
        if recipe.features:
            raise ValueError("recipe: features need a teacher, stored distributions have no hidden states")
        return
    mine = {id(p) for p in student.parameters()}
    if any(id(p) in mine for p in teacher.parameters()):
        raise ValueError("teacher and student share parameters: distil into a copy")
    a, b = teacher.config, student.config
    if a.vocab_size != b.vocab_size:
        raise ValueError(f"student must have the teacher's vocabulary {a.vocab_size}, got {b.vocab_size}")
    if recipe.features:
        layer_map(b.num_hidden_layers, a.num_hidden_layers)


def _projections(
    teacher: nn.Module, student: nn.Module, generator: torch.Generator | None
) -> nn.ModuleList | None:
    """A matrix for each layer of a student that is not as wide as its teacher, or None."""
    a, b = teacher.config, student.config
    if a.hidden_size == b.hidden_size:
        return None
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator is needed to project width {b.hidden_size} to {a.hidden_size}")
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, which are drawn again
        linear = [nn.Linear(b.hidden_size, a.hidden_size, bias=False) for _ in range(b.num_hidden_layers)]
    for projection in linear:
        nn.init.normal_(projection.weight, std=b.hidden_size**-0.5, generator=generator)
    return nn.ModuleList(linear).to(next(student.parameters()).device)
