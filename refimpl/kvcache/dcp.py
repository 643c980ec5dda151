"""Dynamic Context Pruning: each layer learns which tokens of its context nobody will need again.

Anagnostidis et al., 2305.15805. Beside its heads a layer gets a small query and key: token n lets token j go
for good when their product says so. While training, "go" is a number between 0 and 1 that is added to the
attention as a logarithm; afterwards it is a step, and the key, the value and the small key leave the cache
(`refimpl.kvcache.dcp_policy`). The same masks serve both, so training sees what decoding does.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.paths import atomic_write

__all__ = ["ContextPruning", "Interaction", "keep_probabilities", "load_pruning", "save_pruning",
           "sparse_sigmoid", "sparsity"]  # fmt: skip


def sparse_sigmoid(z: Tensor, alpha: float) -> Tensor:
    """Return the first entry of alpha-entmax([z, 0]): a sigmoid that reaches 0 and 1 exactly if alpha > 1.

    The gate of 2305.15805. With a = alpha - 1 it is the p with (p^a - (1-p)^a) / a = z; alpha = 1 gives the
    logistic function, alpha = 2 clamp((z+1)/2, 0, 1), alpha = inf the step z > 0 (without gradient). It is
    0 or 1 where |z| >= 1/a, and there its gradient is 0.

    Parameters: z of any shape, floating; alpha >= 1, in training 1 to 8.
    Raises ValueError for alpha < 1 or NaN, TypeError for integers.

    >>> [round(p, 4) for p in sparse_sigmoid(torch.tensor([-2., 0., 0.5]), 2.0).tolist()]
    [0.0, 0.5, 0.75]
    """
    if not alpha >= 1:
        raise ValueError(f"alpha: {alpha}; allowed: 1 to infinity")
    if not z.is_floating_point():
        raise TypeError(f"z: {z.dtype}; allowed: floating types")
    if alpha == math.inf:
        return (z > 0).to(z.dtype)
    return torch.sigmoid(z) if alpha == 1 else _SparseSigmoid.apply(z, alpha - 1)


class _SparseSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, a: float) -> Tensor:
        # Bisect the smaller of p and 1 - p, to 2^-31. For a near 0 both powers are near 1: float64.
        target = -a * (z.detach().double() if a < 0.1 else z.detach()).abs()
        small = torch.zeros_like(target)
        for k in range(2, 32):
            middle = small + 2.0**-k
            small = torch.where(middle**a - (1 - middle) ** a < target, middle, small)
        small = small.masked_fill(target <= -1, 0).to(z.dtype)
        p = torch.where(z > 0, 1 - small, small)
        ctx.save_for_backward(small)
        ctx.a = a
        return p

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (small,) = ctx.saved_tensors
        slope = 1 / (small ** (ctx.a - 1) + (1 - small) ** (ctx.a - 1))
        return grad * slope.masked_fill(small == 0, 0), None


def keep_probabilities(gate: Tensor, real: Tensor | None = None) -> Tensor:
    """Return how much of token j is left for query n: the product of its gates since it came.

    As in 2305.15805, keep[n, j] = prod of gate[m, j] over j < m <= n. A token drops neither itself nor what
    comes after it. At j > n the result is 1 (causality is the attention's business).

    Parameters: gate [B, T, T] in [0, 1], query n in rows; real [B, T], False at padding, which drops nothing.

    >>> keep_probabilities(torch.full((1, 3, 3), 0.5))[0].tolist()
    [[1.0, 1.0, 1.0], [0.5, 1.0, 1.0], [0.25, 0.5, 1.0]]
    """
    T = gate.shape[-1]
    past = torch.ones(T, T, dtype=torch.bool, device=gate.device).tril(-1)
    if real is not None:
        past = past & real.bool()[:, :, None]
    return gate.masked_fill(~past, 1).cumprod(-2)


class Interaction(nn.Module):
    """The small query and key of one layer: z[n, j] = q(x_n) · k(x_j) / sqrt(r) + b.

    Parameters: d, model width; r, width of the small query and key; bias, first value of b (the larger, the
    more is kept at the start); generator, a CPU `torch.Generator`. Weights are drawn from N(0, 1/d).

    >>> Interaction(8, 4, 2.0, torch.Generator().manual_seed(0))(torch.zeros(1, 3, 8))[0, 0].tolist()
    [2.0, 2.0, 2.0]
    """

    def __init__(self, d: int, r: int, bias: float, generator: torch.Generator) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the constructors draw from the global generator
            self.q, self.k = nn.Linear(d, r, bias=False), nn.Linear(d, r, bias=False)
        self.b = nn.Parameter(torch.tensor(float(bias)))
        with torch.no_grad():
            for linear in (self.q, self.k):
                linear.weight.copy_(torch.randn(r, d, generator=generator) / math.sqrt(d))

    def forward(self, x: Tensor) -> Tensor:
        """z [B, T, T] of the normed inputs x [B, T, d]."""
        return self.score(self.q(x), self.k(x))

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """z [B, T, S] of small queries [B, T, r] and small keys [B, S, r]."""
        return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + self.b


class ContextPruning(nn.Module):
    """The add-on of a whole model: one `Interaction` per layer.

    It has 2 · d · r + 1 numbers per layer; r numbers are cached for a token beside its keys and values.

    Parameters: d, n_layers, of the model; r >= 1 (released script: 64 at d = 768); bias, first value of b (2
    in that script); generator, a CPU `torch.Generator`.
    Raises ValueError for sizes below 1, TypeError for something that is no generator.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> pruning = ContextPruning(32, 3, 4, torch.Generator().manual_seed(0), bias=50.0)  # drops nothing
    >>> model, ids = tiny("llama"), random_ids(1, 6)
    >>> torch.allclose(pruning(model, ids, 2.0)[0], model(ids).logits, atol=1e-5)
    True
    """

    def __init__(
        self, d: int, n_layers: int, r: int, generator: torch.Generator, *, bias: float = 2.0
    ) -> None:
        super().__init__()
        for name, value in (("d", d), ("n_layers", n_layers), ("r", r)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {value!r}; allowed: integers from 1")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        self.r = r
        self.layers = nn.ModuleList(Interaction(d, r, bias, generator) for _ in range(n_layers))

    def check(self, bb: Backbone) -> None:
        """ValueError unless this add-on fits the model."""
        d = self.layers[0].q.in_features
        if (d, len(self.layers)) != (bb.d, bb.n_layers):
            raise ValueError(
                f"pruning: made for {len(self.layers)} layers of width {d}, "
                f"the model has {bb.n_layers} of {bb.d}"
            )

    def keep(self, l: int, x: Tensor, alpha: float, real: Tensor | None = None) -> Tensor:
        """What is left of each token for each query, [B, T, T], by layer l's normed inputs x [B, T, d]."""
        return keep_probabilities(sparse_sigmoid(self.layers[l](x), alpha), real)

    def forward(
        self, model: nn.Module, ids: LongTensor, alpha: float,
        attention_mask: Tensor | None = None, position_ids: LongTensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Run a model with pruned attention: softmax(q k' · scale + log keep) v in every head of a layer.

        Implements 2305.15805, section 3. Small queries and keys read what the heads read, the normed input of
        the layer, and know no positions. Gradients reach the model and the add-on.

        Parameters
        - model: one of `refimpl.backbone.FAMILIES`, on the add-on's device.
        - ids [B, T]; attention_mask [B, T], 0 at padding; position_ids as in `Backbone.forward`.
        - alpha: see `sparse_sigmoid`; infinity for what decoding with the policy computes.

        Returns logits [B, T, V] and for each layer keep [B, T, T], of which the part j <= n means something.
        Raises ValueError for ids, a mask or an add-on that do not fit.
        """
        bb = Backbone(model)
        bb.check_ids(ids)
        self.check(bb)
        if attention_mask is not None and attention_mask.shape != ids.shape:
            got = list(attention_mask.shape)
            raise ValueError(f"attention_mask: shape {got}; allowed: {list(ids.shape)}")
        T = ids.shape[1]
        pos = torch.arange(T, device=ids.device) if position_ids is None else position_ids
        itself = torch.eye(T, dtype=torch.bool, device=ids.device)  # or a query at padding would see nothing
        x, keeps = bb.embed(ids, pos), []
        for l in range(bb.n_layers):
            h = bb.ln1(l, x)
            keep = self.keep(l, h, alpha, attention_mask)
            # The smallest normal number keeps the logarithm and its gradient finite; e^-87 is no weight.
            logs = (keep + torch.finfo(keep.dtype).tiny).log()[:, None]
            bias = logs.masked_fill(~(bb.mask(l, T, attention_mask) | itself), -math.inf)
            q, k, v = bb.qkv(l, h)
            x = x + bb.o_proj(l, bb.attention(l, bb.rot(q, pos), bb.rot(k, pos), v, bias))
            x = x + bb.mlp(l, bb.ln2(l, x))
            keeps.append(keep)
        return bb.head(bb.ln_final(x)), keeps


def sparsity(keeps: list[Tensor], real: Tensor | None = None) -> Tensor:
    """Return the mean of keep over all layers and pairs j < n: the part of the past that is still there.

    The penalty of 2305.15805, which training multiplies by gamma. The last query is left out, since nothing
    is predicted from it. (The released code also averages over the pairs j >= n, which are 1: its gamma
    counts half.) Raises ValueError for fewer than three tokens.

    Parameters: keeps, from `ContextPruning`; real [B, T], False at padding.

    >>> sparsity([keep_probabilities(torch.full((1, 3, 3), 0.5))]).item()
    0.5
    """
    T = keeps[0].shape[-1]
    if T < 3:
        raise ValueError(f"keeps: {T} tokens; allowed: 3 and more")
    pairs = torch.ones(T, T, dtype=torch.bool, device=keeps[0].device).tril(-1)
    pairs[-1] = False
    pairs = pairs.expand(keeps[0].shape)
    if real is not None:
        pairs = pairs & real.bool()[:, None, :] & real.bool()[:, :, None]
    return torch.stack([(keep * pairs).sum() for keep in keeps]).mean() / pairs.sum()


def save_pruning(path: str | Path, pruning: ContextPruning, **about: str) -> None:
    """Write an add-on as safetensors, `about` (model, revision, gamma, ...) as the file's metadata."""
    from safetensors.torch import save

    tensors = {name: p.detach().cpu().contiguous() for name, p in pruning.state_dict().items()}
    atomic_write(path, save(tensors, metadata={name: str(value) for name, value in about.items()}))


def load_pruning(path: str | Path, *, revision: str | None = None) -> tuple[ContextPruning, dict[str, str]]:
    """Read an add-on and its metadata.

    Raises ValueError if it was trained beside a model of another revision, FileNotFoundError.
    """
    from safetensors import safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no add-on at {path}")
    with safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    if revision is not None and about.get("revision") != revision:
        raise ValueError(f"revision: {path} was trained beside {about.get('revision')}, not {revision}")
    n_layers = 1 + max(int(name.split(".")[1]) for name in tensors)
    r, d = tensors["layers.0.q.weight"].shape
    pruning = ContextPruning(d, n_layers, r, torch.Generator())
    pruning.load_state_dict(tensors)
    return pruning.eval(), about
