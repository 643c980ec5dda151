"""Calibration: what a model's linear layers are fed, collected by hooks, once for layers with one input.

Calibration text must not be the text on which a method is measured.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone

__all__ = ["Hidden", "Stats", "calibrate", "collect", "input_groups", "stats_of"]

_STAGES = {"q": 0, "k": 0, "v": 0, "o": 1, "fc": 2, "gate": 2, "up": 2, "down": 3}


@dataclass
class Stats:
    """Statistics of the inputs x [d_in] of a layer over N calibration tokens.

    - H [d_in, d_in], float64: 2/N sum x x' (papers also divide by sequences: a constant factor).
    - absmax, absmean, sqnorm [d_in], float64: max |x_j|, mean |x_j|, sum x_j^2 (Wanda's norm squared).
    - tokens: N.
    - X [n, d_in]: the first n inputs themselves, if they were asked for.
    """

    H: Tensor
    absmax: Tensor
    absmean: Tensor
    sqnorm: Tensor
    tokens: int
    X: Tensor | None = None


def stats_of(X: Tensor, keep: int = 0) -> Stats:
    """Statistics of inputs that are at hand.

    Parameters: `X` [N, d_in], floating point; `keep`, how many rows stay in `Stats.X`.
    Raises ValueError for anything but a finite matrix, or a negative keep.

    >>> stats = stats_of(torch.tensor([[1.0, 0.0], [1.0, -2.0]]))
    >>> stats.H.tolist(), stats.absmax.tolist(), stats.absmean.tolist(), stats.sqnorm.tolist()
    ([[2.0, -2.0], [-2.0, 4.0]], [1.0, 2.0], [1.0, 1.0], [2.0, 4.0])
    """
    sums = _Sums(keep)
    sums.add(X)
    return sums.stats()


def collect(modules: Mapping[str, nn.Module], run: Callable[[], object], keep: int = 0) -> dict[str, Stats]:
    """Run something and return the statistics of what each module was fed meanwhile, by the given names.

    Parameters: `modules`, called with their input as first argument; `run`, without arguments; `keep`, inputs
    that stay as they are in `Stats.X` (AWQ and LLM.int8() look at single inputs).
    Raises ValueError where a module was not called, or was fed numbers that are not finite.

    >>> layer = nn.Linear(3, 2)
    >>> collect({"fc": layer}, lambda: layer(torch.ones(4, 5, 3)))["fc"].tokens
    20
    """
    sums = {name: _Sums(keep) for name in modules}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: sums[name].add(inputs[0]))
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    if unused := [name for name in modules if not sums[name].tokens]:
        raise ValueError(f"modules: {unused[0]} was not called")
    return {name: of_one.stats() for name, of_one in sums.items()}


def input_groups(bb: Backbone, layer: int) -> list[tuple[str, ...]]:
    """Names of a block's linear modules, those with one input together, in the order of computation:
    (q, k, v), (o), (gate, up), (down); GPT-2 has one `c_attn` for q, k, v and one `c_fc`.

    >>> from refimpl.checks.tiny import tiny
    >>> [len(group) for group in input_groups(Backbone(tiny("llama")), 0)]
    [3, 1, 2, 1]
    >>> input_groups(Backbone(tiny("gpt2")), 0)[0]
    ('transformer.h.0.attn.c_attn',)
    """
    stages: dict[int, dict[str, None]] = {}
    for ref in bb.linears():
        if ref.layer == layer:
            stages.setdefault(_STAGES[ref.role], {})[ref.name] = None
    return [tuple(stages[stage]) for stage in sorted(stages)]


def calibrate(model: nn.Module, ids: LongTensor, *, keep: int = 0, batch: int = 8) -> dict[str, Stats]:
    """Statistics of the inputs of every linear layer of a model's blocks, from one pass.

    Parameters: `model`, of a family of `refimpl.backbone`; `ids` [B, T] without padding; `keep`: see
    `collect`; `batch`, rows at a time. Layers with one input share one `Stats` object.
    Returns module name -> Stats. Raises TypeError or ValueError for a model or ids that `Backbone` refuses.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> stats = calibrate(tiny("llama"), random_ids(2, 16))
    >>> stats["model.layers.2.mlp.down_proj"].H.shape, len(stats)
    (torch.Size([40, 40]), 21)
    """
    bb = Backbone(model)
    hidden = Hidden(bb, ids, batch)
    found: dict[str, Stats] = {}
    for layer in range(bb.n_layers):
        found |= hidden.stats(layer, input_groups(bb, layer), keep)
        hidden.advance(layer)
    return found


class Hidden:
    """The hidden states of calibration tokens in front of one block, moved on block by block.

    Parameters: `bb`; `ids` [B, T] without padding, a non-empty LongTensor; `batch`, rows at a time.
    Raises ValueError for other ids, or a batch below 1.
    """

    def __init__(self, bb: Backbone, ids: LongTensor, batch: int = 8) -> None:
        bb.check_ids(ids)
        if type(batch) is not int or batch < 1:
            raise ValueError(f"batch must be an integer >= 1, got {batch!r}")
        self.bb, self.positions = bb, torch.arange(ids.shape[1], device=ids.device)
        with torch.no_grad():
            self.rows = [bb.embed(part, self.positions) for part in ids.split(batch)]

    def stats(self, layer: int, groups: Iterable[tuple[str, ...]], keep: int = 0) -> dict[str, Stats]:
        """The statistics of the modules of block `layer` that `groups` name, one for each group; the hidden
        states stay in front of it."""
        first = {group[0]: self.bb.model.get_submodule(group[0]) for group in groups}
        found = collect(first, lambda: self._outputs(layer), keep)
        return {name: found[group[0]] for group in groups for name in group}

    def advance(self, layer: int) -> None:
        """Move behind block `layer`, as the model is now."""
        with torch.no_grad():
            self.rows = self._outputs(layer)

    @torch.no_grad()
    def stages(self, layer: int, keep: int = 0) -> Iterator[dict[str, Stats]]:
        """The statistics of the groups of block `layer`, one after the other; then the states are behind it.

        Each is computed when it is asked for, with the modules as they are then: those that were replaced
        meanwhile are in the inputs of the next. That is GPTQ's "true-sequential" order at the price of one
        pass and a second one through the MLP, whose inner states are not kept.
        """
        bb, pos, mask = self.bb, self.positions, self._mask(layer)
        groups = iter(input_groups(bb, layer))

        def seen(inputs: Iterable[Tensor]) -> dict[str, Stats]:
            sums = _Sums(keep)
            for x in inputs:
                sums.add(x)
            return dict.fromkeys(next(groups), sums.stats())

        def attend(x: Tensor) -> Tensor:
            q, k, v = bb.qkv(layer, bb.ln1(layer, x))
            return bb.attention(layer, bb.rot(q, pos), bb.rot(k, pos), v, mask)

        def inner(x: Tensor) -> Tensor:
            parts, x = bb.layer(layer), bb.ln2(layer, x)
            return parts.act(parts.up(x)) if parts.gate is None else parts.act(parts.gate(x)) * parts.up(x)

        yield seen(bb.ln1(layer, x) for x in self.rows)
        heads = [attend(x) for x in self.rows]
        yield seen(z.transpose(1, 2).flatten(-2) for z in heads)
        for i, z in enumerate(heads):
            self.rows[i] = self.rows[i] + bb.o_proj(layer, z)
        heads.clear()
        yield seen(bb.ln2(layer, x) for x in self.rows)
        yield seen(inner(x) for x in self.rows)
        for i, x in enumerate(self.rows):
            self.rows[i] = x + bb.mlp(layer, bb.ln2(layer, x))

    def _mask(self, layer: int) -> Tensor | None:
        return None if self.bb.window(layer) is None else self.bb.mask(layer, len(self.positions))

    def _outputs(self, layer: int) -> list[Tensor]:
        mask = self._mask(layer)
        return [self.bb.block(layer, x, self.positions, mask) for x in self.rows]


class _Sums:
    def __init__(self, keep: int) -> None:
        if type(keep) is not int or keep < 0:
            raise ValueError(f"keep must be an integer >= 0, got {keep!r}")
        self.keep, self.tokens, self.kept = keep, 0, []

    def add(self, x: Tensor) -> None:
        refused = f"inputs must be finite numbers [..., d_in], got {x.dtype} {list(x.shape)}"
        if not x.is_floating_point() or x.numel() == 0:
            raise ValueError(refused)
        dtype, x = x.dtype, x.detach().flatten(0, -2).double()
        size = x.abs()
        largest = size.amax(0)  # NaN where a NaN is
        if not bool(largest.isfinite().all()):
            raise ValueError(refused)
        if self.tokens == 0:
            zeros = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            self.H = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
            self.absmax, self.abssum = zeros.clone(), zeros.clone()
        if (left := self.keep - self.tokens) > 0:
            self.kept.append(x[:left].to(dtype))
        self.H.addmm_(x.T, x)
        self.absmax = torch.maximum(self.absmax, largest)
        self.abssum += size.sum(0)
        self.tokens += len(x)

    def stats(self) -> Stats:
        N = self.tokens
        X = torch.cat(self.kept) if self.kept else None
        return Stats(2 / N * self.H, self.absmax, self.abssum / N, self.H.diagonal().clone(), N, X)
