"""The check of multi-head latent attention (KV-cache spec, section 20), against transformers' DeepSeek-V3."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {"latent_attention": "refimpl.kvcache.mla:LatentAttention"}
WIDTH, HEADS, RANK, ROPE, NOPE, VALUE = 24, 3, 10, 4, 6, 5


@check
def check_latent_attention(LatentAttention: Callable) -> None:
    """`LatentAttention(attention, inv_freq)` called with (x, cache, absorbed=) gives the module's own output,
    expanded and absorbed, in one piece and token by token, and caches a latent and one rotary key."""
    from transformers import DynamicCache

    for query_rank, interleave in ((None, True), (7, False)):
        attention, rotary = _random(query_rank, interleave)
        where = f"query rank {query_rank}, neighbouring pairs {interleave}"
        x = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1))
        pos = torch.arange(9)[None]
        future = torch.full((9, 9), float("-inf")).triu(1)[None, None]
        with torch.no_grad():
            theirs = DynamicCache()
            expected = attention(x, rotary(x, pos), future, past_key_values=theirs)[0]
            ours = LatentAttention(attention, rotary.inv_freq)
            for absorbed in (False, True):
                for sizes in ([9], [1] * 9, [4, 5]):
                    cache, start, parts = _Recorder(), 0, []
                    for size in sizes:
                        parts.append(ours(x[:, start : start + size], cache, absorbed=absorbed))
                        start += size
                    form = f"{where}, {'absorbed' if absorbed else 'expanded'}, pieces {sizes}"
                    require_close(torch.cat(parts, 1), expected, 1e-5, f"{form}: output")
                    _latents(cache, theirs, form)
    require_error(TypeError, lambda: LatentAttention(nn.Linear(2, 2), torch.ones(1)), "another module")


def _latents(cache: "_Recorder", theirs: object, form: str) -> None:
    shapes = [tuple(t.shape) for t in (cache.latent, cache.rope_key)]
    require(shapes == [(2, 1, 9, RANK), (2, 1, 9, ROPE)],
            f"{form}: cached are tensors {shapes}, not a latent and one rotary key a token")  # fmt: skip
    require_close(cache.latent, theirs.layers[0].keys, 1e-6, f"{form}: the latent that is cached")


class _Recorder:
    """A cache of one layer that keeps what it is given."""

    latent: Tensor | None = None
    rope_key: Tensor | None = None

    @property
    def seen(self) -> int:
        return 0 if self.latent is None else self.latent.shape[2]

    def append(self, latent: Tensor, rope_key: Tensor) -> None:
        self.latent = latent if self.latent is None else torch.cat((self.latent, latent), 2)
        self.rope_key = rope_key if self.rope_key is None else torch.cat((self.rope_key, rope_key), 2)


def _random(query_rank: int | None, interleave: bool) -> tuple[nn.Module, nn.Module]:
    """Attention and rotary embedding of a random layer, with a wide gain of the latent's norm."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = deepseek.DeepseekV3Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, kv_lora_rank=RANK,
        q_lora_rank=query_rank, qk_rope_head_dim=ROPE, qk_nope_head_dim=NOPE, v_head_dim=VALUE,
        rope_interleave=interleave, num_hidden_layers=1, max_position_embeddings=32, n_group=1, topk_group=1,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # the constructors draw from the global generator
        attention, rotary = (
            deepseek.DeepseekV3Attention(config, 0),
            deepseek.DeepseekV3RotaryEmbedding(config),
        )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.4)
    return attention.eval(), rotary
