"""The checks of gradient checkpointing (footprint spec, A5): plain gradients, one tensor kept per block."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {
    "gradient_checkpointing": "refimpl.footprint.checkpointing:checkpoint",
    "checkpoint_blocks": "refimpl.footprint.checkpointing:best_every",
}


@check
def check_gradient_checkpointing(checkpoint: Callable) -> None:
    """`checkpoint(function, *inputs)` -> `function(*inputs)` that keeps only its inputs until backward."""
    with torch.random.fork_rng(devices=[]):
        for dropout in (0.0, 0.5):
            plain = _Block(dropout).step(lambda function, *inputs: function(*inputs))
            ours = _Block(dropout).step(checkpoint)
            case = f"with dropout {dropout}"
            require(torch.equal(ours["loss"], plain["loss"]), f"the loss {case} is not the plain one")
            require(ours["saved"] == 4 * 8 * 16, f"{case} forward keeps {ours['saved']} bytes instead of the "
                    f"{4 * 8 * 16} of the input (the plain block keeps {plain['saved']})")  # fmt: skip
            require(ours["runs"] == 2, f"the function ran {ours['runs']} times instead of twice")
            for name, expected in plain["gradients"].items():
                require_close(ours["gradients"][name], expected, 0.0, f"the gradient of {name} {case}")
            same = torch.equal(ours["next"], plain["next"])
            require(same, f"{case} the numbers drawn after backward are others than without checkpointing")
        block = _Block(0.0)
        block.x.requires_grad_(False)  # a frozen embedding below trained weights
        loss = block.loss(checkpoint)
        require(loss.requires_grad, "trained weights get no gradient if the input of the block needs none")
        loss.backward()
        expected = _Block(0.0).step(lambda function, *inputs: function(*inputs))["gradients"]["the weight"]
        require_close(block.w.grad, expected, 0.0, "the gradient of the weight, below it a frozen input")


class _Block:
    """dropout(sin(x w)) exp(dropout(sin(x w))) with x [8, 16] and w [16, 16]."""

    def __init__(self, dropout: float) -> None:
        rng = torch.Generator().manual_seed(0)
        self.x = torch.randn(8, 16, generator=rng).requires_grad_()
        self.w = torch.randn(16, 16, generator=rng).requires_grad_()
        self.dropout, self.runs = dropout, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.runs += 1
        y = torch.nn.functional.dropout((x @ self.w).sin(), self.dropout)
        return y * y.exp()

    def loss(self, checkpoint: Callable) -> Tensor:
        return checkpoint(self, self.x).sum()

    def step(self, checkpoint: Callable) -> dict:
        """Forward, three draws of someone else, backward, three more draws."""
        torch.manual_seed(7)
        kept = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata != self.w.untyped_storage()._cdata:
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss(checkpoint)
        saved = sum(storage.nbytes() for storage in kept.values())
        torch.rand(3)
        loss.backward()
        return {"loss": loss.detach(), "saved": saved, "runs": self.runs, "next": torch.rand(3),
                "gradients": {"the input": self.x.grad, "the weight": self.w.grad}}  # fmt: skip


@check
def check_checkpoint_blocks(best_every: Callable) -> None:
    """`best_every(layers, boundary, layer)` -> layers per block with the lowest peak in backward."""

    def peak(layers: int, every: int, boundary: int, layer: int) -> int:
        """Walk back through the blocks: the boundaries that are left, and the block that is recomputed."""
        starts, most = list(range(0, layers, every)), 0
        end = layers
        while starts:
            most = max(most, len(starts) * boundary + (end - starts[-1]) * layer)
            end = starts.pop()
        return most

    for layers in (1, 2, 7, 12, 24, 50, 80, 126):
        for boundary, layer in ((1, 1), (2, 3), (1, 8), (10, 275), (1, 60)):
            case = f"{layers} layers of {layer} bytes and boundaries of {boundary}"
            every = best_every(layers, boundary, layer)
            require(
                isinstance(every, int) and 1 <= every <= layers, f"{case}: {every!r} is not in 1..{layers}"
            )
            costs = [peak(layers, k, boundary, layer) for k in range(1, layers + 1)]
            best = costs.index(min(costs)) + 1
            diagnosis = (
                f"{case}: blocks of {every} peak at {costs[every - 1]} bytes, of {best} at {min(costs)}"
            )
            require(costs[every - 1] == min(costs), diagnosis)
