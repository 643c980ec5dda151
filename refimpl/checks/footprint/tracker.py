"""The check of the live tracker (footprint spec, A3): hand-counted bytes of small programs, real and fake."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from refimpl.checks import check, require, require_error

IMPLEMENTATION = {"live_tracker": "refimpl.footprint.tracker:LiveTracker"}

KB = 1000 * 4  # a float32 tensor of 1000 elements


@check
def check_live_tracker(tracker_class: type) -> None:
    """`LiveTracker()`: a context with register, watch, reset_peak, live, peak, by_kind, at_peak, timeline."""
    for mode, where in ((nullcontext(), "real tensors"), (FakeTensorMode(), "fake tensors")):
        with mode:
            _programs(tracker_class, where)
            _training_step(tracker_class, where)
    require_error(ValueError, lambda: tracker_class().register([torch.ones(1)], "wieght"), "an unknown kind")
    require_error(
        TypeError, lambda: tracker_class().register([1.0], "weight"), "a number in place of a tensor"
    )


def _programs(tracker_class: type, where: str) -> None:
    def temporaries(x: Tensor) -> Tensor:
        for _ in range(5):
            y = x * 2
            del y
        return x + 1

    programs = [
        ("x * 2, then its exponential: three tensors at once", lambda x: (x * 2).exp(), 3, 2),
        ("views and slices hold no bytes of their own", lambda x: x.view(10, 100).t()[:5], 1, 1),
        ("a slice keeps its whole storage alive", lambda x: (x + 1)[:10], 2, 2),
        ("an operation in place makes nothing", lambda x: x.mul_(2).add_(1), 1, 1),
        ("five temporaries, one after the other", temporaries, 2, 2),
        ("an operation with several outputs", lambda x: x.view(2, 500).max(dim=0), 1 + 0.5 + 1, 1 + 0.5 + 1),
    ]
    for what, program, peak, live in programs:
        x = torch.ones(1000)
        with tracker_class() as tracker:
            tracker.register([x], "weight")
            held = program(x)
        for name, got, count in (("peak", tracker.peak, peak), ("live", tracker.live, live)):
            require(got == count * KB, f"{where}: {what}: {name} is {got} bytes, not {int(count * KB)}")
        del held, x
        require(tracker.live == 0, f"{where}: {what}: {tracker.live} bytes are alive after everything died")


def _training_step(tracker_class: type, where: str) -> None:
    """loss = sum(exp(x ∘ w)) with SGD and momentum; w, x and everything of their shape have 4000 bytes."""
    model = _Scale()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    x = torch.ones(1000)

    def step() -> None:
        tracker.new = "activation"
        loss = model(x).exp().sum()
        tracker.new = "temp"
        loss.backward()
        del loss
        optimizer.step()

    with tracker_class() as tracker:
        tracker.watch(model, optimizer)
        tracker.watch(model, optimizer)
        tracker.register([x], "activation")
        require(
            tracker.live == 2 * KB, f"{where}: w and x, registered twice, are {tracker.live} bytes, not 8000"
        )
        step()
        optimizer.zero_grad()
        before = tracker.live
        require(
            before == 3 * KB, f"{where}: w, x and the momentum are {before} bytes after a step, not 12000"
        )
        scratch = torch.zeros(10_000)
        del scratch
        tracker.reset_peak()
        require(
            tracker.peak == before, f"{where}: after reset_peak() the peak is {tracker.peak}, not {before}"
        )
        step()
    # At the highest instant w, x, the momentum, exp(x ∘ w) and the gradient of x ∘ w are alive, and 4 bytes
    # each of the loss and its gradient, which expand() repeats without copying.
    require(tracker.peak == 5 * KB + 8, f"{where}: the second step's peak is {tracker.peak} bytes, not 20008")
    expected = {"weight": KB, "grad": KB, "optim": KB, "activation": KB}
    kinds = {kind: size for kind, size in tracker.by_kind.items() if size}
    require(kinds == expected, f"{where}: after a step by_kind is {kinds}, not {expected}")
    for name, total, split in (
        ("live", tracker.live, tracker.by_kind),
        ("peak", tracker.peak, tracker.at_peak),
    ):
        require(sum(split.values()) == total, f"{where}: the kinds of {name} sum to {sum(split.values())}")
    sizes = [size for _, size in tracker.timeline]
    require(sizes and max(sizes) == tracker.peak, f"{where}: the timeline's maximum is not the peak")


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
