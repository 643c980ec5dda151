"""The evaluation harness: one way to score a model, used by every chapter.

A model enters as a Hugging Face causal LM or as any `LogitsFn` (token ids in, logits out), so a compressed
model, a cache policy or a memory system is scored by the same code as the original. Conventions:

- log-probabilities are natural (nats), taken by a log-softmax in float32 or wider; bits only per byte;
- every text is preceded by the beginning-of-text token, which these functions prepend themselves;
- sums are taken over the whole corpus and divided once; intervals come from resampling documents or items,
  never tokens; every random draw uses a `numpy.random.Generator` that the caller passes.

Shapes: B batch, T tokens, V vocabulary, N scored tokens, n items or documents.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

__all__ = [
    "ChoiceItem", "Estimate", "LogitsFn", "Metric", "Report", "Row", "Scores", "bits_per_byte", "book_score",
    "bootstrap", "candidate_rank", "choice_logps", "evaluate", "exact_match", "greedy_answers",
    "kl_to_reference", "multiple_choice", "normalise_answer", "paired_bootstrap", "perplexity",
    "score_documents", "token_f1", "token_nll", "weights_hash", "wilson",
]  # fmt: skip

LogitsFn = Callable[[LongTensor], Tensor]
"""Token ids [B, T] on the CPU to logits [B, T, V] on any device."""


# --- Statistics -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A measured number with its interval.

    Parameters
    ----------
    value : the number itself.
    lo, hi : bounds of the interval, 95 % unless said otherwise; NaN where one observation allows none.
    n : how many items or documents it rests on.
    seeds : how many training or calibration seeds it rests on, default 1.

    Examples
    --------
    >>> print(Estimate(0.5, 0.4, 0.6, n=100))
    0.5 [0.4, 0.6] n=100
    """

    value: float
    lo: float
    hi: float
    n: int
    seeds: int = 1

    def __str__(self) -> str:
        seeds = "" if self.seeds == 1 else f" seeds={self.seeds}"
        return f"{self.value:.4g} [{self.lo:.4g}, {self.hi:.4g}] n={self.n}{seeds}"


