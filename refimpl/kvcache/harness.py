"""What every method of the chapter is measured by: stream perplexity, fidelity, recall, and bytes.

- *stream*: the prompt in one forward, the rest of the document token by token. A token's NLL counts if the
  cache could evict before it was predicted.
- *fidelity*, in the same run: KL of the next-token distribution against the full cache's, and per layer the
  relative error |o - o_full| / |o_full| of the attention's output before its projection.
- *recall*: facts in a prompt, one of them asked for; the question is part of the prompt, or comes when the
  prompt has been compressed already.
- *bytes*: held after each step, at most held at any moment of a forward, read by a step's attention.

Items are documents: `difference` pairs two methods over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import LongTensor, Tensor, nn

from refimpl.backbone import Backbone
from refimpl.evaluate import Estimate, paired_bootstrap
from refimpl.kvcache.cache import KVCache
from refimpl.kvcache.texts import Fact

__all__ = ["Recall", "Reference", "Stream", "difference", "recall", "reference", "stream"]

Question = Literal["inside", "after"]


class Reference(NamedTuple):
    """The full cache's log-probabilities [B, n, V] and attention outputs [L, B, n, H · D] on a document."""

    log_p: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Stream:
    """One run over a batch of documents.

    Attributes: nll [B, n] in nats, of the n tokens that were predicted from the cache; kl [B, n] in nats and
    error [B, L] against the full cache (None without a reference); held, bytes after each step, on average;
    peak, bytes held at most at any moment, the prompt's forward included; read, bytes read by the attention
    of a step, on average, and moved, those that came from the host. Bytes are those of the whole batch.
    """

    nll: Tensor
    kl: Tensor | None
    error: Tensor | None
    held: float
    peak: int
    read: float
    moved: float


@dataclass(frozen=True)
class Recall:
    """One question after another: nll [n] of the answers in nats, exact [n] 0 or 1, bytes held on average."""

    nll: np.ndarray
    exact: np.ndarray
    held: float


# --- one run ------------------------------------------------------------------------------------------------
@torch.no_grad()
def reference(model: nn.Module, ids: LongTensor, prompt: int) -> Reference:
    """Run the full cache over documents ids [B, T] as `stream` does."""
    logits, outputs = [], []
    with _outputs(model) as seen:
        for step in _steps(model, KVCache(model), ids, prompt):
            logits.append(step.log_softmax(-1))
            outputs.append(torch.stack(seen))
    return Reference(torch.stack(logits, 1), torch.stack(outputs, 2))


@torch.no_grad()
def stream(
    model: nn.Module, cache: KVCache, ids: LongTensor, prompt: int, against: Reference | None = None
) -> Stream:
    """Feed documents ids [B, T], all of full length, into an empty cache and measure.

    Parameters: prompt, the tokens of the first forward, 1..T-2; the others follow one at a time, and those
    from `prompt` + 1 on are predicted; against, what `reference` gives for the same documents. Raises
    ValueError for a prompt out of range, a cache that is not empty and a reference of another shape.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> from refimpl.kvcache import Window
    >>> model, ids = tiny("llama"), random_ids(2, 20)
    >>> full = reference(model, ids, 10)
    >>> same = stream(model, KVCache(model, Window(99)), ids, 10, full)
    >>> same.nll.shape, bool(same.kl.max() < 1e-6), same.held < same.peak
    (torch.Size([2, 9]), True, True)
    """
    B, T = ids.shape
    n, L = T - 1 - prompt, cache.n_layers
    if against is not None and against.log_p.shape[:2] != (B, n):
        raise ValueError(f"against: of {list(against.log_p.shape[:2])} tokens; allowed: [{B}, {n}]")
    nll, kl, error = torch.empty(B, n), torch.empty(B, n), torch.zeros(B, L)
    held, read, moved = [], [], []
    with _outputs(model) as seen, _peak(cache) as peak:
        for i, logits in enumerate(_steps(model, cache, ids, prompt)):
            log_q = logits.log_softmax(-1)
            nll[:, i] = -log_q.gather(-1, ids[:, prompt + 1 + i, None])[:, 0]
            if against is not None:
                log_p = against.log_p[:, i]
                kl[:, i] = (log_p.exp() * (log_p - log_q)).sum(-1)
                full = against.outputs[:, :, i]
                error += ((torch.stack(seen) - full).norm(dim=-1) / full.norm(dim=-1)).T.cpu() / n
            bytes_read = cache.read_bytes()
            held.append(sum(cache.nbytes().values()))
            read.append(sum(bytes_read.values()) - bytes_read["moved"])
            moved.append(bytes_read["moved"])
    return Stream(
        nll, None if against is None else kl, None if against is None else error,
        float(np.mean(held)), max(*peak, *held), float(np.mean(read)), float(np.mean(moved)),
    )  # fmt: skip


