"""What a footprint depends on: the architecture of a model and the run that trains or serves it.

Both are plain numbers: no tensor is made here, so a model of 70 billion parameters costs nothing to describe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

__all__ = ["Arch", "DTYPE_BYTES", "Run"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Arch:
    """The geometry of a GPT-2 or LLaMA-like decoder.

    Parameters
    ----------
    kind : "gpt2" (learned positions, LayerNorm, biases, GELU MLP) or "llama" (RoPE, RMSNorm, SwiGLU).
    vocab, positions : V, and the longest sequence.
    hidden, ffn, layers : h, f (GPT-2: 4h) and L.
    heads, kv_heads, head_dim : a query heads, kv key-value heads, of d dimensions each.
    tied : whether the output head is the embedding.
    qkv_bias : whether a "llama" has biases on q, k and v (Qwen2); GPT-2 always has them.

    Raises ValueError for sizes that do not fit together.

    Examples
    --------
    >>> gpt2 = Arch("gpt2", 50257, 1024, 768, 3072, 12, 12, 12, 64, tied=True)
    >>> gpt2.parameters()
    124439808
    >>> llama2 = Arch("llama", 32000, 4096, 4096, 11008, 32, 32, 32, 128, tied=False)
    >>> llama2.parameters()
    6738415616
    """

    kind: Literal["gpt2", "llama"]
    vocab: int
    positions: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("gpt2", "llama"):
            raise ValueError(f"kind must be 'gpt2' or 'llama', got {self.kind!r}")
        for name in ("vocab", "positions", "hidden", "ffn", "layers", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.kind == "gpt2" and (self.kv_heads != self.heads or self.head_dim * self.heads != self.hidden):
            raise ValueError("a GPT-2 has kv_heads = heads and head_dim = hidden / heads")

    @classmethod
    def from_config(cls, config: Any) -> Arch:
        """Read a `transformers` configuration, its dictionary, or the path of a `config.json`.

        Known model types: gpt2, llama, mistral, qwen2. Raises ValueError for another.

        >>> Arch.from_config({"model_type": "gpt2"}).parameters()
        124439808
        """
        if isinstance(config, str | Path):
            config = json.loads(Path(config).read_text())
        if not isinstance(config, Mapping):
            config = config.to_dict()
        model_type = config.get("model_type")
        if model_type == "gpt2":
            hidden, heads = config.get("n_embd", 768), config.get("n_head", 12)
            return cls(
                "gpt2", config.get("vocab_size", 50257), config.get("n_positions", 1024), hidden,
                config.get("n_inner") or 4 * hidden, config.get("n_layer", 12), heads, heads, hidden // heads,
                tied=config.get("tie_word_embeddings", True),
            )  # fmt: skip
        if model_type in ("llama", "mistral", "qwen2"):
            if config.get("mlp_bias") or (model_type == "llama" and config.get("attention_bias")):
                raise ValueError("config has attention_bias or mlp_bias, which this account does not cover")
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            return cls(
                "llama", config["vocab_size"], config["max_position_embeddings"], hidden,
                config["intermediate_size"], config["num_hidden_layers"], heads,
                config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads,
                tied=config.get("tie_word_embeddings", False),
                qkv_bias=model_type == "qwen2",
            )  # fmt: skip
        raise ValueError(f"model_type must be gpt2, llama, mistral or qwen2, got {model_type!r}")

    def tensors(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return (name, shape) of every parameter tensor, named and shaped as in `transformers`, ties once.

        GPT-2's matrices are stored [in, out] (Conv1D), LLaMA's [out, in] (Linear).
        """
        h, f = self.hidden, self.ffn
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        out: list[tuple[str, tuple[int, ...]]] = []
        if self.kind == "gpt2":
            out += [
                ("transformer.wte.weight", (self.vocab, h)),
                ("transformer.wpe.weight", (self.positions, h)),
            ]
            for i in range(self.layers):
                at = f"transformer.h.{i}."
                out += [(at + "ln_1.weight", (h,)), (at + "ln_1.bias", (h,))]
                out += [(at + "attn.c_attn.weight", (h, 3 * h)), (at + "attn.c_attn.bias", (3 * h,))]
                out += [(at + "attn.c_proj.weight", (h, h)), (at + "attn.c_proj.bias", (h,))]
                out += [(at + "ln_2.weight", (h,)), (at + "ln_2.bias", (h,))]
                out += [(at + "mlp.c_fc.weight", (h, f)), (at + "mlp.c_fc.bias", (f,))]
                out += [(at + "mlp.c_proj.weight", (f, h)), (at + "mlp.c_proj.bias", (h,))]
            out += [("transformer.ln_f.weight", (h,)), ("transformer.ln_f.bias", (h,))]
        else:
            out += [("model.embed_tokens.weight", (self.vocab, h))]
            for i in range(self.layers):
                at = f"model.layers.{i}."
                for name, rows in (("q", q), ("k", kv), ("v", kv)):
                    out += [(at + f"self_attn.{name}_proj.weight", (rows, h))]
                    out += [(at + f"self_attn.{name}_proj.bias", (rows,))] if self.qkv_bias else []
                out += [(at + "self_attn.o_proj.weight", (h, q))]
                out += [(at + f"mlp.{name}_proj.weight", (f, h)) for name in ("gate", "up")]
                out += [(at + "mlp.down_proj.weight", (h, f))]
                out += [(at + f"{name}_layernorm.weight", (h,)) for name in ("input", "post_attention")]
            out += [("model.norm.weight", (h,))]
        if not self.tied:
            out += [("lm_head.weight", (self.vocab, h))]
        return tuple(out)

    def parameters(self) -> int:
        """Return the number of parameters, ties once."""
        return sum(prod(shape) for _, shape in self.tensors())


