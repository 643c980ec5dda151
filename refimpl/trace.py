"""Run a model, record named activations, optionally edit some on the way.

Looking inside a transformer is one operation, and `trace` is that operation: logit lens, attribution,
patching, ablation, calibration passes and neuron unlearning are all a choice of sites to record and sites to
edit. It is built on forward hooks, which are gone when `trace` returns or raises.

Shapes: B batch, T tokens, d model width, H query heads, G KV heads, D head dim, F MLP width. Site names
follow TransformerLens, so that peers can be compared key by key. A block computes
resid_pre -> attn_out -> resid_mid = resid_pre + attn_out -> mlp_out -> resid_post = resid_mid + mlp_out.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone

Site = tuple[str, int]  # (name, layer)
Edit = Callable[[Tensor], Tensor]  # same shape and dtype out

SITES = {
    "embed": "[B, T, d] token embeddings, before GPT-2's positions; layer 0 only",
    "resid_pre": "[B, T, d] residual stream into the block",
    "v": "[B, T, G, D] values, one per KV head",
    "pattern": "[B, H, T, T] attention weights; record only, eager attention only",
    "z": "[B, T, H, D] weighted values, the input of the attention output projection",
    "attn_out": "[B, T, d] what attention adds to the residual stream",
    "resid_mid": "[B, T, d] residual stream between attention and MLP",
    "mlp_post": "[B, T, F] neurons: the input of the MLP's last linear map (LLaMA: act(gate) * up)",
    "mlp_out": "[B, T, d] what the MLP adds to the residual stream",
    "resid_post": "[B, T, d] residual stream out of the block, before any final norm",
    "ln_final": "[B, T, d] the normed residual stream that the head reads; layer 0 only",
}
_GLOBAL = ("embed", "ln_final")


@dataclass
class Trace:
    """The result of `trace`: logits [B, T, V] and the recorded activations by site."""

    logits: Tensor
    acts: dict[Site, Tensor]


def trace(
    model: nn.Module,
    ids: LongTensor | None,
    *,
    record: Collection[Site] = (),
    edit: Mapping[Site, Edit] = MappingProxyType({}),
    inputs_embeds: Tensor | None = None,
    grad: bool = False,
) -> Trace:
    """Run `model` in eval mode, record the sites of `record` and pass those of `edit` through a function.

    Implements the shared abstraction of the interpretability chapter. A site that is both edited and recorded
    is recorded as edited: the trace describes the run that happened.

    Parameters
    - model: GPT-2, LLaMA, Mistral or Qwen2 (see `Backbone`); its train/eval modes are restored afterwards.
    - ids: token ids [B, T]; may be None if inputs_embeds is given.
    - record: sites (name, layer) with a name of `SITES` and a layer 0 .. L-1.
    - edit: site -> function(tensor) -> tensor of the same shape and dtype. The function gets a copy.
    - inputs_embeds: [B, T, d], used instead of the embeddings of ids (GPT-2 still adds its positions).
    - grad: False runs without autograd and records detached tensors; True keeps the graph.

    Raises TypeError for an unsupported model, ValueError for bad ids, an unknown site, a layer out of range,
    an edit of "pattern", a "pattern" without eager attention, or an edit that returns another shape or dtype.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=8))
    >>> no_mlp = {("mlp_out", 0): torch.zeros_like}
    >>> t = trace(model, torch.tensor([[0, 5, 9]]), record=[("z", 1)], edit=no_mlp)
    >>> tuple(t.logits.shape), tuple(t.acts["z", 1].shape)
    ((1, 3, 32), (1, 3, 4, 4))
    """
    bb = Backbone(model)
    _check_input(bb, ids, inputs_embeds)
    for site in [*record, *edit]:
        _check_site(bb, site)
    record = set(record)
    if any(name == "pattern" for name, _ in edit):
        raise ValueError("edit: 'pattern' is record only; compute the new z from pattern and v, and edit 'z'")
    if any(name == "pattern" for name, _ in record) and model.config._attn_implementation != "eager":
        used = model.config._attn_implementation
        raise ValueError(
            f"record: 'pattern' needs eager attention, the model uses {used!r}; "
            "call model.set_attn_implementation('eager') first"
        )

    acts: dict[Site, Tensor] = {}

    def visit(site: Site, x: Tensor) -> Tensor:
        if site in edit:
            # A copy, because x may share its storage with an activation already recorded (resid_pre l is
            # resid_post l-1) or with the caller's inputs_embeds: an edit in place must not reach those.
            y = edit[site](x.clone())
            if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
                got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(f"edit of {site}: expected {x.dtype} {list(x.shape)}, got {got}")
            x = y
        if site in record:
            acts[site] = x if grad else x.detach()
        return x

    wanted = record | set(edit)
    with ExitStack() as stack:
        stack.enter_context(_eval_mode(model))
        stack.enter_context(torch.set_grad_enabled(grad))
        for l in {layer for name, layer in wanted if name not in _GLOBAL}:
            names = {name for name, layer in wanted if layer == l}
            for handle in _hook_block(bb, l, names, edit, visit):
                stack.callback(handle.remove)
        if ("ln_final", 0) in wanted:
            handle = bb.final_norm.register_forward_hook(lambda m, args, out: visit(("ln_final", 0), out))
            stack.callback(handle.remove)
        x = visit(("embed", 0), bb.embed_tokens(ids) if inputs_embeds is None else inputs_embeds)
        logits = model(inputs_embeds=x, use_cache=False).logits
    return Trace(logits, acts)


def _hook_block(
    bb: Backbone, l: int, names: set[str], edit: Mapping[Site, Edit], visit: Callable[[Site, Tensor], Tensor]
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Attach the hooks of block `l` that `names` needs, yielding each handle at once."""
    layer = bb.layer(l)
    mid_edited = ("resid_mid", l) in edit
    kept: dict[str, Tensor] = {}  # resid_mid and mlp_out of the running forward

    def block_in(module, args):
        return visit(("resid_pre", l), args[0]), *args[1:]

    def v_out(module, args, out):  # the last third of GPT-2's c_attn, all of a v_proj
        start = out.shape[-1] - bb.G * bb.D
        v = visit(("v", l), out[..., start:].unflatten(-1, (bb.G, bb.D)))
        return torch.cat((out[..., :start], v.flatten(-2)), dim=-1)

    def o_in(module, args):
        return visit(("z", l), args[0].unflatten(-1, (bb.H, bb.D))).flatten(-2), *args[1:]

    def attn_out(module, args, out):  # attention modules return (output, weights)
        if "pattern" in names:
            visit(("pattern", l), out[1])
        return visit(("attn_out", l), out[0]), *out[1:]

    def ln2_in(module, args):
        kept["resid_mid"] = visit(("resid_mid", l), args[0])
        return kept["resid_mid"], *args[1:]

    def down_in(module, args):
        return visit(("mlp_post", l), args[0]), *args[1:]

    def mlp_out(module, args, out):
        kept["mlp_out"] = visit(("mlp_out", l), out)
        return kept["mlp_out"]

    def block_out(module, args, out):
        x = out[0] if isinstance(out, tuple) else out  # GPT-2 of early 5.x returns a tuple
        if mid_edited:
            # The hook on ln2 changes what the norm reads, not the skip around the MLP: redo the sum.
            x = kept["resid_mid"] + kept["mlp_out"]
        x = visit(("resid_post", l), x)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    if "resid_pre" in names:
        yield layer.block.register_forward_pre_hook(block_in)
    if "v" in names:
        yield layer.v.register_forward_hook(v_out)
    if "z" in names:
        yield layer.o.register_forward_pre_hook(o_in)
    if "attn_out" in names or "pattern" in names:
        yield layer.attn.register_forward_hook(attn_out)
    if "resid_mid" in names:
        yield layer.ln2.register_forward_pre_hook(ln2_in)
    if "mlp_post" in names:
        yield layer.down.register_forward_pre_hook(down_in)
    if "mlp_out" in names or mid_edited:
        yield layer.mlp.register_forward_hook(mlp_out)
    if "resid_post" in names or mid_edited:
        yield layer.block.register_forward_hook(block_out)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_site(bb: Backbone, site: Site) -> None:
    if not (isinstance(site, tuple) and len(site) == 2 and site[0] in SITES and isinstance(site[1], int)):
        raise ValueError(f"site {site!r}: expected (name, layer) with a name of {', '.join(SITES)}")
    layers = 1 if site[0] in _GLOBAL else bb.n_layers
    if not 0 <= site[1] < layers:
        raise ValueError(f"site {site!r}: {site[0]!r} has layers 0..{layers - 1} in this model")


