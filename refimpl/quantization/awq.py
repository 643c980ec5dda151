"""AWQ: scale the input channels of a layer before rounding, so that those that carry much lose less.

Implements arXiv 2306.00978 as its authors' code does it, block by block on the float model's activations.
For a group of layers with one input, x_j its channels, the candidates are

    s_j = mean|x_j|^ratio / sqrt(max s min s),  W^ = Q(W diag(s)) diag(s)^-1,  ratio = 0, 1/20, ..., 19/20,

and the one with the least mean squared error of the *module's* output is kept: the attention for (q, k, v),
the MLP for (gate, up), the layer itself for o and down. All searches of a block see its original weights.
Then 1/s is folded into what produces the input, and each group of weights is clipped to +-c max|w|, c = 1,
0.95, ..., 0.55, by the squared error of its share of the output; not in q and k, whose errors meet in a
product. Scales look at activations only, as in the code (first drafts also had the weights' magnitudes), and
o has none where several query heads share a value head: nothing can be folded there.

Different from the code
- The errors of single layers, and of clipping, come from H = 2/N sum x x' instead of N products: the same
  numbers (the code clips by a sample of 512 tokens). A module's candidate is dropped as soon as its error
  exceeds the best one so far.
- The range of a group includes 0. The code's does not, and cuts off groups whose weights have one sign.
- GPT-2's c_proj of the MLP reads a GELU, through which nothing can be folded. The code divides the GELU's
  output by s; here the layer stores s (`ScaledLinear`), which is the same function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.ledger import of_model
from refimpl.quantization.awq_search import RATIOS, Loss, check_ratios, clip_groups, linear_loss, search
from refimpl.quantization.calibrate import Hidden, Stats, collect, input_groups, stats_of
from refimpl.quantization.fold import fold
from refimpl.quantization.grids import Grid
from refimpl.quantization.linear import (
    GridLinear,
    check_replaceable,
    dense_weight,
    put_module,
    replace_linear,
)
from refimpl.quantization.model import Report, Row
from refimpl.quantization.symmetric import distortion, output_distortion

__all__ = ["AWQReport", "ScaledLinear", "Search", "awq"]

# What feeds the groups of `input_groups`, in their order.
STAGES = ("ln1", "v-o", "ln2", "up-down")


@dataclass(frozen=True)
class Search:
    """One search: `site` of `refimpl.quantization.fold` in block `layer`; the best `ratio` and its `scale` s
    [d_in]; the mean squared error of the module's output without scales (`plain`) and with s (`loss`)."""

    layer: int
    site: str
    ratio: float
    scale: Tensor
    plain: float
    loss: float


@dataclass(frozen=True)
class AWQReport(Report):
    """A `Report`, and the `searches`. Errors are those of the layers as the original model knows them, all
    scales undone, with the float model's H."""

    searches: tuple[Search, ...]


class ScaledLinear(GridLinear):
    """A `GridLinear` of W diag(s) that stores s as well (`channel` [d_in], float16) and undoes it."""

    def dequantize(self) -> Tensor:
        return super().dequantize() / self.channel.float()


def awq(
    model: nn.Module,
    ids: LongTensor,
    bits: int = 4,
    group: int | str = 128,
    *,
    scheme: str = "asymmetric",
    ratios: Sequence[float] = RATIOS,
    clip: bool = True,
    batch: int = 8,
) -> AWQReport:
    """Quantize every linear layer of a model's blocks by AWQ, in place.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, uncompressed. Norms, v and up are divided by scales; embeddings
        stay as they are.
    ids : [B, T] calibration tokens without padding. The paper's code: 128 rows of 512.
    bits, group, scheme : the grid, as for `Grid`, but no group "tensor"; usual: 3 or 4 bits, groups of 128.
    ratios : exponents of the mean input that are tried, within 0 .. 1, the first one 0 (no scales). (0,):
        only rounding and, if wanted, clipping.
    clip : search how far each group of weights is clipped.
    batch : rows of ids at a time.

    Raises TypeError for another model or a layer that is compressed already, ValueError for ids or numbers
    that do not fit: the model is then as it was.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> report = awq(tiny("llama"), random_ids(4, 16), bits=3, group=8)
    >>> [search.site for search in report.searches if search.layer == 0]    # o: two heads share a value head
    ['ln1', 'ln2', 'up-down']
    >>> all(search.loss <= search.plain for search in report.searches)
    True
    """
    grid = Grid(bits, scheme, group)
    if group == "tensor":
        raise ValueError("group must be 'row' or an integer >= 1, got 'tensor': layers are scaled together")
    check_ratios(ratios)
    bb = Backbone(model)
    hidden = Hidden(bb, ids, batch)
    blocks = [input_groups(bb, layer) for layer in range(bb.n_layers)]
    originals = {name: model.get_submodule(name) for groups in blocks for names in groups for name in names}
    for name, module in originals.items():
        check_replaceable(model, name)
        grid.check(dense_weight(module))
    saved = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = of_model(model).total()
    rows: list[Row] = []
    searches: list[Search] = []
    try:
        for layer, groups in enumerate(blocks):
            with torch.no_grad():
                stats, losses = _observe(hidden, layer, groups)
                found = {}
                for site, names, stat, loss in zip(STAGES, groups, stats, losses, strict=True):
                    if site != "v-o" or bb.G == bb.H:
                        W = _joined(bb, names)[0]
                        found[site] = Search(layer, site, *search(W, stat.absmean, grid, ratios, loss))
                rows += _apply(bb, layer, groups, stats, found, grid, clip)
            searches += found.values()
    except BaseException:
        for name, module in originals.items():
            put_module(model, name, module)
        model.load_state_dict(saved)
        raise
    return AWQReport(tuple(rows), before, of_model(model).total(), tuple(searches))


