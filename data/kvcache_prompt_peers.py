"""Golden values of llmlingua 0.2.2 for one segment: tests/kvcache/golden/llmlingua.npz

Run `python data/kvcache_prompt_peers.py` in an environment of its own: `pip install llmlingua==0.2.2
transformers==4.46.3`. It needs no network: the model is a tiny random GPT-2, the tokenizer a list of words,
and tiktoken, which downloads a table when it is asked for an encoding, is replaced by a stub. The prompt
holds no word twice, so that kept ids say which places were kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SEED, VOCAB, LENGTH = 0, 120, 90
RATIOS = (0.8, 0.5, 0.2)
OUT = Path(__file__).resolve().parents[1] / "tests" / "kvcache" / "golden" / "llmlingua.npz"


def main() -> int:
    """Build model and prompt, let the peer compress and rank, store."""
    stub = types.ModuleType("tiktoken")
    stub.encoding_for_model = lambda name: types.SimpleNamespace(encode=lambda text: text.split())
    sys.modules["tiktoken"] = stub
    from llmlingua import PromptCompressor

    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    config = GPT2Config(vocab_size=VOCAB, n_positions=128, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
                        eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.normal(centre, 0.3, parameter.shape, generator=generator))
    words = ["<bos>", *(f"w{i}" for i in range(1, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids = [0, *(1 + torch.randperm(VOCAB - 1, generator=generator)[: LENGTH - 1]).tolist()]
    documents = [[0, *ids[start : start + 14]] for start in (1, 20, 45, 70)]
    question = ids[60:68]

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>")
        fast.save_pretrained(folder)
        peer = PromptCompressor(folder, device_map="cpu")
    text = lambda row: " ".join(words[i] for i in row)
    arrays: dict[str, np.ndarray] = {}
    for ratio in RATIOS:
        # Two separators and one place more are counted by the peer: this target makes its ratio exact.
        kept, _ = peer.iterative_compress_prompt(
            [text(ids)], ratio * (LENGTH + 3), iterative_size=LENGTH, dynamic_ratio=[0.0]
        )
        arrays[f"kept {ratio}"] = kept[0].numpy()
    arrays["losses"] = peer.get_ppl(text(ids), "token").numpy()
    arrays["perplexity"] = np.array([peer.get_ppl(text(d)).item() for d in documents])
    conditional = [peer.get_condition_ppl(text(d), " " + text(question), "after").item() for d in documents]
    arrays["question"], arrays["conditional"] = np.array(question), np.array(conditional)
    arrays["ids"], arrays["documents"] = np.array(ids), np.array(documents)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied to the embedding
            arrays[f"weight {name}"] = weight.numpy()
    digest = hashlib.sha256(arrays["ids"].tobytes()).hexdigest()
    versions = {name: importlib.metadata.version(name) for name in ("llmlingua", "transformers", "torch")}
    about = f"peer {versions}, seed {SEED}, ids sha256 {digest}"
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, about=np.array(about), ratios=np.array(RATIOS), **arrays)
    print(f"{OUT.name}: {OUT.stat().st_size:,} bytes; {about}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
