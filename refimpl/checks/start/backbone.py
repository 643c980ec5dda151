"""The check of `Backbone`: one view of GPT-2, LLaMA, Mistral and Qwen2 (memory chapter, the contract).

The reference is the model's own forward for logits, and the definitions, written in loops, for its steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close, require_error
from refimpl.checks.tiny import CONTEXT, HEADS, LAYERS, VOCAB, WIDTH, random_ids, tiny

IMPLEMENTATION = {"backbone": "refimpl.backbone:Backbone"}

VARIANTS = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied, scaled by layer": (
        "gpt2",
        {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True},
    ),
    "llama, G=1": ("llama", {"num_key_value_heads": 1}),
    "llama, G=2, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, G=H, untied": ("llama", {"num_key_value_heads": HEADS, "tie_word_embeddings": False}),
    "mistral, window 5, head_dim 16": ("mistral", {}),
    "mistral, no window, head_dim 16": ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen2, window 4 from layer 1": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
}


@check
def check_backbone(Backbone: Callable) -> None:
    """`Backbone(model)`: steps that equal the model's, put together again by `forward`."""
    for name, (family, changes) in VARIANTS.items():
        # GPT-2 of early transformers 5.x forgets the scaling by layer under sdpa: eager is the reference.
        for attention in ("eager",) if "scaled" in name else ("sdpa", "eager"):
            model = tiny(family, attention=attention, **changes)
            with torch.no_grad():
                _logits(Backbone(model), f"{name}, {attention}", model)
        with torch.no_grad():
            _steps(Backbone(model), name, model)
            _linears(Backbone(model), name, model)
    _refusals(Backbone)


def _logits(bb: object, name: str, model: nn.Module) -> None:
    ids = random_ids(3, 12)
    window = " (is the window respected?)" if "window" in name else ""
    require_close(bb.forward(ids), model(ids).logits, 1e-5, f"{name}: logits{window}")
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, :1] = 0
    real = mask.bool()
    expected = model(ids, attention_mask=mask).logits
    padded = bb.forward(ids, mask)
    require(bool(torch.isfinite(padded).all()), f"{name}: logits at padding must be finite")
    require_close(padded[real], expected[real], 1e-5, f"{name}: logits of a left-padded batch")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = model(ids[:1, 4:]).logits
    require_close(
        bb.forward(ids, mask, positions)[:1, 4:],
        alone,
        2e-5,
        f"{name}: a left-padded row, with positions counted from its first token, against the row alone",
    )


def _steps(bb: object, name: str, model: nn.Module) -> None:
    config, ids, l, T = model.config, random_ids(2, 7), 1, 7
    gpt2 = name.startswith("gpt2")
    G = HEADS if gpt2 else config.num_key_value_heads
    D = 16 if "head_dim 16" in name else WIDTH // HEADS
    sizes = {"n_layers": LAYERS, "H": HEADS, "G": G, "D": D, "d": WIDTH, "V": VOCAB}
    for attribute, value in sizes.items():
        require(
            getattr(bb, attribute) == value, f"{name}: {attribute} is {getattr(bb, attribute)}, not {value}"
        )
    pos = torch.arange(T)
    hidden = model(ids, output_hidden_states=True).hidden_states
    require_close(bb.embed(ids, pos), hidden[0], 1e-6, f"{name}: embed (GPT-2: with learned positions)")

    block = model.transformer.h[l] if gpt2 else model.model.layers[l]
    h = bb.ln1(l, hidden[l])
    require_close(h, (block.ln_1 if gpt2 else block.input_layernorm)(hidden[l]), 1e-6, f"{name}: ln1")
    if gpt2:
        fused = h @ block.attn.c_attn.weight + block.attn.c_attn.bias
        expected = [fused[..., i * WIDTH : (i + 1) * WIDTH] for i in range(3)]
    else:
        a = block.self_attn
        expected = [p(h) for p in (a.q_proj, a.k_proj, a.v_proj)]
    q, k, v = bb.qkv(l, h)
    for what, got, flat, n in zip("qkv", (q, k, v), expected, (HEADS, G, G), strict=True):
        heads = torch.stack([flat[..., i * D : (i + 1) * D] for i in range(n)], dim=1)
        require_close(
            got, heads, 1e-5, f"{name}: {what} must be un-rotated, [B, {n}, T, D], KV heads not repeated"
        )

    for positions in (pos, pos + 3, torch.stack([pos, pos + 5])):
        turned = bb.rot(q, positions)
        require_close(
            turned,
            q if gpt2 else _rope(q, positions, config),
            1e-5,
            f"{name}: rot (pairs are j and j + D/2, counter-clockwise by position / base^(2j/D))",
        )
        require_close(bb.unrot(turned, positions), q, 1e-5, f"{name}: unrot must undo rot")

    per_head = (pos + torch.arange(2 * G)[:, None]).reshape(
        2, G, T
    )  # a cache holds other slots in every head
    turned = bb.rot(k, per_head)
    for b in range(2):
        for g in range(G):
            require_close(
                turned[b, g],
                bb.rot(k[b : b + 1, g : g + 1], per_head[b, g])[0, 0],
                1e-6,
                f"{name}: rot with one set of positions per head, [B, N, T]",
            )

    mask = bb.mask(l, T)
    z = bb.attention(l, bb.rot(q, pos), bb.rot(k, pos), v, mask)
    x = hidden[l] + bb.o_proj(l, z)
    x = x + bb.mlp(l, bb.ln2(l, x))
    if l + 1 < LAYERS:
        require_close(x, hidden[l + 1], 1e-5, f"{name}: a block put together from its steps")
    require_close(bb.head(bb.ln_final(x)), model.lm_head(_norm(model)(x)), 1e-5, f"{name}: ln_final and head")


