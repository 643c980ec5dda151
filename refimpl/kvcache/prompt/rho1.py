"""Rho-1 (arXiv 2404.07965): train a language model on the tokens that it has yet to learn, not on all.

A reference model, trained on clean text, says how well each token can be predicted. The student's *excess*
loss over it is what there is left to learn: small for what the student knows, small or negative for noise,
which the reference cannot predict either. Selective language modelling (SLM) keeps the top k of a batch by
excess and drops the others from the loss, never from the input: the mirror, at training time, of pruning a
prompt.

Conventions: B rows, T tokens, V vocabulary. Losses [B, T] in nats stand at the position that predicts, so
column t holds -log p(token t+1 | tokens 0..t), and 0 where there is no target. Student and reference are both
read through `next_token_losses`: with a shift in only one of them the excess would compare different tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from refimpl.training import IGNORE, Batch, _pad_id, targets
from refimpl.world.tokens import EOT

SENTENCE_END = re.compile(r"(?<=[.!?]) ")
N_SPECIAL = 32  # ids below are special tokens, which noise does not contain


def next_token_losses(logits: Tensor, labels: LongTensor) -> Tensor:
    """Return the cross-entropy of each position with the token that it has to predict.

    Parameters: logits [B, T, V]; labels [B, T], *already shifted* (`refimpl.training.targets`): labels[:, t]
    is token t+1, or -100 for none. Returns float32 [B, T] without gradient, 0 where there is no target.
    Raises ValueError where the shapes do not fit.

        l[b, t] = -log softmax(logits[b, t])[labels[b, t]]

    >>> next_token_losses(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).tolist()[0][1]
    0.0
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(f"labels: expected shape {list(logits.shape[:-1])}, got {list(labels.shape)}")
    with torch.no_grad():
        flat = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none"
        )
    return flat.view(labels.shape)


def select_tokens(score: Tensor, valid: Tensor, k: float) -> Tensor:
    """Choose the share k of a batch's valid positions with the highest score: over all rows together.

    Parameters: score [B, T], finite where valid; valid, bool [B, T]; k in (0, 1], 0.6 (1 B) to 0.7 (7 B) in
    the paper. Returns bool [B, T] with round(k n) of the n valid positions, at least one; of equal scores the
    first in reading order wins. Raises ValueError for k out of range, shapes that differ, a score that is not
    finite, and where nothing is valid.

    >>> score = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    >>> select_tokens(score, torch.ones(2, 2, dtype=torch.bool), 0.5).tolist()
    [[True, False], [True, False]]
    """
    check_share(k)
    if valid.dtype != torch.bool or score.ndim != 2 or valid.shape != score.shape:
        raise ValueError(
            f"valid: expected bool {list(score.shape)} (B, T), got {valid.dtype} {list(valid.shape)}"
        )
    if not bool(valid.any()):
        raise ValueError("valid: no position has a target")
    if not bool(torch.isfinite(score[valid]).all()):
        raise ValueError("score: holds NaN or infinity where a position is valid")
    flat = score.masked_fill(~valid, -math.inf).flatten()
    order = flat.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    wanted = (valid.sum() * k).round().clamp(min=1)
    return (rank < wanted).view(score.shape) & valid


def check_share(k: float) -> None:
    """ValueError unless k is a number in (0, 1]."""
    if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= 1:
        raise ValueError(f"k must be a share in (0, 1], got {k!r}")


