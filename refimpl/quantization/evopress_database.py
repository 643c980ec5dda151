"""The databases of EvoPress: every part of a model at every level, ready to be swapped in place.

A part is a linear layer at several bit widths (GPTQ) or sparsities (SparseGPT), or an attention, an MLP or a
block that is kept or dropped (arXiv 2410.14649, section 4). The loss is KL(dense model || candidate), mean
over tokens; the dense model's probabilities are computed once. A model that is searched holds float weights,
overwritten in place; `Database.install` then gives it the compressed layers whose bytes were counted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.lora import LoRA
from refimpl.quantization.calibrate import Hidden, input_groups
from refimpl.quantization.evopress_levels import Levels
from refimpl.quantization.linear import CompressedLinear, check_replaceable, dense_weight, replace_linear
from refimpl.quantization.model import Recipe

__all__ = ["Choice", "Database", "ZeroLinear", "drop_database", "layer_database"]


class ZeroLinear(CompressedLinear):
    """A linear layer that is gone: its output is 0 and it stores nothing.

    >>> layer = ZeroLinear((2, 3), {})
    >>> layer(torch.ones(1, 3)), layer.nbytes()
    (tensor([[0., 0.]]), 0)
    """

    def dequantize(self) -> Tensor:
        return torch.zeros(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Choice(NamedTuple):
    """A part at one level: `floats`, name of a linear layer -> weight [d_out, d_in] and bias to search with;
    `layers`, what replaces linear layers at the end (none: they stay); `nbytes` of the part."""

    floats: dict[str, tuple[Tensor, Tensor | None]]
    layers: dict[str, CompressedLinear]
    nbytes: int


class Database:
    """A model and the choices for its parts: a `Problem` of `refimpl.quantization.evopress`.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, uncompressed; its linear layers are overwritten by each use.
    ids : [N, T] token ids without padding, the text on which losses are measured (4 N T V bytes of
        probabilities are kept).
    choices : for each part its choices, level 0 first, each level more of the same number of bytes.
    kinds : for each part a word; parts of one kind and step form a group.
    batch : rows of ids at a time.

    Attributes: `groups`, `n_levels`, `parts` (their names). Raises TypeError or ValueError for a model or ids
    that do not fit, and where a part's levels are not equally far apart in bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: LongTensor,
        choices: dict[str, Sequence[Choice]],
        kinds: Sequence[str],
        batch: int = 8,
    ) -> None:
        if any(isinstance(module, LoRA) for module in model.modules()):
            raise ValueError("model has LoRA factors, which would be lost: merge_lora or remove_lora first")
        self.bb, self.ids, self.batch = Backbone(model), ids, batch
        self.bb.check_ids(ids)
        self.parts, self.choices = tuple(choices), list(choices.values())
        groups: dict[tuple[str, int], list[int]] = {}
        for part, (name, options, kind) in enumerate(zip(self.parts, self.choices, kinds, strict=True)):
            steps = {b.nbytes - a.nbytes for a, b in zip(options, options[1:], strict=False)}
            if len(steps) != 1:
                raise ValueError(
                    f"choices: levels of {name} are {sorted(steps)} bytes apart; must be one step"
                )
            groups.setdefault((kind, steps.pop()), []).append(part)
        self.groups = tuple(map(tuple, groups.values()))
        self.n_levels = tuple(len(options) for options in self.choices)
        names = {name for options in self.choices for choice in options for name in choice.floats}
        self.originals = {name: _copy(model.get_submodule(name)) for name in names}
        with torch.no_grad():
            logits = [model(rows, use_cache=False).logits.float() for rows in ids.split(batch)]
        self.dense = torch.cat(logits).softmax(-1)
        self.negentropy = torch.cat([(z.softmax(-1) * z.log_softmax(-1)).sum(-1) for z in logits])

    def nbytes(self, levels: Levels) -> int:
        """Bytes of all parts at these levels."""
        return sum(self.choices[part][level].nbytes for part, level in enumerate(self._checked(levels)))

    def fitness(self, candidates: Sequence[Levels], tokens: int, generator: torch.Generator) -> list[float]:
        """Mean KL(dense || candidate) of each candidate, nats per token, on `tokens` tokens: whole rows of
        ids drawn without replacement, the last cut. Raises ValueError for more tokens than ids has."""
        N, T = self.ids.shape
        if type(tokens) is not int or not 1 <= tokens <= N * T:
            raise ValueError(f"tokens must be an integer from 1 to {N * T}, N T of ids, got {tokens!r}")
        rows = torch.randperm(N, generator=generator, device=generator.device)[: -(-tokens // T)]
        whole, rest = rows[: tokens // T], rows[tokens // T :]
        parts = [(part, T) for part in whole.split(self.batch) if len(part)]
        parts += [(rest, tokens % T)] if len(rest) else []
        found = []
        for levels in [self._checked(levels) for levels in candidates]:
            self.use(levels)
            found.append(sum(float(self._kl(part, length).sum()) for part, length in parts) / tokens)
        self.restore()
        return found

    def losses(self, levels: Levels) -> Tensor:
        """Mean KL(dense || candidate) of each row of ids, [N], nats per token: the same text every time."""
        self.use(levels)
        N, T = self.ids.shape
        found = torch.cat([self._kl(rows, T) for rows in torch.arange(N).split(self.batch)])
        self.restore()
        return found.double() / T

    def use(self, levels: Levels) -> None:
        """Overwrite the model's weights with these levels' floats."""
        for part, level in enumerate(self._checked(levels)):
            self._write(self.choices[part][level].floats)

    def restore(self) -> None:
        """Give the model its own weights back."""
        self._write(self.originals)

    def install(self, levels: Levels) -> None:
        """Replace linear layers of the model by the compressed ones of these levels; the search is over."""
        levels = self._checked(levels)
        self.restore()
        for part, level in enumerate(levels):
            for name, layer in self.choices[part][level].layers.items():
                replace_linear(self.bb.model, name, layer)

    def _checked(self, levels: Levels) -> Levels:
        fits = len(levels) == len(self.n_levels)
        if not fits or not all(0 <= l < n for l, n in zip(levels, self.n_levels, strict=True)):
            raise ValueError(f"levels must be {len(self.n_levels)} below {self.n_levels}, got {levels}")
        return levels

    @torch.no_grad()
    def _write(self, floats: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        for name, (W, bias) in floats.items():
            layer = self.bb.model.get_submodule(name)
            dense_weight(layer).copy_(W)
            if bias is not None:
                layer.bias.copy_(bias)

    @torch.no_grad()
    def _kl(self, rows: LongTensor, length: int) -> Tensor:
        """Sum of KL(p || q) over the first tokens of rows of ids, [rows], p dense and q the model as it is:
        sum_v p log p + log sum_v exp(z) - sum_v p z, with the logits z of q."""
        z = self.bb.model(self.ids[rows, :length], use_cache=False).logits.float()
        fits = torch.einsum("btv,btv->b", self.dense[rows, :length], z)
        return self.negentropy[rows, :length].sum(1) + z.logsumexp(-1).sum(1) - fits


def layer_database(
    model: nn.Module,
    recipes: Sequence[Recipe],
    ids: LongTensor,
    calibration: LongTensor,
    *,
    base: int,
    batch: int = 8,
) -> Database:
    """Every linear layer of a model's blocks, compressed by each of several recipes.

    As in the authors' code: the layers of a block are compressed from inputs that the blocks before it give
    when they are at the level `base`, and within the block everything is dense.

    Parameters: `recipes`, from the fewest bytes to the most, `GPTQ` with 2, 3, 4 bits, or `SparseGPT` with
    falling sparsities; `ids`, `batch`, as for `Database`; `calibration` [B, T], other text, for the
    statistics. Returns the `Database`; the model is as it was. Raises as `compress_model` and `Database`.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.quantization.rtn import RTN
    >>> recipes = [RTN(bits, "full", group=8) for bits in (2, 3, 4)]
    >>> database = layer_database(tiny("llama"), recipes, random_ids(4, 8), random_ids(4, 8), base=1)
    >>> len(database.parts), [len(group) for group in database.groups]
    (21, [6, 6, 9])
    """
    if not 0 <= base < len(recipes) or len(recipes) < 2:
        raise ValueError(f"base must be the index of one of two or more recipes, got {base!r}")
    bb = Backbone(model)
    hidden = Hidden(bb, calibration, batch)
    choices: dict[str, list[Choice]] = {}
    saved: dict[str, Tensor] = {}
    try:
        for block in range(bb.n_layers):
            stats = hidden.stats(block, input_groups(bb, block))
            for name in stats:
                check_replaceable(model, name)
                old = model.get_submodule(name)
                saved[name], bias = _copy(old)
                layers = [recipe(name, saved[name], stats[name]) for recipe in recipes]
                for layer in layers:
                    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
                choices[name] = [Choice({name: (w.weight, bias)}, {name: w}, w.nbytes()) for w in layers]
                dense_weight(old).copy_(choices[name][base].floats[name][0])
            hidden.advance(block)
    finally:
        for name, W in saved.items():
            dense_weight(model.get_submodule(name)).copy_(W)
    return Database(model, ids, choices, ["layer"] * len(choices), batch)


def drop_database(
    model: nn.Module, ids: LongTensor, parts: str = "sub-blocks", *, batch: int = 8
) -> Database:
    """What may be dropped from a model: level 0 is dropped, level 1 is kept.

    Parameters: `parts`, "sub-blocks": each attention and each MLP, counted separately; "blocks": both at
    once; `ids`, `batch`, as for `Database`. A part is dropped by zeros in the matrix that writes to the
    residual; `install` makes a `ZeroLinear` of each of its layers. Raises ValueError for other parts.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> drop_database(tiny("gpt2"), random_ids(2, 8)).groups
    ((0, 2, 4), (1, 3, 5))
    """
    if parts not in ("blocks", "sub-blocks"):
        raise ValueError(f"parts must be 'blocks' or 'sub-blocks', got {parts!r}")
    bb = Backbone(model)
    names: dict[str, dict[str, nn.Module]] = {}
    for ref in bb.linears():
        attention = ref.role in ("q", "k", "v", "o")
        kind = "block" if parts == "blocks" else "attention" if attention else "mlp"
        names.setdefault(f"{ref.layer} {kind}", {})[ref.name] = ref.module
    writers = {ref.name for ref in bb.linears() if ref.role in ("o", "down")}
    choices = {}
    for part, modules in names.items():
        kept, gone = {}, {}
        for name in writers & modules.keys():
            kept[name] = W, bias = _copy(modules[name])
            gone[name] = torch.zeros_like(W), None if bias is None else torch.zeros_like(bias)
        layers = {name: ZeroLinear(tuple(dense_weight(m).shape), {}) for name, m in modules.items()}
        nbytes = sum(p.nbytes for module in modules.values() for p in module.parameters())
        choices[part] = [Choice(gone, layers, 0), Choice(kept, {}, nbytes)]
    return Database(model, ids, choices, [part.split()[1] for part in choices], batch)


def _copy(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [d_out, d_in] and bias of a linear layer, copied."""
    return dense_weight(layer).clone(), None if layer.bias is None else layer.bias.detach().clone()
