"""One view of the decoder models of this book, whatever their class calls its parts.

`Backbone` names the steps of a GPT-2- or LLaMA-like model (embed, norms, q/k/v, rotation, attention, MLP,
head) so that a memory, a cache or a compressor is written once and runs on all of them. With `refimpl.trace`
it is the only file that knows the inside of `transformers` (5.2 to 5.23), imported on first use only.

Conventions
- Shapes: B batch, T tokens, S keys, H query heads, G KV heads, D head dim, d model width, F MLP width, V
  vocabulary.
- Keys and values keep their G heads; query head h reads KV head h // (H / G).
- RoPE turns the pair (j, j + D/2) of a head ("rotate half", the layout of `transformers`; the RoPE paper
  pairs 2j and 2j+1) counter-clockwise by position * inv_freq[j]. GPT-2 adds learned positions to the
  embedding instead; its rotation is the identity.
- Masks are boolean, True means visible. A window w lets query i see keys i-w+1 .. i, counted in slots.
- Positions default to 0 .. T-1 even in left-padded rows, as in a plain `model(ids, attention_mask=...)`; pass
  `left_padded_positions(attention_mask)` for the positions that `model.generate` uses.
- Dropout is never applied: the outputs are those of `model.eval()`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

FAMILIES = ("GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


class Layer(NamedTuple):
    """The modules of one block under family-independent names (GPT-2: q, k, v are one `c_attn`, no gate)."""

    block: nn.Module
    ln1: nn.Module
    attn: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    ln2: nn.Module
    mlp: nn.Module
    gate: nn.Module | None
    up: nn.Module
    act: nn.Module
    down: nn.Module


@dataclass(frozen=True)
class LinearRef:
    """One linear map of a block and where it is stored.

    - role: "q", "k", "v", "o", then "fc", "down" (GPT-2) or "gate", "up", "down" (the LLaMA-like).
    - name: dotted module name in the model. GPT-2's q, k and v share one module, `attn.c_attn`.
    - transposed: True for GPT-2's `Conv1D`, which stores [d_in, d_out]; `nn.Linear` stores [d_out, d_in].
    - rows: the output rows of the module that belong to this role; all of them, except in `attn.c_attn`.
    """

    layer: int
    role: str
    name: str
    module: nn.Module
    transposed: bool
    rows: slice

    @property
    def weight(self) -> Tensor:
        """A view [d_out, d_in] of the parameter, however stored: writing into it writes into the model."""
        return (self.module.weight.T if self.transposed else self.module.weight)[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """A view [d_out] of the bias, or None."""
        return None if self.module.bias is None else self.module.bias[self.rows]


class Backbone:
    """Adapt a GPT-2, LLaMA, Mistral or Qwen2 causal model to one set of names.

    Implements the contract "Backbone" of the memory chapter: put together again by `forward`, the steps give
    the model's own logits.

    Parameters: model, an instance of one of `FAMILIES` (not a subclass), on any device and dtype.
    Attributes: family, n_layers, H, G, D, d, F, V, n_positions (context length).
    Raises TypeError for any other class; ValueError for rotary types whose frequencies depend on the length
    ("dynamic", "longrope") and for a GPT-2 with cross-attention.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> bb = Backbone(LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)))
    >>> ids = torch.tensor([[0, 5, 9]])
    >>> q, k, v = bb.qkv(0, bb.ln1(0, bb.embed(ids, torch.arange(3))))
    >>> tuple(q.shape), tuple(k.shape), tuple(bb.forward(ids).shape)
    ((1, 4, 3, 4), (1, 2, 3, 4), (1, 3, 32))
    """

    def __init__(self, model: nn.Module) -> None:
        self.family = family(model)
        self.model = model
        self.is_gpt2 = self.family == "GPT2LMHeadModel"
        config = self.config = model.config
        self.n_layers: int = config.num_hidden_layers
        self.H: int = config.num_attention_heads
        self.d: int = config.hidden_size
        self.V: int = config.vocab_size
        self.n_positions: int = config.max_position_embeddings
        if self.is_gpt2:
            if config.add_cross_attention:
                raise ValueError("model: GPT-2 with add_cross_attention=True is not a decoder-only model")
            self.G, self.D = self.H, self.d // self.H
            self.F: int = config.n_inner or 4 * self.d
        else:
            rope = self._core.rotary_emb
            if rope.rope_type in ("dynamic", "longrope"):
                raise ValueError(
                    f"model: rope_type {rope.rope_type!r} changes its frequencies with length; "
                    "allowed: fixed frequencies such as 'default', 'linear', 'llama3', 'yarn'"
                )
            self.G, self.D = config.num_key_value_heads, 2 * len(rope.inv_freq)
            self.F = config.intermediate_size

    # The parts of the model are looked up at each use, so that a compressor may replace modules at any time.
    @property
    def _core(self) -> nn.Module:
        return self.model.transformer if self.is_gpt2 else self.model.model

    def layer(self, l: int) -> Layer:
        """The modules of block `l`; ValueError unless 0 <= l < n_layers."""
        if not 0 <= l < self.n_layers:
            raise ValueError(f"layer {l}: the model has layers 0..{self.n_layers - 1}")
        if self.is_gpt2:
            b = self._core.h[l]
            qkv = b.attn.c_attn
            return Layer(
                b,
                b.ln_1,
                b.attn,
                qkv,
                qkv,
                qkv,
                b.attn.c_proj,
                b.ln_2,
                b.mlp,
                None,
                b.mlp.c_fc,
                b.mlp.act,
                b.mlp.c_proj,
            )
        b = self._core.layers[l]
        a, m = b.self_attn, b.mlp
        return Layer(
            b,
            b.input_layernorm,
            a,
            a.q_proj,
            a.k_proj,
            a.v_proj,
            a.o_proj,
            b.post_attention_layernorm,
            m,
            m.gate_proj,
            m.up_proj,
            m.act_fn,
            m.down_proj,
        )

    @property
    def final_norm(self) -> nn.Module:
        """The norm module before the head."""
        return self._core.ln_f if self.is_gpt2 else self._core.norm

    @property
    def inv_freq(self) -> Tensor | None:
        """RoPE frequencies [D/2] in radians per position; None for GPT-2."""
        return None if self.is_gpt2 else self._core.rotary_emb.inv_freq

    # --- from tokens to the first residual ------------------------------------------------------------------
    def check_ids(self, ids: LongTensor) -> None:
        """ValueError unless `ids` is a non-empty LongTensor [B, T] that fits vocabulary and positions."""
        if not isinstance(ids, Tensor) or ids.dtype != torch.long or ids.ndim != 2 or ids.numel() == 0:
            got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"ids: expected a non-empty LongTensor [B, T], got {got}")
        if ids.min() < 0 or ids.max() >= self.V:
            found = f"{int(ids.min())}..{int(ids.max())}"
            raise ValueError(f"ids: values {found} leave the vocabulary 0..{self.V - 1}")
        if self.is_gpt2 and ids.shape[1] > self.n_positions:
            raise ValueError(f"ids: {ids.shape[1]} tokens, but this GPT-2 has {self.n_positions} positions")

    def embed_tokens(self, ids: LongTensor) -> Tensor:
        """Token embeddings [B, T, d], without positions."""
        return self.model.get_input_embeddings()(ids)

    def add_positions(self, x: Tensor, pos: LongTensor) -> Tensor:
        """Add GPT-2's learned positions pos ([T] or [B, T]) to embeddings x [B, T, d]; others return x."""
        if not self.is_gpt2:
            return x
        if pos.min() < 0 or pos.max() >= self.n_positions:
            raise ValueError(
                f"pos: {int(pos.min())}..{int(pos.max())} leaves the learned positions "
                f"0..{self.n_positions - 1}"
            )
        return x + self._core.wpe(pos)

    def embed(self, ids: LongTensor, pos: LongTensor) -> Tensor:
        """The input [B, T, d] of block 0 for ids [B, T] at positions pos [T] or [B, T]."""
        return self.add_positions(self.embed_tokens(ids), pos)

    # --- one block ------------------------------------------------------------------------------------------
    def ln1(self, l: int, x: Tensor) -> Tensor:
        """The norm before attention: [B, T, d] -> [B, T, d]."""
        return self.layer(l).ln1(x)

    def qkv(self, l: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Un-rotated q [B, H, T, D] and un-repeated k, v [B, G, T, D] of x = ln1(l, residual)."""
        layer = self.layer(l)
        if self.is_gpt2:
            q, k, v = layer.q(x).split(self.d, dim=-1)
        else:
            q, k, v = layer.q(x), layer.k(x), layer.v(x)
        return tuple(t.unflatten(-1, (-1, self.D)).transpose(1, 2) for t in (q, k, v))

    def _cos_sin(self, t: Tensor, pos: LongTensor) -> tuple[Tensor, Tensor]:
        # Angles in float32 whatever the model's dtype, then cast: this is what transformers does.
        angle = pos[..., None].float() * self.inv_freq.float()
        angle = torch.cat((angle, angle), dim=-1)  # [..., T, D]
        if pos.ndim == 2:
            angle = angle[:, None]  # [B, 1, T, D]: all heads alike
        scale = self._core.rotary_emb.attention_scaling  # 1 except for YaRN
        return (angle.cos() * scale).to(t.dtype), (angle.sin() * scale).to(t.dtype)

    def rot(self, t: Tensor, pos: LongTensor) -> Tensor:
        """Rotate queries or keys t [B, N, T, D] to pos [T], [B, T] or [B, N, T]; the identity for GPT-2."""
        if self.is_gpt2:
            return t
        cos, sin = self._cos_sin(t, pos)
        return t * cos + _rotate_half(t) * sin

    def unrot(self, t: Tensor, pos: LongTensor) -> Tensor:
        """The inverse of `rot`: unrot(rot(t, pos), pos) = t."""
        if self.is_gpt2:
            return t
        cos, sin = self._cos_sin(t, pos)
        return (t * cos - _rotate_half(t) * sin) / self._core.rotary_emb.attention_scaling**2

    def window(self, l: int) -> int | None:
        """The sliding window of layer `l` in tokens, the query included; None if it sees all before it."""
        if self.family == "MistralForCausalLM":
            return self.config.sliding_window
        if self.family == "Qwen2ForCausalLM" and self.config.layer_types[l] == "sliding_attention":
            return self.config.sliding_window
        return None

    def mask(self, l: int, T: int, attention_mask: Tensor | None = None) -> Tensor:
        """Causal mask [1|B, 1, T, T] of layer `l`, with its window; attention_mask [B, T]: 0 at padding."""
        i = torch.arange(T, device=self.model.device)
        visible = i[:, None] >= i[None, :]
        window = self.window(l)
        if window is not None:
            visible = visible & (i[None, :] > i[:, None] - window)
        visible = visible[None, None]
        return visible if attention_mask is None else visible & attention_mask.bool()[:, None, None, :]

    def attention(self, l: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k' * scale) v.

        Rotated q [B, H, T, D] and k [B, G, S, D], v like k, mask [1|B, 1|H, T, S] -> [B, H, T, D]. A mask of
        None is the causal one for T = S, not built; ValueError for None and T != S.
        """
        if mask is None and q.shape[2] != k.shape[2]:
            T, S = q.shape[2], k.shape[2]
            raise ValueError(f"mask: None means causal, but there are {T} queries, {S} keys")
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale(l), enable_gqa=True
        )

    def scale(self, l: int) -> float:
        """The factor on q k' in layer `l`: 1/sqrt(D), unless a GPT-2 config says otherwise."""
        if not self.is_gpt2:
            return self.D**-0.5
        scale = self.D**-0.5 if self.config.scale_attn_weights else 1.0
        return scale / (l + 1) if self.config.scale_attn_by_inverse_layer_idx else scale

    def o_proj(self, l: int, z: Tensor) -> Tensor:
        """Attention's output projection: z [B, H, T, D] -> [B, T, d]."""
        return self.layer(l).o(z.transpose(1, 2).flatten(-2))

    def ln2(self, l: int, x: Tensor) -> Tensor:
        """The norm before the MLP: [B, T, d] -> [B, T, d]."""
        return self.layer(l).ln2(x)

    def mlp(self, l: int, x: Tensor) -> Tensor:
        """The MLP of x = ln2(l, residual): down(act(fc(x))), or down(act(gate(x)) * up(x))."""
        layer = self.layer(l)
        if layer.gate is None:
            return layer.down(layer.act(layer.up(x)))
        return layer.down(layer.act(layer.gate(x)) * layer.up(x))

    def block(self, l: int, x: Tensor, pos: LongTensor, mask: Tensor | None) -> Tensor:
        """Block `l` on the residual x [B, T, d] at positions pos, with a mask as in `attention`."""
        q, k, v = self.qkv(l, self.ln1(l, x))
        x = x + self.o_proj(l, self.attention(l, self.rot(q, pos), self.rot(k, pos), v, mask))
        return x + self.mlp(l, self.ln2(l, x))

    # --- from the last residual to the logits ---------------------------------------------------------------
    def ln_final(self, x: Tensor) -> Tensor:
        """The norm before the head: [B, T, d] -> [B, T, d]."""
        return self.final_norm(x)

    def head(self, x: Tensor) -> Tensor:
        """Logits [B, T, V] of x = ln_final(residual)."""
        return self.model.lm_head(x)

    def forward(
        self, ids: LongTensor, attention_mask: Tensor | None = None, position_ids: LongTensor | None = None
    ) -> Tensor:
        """Logits [B, T, V], equal to the model's own; at padding they are finite but meaningless.

        Parameters: ids [B, T]; attention_mask [B, T], 0 at padding (default all ones); position_ids [T] or
        [B, T] (default 0..T-1). Raises ValueError for ids or a mask of wrong type, shape or range.
        """
        self.check_ids(ids)
        if attention_mask is not None and attention_mask.shape != ids.shape:
            got = list(attention_mask.shape)
            raise ValueError(f"attention_mask: expected shape {list(ids.shape)}, got {got}")
        T = ids.shape[1]
        pos = torch.arange(T, device=ids.device) if position_ids is None else position_ids
        x = self.embed(ids, pos)
        for l in range(self.n_layers):
            plain = attention_mask is None and self.window(l) is None
            x = self.block(l, x, pos, None if plain else self.mask(l, T, attention_mask))
        return self.head(self.ln_final(x))

    def linears(self) -> list[LinearRef]:
        """All linear maps of all blocks in the order of computation; embedding and head are not in it."""
        refs = []
        names = {module: name for name, module in self.model.named_modules()}
        for l in range(self.n_layers):
            layer = self.layer(l)
            mlp_roles = {"fc": layer.up} if layer.gate is None else {"gate": layer.gate, "up": layer.up}
            roles = {"q": layer.q, "k": layer.k, "v": layer.v, "o": layer.o, **mlp_roles, "down": layer.down}
            for role, module in roles.items():
                third = "qkv".find(role) if self.is_gpt2 else -1
                rows = slice(None) if third < 0 else slice(third * self.d, (third + 1) * self.d)
                transposed = type(module).__name__ == "Conv1D"
                refs.append(LinearRef(l, role, names[module], module, transposed, rows))
        return refs


