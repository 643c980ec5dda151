"""Traces that run and are wrong: each wraps refimpl's and breaks one thing."""

import torch

from refimpl.backbone import Backbone
from refimpl.trace import Trace, trace


def records_only(model, ids, *, record=(), edit=None, inputs_embeds=None, grad=False):
    """Edits are called and thrown away."""

    def discard(f):
        def call(x):
            f(x)
            return x

        return call

    off = {site: discard(f) for site, f in (edit or {}).items()}
    return trace(model, ids, record=record, edit=off, inputs_embeds=inputs_embeds, grad=grad)


def _changed_acts(change):
    def mutant(model, ids, **arguments):
        result = trace(model, ids, **arguments)
        acts = {site: change(Backbone(model), site, x) for site, x in result.acts.items()}
        return Trace(result.logits, acts)

    return mutant


def _last_residual_normed(bb, site, x):
    return bb.ln_final(x) if site == ("resid_post", bb.n_layers - 1) else x


def _heads_reversed(bb, site, x):
    return x.flip(2) if site[0] == "z" else x


def _embed_with_positions(bb, site, x):
    return bb.add_positions(x, torch.arange(x.shape[1])) if site[0] == "embed" else x


def neurons_at_the_activation(model, ids, *, record=(), **rest):
    """LLaMA's neurons taken behind the activation module, act(gate), not at the input of down_proj."""
    mids = [("resid_mid", l) for name, l in record if name == "mlp_post"]
    result = trace(model, ids, record=[*record, *mids], **rest)
    bb = Backbone(model)
    for name, l in record:
        if name == "mlp_post" and not bb.is_gpt2:
            layer = bb.layer(l)
            result.acts[name, l] = layer.act(layer.gate(layer.ln2(result.acts["resid_mid", l]))).detach()
    result.acts = {site: x for site, x in result.acts.items() if site in set(record)}
    return result


def middle_feeds_the_norm_only(model, ids, *, edit=None, **rest):
    """The naive hook on the second norm: the skip connection around the MLP keeps the old middle."""
    edit = dict(edit or {})
    handles = []
    for site in [s for s in edit if s[0] == "resid_mid" and 0 <= s[1] < Backbone(model).n_layers]:
        f = edit.pop(site)
        ln2 = Backbone(model).layer(site[1]).ln2
        handles.append(ln2.register_forward_pre_hook(lambda m, a, f=f: (f(a[0].clone()),)))
    try:
        return trace(model, ids, edit=edit, **rest)
    finally:
        for handle in handles:
            handle.remove()


def leaves_hooks_after_an_exception(model, ids, **arguments):
    try:
        return trace(model, ids, **arguments)
    except ZeroDivisionError:
        model.get_input_embeddings().register_forward_hook(lambda m, a, out: None)
        raise


def stays_in_eval_mode(model, ids, **arguments):
    result = trace(model, ids, **arguments)
    model.eval()
    return result


def runs_in_train_mode(model, ids, **arguments):
    result = trace(model, ids, **arguments)
    if model.training and not arguments:
        result.logits = model(ids).logits.detach()
    return result


def edits_the_running_tensor(model, ids, *, record=(), edit=None, **rest):
    """No copy for the edit: one in place reaches what was recorded before it."""
    result = trace(model, ids, record=record, edit=edit or {}, **rest)
    for (name, l), f in (edit or {}).items():
        if name == "resid_pre" and ("resid_post", l - 1) in result.acts:
            f(result.acts["resid_post", l - 1])
    return result


def broadcasts_edits(model, ids, *, edit=None, **rest):
    """An edit of the wrong shape is silently stretched."""

    def stretched(f):
        def call(x):
            y = f(x)
            return y.expand_as(x) if y.shape != x.shape and y.shape[1] == 1 else y

        return call

    return trace(model, ids, edit={site: stretched(f) for site, f in (edit or {}).items()}, **rest)


def negative_layers_count_from_the_end(model, ids, *, record=(), **rest):
    L = model.config.num_hidden_layers
    return trace(model, ids, record=[(n, l + L if -L <= l < 0 else l) for n, l in record], **rest)


def detaches_always(model, ids, *, grad=False, **rest):
    result = trace(model, ids, grad=grad, **rest)
    result.acts = {site: x.detach() for site, x in result.acts.items()}
    return result


def pattern_from_any_attention(model, ids, **arguments):
    """Switches to eager by itself, so that the caller does not know which model was measured."""
    used = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return trace(model, ids, **arguments)
    finally:
        model.set_attn_implementation(used)


MUTANTS = [
    ("trace", "edits switched off", records_only),
    ("trace", "last residual recorded after the final norm", _changed_acts(_last_residual_normed)),
    ("trace", "z with its heads in another order", _changed_acts(_heads_reversed)),
    ("trace", "neurons recorded at the activation module, not as act(gate) * up", neurons_at_the_activation),
    ("trace", "embed recorded with GPT-2's positions", _changed_acts(_embed_with_positions)),
    ("trace", "edit of resid_mid reaches the norm only", middle_feeds_the_norm_only),
    ("trace", "a hook stays after an exception", leaves_hooks_after_an_exception),
    ("trace", "train mode not restored", stays_in_eval_mode),
    ("trace", "dropout on", runs_in_train_mode),
    ("trace", "in-place edits reach recorded activations", edits_the_running_tensor),
    ("trace", "edits of the wrong shape are broadcast", broadcasts_edits),
    ("trace", "negative layers accepted", negative_layers_count_from_the_end),
    ("trace", "gradients cut at recorded activations", detaches_always),
    ("trace", "pattern switches the attention silently", pattern_from_any_attention),
]
