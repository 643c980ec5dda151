"""Activations saved for backward, in closed form: what a GPT-2 or LLaMA keeps per layer, to the byte.

The activation term of the survey's Eq. 1, after Korthikanti et al. 2023 (arXiv 2205.05198), but exact for the
models of `transformers`: their forward pass is replayed on sizes alone, and each op saves what its backward
formula reads (`op_rules`). On CUDA attention and layer_norm keep other statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from typing import Any

from refimpl.footprint.arch import Arch, Run
from refimpl.footprint.op_rules import SizeTensor, Tape
from refimpl.footprint.saved_tensors import SavedTensor, as_ledger
from refimpl.ledger import Ledger

__all__ = ["VERIFIED_FROM", "VERIFIED_TO", "korthikanti", "per_layer", "rules", "saved", "saved_bytes"]

# The releases of transformers whose forward pass the rules replay: 5.2, 5.3, 5.4, 5.8, 5.12, 5.13, 5.17, 5.20
# and 5.23 were run on CPU with torch 2.13 and equal the hooks byte by byte. Two things changed on the way.
VERIFIED_FROM, VERIFIED_TO = (5, 2), (5, 23)
GPT2_SCALES_BY_NUMBER = (5, 4)  # before, eager GPT-2 divided the scores by a tensor, which is saved
SDPA_REPEATS_WIDE_HEADS = (5, 13)  # for D > 256 and kv < a; before, the kernel always shared k and v

ACTIVATIONS = {
    "gpt2": ("activation_function", ("gelu_new", "gelu_pytorch_tanh")),
    "llama": ("hidden_act", ("silu",)),
}


def saved(arch: Arch, run: Run, *, fused_gelu: bool = False, ids_counted: bool = False) -> Ledger:
    """Return the activations between forward and backward, items named as `saved_tensors` names them.

    With n = B·S tokens, elements of 4 bytes and dropout 0, a layer keeps (`per_layer`)

        GPT-2  n(28h + 4 + a) with sdpa,   n(28h + 4 + a·S) eager          (f = 4h, gelu_new)
        LLaMA  n(6h + 2·a·d + 2·kv·d + 4f + a + 2), n(6h + 4·a·d + 4f + a·S + 2)

    and the final norm, the output head and the loss keep n(3h + 1) + 2·S·d + n·V floats and 16n + 4 bytes for
    LLaMA (+ 8 for B = 1, whose shifted labels are a view), n(2h + 2) + n·V and 16n + 8S + 4 for GPT-2.

    Parameters
    ----------
    arch : GPT-2, LLaMA, Qwen2 (biases save nothing) or Mistral (with sdpa S below its window).
    run : batch, length, dtype, amp and attention are read. Everything is trained, dropout is 0, labels are
        given, no padding mask. amp is bfloat16 autocast on CPU: each matmul keeps a cast of its weight.
    fused_gelu : GPT-2 with `activation_function="gelu_pytorch_tanh"` instead of "gelu_new".
    ids_counted : leave out the token ids, when the batch is in another ledger.

    Raises ValueError for checkpointing, LoRA and S = 1, RuntimeError for a release of transformers on which
    the rules were not verified.

    Examples
    --------
    >>> gpt2 = Arch("gpt2", 50257, 1024, 768, 3072, 12, 12, 12, 64, tied=True)
    >>> print(saved(gpt2, Run(batch=1, length=1024)))
    kind        tensors     elements      payload B     resident B
    activation      225  317,478,913  1,269,927,940  1,269,927,948
    total           225  317,478,913  1,269,927,940  1,269,927,948
    """
    lines = rules(arch, run, fused_gelu=fused_gelu)
    if ids_counted:
        lines = tuple(line for line in lines if line.tensor != "token ids")
    return as_ledger(lines)


def saved_bytes(
    config: Any,
    batch: int,
    length: int,
    *,
    attention: str = "sdpa",
    dtype: str = "float32",
    amp: bool = False,
) -> int:
    """Return the bytes that a training step of a `transformers` configuration keeps, token ids included.

    Parameters as in `saved` and `Run`. Raises ValueError as well for an activation function without a rule,
    for `reorder_and_upcast_attn`, and with sdpa for a length that reaches the sliding window (whose mask the
    kernel saves).

    >>> saved_bytes({"model_type": "gpt2"}, batch=1, length=1024)
    1269927948
    """
    fields = config if isinstance(config, Mapping) else config.to_dict()
    arch = Arch.from_config(fields)
    name, known = ACTIVATIONS[arch.kind]
    activation = fields.get(name, known[0])
    if activation not in known:
        raise ValueError(f"{name} must be one of {known}, got {activation!r}")
    if fields.get("reorder_and_upcast_attn"):
        raise ValueError("reorder_and_upcast_attn must be False: its ops have no rules here")
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    if attention == "sdpa" and window is not None and length >= window:
        raise ValueError(f"length must be < sliding_window ({window}), got {length}")
    run = Run(batch, length, dtype, amp, attention)
    return saved(arch, run, fused_gelu=activation == "gelu_pytorch_tanh").total(view="resident")


def per_layer(arch: Arch, run: Run, *, fused_gelu: bool = False) -> int:
    """Return the bytes that one more layer keeps.

    >>> llama = Arch("llama", 32000, 4096, 4096, 11008, 32, 32, 32, 128, tied=False)
    >>> n, h, f, a = 4096, 4096, 11008, 32
    >>> per_layer(llama, Run(batch=1, length=4096)) == 4 * n * (10 * h + 4 * f + a + 2)
    True
    """
    one, two = (
        saved(replace(arch, layers=layers), run, fused_gelu=fused_gelu).total(view="resident")
        for layers in (1, 2)
    )
    return two - one


def rules(arch: Arch, run: Run, *, fused_gelu: bool = False) -> tuple[SavedTensor, ...]:
    """Return the lines behind `saved`: module, op, role of the tensor, dtype and elements.

    >>> gpt2 = Arch("gpt2", 96, 16, 32, 128, 1, 4, 4, 8, tied=True)
    >>> for line in rules(gpt2, Run(batch=2, length=8, attention="eager"))[6:9]:
    ...     print(line.module, line.op, line.tensor, line.dtype, line.numel)
    transformer.h.0.attn matmul k float32 512
    transformer.h.0.attn matmul q float32 512
    transformer.h.0.attn softmax output float32 512
    """
    release = _release()
    for name in ("checkpoint_every", "lora_rank"):
        if getattr(run, name) is not None:
            raise ValueError(f"{name} must be None: the rules describe plain training, got {run}")
    if run.length < 2:
        raise ValueError(f"length must be >= 2: one token has no next token to learn, got {run.length}")
    if run.length > arch.positions:
        raise ValueError(f"length must be <= positions ({arch.positions}), got {run.length}")
    tape = Tape(run)
    if arch.kind == "gpt2":
        _gpt2(tape, arch, fused_gelu, release)
    else:
        if fused_gelu:
            raise ValueError("fused_gelu belongs to kind 'gpt2'; a 'llama' has SiLU")
        _llama(tape, arch, release)
    return tuple(tape.lines)


def korthikanti(
    s: int, b: int, h: int, a: int, *, t: int = 1, sequence_parallel: bool = False,
    recompute: str = "none", dropout: bool = True,
) -> float:  # fmt: skip
    """Return the bytes of one layer by the formula of Korthikanti et al. (arXiv 2205.05198).

    16-bit activations, eager attention, fused GELU, f = 4h; the norms' statistics are neglected:

        s·b·h·(10 + 24/t + 5·a·s/(h·t)),  all of it / t with sequence parallelism,
        without the a·s term for selective recomputation, 2·s·b·h for full recomputation.

    Without dropout its masks (1 byte each: 2·sbh outside attention, a·s²·b inside) and the dropped copy of
    the softmax (2·a·s²·b) go: s·b·h·(32 + 2·a·s/h) for t = 1.

    Parameters
    ----------
    s, b, h, a : length, batch, width and heads.
    t : tensor-parallel ranks.
    sequence_parallel : whether norms and dropouts are split over these ranks, too.
    recompute : "none", "selective" (attention without its projections) or "full" (the layer's input is kept).
    dropout : whether dropout is on, as in the paper.

    >>> korthikanti(2048, 4, 12288, 96) / (2048 * 4 * 12288)        # GPT-3: 34 + 5as/h
    114.0
    """
    for name, value in {"s": s, "b": b, "h": h, "a": a, "t": t}.items():
        if value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if recompute not in ("none", "selective", "full"):
        raise ValueError(f"recompute must be 'none', 'selective' or 'full', got {recompute!r}")
    if recompute == "full":
        return 2 * s * b * h
    outside, split, square = (10, 24, 5) if dropout else (8, 24, 2)
    inside = split + (square * a * s / h if recompute == "none" else 0)
    return s * b * h * (outside / (t if sequence_parallel else 1) + inside / t)


def _gpt2(tape: Tape, arch: Arch, fused_gelu: bool, release: tuple[int, ...]) -> None:
    h, f, a = arch.hidden, arch.ffn, arch.heads
    tape.save("transformer.wte", "embedding", token_ids=SizeTensor(tape.n, "int64"))
    tape.save("transformer.wpe", "embedding", positions=SizeTensor(tape.run.length, "int64"))
    for i in range(arch.layers):
        at = f"transformer.h.{i}."
        normed = tape.layer_norm(at + "ln_1", tape.stream(h))
        qkv = tape.linear(at + "attn.c_attn", normed, h, 3 * h, bias=True, op="addmm")
        q, k, v = (SizeTensor(tape.n * h, qkv.dtype, storage=qkv.storage) for _ in range(3))
        if tape.run.attention == "sdpa":
            mixed = tape.sdpa(at + "attn", q, k, v, a)
        else:
            divided = release < GPT2_SCALES_BY_NUMBER
            mixed = tape.eager(at + "attn", q, k, v, a, divided=divided)
        tape.linear(at + "attn.c_proj", mixed, h, h, bias=True, op="addmm")
        normed = tape.layer_norm(at + "ln_2", tape.stream(h))
        hidden = tape.linear(at + "mlp.c_fc", normed, h, f, bias=True, op="addmm")
        hidden = (tape.gelu if fused_gelu else tape.gelu_new)(at + "mlp.act", hidden)
        tape.linear(at + "mlp.c_proj", hidden, f, h, bias=True, op="addmm")
    normed = tape.layer_norm("transformer.ln_f", tape.stream(h))
    tape.cross_entropy(tape.linear("lm_head", normed, h, arch.vocab))


def _llama(tape: Tape, arch: Arch, release: tuple[int, ...]) -> None:
    h, f, a, kv, d = arch.hidden, arch.ffn, arch.heads, arch.kv_heads, arch.head_dim
    tape.save("model.embed_tokens", "embedding", token_ids=SizeTensor(tape.n, "int64"))
    cos, sin = (SizeTensor(tape.run.length * d, tape.run.dtype) for _ in range(2))
    sdpa = tape.run.attention == "sdpa"
    shared = sdpa and (d <= 256 or release < SDPA_REPEATS_WIDE_HEADS)  # one KV head serves a/kv query heads
    for i in range(arch.layers):
        at = f"model.layers.{i}."
        normed = tape.rms_norm(at + "input_layernorm", tape.stream(h))
        q = tape.linear(at + "self_attn.q_proj", normed, h, a * d, bias=arch.qkv_bias)
        k = tape.linear(at + "self_attn.k_proj", normed, h, kv * d, bias=arch.qkv_bias)
        v = tape.linear(at + "self_attn.v_proj", normed, h, kv * d, bias=arch.qkv_bias)
        q, k = (tape.rope(at + "self_attn", x, cos, sin) for x in (q, k))
        if not shared:
            k, v = (tape.repeat(x, kv, a // kv) for x in (k, v))
        if sdpa:
            mixed = tape.sdpa(at + "self_attn", q, k, v, a)
        else:
            mixed = tape.eager(at + "self_attn", q, k, v, a, upcast=True)
        tape.linear(at + "self_attn.o_proj", mixed, a * d, h)
        normed = tape.rms_norm(at + "post_attention_layernorm", tape.stream(h))
        gate = tape.silu(at + "mlp.act_fn", tape.linear(at + "mlp.gate_proj", normed, h, f))
        up = tape.linear(at + "mlp.up_proj", normed, h, f)
        tape.linear(at + "mlp.down_proj", tape.mul(at + "mlp", gate, up), f, h)
    normed = tape.rms_norm("model.norm", tape.stream(h))
    tape.cross_entropy(tape.linear("lm_head", normed, h, arch.vocab))


def _release() -> tuple[int, ...]:
    version = metadata.version("transformers")
    release = tuple(int(part) for part in version.split(".")[:2])
    if not VERIFIED_FROM <= release <= VERIFIED_TO:
        known = " to ".join(".".join(map(str, end)) for end in (VERIFIED_FROM, VERIFIED_TO))
        raise RuntimeError(
            f"the rules of saved activations are verified for transformers {known}, found {version}: "
            "measure with saved_tensors, or verify the rules there and widen the range"
        )
    return release