def family(model: nn.Module) -> str:
    """The class name of a supported model; TypeError for any other object.

    >>> family(nn.Linear(2, 2))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    TypeError: model: Linear is not supported; allowed: GPT2LMHeadModel, LlamaForCausalLM, ...
    """
    cls = type(model)
    if cls.__name__ not in FAMILIES or not cls.__module__.startswith("transformers."):
        raise TypeError(f"model: {cls.__name__} is not supported; allowed: {', '.join(FAMILIES)}")
    return cls.__name__


def left_padded_positions(attention_mask: Tensor) -> LongTensor:
    """Positions [B, T] that start at 0 at each row's first real token, as `model.generate` counts them.

    >>> left_padded_positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist()
    [[0, 0, 0, 1], [0, 1, 2, 3]]
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _rotate_half(t: Tensor) -> Tensor:
    a, b = t.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


# --- attention functions of our own, inside the model -------------------------------------------------------
_active: dict[int, tuple[Callable, Callable]] = {}  # id(model.config) -> (function, mask_function)


def raw_mask(*, attention_mask: Tensor | None = None, **_) -> Tensor | None:
    """The mask function that passes the 2-D padding mask [B, S] (or None) on as it is."""
    return attention_mask


@cache
def _register() -> None:
    # One name, registered once, looks up the model's current functions: nothing accumulates in the global
    # tables of transformers. Without a mask function of the same name they pass None, and padding is silently
    # ignored.
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(module, query, key, value, mask, dropout=0.0, scaling=None, **kw):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling  # GPT-2 of early 5.x passes none
        function = _active[id(module.config)][0]
        return function(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kw)

    def mask(*, config, **kw):
        return _active[id(config)][1](**kw)

    AttentionInterface.register("refimpl", attention)
    AttentionMaskInterface.register("refimpl", mask)


@contextmanager
def use_attention(model: nn.Module, function: Callable, mask_function: Callable = raw_mask) -> Iterator[None]:
    """Run `model` with our own attention inside a `with` block, and restore its implementation on every exit.

    Parameters
    - function(module, query, key, value, mask, dropout=, scaling=, **kw) -> (out [B, T, H, D], weights or
      None). Query [B, H, T, D] and key [B, G, S, D] arrive rotated (see `Backbone.unrot`), key and value with
      their G heads; the layer is `module.layer_idx`.
    - mask_function(**kw): its result arrives as `mask` (default: the 2-D padding mask [B, S], or None).
      Causality is then the function's business.

    Blocks nest. Raises TypeError for an unsupported model or a function that cannot be called.
    """
    family(model)
    for name, value in (("function", function), ("mask_function", mask_function)):
        if not callable(value):
            raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")
    _register()
    key, implementation = id(model.config), model.config._attn_implementation
    outer = _active.get(key)
    _active[key] = (function, mask_function)
    try:
        model.set_attn_implementation("refimpl")
        yield
    finally:
        model.set_attn_implementation(implementation)
        if outer is None:
            del _active[key]
        else:
            _active[key] = outer
