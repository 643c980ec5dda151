"""LoRA: train a low-rank update beside each frozen matrix.

Implements arXiv 2106.09685, Eq. 3: y = W x + (alpha / r) B A x, with A [r, in] random and B [out, r] zero, so
that training starts from the unchanged model.

A layer keeps its place and its names: the factors are its submodule `lora`, called "<layer>.lora.A" and
"<layer>.lora.B" in the state dict, and a forward hook adds their output. So `nn.Linear`, the `Conv1D` of
GPT-2 (which stores W transposed, [in, out]) and quantised linear layers are all treated alike.

Memory: y = W x with a frozen W saves no input for the backward pass, so A alone saves x; and where nothing
below needs a gradient, nothing is saved. The trap in that: a checkpointed block (reentrant form) whose input
needs no gradient gets none inside either. With frozen embeddings checkpoint with `use_reentrant=False`, or
call `model.enable_input_require_grads()` (transformers does so when it enables checkpoints).
"""

import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LoRA", "add_lora", "is_target", "load_lora", "lora_state_dict", "merge_lora", "remove_lora",
           "save_lora", "without_lora"]  # fmt: skip


class LoRA(nn.Module):
    """The low-rank update of one layer: x -> (alpha / r) B A x.

    Parameters: `A` [r, in] and `B` [out, r], which become the parameters; `alpha`, the scale's numerator.

    >>> update = LoRA(torch.ones(1, 3), torch.ones(2, 1), alpha=0.5)
    >>> update(torch.tensor([1., 2., 3.])).tolist(), update.matrix().shape
    ([3.0, 3.0], torch.Size([2, 3]))
    """

    def __init__(self, A: Tensor, B: Tensor, alpha: float) -> None:
        super().__init__()
        self.A, self.B, self.alpha = nn.Parameter(A), nn.Parameter(B), alpha
        self.enabled = True

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / len(self.A)

    def forward(self, x: Tensor) -> Tensor:
        # Two thin products: the full matrix BA is never made. The scale meets the thin result.
        return F.linear(F.linear(x, self.A) * self.scale, self.B)

    def matrix(self) -> Tensor:
        """The update as a matrix [out, in]."""
        return self.scale * self.B @ self.A


def is_target(name: str, targets: Collection[str]) -> bool:
    """Whether a module of this name is meant: a target is the name's end, of one or more whole parts.

    >>> [is_target("h.0.attn.c_proj", [t]) for t in ("c_proj", "attn.c_proj", "mlp.c_proj", "proj")]
    [True, True, False, False]
    """
    return any(f".{name}".endswith(f".{target}") for target in targets)


def add_lora(
    model: nn.Module, targets: Collection[str], rank: int, alpha: float, generator: torch.Generator
) -> tuple[str, ...]:
    """Freeze a model and add LoRA factors to the layers that `targets` name, in place.

    Implements arXiv 2106.09685, section 4.1. A is drawn from N(0, 1 / in), so that A x is as large as an
    entry of x; B is 0, so the model's output does not change. The factors take the layer's dtype and device.

    Parameters
    ----------
    targets : ends of module names, `("q_proj", "v_proj")`, `("c_attn",)`, `("mlp.c_proj",)`; see `is_target`.
    rank : r, from 1 to the smaller side of each matrix; 4 to 64 are usual.
    alpha : the update is scaled by alpha / rank, so that rank can change without retuning; usual: r or 2r.
    generator : draws A.

    Returns the names of the layers. Raises ValueError for a target without layer, a rank or alpha out of
    range, a layer tied to another and a model that has LoRA; TypeError for a target that is not linear.
    The model is changed only after all of that holds.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6))
    >>> add_lora(model, ["0"], rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    ('0',)
    >>> [(name, list(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    [('0.lora.A', [2, 6]), ('0.lora.B', [4, 2])]
    """
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets must be one or more names in a list or tuple, got {targets!r}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    modules = dict(model.named_modules())
    for target in targets:
        if not any(is_target(name, [target]) for name in modules):
            known = sorted({name.rpartition(".")[2] for name, m in modules.items() if _is_linear(m)})
            raise ValueError(f"targets: no layer is called {target!r}; linear layers are {', '.join(known)}")
    layers = {name: module for name, module in modules.items() if is_target(name, targets)}
    _check_layers(model, layers, rank, alpha)
    factors = {}
    for name, layer in layers.items():
        n_out, n_in = _sizes(layer)
        A = torch.empty(rank, n_in, device=generator.device).normal_(std=n_in**-0.5, generator=generator)
        factors[name] = A, torch.zeros(n_out, rank)
    _attach(model, layers, factors, alpha)
    return tuple(layers)


