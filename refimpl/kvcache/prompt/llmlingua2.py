"""LLMLingua-2: a small bidirectional encoder says of every token whether it stays.

Implements arXiv 2403.12968 (Pan et al., Findings of ACL 2024), section 4: p(keep) per token, its mean
per word, and the words of highest probability until the budget is spent. `annotation.py` makes the training
data, `distill.py` trains. The encoder is our own (the paper fine-tunes XLM-RoBERTa large) and reads the ids
of the bundled tokenizer.
"""

import json
import math
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from refimpl.kvcache.prompt.units import (
    Pruned,
    best_units,
    check_prompt,
    pieces,
    sentences,
    unit_mean,
    unit_numbers,
    words,
)
from refimpl.paths import atomic_write, data_file


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.out(z.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TokenClassifier(nn.Module):
    """A transformer encoder with two logits per token: drop, keep.

    Parameters: vocab, width, layers, heads, context (longest input); causal, True for the ablation in which a
    token sees only what is before it. Weights come from torch's global generator; `distill.train` forks it.

    >>> TokenClassifier(vocab=50, width=16, layers=1)(torch.tensor([[3, 4, 5]])).shape
    torch.Size([1, 3, 2])
    """

    def __init__(
        self, *, vocab: int = 4096, width: int = 128, layers: int = 4, heads: int = 4, context: int = 512,
        causal: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.geometry = {"vocab": vocab, "width": width, "layers": layers, "heads": heads, "context": context,
                         "causal": causal}  # fmt: skip
        self.context, self.causal = context, causal
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads, causal) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=1 / math.sqrt(width))

    def forward(self, ids: LongTensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, 2] of ids [B, T]; mask [B, T] is 0 at padding. ValueError for T > context."""
        T = ids.shape[1]
        if T > self.context:
            raise ValueError(f"ids: {T} tokens, but the classifier's context is {self.context}")
        visible = torch.ones(1, 1, T, T, dtype=torch.bool, device=ids.device)
        if self.causal:
            visible = visible.tril()
        if mask is not None:
            visible = visible & mask.bool()[:, None, None, :]
        x = self.token(ids) + self.position.weight[:T]
        for block in self.blocks:
            x = block(x, visible)
        return self.head(self.norm(x))


def save_classifier(model: TokenClassifier, path: str | Path) -> None:
    """Write weights (rounded to float16) and geometry as one safetensors file, whole or not at all."""
    from safetensors.torch import save

    weights = {
        name: w.detach().to("cpu", torch.float16).contiguous() for name, w in model.state_dict().items()
    }
    atomic_write(path, save(weights, metadata={"geometry": json.dumps(model.geometry)}))


def load_classifier(path: str | Path | None = None) -> TokenClassifier:
    """Load a classifier in float32, in evaluation mode; None: the one that ships with the package.

    Raises FileNotFoundError when there is none, ValueError for a file that is not one.
    """
    from safetensors import safe_open

    path = Path(path) if path is not None else data_file("adapters", "llmlingua2.safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"no token classifier at {path}; train one with data/kvcache_llmlingua2.py")
    with safe_open(path, "pt") as file:
        geometry = (file.metadata() or {}).get("geometry")
        if geometry is None:
            raise ValueError(f"path: {path} holds no geometry, so it is no token classifier")
        weights = {name: file.get_tensor(name).float() for name in file.keys()}
    with torch.random.fork_rng(devices=[]):
        model = TokenClassifier(**json.loads(geometry))
    model.load_state_dict(weights)
    return model.eval()


class LLMLingua2:
    """Prune by a trained token classifier.

    Parameters
    ----------
    classifier : the student, for example `load_classifier()`.
    tokenizer : the one it was trained with (the bundled one); only `decode` is used, to find the words.
    force : words that always stay, compared without surrounding spaces, for example {".", "\\n"}.
    force_digits : True keeps every word with a digit.

    Forced words count against the budget and come first; if they alone exceed it, `prune` raises ValueError.
    """

    def __init__(
        self,
        classifier: nn.Module,
        tokenizer: object,
        *,
        force: Collection[str] = (),
        force_digits: bool = False,
    ) -> None:
        if isinstance(force, str):
            raise TypeError(f"force: expected a collection of words, got the string {force!r}")
        self.classifier, self.tokenizer = classifier, tokenizer
        self.force, self.force_digits = frozenset(force), force_digits

    @torch.no_grad()
    def keep_probability(self, ids: LongTensor) -> Tensor:
        """p(keep) of each token [n]. A text longer than the classifier's context is read in chunks that end
        with a sentence.
        """
        check_prompt(ids)
        device = self.classifier.head.weight.device
        out = []
        for first, last in _chunks(pieces(self.tokenizer, ids), self.classifier.context):
            out.append(self.classifier(ids[None, first:last].to(device))[0].float().softmax(-1)[:, 1])
        return torch.cat(out).to(ids.device)

    def prune(self, ids: LongTensor, budget: int) -> Pruned:
        """Keep the words of highest mean p(keep) that fit into `budget` tokens: at most one word less stays.

        The official code keeps the words above a percentile of the tokens, and misses it where many words tie
        (p = 1.0); here the earlier of equal words stays.
        """
        check_prompt(ids, budget)
        texts = pieces(self.tokenizer, ids)
        units = unit_numbers(texts, words).to(ids.device)
        scores = unit_mean(self.keep_probability(ids), units)
        forced = self._forced(texts, units)
        needed = int(forced[units].sum())
        if needed > budget:
            raise ValueError(
                f"budget: {budget} tokens, but the words that force and force_digits keep take {needed}"
            )
        return Pruned(best_units(scores + 2 * forced, units, budget), scores[units])

    def _forced(self, texts: list[str], units: LongTensor) -> Tensor:
        written = [""] * (int(units[-1]) + 1)
        for text, unit in zip(texts, units.tolist(), strict=True):
            written[unit] += text
        bare = [word.strip(" ") for word in written]
        digits = [self.force_digits and any(c.isdigit() for c in word) for word in bare]
        found = [word in self.force or digit for word, digit in zip(bare, digits, strict=True)]
        return torch.tensor(found, device=units.device)


def _chunks(texts: list[str], longest: int) -> list[tuple[int, int]]:
    """Cut n tokens into spans of at most `longest`, each ending with the last sentence that fits; a sentence
    that is longer is cut.
    """
    number, spans, first = sentences(texts), [], 0
    while len(texts) - first > longest:
        last = first + longest
        while last > first and number[last] == number[last - 1]:
            last -= 1
        last = last if last > first else first + longest
        spans.append((first, last))
        first = last
    return [*spans, (first, len(texts))]