def _norm(model: nn.Module) -> nn.Module:
    return model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm


def _rope(t: Tensor, pos: Tensor, config: object) -> Tensor:
    """The rotation, pair by pair, as a multiplication of complex numbers."""
    B, N, T, D = t.shape
    base = config.rope_parameters["rope_theta"]
    out = torch.empty_like(t)
    pos = pos.expand(B, T)
    for j in range(D // 2):
        angle = (pos * base ** (-2 * j / D))[:, None].double()  # [B, 1, T]
        pair = torch.complex(t[..., j].double(), t[..., j + D // 2].double())
        turned = pair * torch.polar(torch.ones_like(angle), angle)
        out[..., j], out[..., j + D // 2] = turned.real, turned.imag
    return out


def _linears(bb: object, name: str, model: nn.Module) -> None:
    gpt2 = name.startswith("gpt2")
    refs = bb.linears()
    roles = ["q", "k", "v", "o", "fc", "down"] if gpt2 else ["q", "k", "v", "o", "gate", "up", "down"]
    require(
        [(r.layer, r.role) for r in refs] == [(l, role) for l in range(LAYERS) for role in roles],
        f"{name}: linears must list {', '.join(roles)} of each layer in order",
    )
    for ref in refs:
        require(
            model.get_submodule(ref.name) is ref.module, f"{name}: {ref.name} is not the module of {ref.role}"
        )
        d_in = ref.weight.shape[1]
        x = torch.randn(2, 3, d_in, generator=torch.Generator().manual_seed(0))
        y = x @ ref.weight.T + (0 if ref.bias is None else ref.bias)
        require_close(
            y, ref.module(x)[..., ref.rows], 1e-5, f"{name}: weight [d_out, d_in] and bias of {ref.role}"
        )
        home = ref.module.weight.untyped_storage().data_ptr()
        require(
            ref.weight.untyped_storage().data_ptr() == home,
            f"{name}: the weight of {ref.role} must be a view",
        )


def _refusals(Backbone: Callable) -> None:
    for other in (nn.Linear(2, 2), tiny("llama").model):
        require_error(
            TypeError,
            lambda m=other: Backbone(m),
            f"a {type(other).__name__}, which is not a supported model",
        )
    bb = Backbone(tiny("gpt2"))
    for what, ids in (
        ("ids outside the vocabulary", torch.tensor([[VOCAB]])),
        ("negative ids", torch.tensor([[-1]])),
        ("ids of one dimension", torch.tensor([3])),
        ("empty ids", torch.zeros(1, 0, dtype=torch.long)),
        ("more tokens than positions", random_ids(1, CONTEXT + 1)),
    ):
        require_error(ValueError, lambda i=ids: bb.forward(i), what)
    require_error(
        ValueError, lambda: bb.forward(random_ids(2, 5), torch.ones(2, 4)), "a mask of another shape than ids"
    )
    require_error(
        ValueError, lambda: bb.ln1(LAYERS, torch.zeros(1, 1, WIDTH)), "layer L (layers count from 0)"
    )
