"""The check of AdamW with 8-bit states (footprint spec, A7; Dettmers et al. 2110.02861).

The reference builds the map from its bit patterns, rounds by comparing with all 256 values, and computes in
float64. Rounding errors may tip a value over to the neighbouring code, so a few weights may differ.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {"adam8bit": "refimpl.footprint.adam8bit:AdamW8bit"}

LR, BETAS, EPS, DECAY, BLOCK, STEPS = 0.01, (0.9, 0.99), 1e-8, 0.1, 256, 5


@check
def check_adam8bit(optimizer_class: Callable) -> None:
    """`AdamW8bit(params, lr=, betas=, eps=, weight_decay=)`, a group's `bits`, `state`, `load_state_dict`."""
    large, odd, small, embedding = [nn.Parameter(w) for w in _weights()]
    groups = [{"params": [large, odd, small]}, {"params": [embedding], "bits": 32}]
    optimizer = optimizer_class(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    large_w, odd_w, small_w, embedding_w = _weights()
    wanted = [_Reference(large_w, True), _Reference(odd_w, True)]
    wanted += [_Reference(small_w, False), _Reference(embedding_w, False)]
    for step in range(STEPS):
        for i, (p, reference) in enumerate(zip((large, odd, small, embedding), wanted, strict=True)):
            p.grad = _gradient(p.shape, 10 * step + i)
            reference.step(p.grad)
        optimizer.step()
        if step == 0:
            for p, reference in zip((large, odd), wanted, strict=False):
                require_close(p, reference.w, 1e-6, "weights after one step, of which nothing is rounded yet")
    for what, p, reference in (
        ("float32 states of a small tensor", small, wanted[2]),
        ("float32 states of an embedding, listed with bits=32", embedding, wanted[3]),
    ):
        require_close(p, reference.w, 1e-5, f"weights after {STEPS} steps, {what}")
    for what, p, reference in (("full blocks", large, wanted[0]), ("a last block cut short", odd, wanted[1])):
        off = ((p.detach() - reference.w).abs() > 1e-3 * LR).double().mean().item()
        require(
            off < 0.01,
            f"{what}: after {STEPS} steps {off:.0%} of the weights are not where blocks of "
            f"{BLOCK} with the dynamic map (signed for m, unsigned for v) lead",
        )
    _check_bytes(optimizer, (large, odd), (small, embedding))
    _check_resume(optimizer_class)
    require_error(ValueError, lambda: optimizer_class([nn.Parameter(torch.ones(3))], lr=-1.0), "lr = -1")


def _weights() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng) for shape in ((32, 160), (67, 64), (4000,), (40, 128))]


def _gradient(shape: torch.Size, seed: int) -> Tensor:
    """Entries of very different size, one of them far outside: what the map and the blocks are for."""
    rng = torch.Generator().manual_seed(seed)
    gradient = torch.randn(shape, generator=rng) * torch.randn(shape, generator=rng).exp()
    gradient.view(-1)[700] = 1e4
    return gradient


class _Reference:
    """AdamW in float64 on one tensor; m and v are rounded after each step if `rounded`."""

    def __init__(self, w: Tensor, rounded: bool) -> None:
        self.w, self.rounded, self.t = w.double(), rounded, 0
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        (b1, b2), g = BETAS, gradient.double()
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        denominator = (self.v / (1 - b2**self.t)).sqrt() + EPS
        self.w = self.w * (1 - LR * DECAY) - LR * self.m / (1 - b1**self.t) / denominator
        if self.rounded:
            self.m, self.v = _rounded(self.m, _table(signed=True)), _rounded(self.v, _table(signed=False))


def _table(signed: bool) -> Tensor:
    """The map, from bit patterns: zeros, a one, fraction bits; the two codes over are 0 and 1."""
    values, width = [0.0, 1.0], 7 if signed else 8
    for pattern in range(2 ** (width - 7), 2**width):
        zeros = width - pattern.bit_length()
        fraction_bits = width - zeros - 1
        fraction = (pattern - 2**fraction_bits + 0.5) / 2**fraction_bits
        value = (0.1 + 0.9 * fraction) / 10**zeros
        values += [value, -value] if signed else [value]
    return torch.tensor(sorted(values), dtype=torch.float64)


def _rounded(x: Tensor, table: Tensor) -> Tensor:
    parts = []
    for part in x.flatten().split(BLOCK):
        scale = part.abs().max()
        nearest = ((part / scale)[:, None] - table).abs().argmin(dim=1)
        parts.append(table[nearest] * scale)
    return torch.cat(parts).view(x.shape)


def _check_bytes(optimizer: torch.optim.Optimizer, rounded: tuple, kept: tuple) -> None:
    storages = {}
    for p in (*rounded, *kept):
        for value in optimizer.state[p].values():
            if isinstance(value, Tensor) and value.dim():  # a count of steps may be a scalar
                storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    expected = sum(2 * (p.numel() + 4 * -(-p.numel() // BLOCK)) for p in rounded)
    expected += sum(8 * p.numel() for p in kept)
    total, maps = sum(storages.values()), 2 * 256 * 4
    require(
        total in (expected, expected + maps),
        f"the states hold {total} bytes, not 2 · (numel + 4 · blocks) or 8 · numel each: {expected} "
        f"(or {maps} more, if they hold the maps)",
    )


def _check_resume(optimizer_class: Callable) -> None:
    """bfloat16 parameters: torch's own load_state_dict casts their states to bfloat16."""
    one = nn.Parameter(_weights()[0].bfloat16())
    first = optimizer_class([one], lr=LR)
    _advance(first, one, range(3))
    other = nn.Parameter(one.detach().clone())
    second = optimizer_class([other], lr=LR)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    _advance(first, one, range(3, 8))
    _advance(second, other, range(3, 8))
    require(torch.equal(one, other), "a run resumed from state_dict() leaves the way of the one it resumes")


def _advance(optimizer: torch.optim.Optimizer, p: nn.Parameter, seeds: range) -> None:
    for seed in seeds:
        p.grad = _gradient(p.shape, seed).bfloat16()
        optimizer.step()