def _observe(hidden: Hidden, layer: int, groups: list[tuple[str, ...]]) -> tuple[list[Stats], list[Loss]]:
    """Input statistics and losses of a block's four groups; moves the hidden states behind the block."""
    bb, pos = hidden.bb, hidden.positions
    mask = None if bb.window(layer) is None else bb.mask(layer, len(pos))
    parts = bb.layer(layer)
    (qkv, qkv_bias), (fc, fc_bias) = _joined(bb, groups[0]), _joined(bb, groups[2])
    attention: list[tuple[Tensor, Tensor]] = []
    mlp: list[tuple[Tensor, Tensor]] = []

    def attend(x: Tensor, W: Tensor) -> Tensor:
        sizes = [bb.H * bb.D, bb.G * bb.D, bb.G * bb.D]
        split = F.linear(x, W, qkv_bias).split(sizes, -1)
        q, k, v = (t.unflatten(-1, (-1, bb.D)).transpose(1, 2) for t in split)
        return bb.o_proj(layer, bb.attention(layer, bb.rot(q, pos), bb.rot(k, pos), v, mask))

    def feed(x: Tensor, W: Tensor) -> Tensor:
        h = F.linear(x, W, fc_bias)
        if parts.gate is None:
            return parts.down(parts.act(h))
        gate, up = h.chunk(2, -1)
        return parts.down(parts.act(gate) * up)

    def run() -> None:
        for i, x in enumerate(hidden.rows):
            normed = bb.ln1(layer, x)
            attention.append((normed, attend(normed, qkv)))
            x = x + attention[-1][1]
            normed = bb.ln2(layer, x)
            mlp.append((normed, feed(normed, fc)))
            hidden.rows[i] = x + mlp[-1][1]

    (o,), (down,) = groups[1], groups[3]
    modules = {name: bb.model.get_submodule(name) for name in (o, down)}
    seen = collect(modules, run)
    first, third = (stats_of(torch.cat([x.flatten(0, 1) for x, _ in pairs])) for pairs in (attention, mlp))
    losses = [
        _module_loss(attend, attention),
        linear_loss(dense_weight(modules[o]), seen[o].H),
        _module_loss(feed, mlp),
        linear_loss(dense_weight(modules[down]), seen[down].H),
    ]
    return [first, seen[o], third, seen[down]], losses


def _module_loss(run: Callable[[Tensor, Tensor], Tensor], pairs: list[tuple[Tensor, Tensor]]) -> Loss:
    """The loss of run(x, W^) for pairs of an input and the float module's output."""
    numel = sum(y.numel() for _, y in pairs)

    def loss(W_hat: Tensor, bound: float) -> float:
        total = 0.0
        for x, y in pairs:
            total += float((run(x, W_hat.to(x.dtype)) - y).float().square().sum()) / numel
            if total >= bound:
                break
        return total

    return loss


def _joined(bb: Backbone, names: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of layers with one input as those of one layer."""
    layers = [bb.model.get_submodule(name) for name in names]
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return torch.cat([dense_weight(layer) for layer in layers]), bias


def _apply(
    bb: Backbone,
    layer: int,
    groups: list[tuple[str, ...]],
    stats: list[Stats],
    found: dict[str, Search],
    grid: Grid,
    clip: bool,
) -> list[Row]:
    """Fold the scales of a block, clip, round, and replace its layers."""
    refs = [ref for ref in bb.linears() if ref.layer == layer]
    before = {ref.name: dense_weight(ref.module).float().clone() for ref in refs}
    divided = {name: W.new_ones(len(W), 1) for name, W in before.items()}  # of the rows of v and up
    for site, of_site in found.items():
        if bb.is_gpt2 and site == "up-down":
            continue
        fold(bb, layer, site, of_site.scale)
        for ref in refs:
            if ref.role == {"v-o": "v", "up-down": "up"}.get(site):
                divided[ref.name][ref.rows] = of_site.scale[:, None]
    rows = []
    for site, names, stat in zip(STAGES, groups, stats, strict=True):
        s = found[site].scale if site in found else before[names[0]].new_ones(len(stat.H))
        stored = bb.is_gpt2 and site == "up-down"
        s = s.half().float() if stored else s
        for name in names:
            old = bb.model.get_submodule(name)
            W = dense_weight(old).float() * (s if stored else 1)
            for ref in refs:
                if clip and ref.name == name and ref.role not in ("q", "k"):
                    W[ref.rows] = clip_groups(W[ref.rows], stat.H / (s[:, None] * s), grid)
            new = (ScaledLinear if stored else GridLinear).pack(grid.quantize(W), grid.bits)
            if stored:
                new.register_buffer("channel", s.half())
            if old.bias is not None:
                new.bias = nn.Parameter(old.bias.detach().clone(), requires_grad=False)
            replace_linear(bb.model, name, new)
            W_hat = new.weight * divided[name] / (1 if stored else s)
            errors = distortion(before[name], W_hat), output_distortion(before[name], W_hat, stat.H)
            rows.append(Row(name, tuple(W.shape), new.nbytes(), new.bits_per_weight, *errors))
    return rows
