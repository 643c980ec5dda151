"""Golden arrays of kvpress for the tests: writes tests/kvcache/golden/kvpress.npz.

Run `python data/kvcache_golden.py` in an environment of its own, made by
`pip install torch==2.13.0 transformers==5.2.0 kvpress==0.5.5`. It imports nothing of refimpl; the tests take
the model, the tokens and the sizes from here.

For every case: kept values of each layer, flat over heads, [N, D]; how many each head keeps, [G]; logits
after the prompt and after each of 20 more tokens, [21, V].
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import LongTensor, Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "tests" / "kvcache" / "golden" / "kvpress.npz"
SEED, PROMPT, STEPS, VOCAB = 0, 128, 20, 160
PEERS = ("kvpress", "transformers", "torch", "numpy")
# Of 128 tokens 38 stay; in the pyramid 112, 64 and 16 (a steeper one would fall back to SnapKV in kvpress).
KEPT, RATIO, WINDOW, KERNEL, SINK, BETA = 38, 0.7, 8, 5, 4, 4
CASES = ("SnapKV", "PyramidKV", "StreamingLLM", "KeyRerotation(StreamingLLM)", "Knorm", "ObservedAttention",
         "TOVA", "AdaKV(SnapKV)", "Decoding(Knorm)", "Decoding(TOVA)")  # fmt: skip


def model(attention: str = "eager", length: int = 512) -> nn.Module:
    """A 3-layer Llama of width 32 with 4 heads on 2 KV heads; weights from numpy, in the order of names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=length, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, pad_token_id=1, attn_implementation=attention,
    )  # fmt: skip
    llama, rng = LlamaForCausalLM(config).eval(), np.random.default_rng(SEED)
    with torch.no_grad():
        for name, weight in sorted(llama.named_parameters()):
            drawn = rng.normal(1.0 if "norm" in name else 0.0, 0.2, tuple(weight.shape))
            weight.copy_(torch.from_numpy(drawn.astype(np.float32)))
    return llama


def tokens(n: int = PROMPT + STEPS) -> LongTensor:
    """Ids [1, n] of prompt and continuation; no two are equal, for their keys would have equal norms."""
    return torch.from_numpy(np.random.default_rng(SEED + 1).permutation(np.arange(2, VOCAB))[None, :n])


def fingerprint() -> str:
    """SHA-256 of the weights and the ids."""
    digest = hashlib.sha256(tokens().numpy().tobytes())
    for _, weight in sorted(model().named_parameters()):
        digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()


def press(case: str, kept: int = KEPT, ratio: float = RATIO, window: int = WINDOW):
    """kvpress' object for a case."""
    import kvpress as peer

    snap = dict(compression_ratio=ratio, window_size=window, kernel_size=KERNEL)
    streaming = peer.StreamingLLMPress(compression_ratio=ratio, n_sink=SINK)
    decoding = dict(compression_interval=1, target_size=kept, hidden_states_buffer_size=1)
    return {
        "SnapKV": lambda: peer.SnapKVPress(**snap),
        "PyramidKV": lambda: peer.PyramidKVPress(**(snap | {"compression_ratio": 0.5}), beta=BETA),
        "StreamingLLM": lambda: streaming,
        "KeyRerotation(StreamingLLM)": lambda: peer.KeyRerotationPress(streaming),
        "Knorm": lambda: peer.KnormPress(ratio),
        "ObservedAttention": lambda: peer.ObservedAttentionPress(ratio),
        "TOVA": lambda: peer.TOVAPress(ratio),
        "AdaKV(SnapKV)": lambda: peer.AdaKVPress(peer.SnapKVPress(**snap), alpha_safeguard=0.2),
        "Decoding(Knorm)": lambda: peer.DecodingPress(peer.KnormPress(), **decoding),
        "Decoding(TOVA)": lambda: peer.DecodingPress(peer.TOVAPress(), **decoding),
        "Decoding(StreamingLLM)": lambda: peer.DecodingPress(peer.StreamingLLMPress(n_sink=SINK), **decoding),
    }[case]()


@torch.no_grad()
def run(case: str) -> tuple[list[Tensor], list[list[int]], Tensor]:
    """Kept values of each layer [N, D], slots of each head, logits [21, V]."""
    from transformers import DynamicCache

    llama = model("eager" if case == "ObservedAttention" else "sdpa")
    ids, cache = tokens(), DynamicCache()
    decoding = case.startswith("Decoding")
    with press(case)(llama):
        logits = [llama(ids[:, :PROMPT], past_key_values=cache).logits[0, -1]]
        values = [layer.values[0] for layer in cache.layers]
        masks = [torch.ones(v.shape[:2], dtype=torch.bool) for v in values]
        for layer, mask in zip(llama.model.layers, masks, strict=True):
            evicted = getattr(layer.self_attn, "masked_key_indices", None)
            if evicted is not None:
                mask[evicted[1], evicted[2]] = False
        # A press that turns keys to their new places leaves the next token the first free one.
        start = KEPT if case.startswith("KeyRerotation") else PROMPT
        if decoding:
            logits += decode(llama, cache, ids, start)
            values = [layer.values[0] for layer in cache.layers]
            masks = [torch.ones(v.shape[:2], dtype=torch.bool) for v in values]
    if not decoding:
        logits += decode(llama, cache, ids, start)
    kept = [v[mask] for v, mask in zip(values, masks, strict=True)]
    return kept, [mask.sum(-1).tolist() for mask in masks], torch.stack(logits)


def decode(llama: nn.Module, cache: object, ids: LongTensor, start: int) -> list[Tensor]:
    """Logits of the tokens after the prompt, fed one at a time at positions start, start + 1, ..."""
    out = []
    for i in range(STEPS):
        at = torch.tensor([[start + i]])
        token = ids[:, PROMPT + i : PROMPT + i + 1]
        out.append(llama(token, past_key_values=cache, position_ids=at).logits[0, -1])
    return out


def main() -> int:
    """Compute, store."""
    torch.set_num_threads(1)
    arrays = {}
    for case in CASES:
        values, counts, logits = run(case)
        arrays |= {f"{case}/values/{l}": v.numpy() for l, v in enumerate(values)}
        arrays |= {f"{case}/counts/{l}": np.array(c) for l, c in enumerate(counts)}
        arrays[f"{case}/logits"] = logits.numpy()
        print(f"{case}: slots by layer and head {counts}", flush=True)
    versions = {name: importlib.metadata.version(name) for name in PEERS}
    about = {
        "peers": versions,
        "seed": SEED,
        "input": fingerprint(),
        "command": "python data/kvcache_golden.py",
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, about=json.dumps(about), **arrays)
    print(f"{OUT.relative_to(ROOT)}: {OUT.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
