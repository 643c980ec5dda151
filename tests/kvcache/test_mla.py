"""Multi-head latent attention against transformers' DeepSeek-V3."""

import pytest
import torch
from torch import nn

from refimpl.footprint.arch import Arch
from refimpl.footprint.published import arch
from refimpl.footprint.serving import kv_width
from refimpl.kvcache.mla import LatentAttention, LatentCache


def deepseek(query_rank=12, interleave=True, **changes):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=40, hidden_size=24, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=2,
        kv_lora_rank=10, q_lora_rank=query_rank, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5,
        intermediate_size=32, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, max_position_embeddings=64, rope_interleave=interleave,
        attn_implementation="eager", **changes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeepseekV3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def ours(model, layer=0):
    return LatentAttention(model.model.layers[layer].self_attn, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("query_rank", [None, 12])
@pytest.mark.parametrize("interleave", [True, False])
@torch.no_grad()
def test_equals_transformers_and_absorbed_equals_expanded(query_rank, interleave):
    model = deepseek(query_rank, interleave)
    x = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(0))
    future = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    rope = model.model.rotary_emb(x, torch.arange(11)[None])
    expected = model.model.layers[1].self_attn(x, rope, future)[0]
    attention = ours(model, 1)
    for absorbed in (True, False):
        cache = LatentCache()
        parts = [attention(piece, cache, absorbed=absorbed) for piece in x.split([5, 1, 1, 4], 1)]
        assert (torch.cat(parts, 1) - expected).abs().max() < 1e-5
        assert cache.latent.shape == (2, 1, 11, 10) and cache.rope_key.shape == (2, 1, 11, 4)
        assert cache.nbytes() == 2 * 11 * (10 + 4) * 4


@torch.no_grad()
def test_whole_model_with_absorbed_attention_generates_the_same(monkeypatch):
    model = deepseek()
    ids = torch.tensor([[3, 7, 1, 30]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    caches = [LatentCache() for _ in range(2)]
    for layer, cache in zip(model.model.layers, caches, strict=True):
        attention = LatentAttention(layer.self_attn, model.model.rotary_emb.inv_freq)

        def forward(hidden_states, attention=attention, cache=cache, **kwargs):
            return attention(hidden_states, cache), None

        monkeypatch.setattr(layer.self_attn, "forward", forward)
    tokens = ids
    for step in range(8):
        new = tokens if step == 0 else tokens[:, -1:]
        tokens = torch.cat((tokens, model(new, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(tokens, expected)
    assert caches[0].seen == 11


def test_numbers_per_token_and_layer():
    """MHA > GQA > MQA > MLA at equal head dims; and what DeepSeek publishes for its own."""
    heads = {"MHA": 128, "GQA": 8, "MQA": 1}
    width = {name: 2 * G * 128 for name, G in heads.items()}
    width["MLA"] = kv_width(arch("deepseek-ai/DeepSeek-V3"))
    assert width == {"MHA": 32768, "GQA": 2048, "MQA": 256, "MLA": 576}
    assert width["MHA"] > width["GQA"] > width["MLA"] > width["MQA"]
    assert isinstance(arch("meta-llama/Meta-Llama-3-8B"), Arch)


def test_bad_input():
    model = deepseek()
    attention = model.model.layers[0].self_attn
    with pytest.raises(TypeError, match="Linear"):
        LatentAttention(nn.Linear(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match="inv_freq: 3"):
        LatentAttention(attention, torch.ones(3))
    cache = LatentCache()
    with pytest.raises(ValueError, match="x: shape"):
        ours(model)(torch.zeros(1, 2, 23), cache)
    assert cache.seen == 0 and cache.nbytes() == 0
    ours(model)(torch.zeros(1, 2, 24), cache)
    with pytest.raises(ValueError, match="latent: 2 rows"):
        ours(model)(torch.zeros(2, 1, 24), cache)
    attention.scaling = 1.0
    with pytest.raises(ValueError, match="scaling"):
        ours(model)
