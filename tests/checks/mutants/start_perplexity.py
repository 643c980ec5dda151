"""Plausible but wrong scorers that `check_token_nll` and `check_corpus_perplexity` must reject."""

import math

import numpy as np
import torch

from refimpl.evaluate import Estimate, bootstrap, token_nll


def _log_probs(model, inputs):
    return model(inputs[None])[0].log_softmax(-1)


def _stream(ids, bos):
    if len(ids) == 0:
        raise ValueError("empty")
    return torch.cat([torch.tensor([bos]), torch.as_tensor(ids)])


def _windows(n, max_len, ctx):
    if ctx > max_len:
        raise ValueError("ctx")
    end = min(n, max_len)
    windows = [(0, end, end)]
    while end < n:
        keep = min(max_len - ctx + 1, n - end)
        end += keep
        windows.append((end - max_len, end, keep))
    return windows


def _score(model, s, windows):
    n = len(s) - 1
    nll, seen = torch.zeros(n), torch.zeros(n, dtype=torch.long)
    for start, end, keep in windows:
        logp = _log_probs(model, s[start:end]).float()
        for target in range(end - keep + 1, end + 1):
            nll[target - 1] = -logp[target - 1 - start, s[target]]
            seen[target - 1] = target - start
    return nll, seen


def context_scored_again(model, ids, max_len, ctx=1, bos=0):
    s = _stream(ids, bos)
    return _score(model, s, [(a, b, b - a) for a, b, _ in _windows(len(s) - 1, max_len, ctx)])


def first_token_unscored(model, ids, max_len, ctx=1, bos=0):
    s = torch.as_tensor(ids)
    if len(s) == 0:
        raise ValueError("empty")
    nll, seen = _score(model, s, _windows(len(s) - 1, max_len, ctx))
    return torch.cat([torch.zeros(1), nll]), torch.cat([torch.zeros(1, dtype=torch.long), seen])


def bos_before_every_window(model, ids, max_len, ctx=1, bos=0):
    s = _stream(ids, bos)
    nll, seen = _score(model, s, _windows(len(s) - 1, max_len, ctx))
    for start, end, keep in _windows(len(s) - 1, max_len, ctx)[1:]:
        logp = _log_probs(model, torch.cat([torch.tensor([bos]), s[start + 1 : end]])).float()
        for target in range(end - keep + 1, end + 1):
            nll[target - 1] = -logp[target - 1 - start, s[target]]
    return nll, seen


def last_window_cut_short(model, ids, max_len, ctx=1, bos=0):
    s = _stream(ids, bos)
    windows = _windows(len(s) - 1, max_len, ctx)
    return _score(model, s, [(max(a, b - keep - ctx + 1), b, keep) for a, b, keep in windows])


def softmax_in_half_precision(model, ids, max_len, ctx=1, bos=0):
    s = _stream(ids, bos)
    nll, seen = _score(model, s, _windows(len(s) - 1, max_len, ctx))
    return nll.to(model(s[None, :1]).dtype).float(), seen


def _parts(model, documents, max_len):
    return [token_nll(model, ids, max_len)[0].double() for ids in documents]


def mean_of_document_perplexities(model, documents, *, max_len, rng):
    return bootstrap([math.exp(x.mean()) for x in _parts(model, documents, max_len)], rng=rng)


def mean_of_window_means(model, documents, *, max_len, rng):
    parts = _parts(model, documents, max_len)
    rows = [np.mean([row.mean() for row in x.split(max_len)]) for x in parts]
    est = bootstrap(rows, rng=rng)
    return Estimate(math.exp(est.value), math.exp(est.lo), math.exp(est.hi), est.n)


def tokens_resampled(model, documents, *, max_len, rng):
    est = bootstrap(torch.cat(_parts(model, documents, max_len)).numpy(), rng=rng)
    return Estimate(math.exp(est.value), math.exp(est.lo), math.exp(est.hi), len(documents))


def separators_scored_as_text(model, documents, *, max_len, rng):
    joined = [torch.cat([torch.as_tensor(ids), torch.zeros(1, dtype=torch.long)]) for ids in documents]
    parts = _parts(model, joined, max_len)
    est = bootstrap([float(x.sum()) for x in parts], [len(x) for x in parts], rng=rng)
    return Estimate(math.exp(est.value), math.exp(est.lo), math.exp(est.hi), est.n)


MUTANTS = [
    ("token_nll", "overlapping windows score their context again, with less context", context_scored_again),
    ("token_nll", "the first token is not scored", first_token_unscored),
    ("token_nll", "every window starts with the beginning-of-text token", bos_before_every_window),
    ("token_nll", "the last window is cut short instead of reaching back", last_window_cut_short),
    ("token_nll", "the score is rounded to the dtype of the logits", softmax_in_half_precision),
    ("corpus_perplexity", "perplexities of documents are averaged", mean_of_document_perplexities),
    ("corpus_perplexity", "means of windows of unequal length are averaged", mean_of_window_means),
    ("corpus_perplexity", "the bootstrap resamples tokens", tokens_resampled),
    ("corpus_perplexity", "the separator behind each document is scored as text", separators_scored_as_text),
]