@dataclass(frozen=True)
class Run:
    """How a model is trained: everything that moves bytes.

    Parameters
    ----------
    batch, length : B sequences of S tokens each, of one micro-batch.
    dtype : of the parameters, "float32", "bfloat16" or "float16".
    amp : bfloat16 autocast over float32 parameters.
    attention : "eager" or "sdpa".
    optimizer : "adamw", "adamw8bit", "adafactor", "momentum" (SGD with momentum) or "sgd".
    checkpoint_every : recompute blocks of so many layers (None: keep all activations).
    accumulate : micro-batches per optimizer step.
    lora_rank, lora_targets : train factors of this rank beside the named projections ("q_proj", ...) and
        nothing else (None: train everything).
    zero_stage, world : ZeRO stage 0 to 3 over so many ranks.

    Raises ValueError for a value out of range.

    Examples
    --------
    >>> Run(batch=2, length=128).tokens
    256
    """

    batch: int = 1
    length: int = 1024
    dtype: str = "float32"
    amp: bool = False
    attention: Literal["eager", "sdpa"] = "sdpa"
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "momentum", "sgd"] = "adamw"
    checkpoint_every: int | None = None
    accumulate: int = 1
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    zero_stage: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "length", "accumulate", "world"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)!r}")
        for name in ("checkpoint_every", "lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be None or an integer >= 1, got {value!r}")
        choices = {
            "dtype": tuple(DTYPE_BYTES),
            "attention": ("eager", "sdpa"),
            "optimizer": ("adamw", "adamw8bit", "adafactor", "momentum", "sgd"),
            "zero_stage": (0, 1, 2, 3),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.amp and self.dtype != "float32":
            raise ValueError(f"amp keeps float32 parameters, so dtype must be 'float32', got {self.dtype!r}")

    @property
    def tokens(self) -> int:
        """n = B · S, the tokens of one micro-batch."""
        return self.batch * self.length

    @property
    def itemsize(self) -> int:
        """Bytes of one parameter."""
        return DTYPE_BYTES[self.dtype]
