"""The checks of KIVI and of MiniKV's two parts (kv-cache spec 17 and 18)."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {
    "kivi": "refimpl.kvcache.kivi:KIVI",
    "minikv_codec": "refimpl.kvcache.minikv:PromptKIVI",
    "minikv_policy": "refimpl.kvcache.minikv:PrefillH2O",
}
B, G, D = 2, 2, 8


@check
def check_kivi(KIVI: Callable) -> None:
    """`KIVI(bits, group=, residual=)` with `append(k, v)`, `commit(ok)`, `read()`, `nbytes()`."""
    group, residual = 8, 16
    for bits in (1, 2, 4, 8, 16):
        _follow(KIVI, bits, group, residual, f"{bits} bits", keys=lambda n, first: n - n % residual,
                values=lambda n, first: max(0, n - residual))  # fmt: skip
    require_error(ValueError, lambda: KIVI(3), "KIVI(3)")
    require_error(ValueError, lambda: KIVI(2, group=8, residual=12), "a residual of one and a half groups")


@check
def check_minikv_codec(PromptKIVI: Callable) -> None:
    """As KIVI, but the prompt is quantised but for n mod group, later tokens `residual` at a time."""
    group, residual = 8, 16

    def due(n: int, first: bool) -> int:
        return n - n % group if first or n >= residual else 0

    _follow(PromptKIVI, 2, group, residual, "2 bits", keys=due, values=due)


@check
def check_minikv_policy(PrefillH2O: Callable) -> None:
    """`PrefillH2O(heavy, recent, depth=)` whose `keep(v)` selects once, by column sums, in a pyramid."""
    n, L, R = 56, 5, 2
    for heavy, recent, depth in ((0.25, 0.25, 7), (0.25, 0.25, 1), (0.3, 0.0, 3)):
        policy = PrefillH2O(heavy, recent, depth=depth)
        for layer in range(L):
            scores = torch.randn(B, G, R, n, n, generator=_seed(layer))
            hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
            mass = scores.masked_fill(hidden, -torch.inf).softmax(-1).sum(3)
            view = SimpleNamespace(prefill=True, full=True, S=n, shape=(B, G, n), layer=layer, n_layers=L,
                                   attn_sum=mass.clone)  # fmt: skip
            keep = _as_mask(policy.keep(view), (B, G, n))
            last = heavy / depth
            share = 2 * heavy - last + (2 * last - 2 * heavy) * layer / (L - 1)
            top, end = int(share * n + 1e-9), int(recent * n)
            for b in range(B):
                for g in range(G):
                    order = mass[b, g].sum(0)[: n - end].argsort(descending=True)[:top].tolist()
                    expected = sorted({*order, *range(n - end, n)})
                    got = keep[b, g].nonzero().flatten().tolist()
                    require(got == expected,
                            f"heavy {heavy}, recent {recent}, depth {depth}, layer {layer} of {L}: row {b}, "
                            f"head {g} keeps {got}, not {expected}")  # fmt: skip
            require(policy.once, f"layer {layer}: something may be evicted in decoding, too")
    require_error(ValueError, lambda: PrefillH2O(0.9, 0.5), "more than the prompt")


def _follow(make: Callable, bits: int, group: int, residual: int, what: str, *, keys: Callable,
            values: Callable) -> None:  # fmt: skip
    """Append a prompt of 37 tokens, a question of 5, and 60 tokens; compare what is read after each."""
    codec = make(bits, group=group, residual=residual)
    expected = {"k": torch.empty(B, G, 0, D), "v": torch.empty(B, G, 0, D)}
    waiting = {"k": 0, "v": 0}
    for step, n in enumerate([37, 5] + [1] * 60):
        k, v = torch.randn(2, B, G, n, D, generator=_seed(step))
        k[..., 3] = 3 * k[..., 3] + 4  # a large channel
        codec.append(k, v)
        read = dict(zip("kv", codec.read(), strict=True))
        for name, new in (("k", k), ("v", v)):
            expected[name] = torch.cat((expected[name], new), 2)
            require_close(read[name], expected[name], 1e-4, f"{what}: {name} read in step {step}'s attention")
            waiting[name] += n
        codec.commit(None)
        if bits == 16:
            continue
        for name, due, axis in (("k", keys, 2), ("v", values, 3)):
            count = due(waiting[name], step == 0)
            start = expected[name].shape[2] - waiting[name]
            part = expected[name][:, :, start : start + count]
            expected[name][:, :, start : start + count] = _rounded(part, bits, group, axis)
            waiting[name] -= count
        total = expected["k"].shape[2]
        done = {name: total - waiting[name] for name in "kv"}
        payload = B * G * D * (sum(done.values()) * bits / 8 + sum(waiting.values()) * 4)
        meta = B * G * D * 2 * 4 * sum(done.values()) / group
        size = codec.nbytes()
        require(size == {"payload": payload, "meta": meta},
                f"{what}: {size} bytes after {total} tokens, not {payload:.0f} and {meta:.0f}")  # fmt: skip


def _rounded(x: Tensor, bits: int, group: int, dim: int) -> Tensor:
    """Each group of `group` neighbours along dim on 2^bits equidistant values from its minimum to its
    maximum."""
    out = torch.empty_like(x)
    for start in range(0, x.shape[dim], group):
        part = x.narrow(dim, start, group)
        low, high = part.amin(dim, keepdim=True), part.amax(dim, keepdim=True)
        step = (high - low) / (2**bits - 1)
        out.narrow(dim, start, group).copy_(((part - low) / step).round() * step + low)
    return out


def _as_mask(keep: Tensor | None, shape: tuple[int, int, int]) -> Tensor:
    if keep is None:
        return torch.ones(shape, dtype=torch.bool)
    if keep.dtype == torch.bool:
        return keep.expand(shape)
    return torch.zeros(shape, dtype=torch.bool).scatter(-1, keep.expand(*shape[:2], -1), True)


def _seed(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)
