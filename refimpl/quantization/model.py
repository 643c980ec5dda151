"""Compress a whole model, layer by layer, with a recipe; and the report of what it cost.

Groups of layers with one input are compressed in the order of computation, (q, k, v), (o), (gate, up),
(down), block by block. In the sequential mode (GPTQ's "true-sequential") each group's inputs are those that
the layers compressed before it produce.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.ledger import of_model
from refimpl.lora import LoRA
from refimpl.quantization.calibrate import Hidden, Stats, collect, input_groups
from refimpl.quantization.linear import (
    CompressedLinear,
    check_replaceable,
    dense_weight,
    put_module,
    replace_linear,
)
from refimpl.quantization.symmetric import distortion, output_distortion

__all__ = ["Recipe", "Report", "Row", "compress_model"]

Recipe = Callable[[str, Tensor, Stats], CompressedLinear]


@dataclass(frozen=True)
class Row:
    """One compressed layer: `shape` (d_out, d_in); `nbytes` with its bias; `bits` stored per weight;
    `weight_error` ||W - W^||_F^2; `output_error` tr((W - W^) H (W - W^)') with the H that the layer was
    compressed with, which in the sequential mode depends on the method."""

    name: str
    shape: tuple[int, int]
    nbytes: int
    bits: float
    weight_error: float
    output_error: float


@dataclass(frozen=True)
class Report:
    """What `compress_model` did: a row for each layer, and the bytes of the whole model before and after,
    embeddings and head included."""

    rows: tuple[Row, ...]
    bytes_before: int
    bytes_after: int

    @property
    def bits(self) -> float:
        """Bits per weight over all compressed layers."""
        numel = [row.shape[0] * row.shape[1] for row in self.rows]
        return sum(row.bits * n for row, n in zip(self.rows, numel, strict=True)) / sum(numel)

    @property
    def weight_error(self) -> float:
        """Sum of ||W - W^||_F^2 over the layers."""
        return sum(row.weight_error for row in self.rows)

    @property
    def output_error(self) -> float:
        """Sum of tr((W - W^) H (W - W^)') over the layers."""
        return sum(row.output_error for row in self.rows)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'layer':{width}}  {'shape':>11}  {'bits':>6}  {'bytes':>9}  {'dW':>9}  {'dW H dW':>9}"]
        for row in self.rows:
            shape = f"{row.shape[0]}x{row.shape[1]}"
            lines.append(
                f"{row.name:{width}}  {shape:>11}  {row.bits:6.3f}  {row.nbytes:9,}  "
                f"{row.weight_error:9.3g}  {row.output_error:9.3g}"
            )
        lines.append(
            f"{self.bits:.3f} bits per weight in {len(self.rows)} layers; "
            f"the model: {self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )
        return "\n".join(lines)


def compress_model(
    model: nn.Module,
    recipe: Recipe,
    ids: LongTensor,
    *,
    sequential: bool = True,
    head: bool = False,
    keep: int = 0,
    batch: int = 8,
) -> Report:
    """Replace every linear layer of a model's blocks by what a recipe makes of it, in place.

    Implements the order of arXiv 2210.17323, section 4, and the "true-sequential" option of its code.

    Parameters
    ----------
    model : of a family of `refimpl.backbone`, uncompressed. Embeddings and norms stay; biases are kept in
        float; GPT-2's `c_attn` is one layer [3 d, d].
    recipe : (module name, weight [d_out, d_in], Stats of its inputs) -> CompressedLinear without bias; an
        `RTN` or `GPTQ` object, or a function that chooses among them by name.
    ids : [B, T] calibration tokens without padding (id 0 first). Statistics of d_in inputs want several times
        d_in tokens.
    sequential : inputs come from the layers already compressed; False: from the uncompressed model.
    head : compress the output head as well; it must not be tied (`untie_head`).
    keep : inputs that stay in `Stats.X`.
    batch : rows of ids at a time.

    Returns a `Report`. Raises TypeError for another model or a layer that is compressed already, ValueError
    for ids, a tied head or LoRA factors, and whatever the recipe raises: the model is then as it was.

    Examples
    --------
    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.quantization import RTN
    >>> report = compress_model(tiny("gpt2"), RTN(4, group=8), random_ids(2, 16))
    >>> len(report.rows), report.bits
    (12, 6.5)
    """
    bb = Backbone(model)
    if any(isinstance(module, LoRA) for module in model.modules()):
        raise ValueError("model has LoRA factors, which would be lost: merge_lora or remove_lora first")
    hidden = Hidden(bb, ids, batch)
    blocks = [input_groups(bb, layer) for layer in range(bb.n_layers)]
    names = [name for groups in blocks for group in groups for name in group] + ["lm_head"] * head
    for name in names:
        check_replaceable(model, name)
    originals = {name: model.get_submodule(name) for name in names}
    before = of_model(model).total()
    rows: list[Row] = []
    try:
        for layer, groups in enumerate(blocks):
            if sequential:
                for stats in hidden.stages(layer, keep):
                    rows += [_compress(model, name, recipe, stats[name]) for name in stats]
            else:
                stats = hidden.stats(layer, groups, keep)
                hidden.advance(layer)
                rows += [_compress(model, name, recipe, stats[name]) for name in stats]
        if head:
            run = lambda: [bb.head(bb.ln_final(x)) for x in hidden.rows]
            stats = collect({"lm_head": model.lm_head}, run, keep)
            rows.append(_compress(model, "lm_head", recipe, stats["lm_head"]))
    except BaseException:
        for name, module in originals.items():
            put_module(model, name, module)
        raise
    return Report(tuple(rows), before, of_model(model).total())


def _compress(model: nn.Module, name: str, recipe: Recipe, stats: Stats) -> Row:
    old = model.get_submodule(name)
    W = dense_weight(old)
    new = recipe(name, W, stats)
    if old.bias is not None:
        new.bias = nn.Parameter(old.bias.detach().clone(), requires_grad=False)
    replace_linear(model, name, new)
    W_hat = new.weight
    errors = distortion(W, W_hat), output_distortion(W, W_hat, stats.H)
    return Row(name, tuple(W.shape), new.nbytes(), new.bits_per_weight, *errors)
