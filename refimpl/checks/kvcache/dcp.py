"""The checks of Dynamic Context Pruning (KV-cache spec, section 14)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close, require_error
from refimpl.checks.tiny import HEADS, LAYERS, WIDTH, random_ids, tiny

IMPLEMENTATION = {
    "sparse_sigmoid": "refimpl.kvcache.dcp:sparse_sigmoid",
    "context_pruning": "refimpl.kvcache.dcp:ContextPruning",
    "context_pruning_cache": "refimpl.kvcache.dcp_policy:decode",
}
D = WIDTH // HEADS


@check
def check_sparse_sigmoid(sparse_sigmoid: Callable) -> None:
    """`sparse_sigmoid(z, alpha)` is the first entry of alpha-entmax([z, 0]), with its gradient."""
    z = torch.linspace(-4, 4, 161)
    closed = {1.0: z.sigmoid(), 2.0: ((z + 1) / 2).clamp(0, 1), float("inf"): (z > 0).float()}
    for alpha, expected in closed.items():
        require_close(sparse_sigmoid(z, alpha), expected, 1e-6, f"alpha {alpha}")
    require_close(
        sparse_sigmoid(z, 1.00001), z.sigmoid(), 1e-4, "alpha just above 1 is the logistic function"
    )
    for alpha in (1.1, 1.5, 3.0, 8.0):
        require_close(sparse_sigmoid(z, alpha), _entmax(z, alpha), 1e-5, f"alpha {alpha}, against entmax")
        at = torch.tensor([-2.0, -0.3, -0.05, 0.0, 0.04, 0.1, 0.6, 3.0], dtype=torch.float64)
        at.requires_grad_(True)
        (slope,) = torch.autograd.grad(sparse_sigmoid(at, alpha).sum(), at)
        h = 1e-4
        expected = (_entmax(at.detach() + h, alpha) - _entmax(at.detach() - h, alpha)) / (2 * h)
        require_close(
            slope, expected, 1e-3 * float(expected.max()), f"alpha {alpha}: gradient, by differences"
        )
    require_error(ValueError, lambda: sparse_sigmoid(z, 0.5), "alpha below 1")
    require_error(ValueError, lambda: sparse_sigmoid(z, float("nan")), "alpha NaN")


@check
def check_context_pruning(ContextPruning: Callable) -> None:
    """`ContextPruning(d, n_layers, r, generator, bias=)` called with (model, ids, alpha) gives logits and
    what is left of each token; with the step function they are those of decoding with real deletion."""
    for family in ("llama", "gpt2"):
        model, ids = tiny(family), random_ids(2, 14)
        pruning = _add_on(ContextPruning)
        with torch.no_grad():
            got, keeps = pruning(model, ids, float("inf"))
            for row in range(2):
                expected, held = _deletion(model, pruning, ids[row])
                require_close(got[row], expected, 1e-5, f"{family}, step function: logits against deletion")
                left = torch.stack([keep[row].tril().sum(-1) for keep in keeps])
                require_close(left, held, 0, f"{family}, step function: tokens left after each token")
            soft, keeps = pruning(model, ids, 2.0)
            h = _norm(model, 0)(_embedded(model, ids))
            gate = _entmax(_scores(pruning.layers[0], h, h), 2.0)
            require_close(keeps[0].tril(), _naive_keep(gate), 1e-5, f"{family}, alpha 2: what layer 0 keeps")
            require(
                bool((soft - got).abs().max() > 1e-3), f"{family}: alpha 2 and the step give the same logits"
            )
            all_kept = ContextPruning(WIDTH, LAYERS, 4, torch.Generator().manual_seed(3), bias=60.0)
            require_close(all_kept(model, ids, 2.0)[0], model(ids).logits, 1e-5, f"{family}: nothing pruned")
    require_error(ValueError, lambda: pruning(model, ids[:, :0], 2.0), "no token")
    require_error(
        ValueError, lambda: pruning(tiny("gpt2", num_hidden_layers=2), ids, 2.0), "two layers of three"
    )


@check
def check_context_pruning_cache(decode: Callable) -> None:
    """`decode(model, pruning, ids)` feeds ids [B, T] token by token: logits [B, T, V] and slots held by every
    layer after each token [L, B, T] are those of lists from which entries are really deleted."""
    for family in ("llama", "gpt2"):
        model, ids = tiny(family), random_ids(2, 14)
        pruning = _add_on(_AddOn)
        with torch.no_grad():
            got, held = decode(model, pruning, ids)
            for row in range(2):
                expected, slots = _deletion(model, pruning, ids[row])
                require_close(held[:, row].float(), slots, 0, f"{family}: slots held after each token")
                require_close(got[row], expected, 1e-5, f"{family}: logits")


def _add_on(ContextPruning: Callable) -> nn.Module:
    """An add-on that drops a part of the context in every layer."""
    return ContextPruning(WIDTH, LAYERS, 8, torch.Generator().manual_seed(1), bias=1.0)


class _AddOn(nn.Module):
    """What decoding needs of an add-on: per layer a small query, a small key, a bias and their score."""

    def __init__(self, d: int, n_layers: int, r: int, generator: torch.Generator, *, bias: float) -> None:
        super().__init__()
        self.r = r
        self.layers = nn.ModuleList(_Interaction(d, r, generator, bias) for _ in range(n_layers))

    def check(self, backbone: object) -> None:
        """Fits."""


class _Interaction(nn.Module):
    def __init__(self, d: int, r: int, generator: torch.Generator, bias: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the constructors draw from the global generator
            self.q, self.k = nn.Linear(d, r, bias=False), nn.Linear(d, r, bias=False)
        self.b = bias
        with torch.no_grad():
            for linear in (self.q, self.k):
                linear.weight.copy_(torch.randn(r, d, generator=generator) / d**0.5)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + self.b


def _entmax(z: Tensor, alpha: float) -> Tensor:
    """First entry of alpha-entmax([z, 0]): bisect the threshold tau at which both entries sum to 1."""
    a, dtype, z = alpha - 1, z.dtype, z.double()
    high = torch.maximum(a * z, torch.zeros_like(z))
    low = high - 1
    for _ in range(80):
        tau = (low + high) / 2
        total = (a * z - tau).clamp(min=0) ** (1 / a) + (-tau).clamp(min=0) ** (1 / a)
        low, high = torch.where(total >= 1, tau, low), torch.where(total >= 1, high, tau)
    return ((a * z - low).clamp(min=0) ** (1 / a)).to(dtype)


def _scores(interaction: nn.Module, x_n: Tensor, x_j: Tensor) -> Tensor:
    q, k = x_n @ interaction.q.weight.T, x_j @ interaction.k.weight.T
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + interaction.b


def _naive_keep(gate: Tensor) -> Tensor:
    B, T, _ = gate.shape
    keep = torch.zeros(B, T, T)
    for n in range(T):
        for j in range(n + 1):
            keep[:, n, j] = 1
            for m in range(j + 1, n + 1):
                keep[:, n, j] *= gate[:, m, j]
    return keep


def _deletion(model: nn.Module, pruning: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Decode one row with lists of (position, key, value, normed input); entries that z <= 0 lets go are
    taken out before the heads look. Logits [T, V], entries left [L, T]."""
    lists: list[list[tuple]] = [[] for _ in range(LAYERS)]
    logits, held = [], torch.zeros(LAYERS, len(ids))
    for t, token in enumerate(ids):
        x = _embedded(model, token.view(1, 1), t)[0, 0]
        for l in range(LAYERS):
            h = _norm(model, l)(x)
            q, k, v = _qkv(model, l, h, t)
            lists[l] = [e for e in lists[l] if _scores(pruning.layers[l], h[None], e[3][None]).item() > 0]
            lists[l].append((t, k, v, h))
            held[l, t] = len(lists[l])
            K, V = (torch.stack([e[i] for e in lists[l]], 1) for i in (1, 2))  # [G, S, D]
            K, V = (m.repeat_interleave(HEADS // len(m), 0) for m in (K, V))
            weights = ((K @ q[:, :, None])[..., 0] / D**0.5).softmax(-1)
            x = _rest(model, l, x, (weights[:, None] @ V).flatten())
        logits.append(_head(model, x))
    require(0 < held.sum() < LAYERS * len(ids) * (len(ids) + 1) / 2, "the reference deletes nothing")
    return torch.stack(logits), held


# --- tiny models, step by step ------------------------------------------------------------------------------
def _is_gpt2(model: nn.Module) -> bool:
    return model.config.model_type == "gpt2"


def _embedded(model: nn.Module, ids: Tensor, start: int = 0) -> Tensor:
    x = model.get_input_embeddings()(ids)
    if _is_gpt2(model):
        x = x + model.transformer.wpe(torch.arange(start, start + ids.shape[1]))
    return x


def _norm(model: nn.Module, l: int) -> nn.Module:
    return model.transformer.h[l].ln_1 if _is_gpt2(model) else model.model.layers[l].input_layernorm


def _qkv(model: nn.Module, l: int, h: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [H, D], k and v [G, D] of one normed input."""
    if _is_gpt2(model):
        return tuple(part.view(HEADS, D) for part in model.transformer.h[l].attn.c_attn(h[None])[0].chunk(3))
    attn = model.model.layers[l].self_attn
    q, k, v = (linear(h).view(-1, D) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
    angle = t * model.model.rotary_emb.inv_freq
    cos, sin = angle.cos(), angle.sin()

    def rotate(m: Tensor) -> Tensor:
        a, b = m.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    return rotate(q), rotate(k), v


def _rest(model: nn.Module, l: int, x: Tensor, z: Tensor) -> Tensor:
    """The residual after output projection and MLP."""
    if _is_gpt2(model):
        block = model.transformer.h[l]
        x = x + block.attn.c_proj(z[None])[0]
        return x + block.mlp(block.ln_2(x)[None])[0]
    block = model.model.layers[l]
    x = x + block.self_attn.o_proj(z)
    return x + block.mlp(block.post_attention_layernorm(x))


def _head(model: nn.Module, x: Tensor) -> Tensor:
    return model.lm_head((model.transformer.ln_f if _is_gpt2(model) else model.model.norm)(x))
