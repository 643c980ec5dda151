"""The check of KCache (kv-cache spec 21): error bound, no hidden renormalising, exact traffic."""

from collections.abc import Callable

import torch

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {"kcache": "refimpl.kvcache.kcache:KCache"}


@check
def check_kcache(KCache: Callable) -> None:
    """`KCache(n, renormalise)` with `read(q, codec, scale, ok)` and `read_bytes()`; `KCache(1).codec()` makes
    its codec, with `append(k, v)` and `nbytes()`."""
    draw = torch.Generator().manual_seed(0)
    B, G, R, S, D, scale = 2, 2, 3, 50, 8, 0.6
    k, v = (torch.randn(B, G, S, D, generator=draw) for _ in range(2))
    q = 2 * torch.randn(B, G, R, 1, D, generator=draw)
    codec = KCache(1).codec()
    codec.append(k[:, :, :30], v[:, :, :30])
    codec.append(k[:, :, 30:], v[:, :, 30:])
    held = codec.nbytes()
    require(
        held.get("payload") == k.nbytes, f"{held} bytes held; only the keys, {k.nbytes}, are the device's"
    )
    require(held.get("host") == v.nbytes, f"{held} bytes held; the values, {v.nbytes}, are the host's")
    weights = torch.einsum("bgrtd,bgsd->bgrs", q, k).mul(scale).softmax(-1)
    for n in (1, 6, 25, S, S + 9):
        m = min(n, S)
        alpha, index = weights.sort(-1, descending=True)
        alpha, index = alpha[..., :m], index[..., :m]
        parts = [[v[b, g][index[b, g]] for g in range(G)] for b in range(B)]
        rows = torch.stack([torch.stack(row) for row in parts])  # [B, G, R, m, D]
        plain = (alpha[..., None] * rows).sum(-2)
        mass = alpha.sum(-1, keepdim=True)
        union = sum(len(index[b, g].unique()) for b in range(B) for g in range(G))
        for renormalise, expected in ((False, plain), (True, plain / mass)):
            where = f"n = {n} of {S} slots, renormalise = {renormalise}"
            reader = KCache(n, renormalise)
            out = reader.read(q, codec, scale, None)
            require_close(out[:, :, :, 0], expected, 1e-5, f"{where}: output")
            read = reader.read_bytes()
            require(read["payload"] == k.nbytes, f"{where}: reads {read['payload']} bytes of keys, not all")
            for what in ("host", "moved"):
                require(
                    read[what] == union * D * 4,
                    f"{where}: {what} {read[what]} bytes; the groups' unions are {union} rows of {D * 4}",
                )
    for bad in (0, -3, 1.5):
        require_error(ValueError, lambda bad=bad: KCache(bad), f"n = {bad}")
