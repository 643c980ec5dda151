"""The checks of the survey's Eq. 8-10 and of MiniCache (kv-cache spec 3 and 16)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {
    "kvsvd": "refimpl.kvcache.kvsvd:KVSVD",
    "minicache": "refimpl.kvcache.minicache:MiniCache",
}
B, G, N, D = 2, 2, 40, 8


@check
def check_kvsvd(KVSVD: Callable) -> None:
    """`KVSVD(rank, value_rank=, residual=, update=)` with `append`, `commit(ok)`, `read()`, `nbytes()`."""
    k, v = torch.randn(2, B, G, N, D, generator=_seed(0))
    k = k * torch.logspace(0, -1, D)
    more = torch.randn(B, G, 4, D, generator=_seed(1))
    for rank, update in ((3, "project"), (3, "refactor"), (8, "project")):
        what = f"rank {rank}, {update}"
        codec = KVSVD(rank, residual=4, update=update)
        codec.append(k, v)
        require_close(codec.read()[0], k, 1e-5, f"{what}: keys that the prompt itself reads")
        codec.commit(None)
        basis = torch.linalg.svd(k).Vh[..., :rank, :]
        best = k @ basis.transpose(-1, -2) @ basis
        require_close(codec.read()[0], best, 1e-4, f"{what}: keys after the prompt")
        require_close(codec.read()[1], v, 0, f"{what}: values, which stay dense")
        numbers = B * G * (rank * (N + D) + N * D)
        require(codec.nbytes()["payload"] == 4 * numbers,
                f"{what}: {codec.nbytes()} bytes, not 4 · {numbers}: r (n + D) for keys, n D for values"
        )  # fmt: skip
        codec.append(more[:, :, :3], more[:, :, :3])
        codec.commit(None)
        require_close(codec.read()[0][:, :, N:], more[:, :, :3], 0, f"{what}: keys that wait")
        codec.append(more[:, :, 3:], more[:, :, 3:])
        codec.commit(None)
        if update == "project":
            expected = torch.cat((best, more @ basis.transpose(-1, -2) @ basis), 2)
        else:
            both = torch.cat((best, more), 2)
            again = torch.linalg.svd(both).Vh[..., :rank, :]
            expected = both @ again.transpose(-1, -2) @ again
        require_close(codec.read()[0], expected, 1e-4, f"{what}: keys after the residual was taken in")
        require(codec.nbytes()["payload"] == 4 * B * G * (rank * (N + 4 + D) + (N + 4) * D),
                f"{what}: {codec.nbytes()} bytes after {N + 4} tokens")  # fmt: skip
    require_error(ValueError, lambda: KVSVD(0), "rank 0")


@check
def check_minicache(MiniCache: Callable) -> None:
    """`MiniCache(t, retain=)`, two of which `join` as layers 0 and 1, with `append`, `commit`, `read`."""
    for t, retain in ((0.6, None), (0.6, 0.3), (0.0, None), (1.0, None), (0.3, 1)):
        what = f"t {t}, retain {retain}"
        pair = _joined(MiniCache(t, retain=retain, start=0))
        seen: list[Tensor] = []
        kept: list[Tensor] = []
        for step, n in enumerate((N, 1, 1, 3)):
            x = torch.randn(2, 2, B, G, n, D, generator=_seed(step))  # layer, key or value
            x[1] = x[1] + 0.7 * x[0]
            for l, codec in enumerate(pair):
                codec.append(*x[l])
                for name, got, new in zip("kv", codec.read(), x[l], strict=True):
                    told = f"{what}: new {name} of layer {l} that step {step} reads"
                    require_close(got[:, :, -n:], new, 1e-5, told)
                codec.commit(None)
            seen.append(x)
            distance = _distance(torch.cat(seen, 4))
            low, high = distance.amin(-1, keepdim=True), distance.amax(-1, keepdim=True)
            new = distance[..., -n:]
            whole = new >= high - (retain or 0) * (high - low)
            whole = whole & (retain is not None)
            kept.append(torch.ones_like(whole) if retain == 1 else whole)
        x, whole = torch.cat(seen, 4), torch.cat(kept, 3)
        for l, codec in enumerate(pair):
            for j, got in enumerate(codec.read()):
                name = f"{what}: {'kv'[j]} of layer {l}"
                require_close(got.norm(dim=-1), x[l, j].norm(dim=-1), 1e-4, f"{name}: norms")
                expected = torch.where(whole[j][..., None], x[l, j], _merged(x[:, j], l, t))
                require_close(got, expected, 1e-3, f"{name}: entries")
        merged, n = int((~whole).sum()), whole.numel()
        payload = sum(codec.nbytes()["payload"] for codec in pair)
        require(payload == 4 * (merged * (D + 2) + (n - merged) * 2 * D),
                f"{what}: {payload} bytes; {merged} of {n} entries merged: D + 2 numbers each, else 2 D"
        )  # fmt: skip
    require_error(ValueError, lambda: MiniCache(1.5), "t = 1.5")


def _joined(prototype: object) -> list:
    codecs = [prototype.fresh(), prototype.fresh()]
    for l, codec in enumerate(codecs):
        codec.layer = l
    for codec in codecs:
        codec.join(codecs)
    return codecs


def _distance(x: Tensor) -> Tensor:
    a, b = (x / x.norm(dim=-1, keepdim=True)).double()
    return torch.arccos((a * b).sum(-1).clamp(-1, 1)) / math.pi


def _merged(x: Tensor, l: int, t: float) -> Tensor:
    """Layer l's entry restored from the direction at the fraction t of the arc and its own norm."""
    a, b = (x / x.norm(dim=-1, keepdim=True)).double()
    w = torch.arccos((a * b).sum(-1, keepdim=True).clamp(-1, 1))
    e = (((1 - t) * w).sin() * a + (t * w).sin() * b) / w.sin()
    return (e * x[l].norm(dim=-1, keepdim=True)).float()


def _seed(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)
