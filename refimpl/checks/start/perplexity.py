"""The checks of token scoring and perplexity (interpretability spec, D1).

The reference scores one token at a time: for each it works out which window the definition puts it in, runs
the model on that context alone, and takes one log-probability. The model is a toy whose every output depends
on all of its input and on the position in the window, so that no wrong context goes unnoticed.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from refimpl.checks import check, require, require_close, require_error

IMPLEMENTATION = {
    "token_nll": "refimpl.evaluate:token_nll",
    "corpus_perplexity": "refimpl.evaluate:perplexity",
}

V, MAX_LEN = 11, 8


@check
def check_token_nll(fn: Callable) -> None:
    """`fn(logits_fn, ids, max_len, ctx, bos)` -> nll [N] and ctx_used [N], each token scored exactly once."""
    cases = [
        (5, 1, "a text shorter than the window is one forward pass"),
        (MAX_LEN, 1, "a text as long as the window is one forward pass"),
        (3 * MAX_LEN, 1, "disjoint windows (ctx=1)"),
        (2 * MAX_LEN + 3, 1, "disjoint windows, the last of them reaching back (ctx=1)"),
        (2 * MAX_LEN + 3, 4, "overlapping windows (ctx=4): context is read, not scored again"),
        (2 * MAX_LEN + 3, MAX_LEN, "full context for every token (ctx=max_len)"),
    ]
    for n, ctx, what in cases:
        ids = _text(n)
        what = f"N={n}, max_len={MAX_LEN}, ctx={ctx}: {what}"
        nll, seen = fn(_toy, ids, MAX_LEN, ctx, 0)
        require(len(nll) == n, f"{what}: {len(nll)} scores for {n} tokens; each token counts exactly once")
        expected, expected_seen = _reference(ids, ctx, bos=0)
        first = float(nll[0] - expected[0])
        require(
            abs(first) < 1e-5,
            f"{what}: the first token is off by {first:.3g}; the beginning-of-text token predicts it",
        )
        require_close(nll, expected, 1e-5, f"{what}: nll")
        require(seen.tolist() == expected_seen, f"{what}: ctx_used is {seen.tolist()}, not {expected_seen}")
    ids = _text(MAX_LEN + 2)
    nll, _ = fn(_toy, ids, MAX_LEN, 1, 7)
    require_close(nll, _reference(ids, 1, bos=7)[0], 1e-5, "bos=7: nll behind another first token")
    nll, _ = fn(lambda x: _toy(x).bfloat16(), ids, MAX_LEN, 1, 0)
    rounded = _reference(ids, 1, bos=0, dtype=torch.bfloat16)[0]
    require_close(nll.float(), rounded, 1e-5, "bfloat16 logits: the log-softmax must be taken in float32")
    require_error(ValueError, lambda: fn(_toy, ids[:0], MAX_LEN, 1, 0), "an empty text")
    require_error(ValueError, lambda: fn(_toy, ids, MAX_LEN, MAX_LEN + 1, 0), "ctx larger than max_len")


@check
def check_corpus_perplexity(fn: Callable) -> None:
    """`fn(logits_fn, documents, max_len=, rng=)` -> an estimate with value, lo, hi, n."""
    documents = [_text(n, seed=n) for n in (3, 2 * MAX_LEN + 1)]
    sums = [float(_reference(ids, 1, bos=0)[0].double().sum()) for ids in documents]
    lengths = [len(ids) for ids in documents]
    expected = float(np.exp(sum(sums) / sum(lengths)))
    alone = [float(np.exp(s / n)) for s, n in zip(sums, lengths, strict=True)]
    est = fn(_toy, documents, max_len=MAX_LEN, rng=np.random.default_rng(0))
    mean = float(np.mean(alone))
    hint = " (this is the mean of the documents' perplexities)" if abs(est.value - mean) < 1e-3 else ""
    require(
        abs(est.value - expected) < 1e-4 * expected,
        f"perplexity is {est.value:.5g}, not {expected:.5g}{hint}; sum the nll of all documents in nats, "
        "divide once by the number of their tokens, take exp",
    )
    require(est.n == 2, f"n is {est.n}, not 2: the documents are the items")
    # Of two documents a quarter of the resamples holds the first twice, a quarter the second twice.
    got, bounds = (est.lo, est.hi), (min(alone), max(alone))
    require(
        np.allclose(got, bounds, rtol=1e-4),
        f"the interval is {got}, resampling the two documents gives {bounds}; tokens are not items",
    )


def _toy(ids: Tensor) -> Tensor:
    """Logits [B, T, V] that mix all ids so far, the latest most, and the position in the window."""
    g = torch.Generator().manual_seed(3)
    table, places = torch.randn(V, V, generator=g), torch.randn(MAX_LEN, V, generator=g)
    state, logits = torch.zeros(len(ids), V), []
    for t in range(ids.shape[1]):
        state = 0.8 * state + table[ids[:, t]]
        logits.append(state + places[t])
    return torch.stack(logits, dim=1)


def _text(n: int, seed: int = 0) -> Tensor:
    return torch.randint(1, V, (n,), generator=torch.Generator().manual_seed(seed))


def _reference(
    ids: Sequence[int], ctx: int, bos: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[int]]:
    text = [bos, *(int(i) for i in ids)]
    n, new = len(ids), MAX_LEN - ctx + 1
    nll, seen = [], []
    for i in range(1, n + 1):
        if i <= MAX_LEN:
            start = 0
        else:
            windows_before = (i - MAX_LEN - 1) // new
            start = min(MAX_LEN + (windows_before + 1) * new, n) - MAX_LEN
        logits = _toy(torch.tensor([text[start:i]]))[0, -1].to(dtype).float()
        nll.append(torch.logsumexp(logits, 0) - logits[text[i]])
        seen.append(i - start)
    return torch.stack(nll), seen
