"""Tiny models with random weights, on which exact identities are checked in milliseconds.

The weights are drawn wide (norm gains and biases as well), so that a forgotten bias, a wrong head or a
dropped position moves the logits by far more than rounding does.
"""

from functools import partial

import torch
from torch import nn

FAMILIES = ("gpt2", "llama", "mistral", "qwen2")
VOCAB, WIDTH, LAYERS, HEADS, CONTEXT = 48, 32, 3, 4, 32


def tiny(family: str, *, seed: int = 0, attention: str = "eager", **changes: object) -> nn.Module:
    """A random model of 3 layers, width 32, 4 heads, vocabulary 48, context 32, in eval mode.

    Parameters: family, one of `FAMILIES` (llama and qwen2: 2 KV heads; mistral: 2 KV heads of 16 and a window
    of 5); attention, the transformers name of the implementation; changes, further fields of the config.
    Raises ValueError for an unknown family.

    >>> tiny("llama").config.num_key_value_heads
    2
    """
    import transformers as hf

    shared = {
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_size": WIDTH,
        "max_position_embeddings": CONTEXT,
        "attn_implementation": attention,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    llama = shared | {"num_key_value_heads": 2, "intermediate_size": 40, "tie_word_embeddings": True}
    classes = {
        "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, shared),
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, llama),
        "mistral": (hf.MistralConfig, hf.MistralForCausalLM, llama | {"head_dim": 16, "sliding_window": 5}),
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, llama),
    }
    if family not in classes:
        raise ValueError(f"family: {family!r}; allowed: {', '.join(FAMILIES)}")
    config, model_class, fields = classes[family]
    with torch.random.fork_rng(devices=[]):  # the constructors draw from the global generator
        model = model_class(config(**(fields | changes))).eval()
    normal = partial(torch.normal, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name or ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(normal(centre, 0.2, parameter.shape))
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.LongTensor:
    """Token ids of the given shape, without the special ids 0 and 1.

    >>> tuple(random_ids(2, 5).shape)
    (2, 5)
    """
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
