"""The texts on which the methods of the chapter are measured: held-out documents, and prompts with facts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import LongTensor

from refimpl.corpus import topics
from refimpl.world.formats import BY_NAME
from refimpl.world.lexicon import FIRST_NAMES
from refimpl.world.recall import needle_facts
from refimpl.world.rng import Rng

__all__ = ["Fact", "Kind", "documents", "facts", "text_of"]

Kind = Literal["stories", "topics"]


class Fact(NamedTuple):
    """A prompt with facts in it, a question about one of them, and its answer, as token ids [1, T]."""

    context: LongTensor
    question: LongTensor
    answer: LongTensor


def text_of(tokenizer: Any, kind: Kind, n: int, seed: int = 0) -> LongTensor:
    """Return n tokens of held-out text: stories of the world ("eval" split), or pydoc's topics.

    The topics come in their order, and are repeated where they are shorter than n. Raises ValueError for
    another kind or n < 1.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: {kind!r}; allowed: {', '.join(get_args(Kind))}")
    if n < 1:
        raise ValueError(f"n: {n}; allowed: 1 and more, a number of tokens")
    pieces: Iterator[str]
    if kind == "stories":
        rng = Rng("kvcache", kind, seed)
        pieces = iter(lambda: BY_NAME["story"].document(rng, "eval"), None)
    else:
        both = [*topics("test").documents, *topics("calibration").documents]
        pieces = (both[(seed + i) % len(both)] for i in count())
    ids: list[int] = []
    while len(ids) < n:
        ids += tokenizer(next(pieces), add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids[:n])


def documents(tokenizer: Any, kind: Kind, n: int, length: int, seed: int = 0) -> LongTensor:
    """Return n documents [n, length], each beginning with the end-of-text token, no text in two of them."""
    body = text_of(tokenizer, kind, n * (length - 1), seed).view(n, length - 1)
    return torch.cat((torch.full((n, 1), tokenizer.bos_token_id), body), 1)


def facts(tokenizer: Any, n: int, words: int = 300, n_facts: int = 8, seed: int = 0) -> list[Fact]:
    """Return n prompts of about `words` words of stories with `n_facts` codes in them, one asked for.

    They are documents of the world's format "needle"; every answer is a code word.
    """
    rng, form, found = Rng("kvcache", "facts", seed), BY_NAME["needle"], []
    encode = lambda text: torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False).input_ids])
    for _ in range(n):
        drawn = needle_facts(rng, words, [rng.random() for _ in range(n_facts)], FIRST_NAMES)
        drawn["ask"] = drawn["ask"][:1]
        prompt, answer = form.prompt(form.render(drawn, rng))
        at = prompt.rindex("Question: ")
        context = torch.cat((torch.tensor([[tokenizer.bos_token_id]]), encode(prompt[:at])), 1)
        found.append(Fact(context, encode(prompt[at:]), encode(answer.rstrip("\n"))))
    return found