class SelectiveLM:
    """The loss of selective language modelling: a `loss_fn` for `refimpl.training.train`.

    Implements Rho-1, arXiv 2404.07965: excess = L_student - L_reference per token, the top k of the batch is
    kept, and the loss is the mean of L_student over the kept tokens. The choice is made anew at every call
    with the student as it then is, and no gradient flows through it.

    Parameters: reference, a causal language model of the student's vocabulary, on its device; k, the share
    kept (default 0.6, the paper's for 1 B; 0.7 for 7 B; 1.0 is `lm_loss`, bit for bit). What is called a
    batch here is what the loss is called with: leave `TrainConfig.micro_batch` at None. Raises ValueError for
    k out of range and for another vocabulary.

        loss = sum_{i in S} L_student(x_i) / |S|,   S = top-k of L_student(x_i) - L_reference(x_i)

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> loss = SelectiveLM(tiny("llama", seed=1), k=0.5)
    >>> student, ids = tiny("llama"), random_ids(2, 8)
    >>> int(loss.selected(student, ids).sum()), bool(loss(student, ids) > 0)
    (7, True)
    """

    def __init__(self, reference: nn.Module, k: float = 0.6) -> None:
        check_share(k)
        self.reference, self.k = reference.eval(), k

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss, a scalar with the student's gradient."""
        logits, labels = _forward(model, batch)
        return mean_loss(logits, labels, self.choose(logits, labels, batch))

    @torch.no_grad()
    def selected(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return bool [B, T]: the positions whose loss would be trained on."""
        return self.choose(*_forward(model, batch), batch)

    @torch.no_grad()
    def choose(self, logits: Tensor, labels: LongTensor, batch: Batch) -> Tensor:
        """Return bool [B, T] for the student's logits [B, T, V] and shifted labels [B, T]."""
        theirs, _ = _forward(self.reference, batch)
        if theirs.shape != logits.shape:
            raise ValueError(
                f"reference: its vocabulary of {theirs.shape[-1]} is not the model's {logits.shape[-1]}"
            )
        excess = next_token_losses(logits, labels) - next_token_losses(theirs, labels)
        return select_tokens(excess, labels != IGNORE, self.k)


class RandomLM:
    """The control of `SelectiveLM`: as many tokens, drawn at random, anew at every call.

    Parameters: k, the share kept, in (0, 1]; generator, on the CPU. Raises ValueError for k out of range.

    >>> from refimpl.checks.tiny import random_ids, tiny
    >>> bool(RandomLM(0.5, torch.Generator().manual_seed(0))(tiny("llama"), random_ids(2, 8)) > 0)
    True
    """

    def __init__(self, k: float, generator: torch.Generator) -> None:
        check_share(k)
        self.k, self.generator = k, generator

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss, a scalar with the student's gradient."""
        logits, labels = _forward(model, batch)
        score = torch.rand(labels.shape, generator=self.generator).to(labels.device)
        return mean_loss(logits, labels, select_tokens(score, labels != IGNORE, self.k))


def mean_loss(logits: Tensor, labels: LongTensor, keep: Tensor) -> Tensor:
    """Return the mean cross-entropy over the kept positions: divided by their number, not by all tokens'.

    Parameters: logits [B, T, V]; shifted labels [B, T]; keep, bool [B, T]. The other positions become "no
    target" in the same sum that `lm_loss` takes, so keeping all of them changes no bit.

    >>> logits, labels = torch.zeros(1, 2, 4), torch.tensor([[1, 2]])
    >>> both = mean_loss(logits, labels, torch.tensor([[True, True]]))
    >>> bool(mean_loss(logits, labels, torch.tensor([[True, False]])) == both)
    True
    """
    labels = labels.masked_fill(~keep, IGNORE).flatten()
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def _forward(model: nn.Module, batch: Batch) -> tuple[Tensor, LongTensor]:
    """Logits [B, T, V] and the shifted labels [B, T] of a batch, as `lm_loss` computes them."""
    given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    labels = targets(batch, _pad_id(model))
    if labels is None:
        raise ValueError(f"batch: expected ids or a dict with 'input_ids', got keys {sorted(given)}")
    logits = model(
        input_ids=given["input_ids"], attention_mask=given.get("attention_mask"), use_cache=False
    ).logits
    return logits, labels


# --- a corpus of which every noisy token is known -----------------------------------------------------------


def noisy_rows(
    texts: Sequence[str], tokenizer: Any, *, share: float, length: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut texts into rows in which a share of the sentences is noise, and say which tokens are.

    Parameters: texts; tokenizer, the bundled one; share in [0, 1] of sentences that are corrupted, by turns
    by shuffling their words and by putting random tokens in their place; length T of a row, >= 2; rng.
    Returns uint16 ids [N, T], every row beginning with id 0, texts separated by it, and bool noise [N, T];
    the tokens that do not fill a last row are left out. Raises ValueError for a share or length out of range
    and for texts of fewer tokens than one row.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share!r}")
    if length < 2:
        raise ValueError(f"length must be an integer >= 2, got {length!r}")
    if not texts:
        raise ValueError(f"texts: 0 tokens do not fill one row of {length}")
    pieces, kinds, noisy = [], [], 0  # kind: 0 clean, 1 shuffled words, 2 random tokens, -1 the end of a text
    for text in texts:
        for i, sentence in enumerate(SENTENCE_END.split(text.strip())):
            kind = 0
            if rng.random() < share:
                kind, noisy = 1 + noisy % 2, noisy + 1
            words = sentence.split(" ")
            if kind == 1:
                words = [words[j] for j in rng.permutation(len(words))]
            pieces.append((" " if i else "") + " ".join(words))
            kinds.append(kind)
        pieces.append("")
        kinds.append(-1)
    ids, noise = [], []
    # The backend's own batch: transformers' would spend more time on attention masks than on tokens.
    encoded = tokenizer.backend_tokenizer.encode_batch(pieces, add_special_tokens=False)
    for kind, one in zip(kinds, encoded, strict=True):
        piece = [EOT] if kind < 0 else one.ids
        if kind == 2:
            piece = rng.integers(N_SPECIAL, len(tokenizer), len(piece)).tolist()
        ids += piece
        noise += [kind > 0] * len(piece)
    n = len(ids) // (length - 1)
    if n == 0:
        raise ValueError(f"texts: {len(ids)} tokens do not fill one row of {length}")
    rows = np.zeros((n, length), np.uint16)
    is_noise = np.zeros((n, length), bool)
    rows[:, 1:] = np.array(ids[: n * (length - 1)], np.uint16).reshape(n, -1)
    is_noise[:, 1:] = np.array(noise[: n * (length - 1)]).reshape(n, -1)
    return rows, is_noise


def noise_share(keep: Tensor, noise: Tensor) -> float:
    """Return the share of noise among the selected targets.

    Parameters: keep, bool [B, T], at the positions that predict; noise, bool [B, T], at the tokens themselves
    (one further right). Raises ValueError where shapes differ or nothing is kept.

    >>> keep, noise = torch.tensor([[True, True, False]]), torch.tensor([[False, False, True]])
    >>> noise_share(keep, noise)
    0.5
    """
    if keep.shape != noise.shape or not bool(keep.any()):
        raise ValueError(f"keep: {list(keep.shape)} with {int(keep.sum())} kept, noise {list(noise.shape)}")
    return float(noise.roll(-1, dims=1)[keep].float().mean())
