"""Published configurations, and the parameter counts of the architectures among them that `Arch` leaves out.

`published.toml` holds the facts: hidden sizes, layers, heads, vocabulary and published counts of models from
GPT-2 to DeepSeek-V3, under their names on the hub. Nothing is downloaded, and no tensor is made.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

from refimpl.footprint.arch import Arch

__all__ = ["Deepseek", "LlamaVariant", "Model", "arch", "config", "count", "names", "of_config"]

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class LlamaVariant:
    """A LLaMA-like decoder with several experts in place of each MLP (Mixtral) or with normed heads (Qwen3).

    Parameters
    ----------
    base : the decoder without either.
    experts, active : E experts per layer, of which each token uses `active`.
    head_norm : whether queries and keys are normed per head, with one gain of size D for each of the two.

    Raises ValueError unless 1 <= active <= experts.

    >>> mixtral = arch("mistralai/Mixtral-8x7B-v0.1")
    >>> mixtral.parameters(), mixtral.used()
    (46702792704, 12879925248)
    """

    base: Arch
    experts: int = 1
    active: int = 1
    head_norm: bool = False

    def __post_init__(self) -> None:
        _check_experts(self.experts, self.active)

    def tensors(self) -> Shapes:
        """Return (name, shape) of every parameter tensor, as in `transformers`, ties once."""
        h, f, out = self.base.hidden, self.base.ffn, []
        for name, shape in self.base.tensors():
            at, _, part = name.rpartition("mlp.")
            if self.experts == 1 or not at:
                out.append((name, shape))
            elif part == "gate_proj.weight":
                out += [(at + "mlp.gate.weight", (self.experts, h))]
                out += [(at + "mlp.experts.gate_up_proj", (self.experts, 2 * f, h))]
                out += [(at + "mlp.experts.down_proj", (self.experts, h, f))]
            if self.head_norm and name.endswith("o_proj.weight"):
                norm = name.removesuffix("o_proj.weight")
                out += [(f"{norm}{qk}_norm.weight", (self.base.head_dim,)) for qk in "qk"]
        return tuple(out)

    def parameters(self) -> int:
        """Return the number of parameters, ties once."""
        return sum(prod(shape) for _, shape in self.tensors())

    def used(self) -> int:
        """Return how many of them one token uses."""
        idle = self.experts - self.active
        return self.parameters() - idle * self.base.layers * 3 * self.base.hidden * self.base.ffn


@dataclass(frozen=True)
class Deepseek:
    """A DeepSeek-V2 or V3 decoder: multi-head latent attention and a mixture of small experts.

    Parameters
    ----------
    vocab, positions, hidden, layers, heads : V, longest sequence, h, L, H.
    ffn, dense_layers : the first `dense_layers` layers have an MLP of width f.
    query_rank : rank of the compressed query; None where queries are projected directly (V2-Lite).
    kv_rank, rope_dim : what the cache holds per token and layer, a latent and one rotary key for all heads.
    nope_dim, value_dim : dimensions per head of the keys expanded from the latent, and of the values.
    experts, active, shared, expert_ffn : E routed experts of that width, of which a token uses `active`, and
        one MLP of `shared` times that width for every token.
    tied : whether the output head is the embedding.

    Raises ValueError for numbers that do not fit together.

    >>> arch("deepseek-ai/DeepSeek-V3").parameters()
    671026404352
    """

    vocab: int
    positions: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    query_rank: int | None
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    experts: int
    active: int
    shared: int
    expert_ffn: int
    dense_layers: int
    tied: bool = False

    def __post_init__(self) -> None:
        _check_experts(self.experts, self.active)
        if not 0 <= self.dense_layers <= self.layers:
            raise ValueError(f"dense_layers must lie in 0 ... {self.layers}, got {self.dense_layers!r}")

    def tensors(self) -> Shapes:
        """Return (name, shape) of every parameter tensor, as in `transformers`, ties once."""
        h, q = self.hidden, self.heads * (self.nope_dim + self.rope_dim)
        out: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (self.vocab, h))]
        for i in range(self.layers):
            at = f"model.layers.{i}."
            if self.query_rank is None:
                out += [(at + "self_attn.q_proj.weight", (q, h))]
            else:
                out += [(at + "self_attn.q_a_proj.weight", (self.query_rank, h))]
                out += [(at + "self_attn.q_a_layernorm.weight", (self.query_rank,))]
                out += [(at + "self_attn.q_b_proj.weight", (q, self.query_rank))]
            out += [(at + "self_attn.kv_a_proj_with_mqa.weight", (self.kv_rank + self.rope_dim, h))]
            out += [(at + "self_attn.kv_a_layernorm.weight", (self.kv_rank,))]
            expanded = self.heads * (self.nope_dim + self.value_dim)
            out += [(at + "self_attn.kv_b_proj.weight", (expanded, self.kv_rank))]
            out += [(at + "self_attn.o_proj.weight", (h, self.heads * self.value_dim))]
            mlp, width = at + "mlp.", self.ffn
            if i >= self.dense_layers:
                out += [(mlp + "experts.gate_up_proj", (self.experts, 2 * self.expert_ffn, h))]
                out += [(mlp + "experts.down_proj", (self.experts, h, self.expert_ffn))]
                out += [(mlp + "gate.weight", (self.experts, h))]
                mlp, width = mlp + "shared_experts.", self.shared * self.expert_ffn
            out += [(f"{mlp}{name}_proj.weight", (width, h)) for name in ("gate", "up")]
            out += [(mlp + "down_proj.weight", (h, width))]
            out += [(at + f"{name}_layernorm.weight", (h,)) for name in ("input", "post_attention")]
        out += [("model.norm.weight", (h,))]
        return tuple(out if self.tied else [*out, ("lm_head.weight", (self.vocab, h))])

    def parameters(self) -> int:
        """Return the number of parameters, ties once."""
        return sum(prod(shape) for _, shape in self.tensors())

    def used(self) -> int:
        """Return how many of them one token uses."""
        idle = (self.experts - self.active) * (self.layers - self.dense_layers)
        return self.parameters() - idle * 3 * self.hidden * self.expert_ffn


Model = Arch | LlamaVariant | Deepseek


def names() -> tuple[str, ...]:
    """Return the names in the table.

    >>> "meta-llama/Meta-Llama-3-8B" in names()
    True
    """
    return tuple(_table())


def config(name: str) -> dict[str, Any]:
    """Return a model's configuration as in its config.json; ValueError for a name not in the table.

    >>> config("meta-llama/Meta-Llama-3-8B")["num_key_value_heads"]
    8
    """
    # TOML has no null, which says in DeepSeek-V2-Lite that queries are not compressed.
    fields = {"q_lora_rank": None} if "kv_lora_rank" in _row(name) else {}
    return fields | {key: value for key, value in _row(name).items() if key not in _ABOUT}


def count(name: str) -> int:
    """Return the published number of parameters; ValueError for a name not in the table.

    >>> count("meta-llama/Llama-2-7b-hf")
    6738415616
    """
    row = _row(name)
    return row["count"] - row.get("count_other", 0)


def arch(name: str) -> Model:
    """Return a published model's architecture; ValueError for a name not in the table.

    >>> arch("Qwen/Qwen2.5-7B").parameters()
    7615616512
    """
    return of_config(config(name))


def of_config(config: Any) -> Model:
    """Read a `transformers` configuration, its dictionary, or the path of a config.json.

    Known model types: gpt2, llama, mistral, qwen2 (an `Arch`); mixtral, qwen3 (a `LlamaVariant`); deepseek_v2
    and deepseek_v3 (a `Deepseek`). Raises ValueError for another and for a missing field.

    >>> of_config({"model_type": "gpt2"}).parameters()
    124439808
    """
    if isinstance(config, str | Path):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    config = config if isinstance(config, Mapping) else config.to_dict()
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise ValueError(f"model_type must be one of {', '.join(_KINDS)}, got {kind!r}")
    try:
        if kind.startswith("deepseek"):
            return Deepseek(**{ours: config[theirs] for ours, theirs in _DEEPSEEK.items()})
        base = Arch.from_config(config if kind in _PLAIN else {**config, "model_type": "llama"})
        if kind == "mixtral":
            return LlamaVariant(base, config["num_local_experts"], config["num_experts_per_tok"])
        return LlamaVariant(base, head_norm=True) if kind == "qwen3" else base
    except KeyError as missing:
        raise ValueError(f"the configuration of a {kind} has no field {missing}") from missing


_PLAIN = ("gpt2", "llama", "mistral", "qwen2")
_KINDS = (*_PLAIN, "mixtral", "qwen3", "deepseek_v2", "deepseek_v3")
_ABOUT = ("source", "note", "count", "count_other")
_DEEPSEEK = {
    "vocab": "vocab_size", "positions": "max_position_embeddings", "hidden": "hidden_size",
    "ffn": "intermediate_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "query_rank": "q_lora_rank", "kv_rank": "kv_lora_rank", "rope_dim": "qk_rope_head_dim",
    "nope_dim": "qk_nope_head_dim", "value_dim": "v_head_dim", "experts": "n_routed_experts",
    "active": "num_experts_per_tok", "shared": "n_shared_experts", "expert_ffn": "moe_intermediate_size",
    "dense_layers": "first_k_dense_replace", "tied": "tie_word_embeddings",
}  # fmt: skip


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads((files("refimpl.footprint") / "published.toml").read_text(encoding="utf-8"))


def _row(name: str) -> dict[str, Any]:
    if name not in _table():
        raise ValueError(f"name: no published configuration {name!r}; known: {', '.join(_table())}")
    return _table()[name]


def _check_experts(experts: int, active: int) -> None:
    if not 1 <= active <= experts:
        raise ValueError(f"active must lie in 1 ... experts ({experts}), got {active!r}")
