"""What the live tracker does not see on a GPU: bytes that a CUDA kernel allocates and frees inside itself.

Two such kernels decide peaks in data/results/footprint/gpu.json. Going back through a softmax, PyTorch
multiplies gradient and output into a tensor of its own before it reduces it
(aten/src/ATen/native/cuda/SoftMax.cu): with eager attention one more attention map, 4 · B · H · T² bytes,
when a recomputed layer is at its largest. And int32 indices are copied to int64 before they index: 8 bytes
for each code that an 8-bit optimizer decodes.
"""

from __future__ import annotations

from typing import Any

import torch

from refimpl.footprint.tracker import LiveTracker

__all__ = ["CudaTracker", "kernel_scratch"]


def kernel_scratch(func: Any, args: tuple) -> int:
    """Return the bytes that a CUDA kernel holds beside its inputs and outputs while it runs.

    Parameters
    ----------
    func : an ATen operation, as `__torch_dispatch__` gets it.
    args : its positional arguments.

    Knows the two operations above and says 0 for every other: a lower bound, as far as other kernels go.

    >>> grad = torch.empty(2, 8, 16, 16)
    >>> kernel_scratch(torch.ops.aten._softmax_backward_data.default, (grad, grad, -1, grad.dtype))
    16384
    """
    if func is torch.ops.aten._softmax_backward_data.default:
        return args[0].numel() * args[0].element_size()
    if func is torch.ops.aten.index.Tensor:
        return sum(8 * index.numel() for index in args[1] if index is not None and index.dtype == torch.int32)
    return 0


class CudaTracker(LiveTracker):
    """The live tracker as a GPU would count: its peak includes what kernels hold while they run.

    `live` and `timeline` are those of `LiveTracker`, since the bytes are gone when the operation returns; in
    `at_peak` they are "temp". Works on real and fake tensors of any device.

    >>> from refimpl.footprint.tracker import LiveTracker
    >>> def peak_of(kind):
    ...     x = torch.ones(1000, requires_grad=True)
    ...     with kind() as tracker:
    ...         tracker.register([x], "weight")
    ...         x.softmax(0).sum().backward()
    ...     return tracker.peak
    >>> peak_of(CudaTracker) - peak_of(LiveTracker)
    4000
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is not NotImplemented:
            within = self.live + kernel_scratch(func, args)
            if within > self.peak:
                self.peak = within
                self.at_peak = {**self.by_kind, "temp": self.by_kind["temp"] + within - self.live}
        return out
