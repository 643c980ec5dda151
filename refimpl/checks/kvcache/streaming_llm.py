"""The check of StreamingLLM (kv-cache spec 5): every key rotated anew at every step, one head at a time."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close, require_error
from refimpl.checks.tiny import HEADS, random_ids, tiny

IMPLEMENTATION = {"streaming_llm": "refimpl.kvcache.baselines:streaming_cache"}
TOKENS = 40


@check
def check_streaming_llm(streaming_cache: Callable) -> None:
    """`streaming_cache(model, recent, sink)`: first and last tokens, at positions inside the cache."""
    ids = random_ids(1, TOKENS)
    for family, sink, recent, offset in (("llama", 3, 7, 0), ("llama", 0, 6, 5000), ("qwen2", 2, 9, 0)):
        what = f"{family}, {sink} sinks, {recent} recent, text from position {offset}"
        expected = _brute_force(family, sink, recent)
        model, out = tiny(family), []
        cache = streaming_cache(model, recent, sink)
        with torch.no_grad():
            for t in range(ids.shape[1]):
                at = torch.tensor([[t + offset]])
                out.append(model(ids[:, t : t + 1], past_key_values=cache, position_ids=at).logits)
        require_close(torch.cat(out, 1), expected, 5e-4 if offset else 2e-5,
                      f"{what}: logits, against keys rotated at each step")  # fmt: skip
        held = cache.held(0).tolist()
        require(held == [[sink + recent] * 2], f"{what}: {held} slots held, not {sink + recent}")
    for wrong in ((0, 4), (4, -1)):
        require_error(ValueError, lambda wrong=wrong: streaming_cache(tiny("llama"), *wrong), f"{wrong}")
    require_error(ValueError, lambda: streaming_cache(tiny("gpt2"), 4, 4), "learned positions")


@functools.cache  # the same for every candidate
@torch.no_grad()
def _brute_force(family: str, sink: int, recent: int) -> Tensor:
    """Logits from lists of un-rotated keys, numbered anew at each step."""
    model, ids = tiny(family), random_ids(1, TOKENS)
    core, D = model.model, 8
    kept: list[list] = [[] for _ in core.layers]
    out = []
    for t in range(ids.shape[1]):
        x = core.embed_tokens(ids[:, t])  # [1, d]
        for l, layer in enumerate(core.layers):
            a, h = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (p(h).view(-1, D) for p in (a.q_proj, a.k_proj, a.v_proj))
            kept[l].append((k, v))
            if len(kept[l]) > sink + recent + 1:
                del kept[l][sink]
            n, heads = len(kept[l]), []
            for head in range(HEADS):
                g = head * len(k) // HEADS
                keys = torch.stack([_rotate(kept[l][j][0][g], j, core.rotary_emb.inv_freq) for j in range(n)])
                values = torch.stack([kept[l][j][1][g] for j in range(n)])
                scores = keys @ _rotate(q[head], n - 1, core.rotary_emb.inv_freq) / D**0.5
                heads.append(scores.softmax(0) @ values)
            x = x + a.o_proj(torch.cat(heads)[None])
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        out.append(model.lm_head(core.norm(x)))
    return torch.stack(out, 1)


def _rotate(x: Tensor, position: int, inv_freq: Tensor) -> Tensor:
    angle = position * inv_freq
    a, b = x.chunk(2)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))