def _check_input(bb: Backbone, ids: LongTensor | None, inputs_embeds: Tensor | None) -> None:
    if ids is not None:
        bb.check_ids(ids)
    if inputs_embeds is None and ids is None:
        raise ValueError("ids: give token ids [B, T], or inputs_embeds [B, T, d]")
    if inputs_embeds is not None:
        B, T = ("B", "T") if ids is None else ids.shape
        ok = inputs_embeds.ndim == 3 and inputs_embeds.shape[-1] == bb.d
        if not ok or (ids is not None and inputs_embeds.shape[:2] != ids.shape):
            got = list(inputs_embeds.shape)
            raise ValueError(f"inputs_embeds: expected shape [{B}, {T}, {bb.d}], got {got}")
        if bb.is_gpt2 and inputs_embeds.shape[1] > bb.n_positions:
            raise ValueError(
                f"inputs_embeds: {inputs_embeds.shape[1]} tokens, but this GPT-2 has "
                f"{bb.n_positions} learned positions"
            )


def ablate(mask: Mapping[Site, Tensor], mode: Literal["zero", "mean", "resample"]) -> dict[Site, Edit]:
    """Edits for `trace` that remove the masked units of each site.

    Parameters
    - mask: site -> boolean tensor that broadcasts to the site's shape, True = removed: [H, 1] removes heads
      at "z", [F] neurons at "mlp_post", [T, 1] tokens of a residual site.
    - mode: "zero" writes 0; "mean" the mean over the batch and tokens of the same run; "resample" the value
      that the previous row of the batch has there (the last row, for the first).

    Raises TypeError for a mask that is not boolean, ValueError for another mode; when run, ValueError for a
    mask that does not fit and for "resample" with a batch of one.

    >>> x = torch.tensor([[[1., 2.]], [[3., 6.]]])  # [B, T, F] = [2, 1, 2]
    >>> ablate({("mlp_post", 0): torch.tensor([True, False])}, "mean")["mlp_post", 0](x).tolist()
    [[[2.0, 2.0]], [[2.0, 6.0]]]
    """
    if mode not in ("zero", "mean", "resample"):
        raise ValueError(f"mode: {mode!r}; allowed: zero, mean, resample")
    for site, m in mask.items():
        if not isinstance(m, Tensor) or m.dtype != torch.bool:
            got = m.dtype if isinstance(m, Tensor) else type(m).__name__
            raise TypeError(f"mask of {site}: expected a boolean tensor, got {got}")

    def edit_of(site: Site, m: Tensor) -> Edit:
        def edit(x: Tensor) -> Tensor:
            try:
                m.expand_as(x)
            except RuntimeError as error:
                message = f"mask of {site}: {list(m.shape)} does not broadcast to {list(x.shape)}"
                raise ValueError(message) from error
            if mode == "resample" and len(x) < 2:
                raise ValueError("mode: 'resample' takes values from other rows, the batch has only one")
            match mode:
                case "zero":
                    replacement = torch.zeros_like(x)
                case "mean":
                    replacement = x.mean(dim=(0, 1), keepdim=True)
                case "resample":
                    replacement = x.roll(1, dims=0)
            return torch.where(m.to(x.device), replacement, x)

        return edit

    return {site: edit_of(site, m) for site, m in mask.items()}
