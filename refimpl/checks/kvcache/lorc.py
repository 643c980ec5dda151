"""The checks of LoRC (KV-cache spec, section 19)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close, require_error
from refimpl.checks.tiny import HEADS, LAYERS, WIDTH, tiny

IMPLEMENTATION = {
    "lorc": "refimpl.kvcache.lorc:Latent",
    "progressive_ranks": "refimpl.kvcache.lorc:progressive_ranks",
}
D = WIDTH // HEADS
RANKS = [5, 3, 2]


@check
def check_lorc(Latent: Callable) -> None:
    """`Latent(model, ranks, per_head=)` with `append`, `read` and `nbytes` stores what x A gives, and reads
    keys and values of the rank-r weights, for heads by themselves and for all heads of a layer together."""
    for family, per_head in (("gpt2", True), ("llama", False), ("llama", True)):
        model = tiny(family)
        G = model.config.num_attention_heads if family == "gpt2" else 2
        codec = Latent(model, RANKS, per_head=per_head)
        for l in range(LAYERS):
            mine, where = codec.fresh(), f"{family}, layer {l}, heads {'apart' if per_head else 'together'}"
            mine.layer = l
            x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(l))
            (W_k, b_k), (W_v, b_v) = _projections(model, l)
            k, v = (_heads(x @ W + b, G) for W, b in ((W_k, b_k), (W_v, b_v)))
            for start, stop in ((0, 4), (4, 5), (5, 7)):
                mine.append(k[:, :, start:stop], v[:, :, start:stop])
            groups = G if per_head else 1
            for name, got, W, b in zip("kv", mine.read(), (W_k, W_v), (b_k, b_v), strict=True):
                expected = _heads(x @ _low_rank(W, groups, RANKS[l]) + b, G)
                require_close(got, expected, 1e-5, f"{where}: {name} of weights of rank {RANKS[l]}")
            size, entries = sum(mine.nbytes().values()), 2 * 7 * groups * 2 * RANKS[l]
            require(
                size == 4 * entries, f"{where}: {size} bytes for {entries} latent numbers, not {4 * entries}"
            )
    require_error(ValueError, lambda: Latent(tiny("llama"), [1, 1]), "two ranks for three layers")
    require_error(ValueError, lambda: Latent(tiny("llama"), [1, 0, 1]), "rank 0")
    require_error(ValueError, lambda: Latent(tiny("llama"), [1, 1, 2 * D + 1]), "rank above the width")


@check
def check_progressive_ranks(progressive_ranks: Callable) -> None:
    """`progressive_ranks(kappa [L, 2], r_max, r_min)` falls with the logarithm of the product of all
    condition numbers from a layer on."""
    kappa = torch.tensor([[10.0, 10.0], [2.0, 50.0], [1e4, 1.0], [1.0, 100.0]])
    # Products from each layer on: 10^10, 10^8, 10^6 and 10^2, fallen by 0, 1/4, 1/2 and all of their span.
    got = list(progressive_ranks(kappa, 32, 8))
    require(got == [32, 26, 20, 8], f"ranks {got} instead of [32, 26, 20, 8] for log10 products 10, 8, 6, 2")
    got = list(progressive_ranks(kappa, 16, 16))
    require(got == [16] * 4, f"r_min = r_max = 16 is uniform, got {got}")
    require_error(ValueError, lambda: progressive_ranks(kappa, 8, 9), "r_min above r_max")
    require_error(
        ValueError, lambda: progressive_ranks(torch.full((4, 2), torch.inf), 8, 4), "infinite kappa"
    )


def _projections(model: nn.Module, l: int) -> list[tuple[Tensor, Tensor | float]]:
    """(W [d, G·D], bias) of keys and values, x W convention."""
    if model.config.model_type == "gpt2":
        attn = model.transformer.h[l].attn.c_attn  # Conv1D stores [in, out]
        return list(zip(*(t.detach().split(WIDTH, -1)[1:] for t in (attn.weight, attn.bias)), strict=True))
    attn = model.model.layers[l].self_attn
    return [(linear.weight.detach().T, 0.0) for linear in (attn.k_proj, attn.v_proj)]


def _low_rank(W: Tensor, groups: int, rank: int) -> Tensor:
    """The best approximation of rank r of each group of columns, by the eigenvectors of W'W."""
    parts = []
    for part in W.double().chunk(groups, -1):
        vectors = torch.linalg.eigh(part.T @ part).eigenvectors[:, -rank:]
        parts.append(part @ vectors @ vectors.T)
    return torch.cat(parts, -1).float()


def _heads(t: Tensor, G: int) -> Tensor:
    return t.unflatten(-1, (G, -1)).transpose(1, 2)