def wilson(k: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """Return the proportion k/n with Wilson's score interval, which stays honest near 0 and 1.

    Raises ValueError unless 0 <= k <= n and n >= 1.

    Examples
    --------
    >>> print(wilson(10, 10))
    1 [0.7225, 1] n=10
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"wilson needs n >= 1 and 0 <= k <= n, got k={k}, n={n}")
    z = _normal_quantile(confidence)
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Estimate(p, 0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half, n)


def bootstrap(
    values: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray | None = None,
    *,
    rng: np.random.Generator,
    n_boot: int = 1000,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate a mean, or a ratio of sums, with a percentile-bootstrap interval over items.

    Parameters
    ----------
    values : [n] one number per item, or [S, n] for S seeds evaluated on the same n items; then seeds and
        items are both resampled.
    denominators : [n] or None. With it the estimate is sum(values) / sum(denominators), numerator and
        denominator resampled together (bits over bytes). Only for one seed.
    rng : source of the resample indices.
    n_boot : number of resamples, default 1000.
    confidence : default 0.95.

    Raises ValueError for empty, non-finite or wrongly shaped input. With a single item the bounds are NaN.

    Examples
    --------
    >>> print(bootstrap([0, 1, 1, 1], rng=np.random.default_rng(0)))
    0.75 [0.25, 1] n=4
    """
    x = _finite("values", values, ndims=(1, 2))
    d = None
    if denominators is not None:
        d = _finite("denominators", denominators, ndims=(1,))
        if d.shape != x.shape:
            raise ValueError(f"denominators must have the shape of values {x.shape}, got {d.shape}")
        if (d <= 0).any():
            raise ValueError("denominators must be positive")
    _check_draws(rng, n_boot)
    seeds, n = (1, x.shape[0]) if x.ndim == 1 else x.shape
    value = float(x.mean() if d is None else x.sum() / d.sum())
    if n == 1:
        return Estimate(value, math.nan, math.nan, n, seeds)

    draws = np.empty(n_boot)
    rows = max(1, 2_000_000 // n)  # resamples per chunk: bounds the memory, leaves the random stream as it is
    for start in range(0, n_boot, rows):
        stop = min(start + rows, n_boot)
        items = rng.integers(0, n, size=(stop - start, n))
        if d is not None:
            draws[start:stop] = x[items].sum(1) / d[items].sum(1)
        elif x.ndim == 1:
            draws[start:stop] = x[items].mean(1)
        else:
            which = rng.integers(0, seeds, size=(stop - start, seeds))
            draws[start:stop] = [x[np.ix_(s, i)].mean() for s, i in zip(which, items, strict=True)]
    tail = 50 * (1 - confidence)
    lo, hi = np.percentile(draws, [tail, 100 - tail])
    return Estimate(value, float(lo), float(hi), n, seeds)


def paired_bootstrap(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray | None = None,
    *,
    rng: np.random.Generator,
    n_boot: int = 1000,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate the difference a - b of two systems on the same items, resampling the pairs.

    An ordering holds where the interval excludes 0. Parameters as in `bootstrap`; `a` and `b` have equal
    shape and `a[i]`, `b[i]` belong to the same item; `denominators` (bytes, say) are common to both.

    Examples
    --------
    >>> print(paired_bootstrap([3, 4, 5], [1, 2, 3], rng=np.random.default_rng(0)))
    2 [2, 2] n=3
    """
    x, y = _finite("a", a, ndims=(1, 2)), _finite("b", b, ndims=(1, 2))
    if x.shape != y.shape:
        raise ValueError(f"a and b must score the same items, got shapes {x.shape} and {y.shape}")
    return bootstrap(x - y, denominators, rng=rng, n_boot=n_boot, confidence=confidence)


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _finite(name: str, values: Any, ndims: tuple[int, ...]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim not in ndims or x.size == 0:
        raise ValueError(f"{name} must be a non-empty array with {ndims} dimensions, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite, got {x[~np.isfinite(x)][0]}")
    return x


def _check_draws(rng: np.random.Generator, n_boot: int) -> None:
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator, got {type(rng).__name__}")
    if n_boot < 1:
        raise ValueError(f"n_boot must be at least 1, got {n_boot}")


# --- Likelihood -------------------------------------------------------------------------------------------


def token_nll(
    model: nn.Module | LogitsFn,
    ids: Sequence[int] | LongTensor,
    max_len: int | None = None,
    ctx: int = 1,
    bos: int = 0,
    *,
    batch_size: int = 8,
) -> tuple[Tensor, LongTensor]:
    """Score each token of one text exactly once: -log p(token | the context that its window holds).

    The text is read as [bos] + ids. The first window predicts the first `max_len` tokens; each later window
    predicts `max_len - ctx + 1` further ones behind at least `ctx` tokens of context. `ctx=1` gives disjoint
    windows (the rolling log-likelihood of lm-evaluation-harness), `ctx=max_len` gives every token the longest
    context the model can hold, at one forward pass per token. A last window that has fewer tokens to predict
    reaches further back instead, so it is as long as the others.

    Parameters
    ----------
    model : a Hugging Face causal LM, which runs in eval mode on its own device, or a `LogitsFn`.
    ids : [N] token ids of the text, N >= 1, without the beginning-of-text token.
    max_len : longest input of one forward pass; default the model's `max_position_embeddings`, which it may
        not exceed. A `LogitsFn` has no default and no limit.
    ctx : least number of context tokens, 1 <= ctx <= max_len, default 1.
    bos : id put before the text, default 0.
    batch_size : windows per forward pass, default 8. Short windows are padded on the right, which a causal
        model cannot see; use 1 for a `LogitsFn` that looks at its whole input.

    Returns
    -------
    nll [N] in nats on the CPU, float32 or wider, and ctx_used [N], the number of tokens (bos included) that
    the prediction could see. Raises ValueError for empty, negative or out-of-vocabulary ids and a bad window.

    Examples
    --------
    >>> uniform = lambda ids: torch.zeros(*ids.shape, 16)
    >>> nll, seen = token_nll(uniform, [3, 1, 4, 1, 5], max_len=2)
    >>> nll / math.log(2)
    tensor([4., 4., 4., 4., 4.])
    >>> seen
    tensor([1, 2, 1, 2, 2])
    """
    nll, seen = _nll_of_documents(model, [ids], max_len, ctx, bos, batch_size)
    return nll[0], seen[0]


def perplexity(
    model: nn.Module | LogitsFn,
    documents: Sequence[Sequence[int] | LongTensor],
    *,
    rng: np.random.Generator,
    max_len: int | None = None,
    ctx: int = 1,
    bos: int = 0,
    batch_size: int = 8,
    n_boot: int = 1000,
) -> Estimate:
    """Perplexity per token, exp(sum of nll / number of tokens) over all documents.

    `documents` are token ids, each [N_i]; the interval resamples documents and is NaN for a single one.
    Numbers of different tokenizers cannot be compared: use `bits_per_byte`. Other parameters: `token_nll`.

    Examples
    --------
    >>> uniform = lambda ids: torch.zeros(*ids.shape, 16)
    >>> est = perplexity(uniform, [[3, 1], [4, 1, 5]], max_len=8, rng=np.random.default_rng(0))
    >>> round(est.value, 4), est.n
    (16.0, 2)
    """
    _check_draws(rng, n_boot)
    nll, _ = _nll_of_documents(model, documents, max_len, ctx, bos, batch_size)
    sums, counts = [float(x.double().sum()) for x in nll], [len(x) for x in nll]
    mean = bootstrap(sums, counts, rng=rng, n_boot=n_boot)
    return Estimate(math.exp(mean.value), math.exp(mean.lo), math.exp(mean.hi), mean.n)


def score_documents(
    model: nn.Module | LogitsFn,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_len: int | None = None,
    ctx: int = 1,
    bos: int = 0,
    batch_size: int = 8,
) -> Scores:
    """Score texts as bits (values [n]) over UTF-8 bytes (denominators [n]), one document an item.

    `tokenizer` is a Hugging Face tokenizer; other parameters as in `token_nll`. Raises ValueError for an
    empty text.
    """
    for i, text in enumerate(texts):
        if not text:
            raise ValueError(f"texts[{i}] is empty")
    nll, _ = _nll_of_documents(model, [_encode(tokenizer, t) for t in texts], max_len, ctx, bos, batch_size)
    bits = np.array([float(x.double().sum()) / math.log(2) for x in nll])
    n_bytes = np.array([len(t.encode()) for t in texts], dtype=np.float64)
    return Scores(bits, tuple(texts), n_bytes)


def bits_per_byte(
    model: nn.Module | LogitsFn,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    rng: np.random.Generator,
    max_len: int | None = None,
    ctx: int = 1,
    bos: int = 0,
    batch_size: int = 8,
    n_boot: int = 1000,
) -> Estimate:
    """Bits per UTF-8 byte, sum of nll / (ln 2 * bytes): the likelihood that can be compared over tokenizers.

    Bits and bytes are summed over all texts and divided once; the interval resamples documents. Raises
    ValueError for an empty text. Parameters as in `token_nll`.
    """
    _check_draws(rng, n_boot)
    scores = score_documents(
        model, tokenizer, texts, max_len=max_len, ctx=ctx, bos=bos, batch_size=batch_size
    )
    return scores.estimate(rng=rng, n_boot=n_boot)


def book_score(
    model: nn.Module | LogitsFn,
    tokenizer: Any,
    books: Sequence[str],
    *,
    rng: np.random.Generator,
    n_tokens: int = 30_720,
    max_len: int = 1024,
    bos: int = 0,
    batch_size: int = 8,
    n_boot: int = 1000,
) -> Estimate:
    """The book score: bits per byte of each book's first `n_tokens` tokens, averaged over books unweighted.

    Rows of `max_len` are disjoint and the first one begins with `bos`. The interval resamples books. Bytes
    are those of the decoded tokens. Raises ValueError for a book of fewer than `n_tokens` tokens.
    """
    _check_draws(rng, n_boot)
    heads = [_encode(tokenizer, book)[:n_tokens] for book in books]
    for i, ids in enumerate(heads):
        if len(ids) < n_tokens:
            raise ValueError(f"books[{i}] has {len(ids)} tokens, the book score needs {n_tokens}")
    nll, _ = _nll_of_documents(model, heads, max_len, 1, bos, batch_size)
    n_bytes = [len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode()) for ids in heads]
    per_book = [float(x.double().sum()) / math.log(2) / b for x, b in zip(nll, n_bytes, strict=True)]
    return bootstrap(per_book, rng=rng, n_boot=n_boot)


def kl_to_reference(
    model: nn.Module | LogitsFn,
    reference: nn.Module | LogitsFn,
    ids: Sequence[int] | LongTensor,
    *,
    max_len: int | None = None,
    ctx: int = 1,
    bos: int = 0,
    batch_size: int = 4,
) -> dict[str, np.ndarray]:
    """Compare a model q with the model p it was made from, token by token of one text.

    Returns arrays [N]: "kl" = KL(p || q) and "reverse_kl" = KL(q || p) in nats, "flip" = 1 where the most
    likely token differs, "delta_nll" = nll under q minus nll under p. Windows and parameters as in
    `token_nll`; with `max_len=None` the reference's limit is taken. Both models must share one vocabulary.
    Intervals take documents as items, not these tokens.

    Examples
    --------
    >>> one_hot = lambda ids: F.one_hot(ids, 4).float()
    >>> out = kl_to_reference(one_hot, one_hot, [1, 2, 3], max_len=8)
    >>> out["kl"].max() == 0 and out["flip"].max() == 0
    np.True_
    """
    max_len = _window_length(reference, max_len)
    _window_length(model, max_len)
    stream, windows = _windows(ids, max_len, ctx, bos)
    inputs = [(stream[start:end], keep) for start, end, keep in windows]
    parts: list[Tensor | None] = [None] * len(windows)
    pairs = zip(
        _window_logits(model, inputs, batch_size), _window_logits(reference, inputs, batch_size), strict=True
    )
    for (i, q_logits), (_, p_logits) in pairs:
        if q_logits.shape != p_logits.shape:
            sizes = q_logits.shape[-1], p_logits.shape[-1]
            raise ValueError(f"model and reference must share one vocabulary, got sizes {sizes}")
        _, end, keep = windows[i]
        target = _targets(stream[end - keep + 1 : end + 1], q_logits)
        log_p, log_q = p_logits.log_softmax(-1).to(q_logits.device), q_logits.log_softmax(-1)
        flip = log_p.argmax(-1) != log_q.argmax(-1)
        delta = (log_p - log_q).gather(-1, target[:, None])[:, 0]
        parts[i] = torch.stack([_kl(log_p, log_q), _kl(log_q, log_p), flip.to(delta.dtype), delta]).cpu()
    kl, reverse, flip, delta = torch.cat(parts, dim=1).double().numpy()
    return {"kl": kl, "reverse_kl": reverse, "flip": flip, "delta_nll": delta}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def _windows(
    ids: Sequence[int] | LongTensor, max_len: int, ctx: int, bos: int
) -> tuple[LongTensor, list[tuple[int, int, int]]]:
    """Return s = [bos] + ids and windows (start, end, keep): s[start:end] goes in, and its last `keep`
    outputs score the tokens s[end-keep+1 : end+1]."""
    if not 1 <= ctx <= max_len:
        raise ValueError(f"ctx must lie in 1..max_len={max_len}, got {ctx}")
    stream = _with_bos(ids, bos)
    n = len(stream) - 1
    end = min(n, max_len)
    windows = [(0, end, end)]
    while end < n:
        keep = min(max_len - ctx + 1, n - end)
        end += keep
        windows.append((end - max_len, end, keep))
    return stream, windows


def _nll_of_documents(
    model: nn.Module | LogitsFn,
    documents: Sequence[Sequence[int] | LongTensor],
    max_len: int | None,
    ctx: int,
    bos: int,
    batch_size: int,
) -> tuple[list[Tensor], list[LongTensor]]:
    if len(documents) == 0:
        raise ValueError("there is no document to score")
    max_len = _window_length(model, max_len)
    inputs, targets, seen, bounds = [], [], [], [0]
    for ids in documents:
        stream, windows = _windows(ids, max_len, ctx, bos)
        for start, end, keep in windows:
            inputs.append((stream[start:end], keep))
            targets.append(stream[end - keep + 1 : end + 1])
            seen.append(torch.arange(end - start - keep, end - start) + 1)
        bounds.append(len(inputs))
    nll: list[Tensor | None] = [None] * len(inputs)
    for i, logits in _window_logits(model, inputs, batch_size):
        nll[i] = F.cross_entropy(logits, _targets(targets[i], logits), reduction="none").cpu()
    spans = list(itertools.pairwise(bounds))
    return [torch.cat(nll[a:b]) for a, b in spans], [torch.cat(seen[a:b]) for a, b in spans]


def _window_logits(
    model: nn.Module | LogitsFn, inputs: Sequence[tuple[LongTensor, int]], batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, logits [keep, V]) for inputs (ids [T_i], keep), longest first, right-padded batches."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i][0]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [inputs[i][0] for i in batch]
        logits = _forward(model, nn.utils.rnn.pad_sequence(rows, batch_first=True))
        for row, i in enumerate(batch):
            end, keep = len(inputs[i][0]), inputs[i][1]
            yield i, logits[row, end - keep : end].to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def _forward(model: nn.Module | LogitsFn, ids: LongTensor) -> Tensor:
    if isinstance(model, nn.Module):
        _check_vocabulary(ids, model.config.vocab_size)
        with _EvalMode(model):
            logits = model(ids.to(next(model.parameters()).device)).logits
    else:
        logits = model(ids)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(f"logits must be [B, T, V] for ids {tuple(ids.shape)}, got {tuple(logits.shape)}")
    return logits


def _targets(ids: LongTensor, logits: Tensor) -> LongTensor:
    _check_vocabulary(ids, logits.shape[-1])
    return ids.to(logits.device)


def _check_vocabulary(ids: LongTensor, size: int) -> None:
    if ids.max() >= size:
        raise ValueError(f"id {int(ids.max())} is outside the model's vocabulary of {size}")


class _EvalMode:
    """Put the training parts of a module into eval mode and put exactly those back afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = [m for m in model.modules() if m.training]

    def __enter__(self) -> None:
        for part in self.parts:
            part.training = False

    def __exit__(self, *error: object) -> None:
        for part in self.parts:
            part.training = True


def _window_length(model: nn.Module | LogitsFn, max_len: int | None) -> int:
    if isinstance(model, nn.Module):
        limit = model.config.max_position_embeddings
        max_len = limit if max_len is None else max_len
        if max_len > limit:
            raise ValueError(f"max_len {max_len} exceeds the model's context of {limit}")
    if max_len is None:
        raise ValueError("max_len must be given for a model that is a plain function of token ids")
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, got {max_len}")
    return max_len


def _with_bos(ids: Sequence[int] | LongTensor, bos: int) -> LongTensor:
    tokens = torch.as_tensor(ids)
    if tokens.ndim != 1 or len(tokens) == 0:
        raise ValueError(f"ids must be a non-empty sequence of token ids, got shape {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.min() < 0:
        raise ValueError(f"ids must be non-negative integers, got {tokens.dtype}, smallest {tokens.min()}")
    return torch.cat([torch.tensor([bos]), tokens.long().cpu()])


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- Multiple choice and ranking --------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceItem:
    """A prompt, the strings that may follow it, and which of them is right.

    Parameters
    ----------
    prompt : text without white space at its end.
    choices : two or more continuations, each beginning with its space (" Paris").
    answer : index of the right one.

    Raises ValueError where one of these does not hold.

    Examples
    --------
    >>> ChoiceItem("The sky is", (" blue", " green"), 0).choices[0]
    ' blue'
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if not self.prompt or self.prompt != self.prompt.rstrip():
            raise ValueError(f"prompt must be non-empty and end without white space, got {self.prompt!r}")
        if len(self.choices) < 2 or not all(c.strip() for c in self.choices):
            raise ValueError(f"choices must be two or more non-empty strings, got {self.choices}")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer must lie in 0..{len(self.choices) - 1}, got {self.answer}")

    @property
    def name(self) -> str:
        """The item as one string, by which two evaluations recognise that they saw the same items."""
        return "\x1f".join([self.prompt, *self.choices, str(self.answer)])


def choice_logps(
    model: nn.Module | LogitsFn,
    tokenizer: Any,
    items: Sequence[ChoiceItem],
    *,
    max_len: int | None = None,
    bos: int = 0,
    batch_size: int = 32,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return log p(choice | prompt) and the number of tokens of every choice, one array [choices] per item.

    Prompt and choice are tokenised together and cut at the length of the prompt's own tokens, the rule of
    lm-evaluation-harness. Raises ValueError where a prompt leaves no token to the choice or where prompt and
    choice exceed `max_len`. Inputs that choices have in common (all of them, when every choice is one token)
    run once.
    """
    max_len = _window_length(model, max_len)
    # Choices that agree up to their last token share logits: (inputs, keep) -> (item, choice, target).
    wanted: dict[tuple[tuple[int, ...], int], list[tuple[int, int, list[int]]]] = {}
    lengths = [np.zeros(len(item.choices), dtype=np.int64) for item in items]
    for i, item in enumerate(items):
        n_prompt = len(_encode(tokenizer, item.prompt))
        for c, choice in enumerate(item.choices):
            whole = [bos, *_encode(tokenizer, item.prompt + choice)]
            target = whole[1 + n_prompt :]
            if not target:
                raise ValueError(f"choice {choice!r} has no token of its own behind prompt {item.prompt!r}")
            if len(whole) - 1 > max_len:
                raise ValueError(f"items[{i}] needs {len(whole) - 1} positions, max_len is {max_len}")
            lengths[i][c] = len(target)
            wanted.setdefault((tuple(whole[:-1]), len(target)), []).append((i, c, target))
    logps = [np.zeros(len(item.choices)) for item in items]
    keys = list(wanted)
    inputs = [(torch.tensor(ids), keep) for ids, keep in keys]
    for k, logits in _window_logits(model, inputs, batch_size):
        table = logits.log_softmax(-1).cpu()
        for i, c, target in wanted[keys[k]]:
            logps[i][c] = table.gather(-1, torch.tensor(target)[:, None]).double().sum()
    return logps, lengths


def multiple_choice(
    model: nn.Module | LogitsFn,
    tokenizer: Any,
    items: Sequence[ChoiceItem],
    *,
    unconditional: str | None = None,
    max_len: int | None = None,
    bos: int = 0,
    batch_size: int = 32,
) -> dict[str, Scores]:
    """Score multiple-choice items by likelihood; 1 for right, 0 for wrong, the first of equal scores counts.

    Returns Scores under "acc" (sum of log p over the choice's tokens), "acc_norm" (the sum divided by the
    choice's number of characters), "acc_bytes" (by its UTF-8 bytes) and, where the prompt `unconditional`
    ("Answer:") is given, "acc_pmi" (log p(choice | prompt) - log p(choice | unconditional)). Characters and
    bytes are counted without the leading space, as lm-evaluation-harness counts them. Other parameters as in
    `choice_logps`.
    """
    if not items:
        raise ValueError("items is empty")
    options = {"max_len": max_len, "bos": bos, "batch_size": batch_size}
    logps, _ = choice_logps(model, tokenizer, items, **options)
    bare = [[c.lstrip(" ") for c in it.choices] for it in items]
    scored = {
        "acc": logps,
        "acc_norm": [lp / [len(c) for c in cs] for lp, cs in zip(logps, bare, strict=True)],
        "acc_bytes": [lp / [len(c.encode()) for c in cs] for lp, cs in zip(logps, bare, strict=True)],
    }
    if unconditional is not None:
        closed = [ChoiceItem(unconditional, it.choices, it.answer) for it in items]
        prior, _ = choice_logps(model, tokenizer, closed, **options)
        scored["acc_pmi"] = [lp - p for lp, p in zip(logps, prior, strict=True)]
    names = tuple(item.name for item in items)
    return {
        metric: Scores(
            np.array([float(np.argmax(s) == it.answer) for s, it in zip(scores, items, strict=True)]), names
        )
        for metric, scores in scored.items()
    }


def candidate_rank(
    model: nn.Module | LogitsFn,
    tokenizer: Any,
    items: Sequence[ChoiceItem],
    *,
    max_len: int | None = None,
    bos: int = 0,
    batch_size: int = 32,
) -> np.ndarray:
    """Rank the right candidate by log p(candidate | prompt) per token; 1 is best.

    Returns [n] ranks; candidates with equal scores share the mean of their ranks, so a model that cannot tell
    them apart is not rewarded. Accuracy is `(rank == 1).mean()`, mean reciprocal rank `(1 / rank).mean()`.
    Parameters as in `choice_logps`.
    """
    logps, lengths = choice_logps(model, tokenizer, items, max_len=max_len, bos=bos, batch_size=batch_size)
    ranks = []
    for item, logp, length in zip(items, logps, lengths, strict=True):
        score = logp / length
        gold = score[item.answer]
        ranks.append(1 + (score > gold).sum() + ((score == gold).sum() - 1) / 2)
    return np.array(ranks, dtype=np.float64)


# --- Generated answers ------------------------------------------------------------------------------------


@torch.inference_mode()
def greedy_answers(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | LongTensor],
    max_new: int,
    stop_ids: Sequence[int] = (0,),
    *,
    bos: int = 0,
    batch_size: int = 64,
) -> list[list[int]]:
    """Continue every prompt greedily with a KV cache, many prompts at a time.

    Prompts are sorted by length and padded on the left under an attention mask, with positions that count
    from each prompt's own first token, so that an answer is the one the prompt would get alone. (Batching
    changes the order of floating-point sums: two tokens that tie to rounding may swap.)

    Parameters
    ----------
    model : a Hugging Face causal LM on any device.
    prompts : token ids, each [T_i], T_i >= 1, without the beginning-of-text token.
    max_new : most tokens per answer.
    stop_ids : an answer ends before the first of these; default (0,).
    bos : id put before every prompt, default 0.
    batch_size : prompts per batch, default 64.

    Returns the new ids per prompt, in the order of `prompts`, without the stop token. Raises ValueError where
    a prompt and its answer do not fit into the model's context.
    """
    if max_new < 1 or batch_size < 1:
        raise ValueError(f"max_new and batch_size must be at least 1, got {max_new} and {batch_size}")
    limit = model.config.max_position_embeddings
    rows = [_with_bos(p, bos) for p in prompts]
    for i, row in enumerate(rows):
        _check_vocabulary(row, model.config.vocab_size)
        if len(row) + max_new > limit:
            raise ValueError(f"prompts[{i}]: {len(row)} + {max_new} new tokens exceed the context of {limit}")
    device = next(model.parameters()).device
    answers: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    with _EvalMode(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            new = _greedy_batch(model, [rows[i] for i in batch], max_new, stop_ids, device)
            for i, tokens in zip(batch, new, strict=True):
                answers[i] = tokens
    return answers


def _greedy_batch(
    model: nn.Module, rows: list[LongTensor], max_new: int, stop_ids: Sequence[int], device: torch.device
) -> list[list[int]]:
    lengths = torch.tensor([len(row) for row in rows], device=device)
    width = int(lengths.max())
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left").to(device)
    columns = torch.arange(width + max_new, device=device)
    mask = (columns[None, :] >= width - lengths[:, None]).long()
    positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    cache, tokens = None, []
    for step in range(max_new):
        output = model(
            input_ids=ids,
            attention_mask=mask[:, : width + step],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        token = output.logits[:, -1].argmax(-1)
        tokens.append(token)
        done |= torch.isin(token, stops)
        if done.all():
            break
        ids, positions = token[:, None], (lengths + step)[:, None]
    stop_set = set(stop_ids)
    answers = []
    for row in torch.stack(tokens, dim=1).tolist():
        cut = next((t for t, token in enumerate(row) if token in stop_set), len(row))
        answers.append(row[:cut])
    return answers


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Normalise an answer as SQuAD does: lower case, no ASCII punctuation, no articles, single spaces.

    Examples
    --------
    >>> normalise_answer(" The  Lake-House. ")
    'lakehouse'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str | Sequence[str]) -> bool:
    """Say whether the normalised prediction equals one of the normalised gold answers.

    Raises ValueError without a gold answer.

    Examples
    --------
    >>> exact_match("the red boat.", ["Red boat", "boat"])
    True
    """
    return any(normalise_answer(prediction) == normalise_answer(g) for g in _golds(gold))


def token_f1(prediction: str, gold: str | Sequence[str]) -> float:
    """Return the best token F1 (multiset overlap of normalised words) against the gold answers.

    Two empty answers match (1), an empty and a non-empty one do not (0). Raises ValueError without a gold.

    Examples
    --------
    >>> round(token_f1("a small red boat", "the red boat"), 3)
    0.8
    """
    return max(_f1(normalise_answer(prediction).split(), normalise_answer(g).split()) for g in _golds(gold))


def _golds(gold: str | Sequence[str]) -> Sequence[str]:
    golds = [gold] if isinstance(gold, str) else gold
    if not golds:
        raise ValueError("gold must hold at least one answer")
    return golds


def _f1(prediction: list[str], gold: list[str]) -> float:
    if not prediction or not gold:
        return float(prediction == gold)
    common = (Counter(prediction) & Counter(gold)).total()
    return 2 * common / (len(prediction) + len(gold))


# --- Suite and report -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What a metric measured, item by item.

    Parameters
    ----------
    values : [n] one number per item.
    items : n strings that identify the items (their text will do), for pairing two evaluations.
    denominators : [n] or None; with it the metric is sum(values) / sum(denominators).

    Examples
    --------
    >>> bits = Scores(np.array([8.0, 24.0]), ("x", "yyy"), denominators=np.array([1.0, 3.0]))
    >>> print(bits.estimate(rng=np.random.default_rng(0)))
    8 [8, 8] n=2
    """

    values: np.ndarray
    items: tuple[str, ...]
    denominators: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.values) != len(self.items):
            raise ValueError(f"values has {len(self.values)} entries for {len(self.items)} items")

    @property
    def items_hash(self) -> str:
        """SHA-256 (12 hex digits) over the items in their order."""
        return hashlib.sha256("\x1e".join(self.items).encode()).hexdigest()[:12]

    def estimate(self, *, rng: np.random.Generator, n_boot: int = 1000) -> Estimate:
        """Return the metric with its bootstrap interval."""
        return bootstrap(self.values, self.denominators, rng=rng, n_boot=n_boot)


Metric = Callable[[Any], Mapping[str, Scores]]
"""A model or LogitsFn to scores per item, by name; one metric may give several (acc and acc_norm)."""


@dataclass(frozen=True)
class Row:
    """One line of a report: name, estimate, seconds that the metric took, and the scores behind it."""

    metric: str
    estimate: Estimate
    seconds: float
    scores: Scores


@dataclass(frozen=True)
class Report:
    """The result of `evaluate`: rows, and what produced them."""

    rows: tuple[Row, ...]
    model_hash: str | None
    dtype: str | None
    threads: int
    seed: int
    n_boot: int

    def __getitem__(self, metric: str) -> Estimate:
        """Return the estimate of one metric; KeyError names those that exist."""
        return self._row(metric).estimate

    def _row(self, metric: str) -> Row:
        for row in self.rows:
            if row.metric == metric:
                return row
        raise KeyError(f"no metric {metric!r}; there are {[row.metric for row in self.rows]}")

    def diff(self, other: Report) -> dict[str, Estimate]:
        """Return this report minus another, metric by metric, by paired bootstrap over the common items.

        Raises ValueError unless both reports hold the same metrics over the same items.
        """
        mine, theirs = [row.metric for row in self.rows], [row.metric for row in other.rows]
        if mine != theirs:
            raise ValueError(f"the reports hold different metrics: {mine} and {theirs}")
        differences = {}
        for row in self.rows:
            twin = other._row(row.metric)
            same_items = row.scores.items_hash == twin.scores.items_hash
            if not same_items or not _same(row.scores.denominators, twin.scores.denominators):
                raise ValueError(f"the reports scored different items under {row.metric!r}")
            differences[row.metric] = paired_bootstrap(
                row.scores.values,
                twin.scores.values,
                row.scores.denominators,
                rng=np.random.default_rng(self.seed),
                n_boot=self.n_boot,
            )
        return differences

    def __str__(self) -> str:
        width = max(len(row.metric) for row in self.rows)
        return "\n".join(f"{row.metric:<{width}}  {row.estimate}  {row.seconds:.1f} s" for row in self.rows)


def evaluate(
    model: nn.Module | LogitsFn, suite: Sequence[Metric], *, seed: int = 0, n_boot: int = 1000
) -> Report:
    """Run metrics over a model and return their estimates together with the scores of every item.

    Parameters
    ----------
    model : anything the metrics of the suite accept.
    suite : metrics; each returns `Scores` by name, and no name may occur twice.
    seed : seeds the bootstrap, the same for each metric, default 0.
    n_boot : resamples, default 1000.

    Raises ValueError for an empty suite or a repeated name.

    Examples
    --------
    >>> length = lambda model: {"length": Scores(np.array([2.0, 2.0]), ("ab", "cd"))}
    >>> report = evaluate(lambda ids: ids, [length])
    >>> print(report["length"])
    2 [2, 2] n=2
    >>> print(report.diff(report)["length"])
    0 [0, 0] n=2
    """
    if not suite:
        raise ValueError("suite is empty")
    rows: dict[str, Row] = {}
    for metric in suite:
        began = time.perf_counter()
        results = metric(model)
        seconds = time.perf_counter() - began
        for name, scores in results.items():
            if name in rows:
                raise ValueError(f"two metrics of the suite are named {name!r}")
            estimate = scores.estimate(rng=np.random.default_rng(seed), n_boot=n_boot)
            rows[name] = Row(name, estimate, seconds, scores)
    is_module = isinstance(model, nn.Module)
    return Report(
        rows=tuple(rows.values()),
        model_hash=weights_hash(model) if is_module else None,
        dtype=str(next(model.parameters()).dtype) if is_module else None,
        threads=torch.get_num_threads(),
        seed=seed,
        n_boot=n_boot,
    )


def weights_hash(model: nn.Module) -> str:
    """Return a SHA-256 (12 hex digits) over names, types, shapes and bytes of a module's state.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> before = weights_hash(layer)
    >>> _ = nn.init.zeros_(layer.bias)
    >>> before == weights_hash(layer)
    False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)