@torch.no_grad()
def recall(
    model: nn.Module, make: Callable[[int], KVCache], items: Sequence[Fact], question: Question = "inside"
) -> Recall:
    """Ask each question of a cache of its own.

    Parameters: make, given the tokens of the context, returns an empty cache; items, not empty; question,
    "inside" the prompt, or "after" it, when the cache has been compressed without knowing it. The answer is
    fed token by token; it is exact if each of its tokens is the likeliest, which is what greedy decoding
    finds. Raises ValueError for no items and for another `question`.
    """
    if question not in get_args(Question):
        raise ValueError(f"question: {question!r}; allowed: {', '.join(get_args(Question))}")
    if not items:
        raise ValueError("items: none; allowed: one question or more")
    nll, exact, held = [], [], []
    device = model.device
    for item in items:
        context, asked, answer = (t.to(device) for t in item)
        cache = make(context.shape[1])
        pieces = [torch.cat((context, asked), 1)] if question == "inside" else [context, asked]
        # The last token goes alone: the answer's first token, too, is to be predicted from the evicted cache.
        pieces = [*pieces[:-1], pieces[-1][:, :-1], pieces[-1][:, -1:]]
        for piece in pieces:
            logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        held.append(sum(cache.nbytes().values()))
        total, right = 0.0, True
        for i, token in enumerate(answer[0].tolist()):
            total -= float(logits.log_softmax(-1)[token])
            right &= int(logits.argmax()) == token
            if i + 1 < answer.shape[1]:
                following = answer[:, i : i + 1]
                logits = model(following, past_key_values=cache, use_cache=True).logits[0, -1]
        nll.append(total)
        exact.append(float(right))
    return Recall(np.array(nll), np.array(exact), float(np.mean(held)))


def difference(a: Tensor | np.ndarray, b: Tensor | np.ndarray, seed: int = 0) -> Estimate:
    """Return mean(a - b) over documents with its paired 95 % bootstrap interval; a, b [n] or [n, ...].

    >>> print(difference(torch.tensor([[3., 5.], [5., 5.]]), torch.tensor([[1., 3.], [3., 3.]])))
    2 [2, 2] n=2
    """
    a, b = (np.asarray(x, dtype=float).reshape(len(x), -1).mean(1) for x in (a, b))
    return paired_bootstrap(a, b, rng=np.random.default_rng(seed))


# --- inside -------------------------------------------------------------------------------------------------
def _steps(model: nn.Module, cache: KVCache, ids: LongTensor, prompt: int) -> Iterator[Tensor]:
    """Logits [B, V] after each token behind the prompt but the last."""
    T = ids.shape[1]
    if not 1 <= prompt <= T - 2:
        raise ValueError(f"prompt: {prompt}; allowed: 1..{T - 2}, of documents of {T} tokens")
    if cache.seen:
        raise ValueError(f"cache: has seen {cache.seen} tokens; allowed: an empty one")
    model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for t in range(prompt, T - 1):
        yield model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits[:, -1].float()


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """The layers' attention outputs [B, H · D] of the newest token, anew in each forward."""
    bb = Backbone(model)
    seen: list[Tensor] = [torch.empty(0)] * bb.n_layers

    def remember(l: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[l] = args[0][:, -1].float()

        return hook

    hooks = [bb.layer(l).o.register_forward_pre_hook(remember(l)) for l in range(bb.n_layers)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _peak(cache: KVCache) -> Iterator[list[int]]:
    """Bytes held by all layers each time when one has appended and not yet evicted."""
    sizes: list[int] = [0]
    for layer in cache.layers:

        def evict(view: Any, layer: Any = layer, evict: Callable = layer._evict) -> None:
            sizes[0] = max(sizes[0], sum(cache.nbytes().values()))
            evict(view)

        layer._evict = evict
    try:
        yield sizes
    finally:
        for layer in cache.layers:
            del layer._evict
