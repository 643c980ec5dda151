"""PEQA: fine-tune the scales of an integer model and nothing else.

Implements arXiv 2305.14152: W^ = (s0 + ds) Wbar, Wbar = clip(round(W / s0) + z0, 0, 2^b - 1) - z0, with s0
and z0 asymmetric, per row (or group), of least ||W - W^||_F^2. Wbar and z0 stay as they are for every task;
a task is its scales s0 + ds. As W^ is linear in s, no straight-through estimator is needed:

    dL/ds_r = sum_j dL/dW^_rj Wbar_rj,    dL/dW^ = dy' x.

Conventions: the parameter is s = s0 + ds itself, in float32 (AdamW sees the same gradient; a float16 cannot
take its small steps); the least squares are found among the 80 ranges of `refimpl.quantization.grids`, the
paper's text asks for the minimum and not how.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.ledger import of_model
from refimpl.paths import atomic_write
from refimpl.quantization.frozen import Adapted, adapted, compress_frozen
from refimpl.quantization.grids import Grid
from refimpl.quantization.linear import GridLinear
from refimpl.training import Batch, History, TrainConfig, lm_loss, train

__all__ = ["PEQALinear", "load_scales", "peqa", "save_scales", "tune_scales"]


class PEQALinear(GridLinear):
    """A weight on uniform grids whose scale is a parameter; codes and zero points are buffers.

    Between the passes neither W^ nor its gradient is kept, only the input x, as for any trained layer.

    >>> W = torch.tensor([[0.0, 0.26, 1.0, -0.5]])
    >>> layer = PEQALinear.pack(Grid(2, scale_dtype=torch.float32).quantize(W), bits=2)
    >>> layer(torch.ones(1, 4)).sum().backward()
    >>> layer.weight.tolist(), layer.scale.grad.tolist()            # 2 = 0 + 1 + 2 - 1
    ([[0.0, 0.5, 1.0, -0.5]], [[2.0]])
    """

    def __init__(
        self,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        bias: Tensor | None = None,
        **settings: Any,
    ) -> None:
        codes = {name: tensor for name, tensor in tensors.items() if name != "scale"}
        super().__init__(shape, codes, bias, **settings)
        self.scale = nn.Parameter(tensors["scale"].detach().clone())

    def integers(self) -> Tensor:
        """Wbar [d_out, d_in], float32."""
        codes, scale, zero = self.quantized()
        steps = codes.view(*scale.shape, -1).float()
        return (steps - (zero if isinstance(zero, int) else zero[..., None])).view(codes.shape)

    def forward(self, x: Tensor) -> Tensor:
        return _ScaledProduct.apply(x, self.scale, self.bias, self)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        scale = self.scale.data
        super()._apply(fn, recurse)
        self.scale.data = scale.to(self.scale.device)
        return self


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, bias: Tensor | None, layer: PEQALinear) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale)
        ctx.layer = layer
        return F.linear(x, layer.dequantize().to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors  # raises if the scale was changed since the forward pass
        dx = ds = None
        if ctx.needs_input_grad[0]:
            dx = grad @ ctx.layer.dequantize().to(grad.dtype)
        if ctx.needs_input_grad[1]:
            dW = grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)
            ds = (dW * ctx.layer.integers()).view(*scale.shape, -1).sum(-1)
        return dx, ds, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None, None


def peqa(model: nn.Module, bits: int = 4, group: int | str = "row") -> Adapted:
    """Replace the linear layers of a model's blocks by `PEQALinear`, in place; only their scales train.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, uncompressed. Embeddings, norms, biases and head are frozen.
    bits : b of the codes, 2 to 8 (the paper: 4 and 3).
    group : "row" (the paper's channel), or g weights of a row that share a scale, a divisor of d_in
        (the paper: 64 to 256).

    Returns names, number of scales and bytes. Raises as `Grid` and `compress_model`, before anything is
    changed.

    Examples
    --------
    >>> from refimpl.checks.tiny import tiny
    >>> model = tiny("llama")
    >>> report = peqa(model, bits=3)
    >>> report.trainable == sum(model.get_submodule(name).out_features for name in report.names)
    True
    """
    before = of_model(model).total()
    grid = Grid(bits, "asymmetric", group, clip_norm=2.0, scale_dtype=torch.float32)
    names = compress_frozen(model, lambda name, W, stats: PEQALinear.pack(grid.quantize(W), bits))
    _only_scales(model)
    return adapted(model, names, before)


def tune_scales(
    model: nn.Module,
    batches: Callable[[int], Batch],
    *,
    steps: int,
    batch: int,
    lr: float,
    loss_fn: Callable[[nn.Module, Batch], Tensor] = lm_loss,
) -> History:
    """Train the scales of a model of `peqa`, all else frozen, in place, with AdamW: 8 bytes of state a scale.

    The learning rate rises for a twentieth of the steps and then falls linearly to 0. Without weight decay:
    it would pull all of W^ towards 0, and not ds, as the paper's form would have it.

    Parameters
    ----------
    batches, batch, loss_fn : as for `refimpl.training.train`.
    steps : updates (a few hundred here).
    lr : the highest learning rate. A step of AdamW moves a scale by about lr, so it goes with the size of the
        scales: about 1/100 of them is usual here (1e-4 to 1e-3); the paper's large models have 1e-6 to 1e-4.

    Raises ValueError for a model without PEQA layers, and as `TrainConfig`.
    """
    _only_scales(model)
    return train(model, batches, short_run(steps, batch, lr), loss_fn=loss_fn, progress=False)


def short_run(steps: int, batch: int, lr: float) -> TrainConfig:
    """The schedule of a repair: up for a twentieth of the steps, then linearly to 0; no weight decay.

    >>> config = short_run(40, 8, 1e-3)
    >>> config.warmup, config.decay_fraction, config.weight_decay
    (2, 0.95, 0.0)
    """
    warmup = max(1, steps // 20)
    decay = (steps - warmup) / max(1, steps)
    return TrainConfig(steps=steps, batch=batch, lr=lr, warmup=warmup, decay_fraction=decay, weight_decay=0.0)


def save_scales(model: nn.Module, file: str | os.PathLike[str]) -> int:
    """Write the scales of all PEQA layers, a task's whole outcome, to a safetensors file; return its bytes.

    The file also names the integers that it belongs to, by hash. Raises ValueError without PEQA layers.
    """
    from safetensors.torch import save

    scales = {f"{name}.scale": layer.scale.detach().contiguous() for name, layer in _layers(model).items()}
    content = save(scales, metadata={"integers": _integers_hash(model)})
    atomic_write(Path(file), content)
    return len(content)


def load_scales(model: nn.Module, file: str | os.PathLike[str]) -> tuple[str, ...]:
    """Make a PEQA model the one of another task: take over the scales of a file; returns the layers' names.

    Raises ValueError, before anything is changed, for a file of another kind or of other integers.
    """
    from safetensors import safe_open

    layers = _layers(model)
    with safe_open(file, "pt") as opened:
        integers = (opened.metadata() or {}).get("integers")
        scales = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    if integers is None:
        raise ValueError(f"file: {file} was not written by save_scales")
    if integers != _integers_hash(model):
        raise ValueError(f"file: the scales of {file} belong to other integers than the model's")
    for name, layer in layers.items():
        scale = scales[f"{name}.scale"]
        if scale.shape != layer.scale.shape or scale.dtype != layer.scale.dtype:
            raise ValueError(f"file: the scales of {name} are {scale.dtype} {list(scale.shape)}")
    with torch.no_grad():
        for name, layer in layers.items():
            layer.scale.copy_(scales[f"{name}.scale"])
    return tuple(layers)


def _layers(model: nn.Module) -> dict[str, PEQALinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PEQALinear)}
    if not layers:
        raise ValueError("model has no PEQA layers; peqa makes them")
    return layers


def _only_scales(model: nn.Module) -> None:
    layers = _layers(model)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.scale.requires_grad_()


def _integers_hash(model: nn.Module) -> str:
    """SHA-256 of the names, codes and zero points of all PEQA layers."""
    digest = hashlib.sha256()
    for name, layer in _layers(model).items():
        for key, tensor in layer.named_buffers():
            digest.update(f"{name}.{key} {list(tensor.shape)}".encode())
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
