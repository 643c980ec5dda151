"""The tokenizer: byte-level BPE with 4096 ids, trained once on the training mix and then frozen."""

from __future__ import annotations

import json
from collections.abc import Iterable

VOCAB_SIZE = 4096
EOT, PAD = 0, 1  # 0 begins every row, ends every document and is BOS = EOS; 1 never occurs in text

ROLES = ("<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|sep|>")
MARKS = ("({", "-->", "})", ">>", "[MEM_WRITE{", "[MEM_READ{", "}]")
FREE = tuple(f"<|free_{i}|>" for i in range(13, 16))
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(16))
SPECIAL = (*ROLES, *MARKS, *FREE, *RESERVED)
assert len(SPECIAL) == 32


def train_tokenizer(texts: Iterable[str]) -> str:
    """Train the BPE on `texts` and return it as the text of a tokenizer.json.

    Merges never cross words (GPT-2's pre-tokenizer), a word keeps its leading space, and nothing is added to
    a text. Role tokens are special (left out by `skip_special_tokens`); tool marks are ordinary text with one
    id each.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] not in MARKS
    return json.dumps(spec, ensure_ascii=False, indent=None)
