"""The checks of TailorKV (kv-cache spec 23): fetching by a few channels, and P, which assigns the layers."""

from collections.abc import Callable

import torch

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {
    "tailorkv": "refimpl.kvcache.tailorkv:TailorKV",
    "tailorkv_spread": "refimpl.kvcache.tailorkv:spread",
}


@check
def check_tailorkv(TailorKV: Callable) -> None:
    """`TailorKV(budget, channels)` with `build(codec, q, ok)`, `read(q, codec, scale, ok)`, `read_bytes()`;
    its codec is `TailorKV(1, 1).codec(first, last)`, with `append(k, v)` and `commit(ok)`."""
    draw = torch.Generator().manual_seed(0)
    B, G, R, D, n, new, first, last, scale = 2, 2, 3, 8, 90, 4, 3, 5, 0.4
    k, v = (torch.randn(B, G, n + new, D, generator=draw) for _ in range(2))
    k = k * torch.rand(D, generator=draw) * 4  # some channels are larger than others
    q = torch.randn(B, G, R, 1, D, generator=draw)
    far, near = range(first, n - last), [*range(first), *range(n - last, n + new)]
    for budget, C in ((10, 2), (10, D), (len(far), 1), (500, 3)):
        codec = TailorKV(1, 1).codec(first, last)
        codec.append(k[:, :, :n], v[:, :, :n])
        codec.commit(None)
        reader = TailorKV(budget, C)
        reader.build(codec, q, None)
        codec.append(k[:, :, n:], v[:, :, n:])
        out, where = reader.read(q, codec, scale, None), f"budget {budget}, {C} of {D} channels"
        m = min(budget, len(far))
        for b in range(B):
            for g in range(G):
                mean = q[b, g, :, 0].mean(0)
                channels = (mean.abs() * k[b, g, :n].abs().amax(0)).topk(C).indices
                scores = k[b, g, first : n - last, channels] @ mean[channels]
                slots = near + (scores.topk(m).indices + first).tolist()
                weights = (q[b, g, :, 0] @ k[b, g, slots].T * scale).softmax(-1)
                require_close(out[b, g, :, 0], weights @ v[b, g, slots], 1e-5, f"{where}: output")
        fetched, looked = B * G * m * 2 * D * 4, B * G * len(far) * C * 4
        read, expected = reader.read_bytes(), {
            "payload": B * G * len(near) * 2 * D * 4, "meta": looked, "host": fetched,
            "moved": fetched + looked,
        }  # fmt: skip
        require(read == expected, f"{where}: {read} bytes read, not {expected}")
    held = codec.nbytes()
    require(held["host"] == B * G * len(far) * 2 * D * 4, f"{held}: not all far tokens lie on the host")
    require_error(ValueError, lambda: TailorKV(0, 2), "budget 0")


@check
def check_tailorkv_spread(spread: Callable) -> None:
    """`spread(weights [..., T, S], seen [T], share)` -> 1 - mean mass of the largest 5 % of what is seen."""
    draw = torch.Generator().manual_seed(1)
    T, S = 32, 200
    seen = torch.arange(S - T + 1, S + 1)
    causal = torch.arange(S) < seen[:, None]
    uniform = causal / seen[:, None]
    mass = [-(-n // 20) / n for n in seen.tolist()]
    require_close(
        spread(uniform, seen), torch.tensor(1 - sum(mass) / T), 1e-5, "uniform attention: P is 0.95"
    )
    one = torch.nn.functional.one_hot(seen - 1, S).float()
    require_close(spread(one, seen), torch.tensor(0.0), 1e-6, "attention to one token: P is 0")
    weights = torch.randn(2, 3, T, S, generator=draw).mul(2).masked_fill(~causal, -torch.inf).softmax(-1)
    mass = [
        weights[..., t, : int(n)].sort(-1, descending=True).values[..., : -(-int(n) // 20)].sum(-1).mean()
        for t, n in enumerate(seen)
    ]
    found = spread(weights, seen)
    require_close(found, 1 - torch.stack(mass).mean(), 1e-5, "random attention under the causal mask: P")
    require(0 <= float(found) <= 1, f"P is {float(found)}")