def merge_lora(model: nn.Module) -> tuple[str, ...]:
    """Add every update to its matrix, W + (alpha / r) B A, and drop the factors; returns the layers' names.

    Raises ValueError for a model without LoRA, TypeError for a quantised layer, before anything is changed.
    """
    layers = _lora_layers(model)
    for name, layer in layers.items():
        if "weight" not in layer._parameters:
            raise TypeError(f"{name} is a {type(layer).__name__} without a weight to add to; dequantise it")
    for layer in layers.values():
        update = layer.lora.matrix().detach()
        layer.weight.data += update if isinstance(layer, nn.Linear) else update.T
    return remove_lora(model)


def remove_lora(model: nn.Module) -> tuple[str, ...]:
    """Drop all factors: the model that `add_lora` was given, still frozen; returns the layers' names."""
    layers = _lora_layers(model)
    for layer in layers.values():
        layer.lora.hook.remove()
        del layer.lora
    return tuple(layers)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Compute with the frozen model alone inside the block: a reference policy that costs no memory."""
    updates = [layer.lora for layer in _lora_layers(model).values() if layer.lora.enabled]
    for update in updates:
        update.enabled = False
    try:
        yield
    finally:
        for update in updates:
            update.enabled = True


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The factors by name, "<layer>.lora.A" and "<layer>.lora.B", detached but not copied."""
    layers = _lora_layers(model).items()
    return {f"{name}.lora.{AB}": p.detach() for name, m in layers for AB, p in m.lora.named_parameters()}


def save_lora(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Write the factors, and alpha beside them, to a safetensors file."""
    from safetensors.torch import save

    from refimpl.paths import atomic_write

    alpha = next(iter(_lora_layers(model).values())).lora.alpha
    tensors = {name: tensor.contiguous() for name, tensor in lora_state_dict(model).items()}
    atomic_write(Path(file), save(tensors, metadata={"alpha": repr(float(alpha))}))


def load_lora(model: nn.Module, file: str | os.PathLike[str]) -> tuple[str, ...]:
    """Add the factors of a file of `save_lora` to a model, in place, frozen like after `add_lora`.

    Returns the layers' names. Raises ValueError, before anything is changed, for a file of another kind, for
    layers or shapes that the model does not have and for a model that has LoRA.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        alpha = (opened.metadata() or {}).get("alpha")
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    names = [key.removesuffix(".lora.A") for key in tensors if key.endswith(".lora.A")]
    if not alpha or not names or tensors.keys() != {f"{name}.lora.{AB}" for name in names for AB in "AB"}:
        raise ValueError(f"file: {file} does not hold pairs <layer>.lora.A, <layer>.lora.B and alpha")
    modules = dict(model.named_modules())
    if missing := [name for name in names if name not in modules]:
        raise ValueError(f"file: {file} has factors for {missing[0]!r}, which the model does not have")
    layers = {name: modules[name] for name in names}
    factors = {name: (tensors[f"{name}.lora.A"], tensors[f"{name}.lora.B"]) for name in names}
    rank = len(factors[names[0]][0])
    _check_layers(model, layers, rank, float(alpha))
    for name, (A, B) in factors.items():
        n_out, n_in = _sizes(layers[name])
        if A.shape != (rank, n_in) or B.shape != (n_out, rank):
            raise ValueError(f"file: factors {list(B.shape)} x {list(A.shape)} for {name} [{n_out}, {n_in}]")
    _attach(model, layers, factors, float(alpha))
    return tuple(names)


def _attach(
    model: nn.Module, layers: dict[str, nn.Module], factors: dict[str, tuple[Tensor, Tensor]], alpha: float
) -> None:
    """Freeze the model, then give every layer its update and the hook that adds it."""
    model.requires_grad_(False)
    for name, layer in layers.items():
        weight = layer.weight
        A, B = (factor.to(weight.device, weight.dtype) for factor in factors[name])
        layer.lora = LoRA(A, B, alpha)
        layer.lora.hook = layer.register_forward_hook(_add_update)


def _add_update(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + layer.lora(inputs[0]) if layer.lora.enabled else output


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; a Conv1D stores its weight the other way round."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    n_in, n_out = layer.weight.shape
    return n_out, n_in


def _check_layers(model: nn.Module, layers: dict[str, nn.Module], rank: int, alpha: float) -> None:
    if any(isinstance(module, LoRA) for module in model.modules()):
        raise ValueError("model has LoRA factors already; merge_lora or remove_lora first")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a number > 0, got {alpha!r}")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        if not _is_linear(layer):
            raise TypeError(f"targets: {name} is a {type(layer).__name__}, not an nn.Linear or Conv1D")
        largest = min(_sizes(layer))
        if type(rank) is not int or not 1 <= rank <= largest:
            raise ValueError(f"rank must be an integer from 1 to {largest} for {name}, got {rank!r}")
        tied = owners.get(id(layer._parameters.get("weight")), [])
        if len(tied) > 1:
            raise ValueError(f"targets: {name} has a tied weight ({', '.join(tied)}): merging changes both")


def _lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m._modules.get("lora"), LoRA)}
    if not layers:
        raise ValueError("model has no LoRA factors; add_lora adds them")
    return layers
