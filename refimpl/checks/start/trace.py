"""The check of `trace`: record and edit named activations (interpretability chapter, the shared abstraction).

The reference is written from the definitions: hidden states and attention weights come from plain calls of
the model, everything else is recomputed head by head from the weights, edits are compared with own hooks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refimpl.checks import check, require, require_close, require_error
from refimpl.checks.tiny import CONTEXT, FAMILIES, LAYERS, WIDTH, random_ids, tiny

IMPLEMENTATION = {"trace": "refimpl.trace:trace"}

BLOCK_SITES = ("resid_pre", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")

# Two runs of one model need not agree to the bit: on some processors the kernel depends on where buffers lie.
SAME = 1e-5


@check
def check_trace(trace: Callable) -> None:
    """`trace(model, ids, record=, edit=, inputs_embeds=, grad=)` on four families of tiny random models."""
    for family in FAMILIES:
        model, ids = tiny(family), random_ids(2, 9)
        _recording(trace, family, model, ids)
        _editing(trace, family, model, ids)
        _hygiene(trace, family, model, ids)
        _gradients(trace, family, model, ids)
        _errors(trace, family, model, ids)
    _eval_mode(trace)


# --- the reference ------------------------------------------------------------------------------------------
class _Parts:
    """The modules of block `l`, by hand."""

    def __init__(self, model: nn.Module, l: int) -> None:
        self.gpt2 = type(model).__name__ == "GPT2LMHeadModel"
        self.block = model.transformer.h[l] if self.gpt2 else model.model.layers[l]
        self.attn = self.block.attn if self.gpt2 else self.block.self_attn
        self.mlp = self.block.mlp
        self.ln1 = self.block.ln_1 if self.gpt2 else self.block.input_layernorm
        self.ln2 = self.block.ln_2 if self.gpt2 else self.block.post_attention_layernorm
        self.o = self.attn.c_proj if self.gpt2 else self.attn.o_proj
        self.down = self.mlp.c_proj if self.gpt2 else self.mlp.down_proj


def _final_norm(model: nn.Module) -> nn.Module:
    return model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm


def _reference(model: nn.Module, ids: Tensor) -> dict[tuple[str, int], Tensor]:
    """Every site of the plain run, from hidden states, attention weights and the weight matrices."""
    H = model.config.num_attention_heads
    last: list[Tensor] = []
    handle = _Parts(model, LAYERS - 1).block.register_forward_hook(lambda m, a, out: last.append(_first(out)))
    try:
        with torch.no_grad():
            out = model(ids, output_hidden_states=True, output_attentions=True)
            acts = {
                ("embed", 0): model.get_input_embeddings().weight[ids],
                ("ln_final", 0): _final_norm(model)(last[0]),
            }
            for l in range(LAYERS):
                part = _Parts(model, l)
                x = out.hidden_states[l]
                h = part.ln1(x)
                if part.gpt2:
                    d = h.shape[-1]
                    v = h @ part.attn.c_attn.weight[:, 2 * d :] + part.attn.c_attn.bias[2 * d :]
                    v = v.reshape(*v.shape[:2], H, -1)
                else:
                    v = F.linear(h, part.attn.v_proj.weight, part.attn.v_proj.bias)
                    v = v.reshape(*v.shape[:2], model.config.num_key_value_heads, -1)
                share = H // v.shape[2]  # query heads per KV head
                z = torch.stack([out.attentions[l][:, i] @ v[:, :, i // share] for i in range(H)], dim=2)
                attn_out = part.o(z.reshape(*z.shape[:2], -1))
                mid = x + attn_out
                n = part.ln2(mid)
                if part.gpt2:
                    neurons = part.mlp.act(n @ part.mlp.c_fc.weight + part.mlp.c_fc.bias)
                else:
                    neurons = part.mlp.act_fn(part.mlp.gate_proj(n)) * part.mlp.up_proj(n)
                mlp_out = part.down(neurons)
                post = last[0] if l == LAYERS - 1 else out.hidden_states[l + 1]
                values = (x, v, out.attentions[l], z, attn_out, mid, neurons, mlp_out, post)
                acts |= {(name, l): value for name, value in zip(BLOCK_SITES, values, strict=True)}
    finally:
        handle.remove()
    return acts


def _first(out: Tensor | tuple) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= SAME


def _logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def _with_hooks(model: nn.Module, ids: Tensor, *hooks: tuple[nn.Module, str, Callable]) -> Tensor:
    """Logits of a run with hooks (module, "in" or "out", function of the tensor)."""
    handles = []
    for module, side, function in hooks:
        if side == "in":
            handles.append(module.register_forward_pre_hook(lambda m, a, f=function: (f(a[0]), *a[1:])))
        else:
            handles.append(
                module.register_forward_hook(
                    lambda m, a, out, f=function: (f(out[0]), *out[1:]) if isinstance(out, tuple) else f(out)
                )
            )
    try:
        return _logits(model, input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()


# --- what must hold -----------------------------------------------------------------------------------------
def _recording(trace: Callable, family: str, model: nn.Module, ids: Tensor) -> None:
    base = _logits(model, input_ids=ids)
    require(
        _same(trace(model, ids).logits, base),
        f"{family}: a trace that records nothing changes the logits",
    )
    reference = _reference(model, ids)
    result = trace(model, ids, record=list(reference))
    require(_same(result.logits, base), f"{family}: recording changes the logits")
    require(
        set(result.acts) == set(reference),
        f"{family}: asked for {len(reference)} sites, got {len(result.acts)}",
    )
    hints = {
        "v": " (v keeps its KV heads; z has the query heads)",
        "resid_post": " (the residual stream, not yet normed by the final norm)",
        "mlp_post": " (the input of the last linear map; with a gate it is act(gate) * up)",
    }
    for (name, l), expected in reference.items():
        require_close(
            result.acts[name, l], expected, 1e-5, f"{family}: recorded {name!r} {l}{hints.get(name, '')}"
        )
    some = trace(model, ids, record=[("z", 1)])
    require(
        set(some.acts) == {("z", 1)}, f"{family}: records sites that were not asked for: {set(some.acts)}"
    )


def _editing(trace: Callable, family: str, model: nn.Module, ids: Tensor) -> None:
    base, reference, l = _logits(model, input_ids=ids), _reference(model, ids), 1
    part = _Parts(model, l)
    editable = [site for site in reference if site[0] != "pattern"]
    for site in editable:
        same = trace(model, ids, edit={site: lambda x: x}).logits
        require(
            _same(same, base), f"{family}: an edit of {site} that changes nothing changes the logits"
        )
        zero = trace(model, ids, edit={site: torch.zeros_like}).logits
        require((zero - base).abs().max() > 1e-3, f"{family}: zeroing {site} has no effect on the logits")

    def double(x: Tensor) -> Tensor:
        return 2 * x

    def one_head(z: Tensor) -> Tensor:
        z = z.clone()
        z[:, :, 2] = 0
        return z

    def mid_by_hand(mid: Tensor) -> Tensor:  # the block's output once its middle is known
        with torch.no_grad():
            return mid + part.mlp(part.ln2(mid))

    def heads(f: Callable) -> Callable:
        H = model.config.num_attention_heads
        return lambda z: f(z.reshape(*z.shape[:2], H, -1)).reshape(z.shape)

    middle = reference["resid_mid", l]
    final = reference["ln_final", 0]
    expected = {
        ("embed", 0): (
            double,
            _logits(model, inputs_embeds=2 * model.get_input_embeddings().weight[ids].detach()),
        ),
        ("resid_pre", l): (double, _with_hooks(model, ids, (part.block, "in", double))),
        ("v", l): (double, _with_hooks(model, ids, (part.o, "in", double))),  # z is linear in v
        ("z", l): (one_head, _with_hooks(model, ids, (part.o, "in", heads(one_head)))),
        ("attn_out", l): (double, _with_hooks(model, ids, (part.attn, "out", double))),
        ("resid_mid", l): (
            double,
            _with_hooks(model, ids, (part.block, "out", lambda x: mid_by_hand(2 * middle))),
        ),
        ("mlp_post", l): (double, _with_hooks(model, ids, (part.down, "in", double))),
        ("mlp_out", l): (torch.zeros_like, _with_hooks(model, ids, (part.mlp, "out", torch.zeros_like))),
        ("resid_post", l): (double, _with_hooks(model, ids, (part.block, "out", double))),
        ("ln_final", 0): (double, model.lm_head(2 * final).detach()),
    }
    for site, (edit, logits) in expected.items():
        hint = ": the middle feeds the norm AND the skip connection" if site[0] == "resid_mid" else ""
        got = trace(model, ids, edit={site: edit}).logits
        require_close(got, logits, 2e-4, f"{family}: logits after an edit of {site}{hint}")
    both = trace(model, ids, edit={("z", 0): one_head, ("mlp_out", 2): torch.zeros_like}).logits
    by_hand = _with_hooks(
        model,
        ids,
        (_Parts(model, 0).o, "in", heads(one_head)),
        (_Parts(model, 2).mlp, "out", torch.zeros_like),
    )
    require_close(both, by_hand, 1e-5, f"{family}: logits after edits at two layers")


def _hygiene(trace: Callable, family: str, model: nn.Module, ids: Tensor) -> None:
    base, reference = _logits(model, input_ids=ids), _reference(model, ids)

    def fails(x: Tensor) -> Tensor:
        raise ZeroDivisionError("an edit went wrong")

    before = _hooks(model)
    for site in (("mlp_out", 1), ("resid_mid", 1), ("ln_final", 0), ("embed", 0)):
        require_error(
            ZeroDivisionError,
            lambda s=site: trace(model, ids, record=list(reference), edit={s: fails}),
            f"{family}: an exception inside the edit of {site} must reach the caller",
        )
        require(
            _hooks(model) == before,
            f"{family}: hooks stay on the model after an exception inside an edit of {site}",
        )
    require(
        _same(_logits(model, input_ids=ids), base), f"{family}: the model is changed after an exception"
    )

    # An edit in place may be refused or survived, but it must not reach what was recorded before it.
    for site, neighbour in (
        (("resid_pre", 1), ("resid_post", 0)),
        (("resid_post", 1), ("resid_mid", 1)),
        (("z", 1), ("v", 1)),
        (("mlp_out", 1), ("resid_mid", 1)),
    ):
        try:
            result = trace(model, ids, record=[neighbour], edit={site: lambda x: x.mul_(0)})
        except ValueError:
            continue
        require_close(
            result.acts[neighbour],
            reference[neighbour],
            1e-5,
            f"{family}: an edit of {site} in place reaches {neighbour}, recorded before it",
        )
        clean = trace(model, ids, edit={site: torch.zeros_like}).logits
        require_close(result.logits, clean, 1e-5, f"{family}: an edit of {site} in place gives other logits")
    given = model.get_input_embeddings().weight[ids].detach().clone()
    kept = given.clone()
    try:
        trace(model, ids, inputs_embeds=given, edit={("embed", 0): lambda x: x.mul_(0)})
    except ValueError:
        pass
    require(torch.equal(given, kept), f"{family}: an edit in place changed the inputs_embeds of the caller")
    require(_hooks(model) == before, f"{family}: hooks stay on the model")
    require(_same(_logits(model, input_ids=ids), base), f"{family}: traces have changed the model")


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _gradients(trace: Callable, family: str, model: nn.Module, ids: Tensor) -> None:
    embeds = 1.5 * model.get_input_embeddings().weight[ids].detach()
    plain = trace(model, ids, inputs_embeds=embeds, record=[("resid_post", 0)])
    require_close(
        plain.logits, _logits(model, inputs_embeds=embeds), SAME, f"{family}: logits of inputs_embeds"
    )
    require(
        not plain.logits.requires_grad and not plain.acts["resid_post", 0].requires_grad,
        f"{family}: grad=False must not keep the autograd graph",
    )
    leaf, own = embeds.clone().requires_grad_(), embeds.clone().requires_grad_()
    result = trace(model, ids, inputs_embeds=leaf, record=[("resid_post", 0)], grad=True)
    require(result.acts["resid_post", 0].requires_grad, f"{family}: grad=True records detached tensors")
    result.logits[:, -1, 3].sum().backward()
    model(inputs_embeds=own).logits[:, -1, 3].sum().backward()
    require(leaf.grad is not None, f"{family}: grad=True gives inputs_embeds no gradient")
    require_close(leaf.grad, own.grad, 1e-5, f"{family}: gradient at inputs_embeds")
    model.zero_grad()


def _errors(trace: Callable, family: str, model: nn.Module, ids: Tensor) -> None:
    bad = {
        "an unknown site": {"record": [("resid", 0)]},
        "layer L (layers count from 0)": {"record": [("z", LAYERS)]},
        "layer -1": {"record": [("z", -1)]},
        "('embed', 1)": {"record": [("embed", 1)]},
        "an edit of layer L": {"edit": {("z", LAYERS): torch.zeros_like}},
        "an edit of 'pattern', which is record only": {"edit": {("pattern", 0): torch.zeros_like}},
        "an edit that drops a position": {"edit": {("resid_pre", 1): lambda x: x[:, 1:]}},
        "an edit that would broadcast": {"edit": {("mlp_out", 1): lambda x: x.mean(1, keepdim=True)}},
        "inputs_embeds of another length": {"inputs_embeds": torch.zeros(2, 4, WIDTH)},
    }
    for what, arguments in bad.items():
        require_error(ValueError, lambda a=arguments: trace(model, ids, **a), f"{family}: {what}")
    model.set_attn_implementation("sdpa")
    require_error(
        ValueError,
        lambda: trace(model, ids, record=[("pattern", 0)]),
        f"{family}: 'pattern' without eager attention (transformers then returns no weights, silently)",
    )
    model.set_attn_implementation("eager")
    for what, wrong in (
        ("an id outside the vocabulary", ids + 1000),
        ("ids of one dimension", ids[0]),
        ("empty ids", ids[:, :0]),
        ("ids that are not integers", ids.float()),
    ):
        require_error(ValueError, lambda w=wrong: trace(model, w), f"{family}: {what}")
    require_error(TypeError, lambda: trace(nn.Linear(2, 2), ids), "a model of an unknown class")
    if family == "gpt2":
        require_error(
            ValueError, lambda: trace(model, random_ids(1, CONTEXT + 1)), "more tokens than positions"
        )


def _eval_mode(trace: Callable) -> None:
    model, ids = tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5), random_ids(2, 9)
    base = _logits(model, input_ids=ids)
    model.train()
    model.transformer.h[1].eval()
    modes = [m.training for m in model.modules()]
    require(
        _same(trace(model, ids).logits, base), "a model in train mode is traced with its dropout on"
    )
    require(
        [m.training for m in model.modules()] == modes, "the train/eval modes of the modules are not restored"
    )

    def fails(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    require_error(
        ZeroDivisionError, lambda: trace(model, ids, edit={("z", 1): fails}), "an exception in an edit"
    )
    require(
        [m.training for m in model.modules()] == modes, "the train/eval modes are lost after an exception"
    )
