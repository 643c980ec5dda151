"""Fast scores of many short texts: is an answer what greedy decoding would say, and how surprising is it?

Greedy decoding produces an answer exactly when each of its tokens is the argmax given the prompt and the
answer's earlier tokens. One forward pass over prompt plus answer decides that, so no gate of this book has to
generate token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BOS, PAD = 0, 1


@dataclass(frozen=True)
class Scores:
    """Per item: `exact` (bool [N]), `nll` (nats, summed over the completion, [N]), `tokens` ([N])."""

    exact: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray


def encode_items(tokenizer, items: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Encode (prompt, completion) texts; prompts get the BOS id in front, completions nothing."""
    if not items:
        raise ValueError("items: empty; at least one (prompt, completion) pair is needed")
    prompts = tokenizer([p for p, _ in items], add_special_tokens=False)["input_ids"]
    completions = tokenizer([c for _, c in items], add_special_tokens=False)["input_ids"]
    return [([BOS, *p], list(c)) for p, c in zip(prompts, completions, strict=True)]


def _batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batch: list[int] = []
    for i in order:
        if batch and lengths[i] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def score_completions(model, items: Sequence[tuple[list[int], list[int]]], max_tokens: int = 16384) -> Scores:
    """Score each completion after its prompt (token ids, BOS included), in batches of at most `max_tokens`
    places.

    Raises ValueError for an empty completion or one that does not fit the model's context.

    Notes
    -----
    Rows are padded on the right, where a causal model never looks, so no attention mask is needed.
    """
    context = model.config.max_position_embeddings
    for i, (prompt, completion) in enumerate(items):
        if not prompt or not completion:
            raise ValueError(f"items[{i}]: prompt and completion must each hold at least one token")
        if len(prompt) + len(completion) > context:
            raise ValueError(
                f"items[{i}]: {len(prompt) + len(completion)} tokens, the model's context is {context}"
            )
    device = next(model.parameters()).device
    n = len(items)
    exact, nll = np.zeros(n, bool), np.zeros(n)
    for batch in _batches([len(p) + len(c) for p, c in items], max_tokens):
        width = max(len(items[i][0]) + len(items[i][1]) for i in batch)
        ids = torch.full((len(batch), width), PAD, dtype=torch.long)
        rows, cols, owner = [], [], []
        for b, i in enumerate(batch):
            prompt, completion = items[i]
            ids[b, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
            rows += [b] * len(completion)
            cols += range(len(prompt), len(prompt) + len(completion))
            owner += [i] * len(completion)
        ids = ids.to(device)
        r, c = torch.tensor(rows, device=device), torch.tensor(cols, device=device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logps = model.lm_head(hidden[r, c - 1]).float().log_softmax(-1)  # [completion tokens, V]
        target = ids[r, c]
        right = (logps.argmax(-1) == target).cpu().numpy()
        cost = -logps.gather(1, target[:, None])[:, 0].double().cpu().numpy()
        np.add.at(nll, owner, cost)
        wrong = np.zeros(n, bool)
        np.logical_or.at(wrong, owner, ~right)
        exact[batch] = ~wrong[batch]
    return Scores(exact, nll, np.array([len(c) for _, c in items]))


def sample(
    model, prompts: Sequence[Sequence[int]], max_new: int, generator: torch.Generator, *,
    temperature: float = 1.0, stop: int = BOS, max_rows: int = 250,
) -> list[list[int]]:  # fmt: skip
    """Sample a continuation of each prompt (token ids, BOS included) until `stop` or `max_new` tokens.

    The stop token is not returned. Randomness comes from `generator` (on the CPU). Prompts of similar length
    share a batch of at most `max_rows`, padded on the left. Raises ValueError for an empty prompt and for one
    that leaves no room for `max_new` tokens.
    """
    if not prompts or not all(prompts):
        raise ValueError("prompts: at least one, and each of at least one token, are needed")
    if max_new < 1 or temperature <= 0:
        raise ValueError(f"max_new must be >= 1 and temperature > 0, got {max_new} and {temperature}")
    context = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if len(prompt) + max_new > context:
            raise ValueError(f"prompts[{i}]: {len(prompt)} + {max_new} new tokens, the context is {context}")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), max_rows):
        batch = order[start : start + max_rows]
        new = _sample_batch(model, [prompts[i] for i in batch], max_new, generator, temperature, stop)
        for i, continuation in zip(batch, new, strict=True):
            out[i] = continuation
    return out


@torch.no_grad()
def _sample_batch(
    model, prompts: list[Sequence[int]], max_new: int, generator: torch.Generator, temperature: float,
    stop: int,
) -> list[list[int]]:  # fmt: skip
    device, width = next(model.parameters()).device, max(map(len, prompts))
    step = torch.tensor([[PAD] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    new: list[list[int]] = [[] for _ in prompts]
    rows, done, cache = list(range(len(prompts))), set(), None  # rows: the prompt of each row of the batch
    for _ in range(max_new):
        result = model(
            input_ids=step, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = result.past_key_values
        probs = (result.logits[:, -1].float() / temperature).softmax(-1)
        # A number for every prompt, finished or not: what a prompt draws does not depend on the others.
        u = torch.rand(len(prompts), 1, generator=generator)[rows].to(device)
        step = (probs.cumsum(-1) < u * probs.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        step = step.clamp_max(probs.shape[1] - 1)
        for row, token in zip(rows, step[:, 0].tolist(), strict=True):
            if row not in done and token != stop:
                new[row].append(token)
            elif token == stop:
                done.add(row)
        if len(done) == len(prompts):
            break
        mask = torch.cat([mask, torch.ones_like(step)], 1)
        position = position[:, -1:] + 1
        kept = [i for i, row in enumerate(rows) if row not in done]
        if len(kept) <= 0.75 * len(rows):  # dropping rows copies the cache: not at every end of a text
            index = torch.tensor(kept, device=device)
            cache.batch_select_indices(index)
            step, mask, position = step[index], mask[index], position[index]
            rows = [rows[i] for i in kept]
    return new


@dataclass(frozen=True)
class HeadScores:
    """Per head ([L, H]): attention to the token after the previous copy, to the previous one, to slot 0."""

    induction: np.ndarray
    previous: np.ndarray
    slot0: np.ndarray
    gain: float  # nats per token that the second copy is cheaper than the first


def repeated_ids(n: int, period: int, vocab: int, generator: torch.Generator) -> Tensor:
    """[n, 1 + 2 * period] ids: BOS, random tokens (no special ones), and the same tokens again."""
    once = torch.randint(300, vocab, (n, period), generator=generator)
    return torch.cat([torch.full((n, 1), BOS), once, once], 1)


@torch.no_grad()
def head_scores(model, ids: Tensor) -> HeadScores:
    """Measure every head of `model` on `repeated_ids`; the model must use eager attention.

    The induction score is the mean attention from a token of the second copy to the token that followed it in
    the first.
    """
    if model.config._attn_implementation != "eager":
        raise ValueError("model: attention patterns need attn_implementation='eager'")
    period = (ids.shape[1] - 1) // 2
    out = model(input_ids=ids.to(next(model.parameters()).device), output_attentions=True, use_cache=False)
    logps = (
        out.logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None].to(out.logits.device))[..., 0]
    )
    first, second = -logps[:, 1:period].mean(), -logps[:, period + 1 :].mean()
    pattern = torch.stack([a.float().mean(0) for a in out.attentions])  # [L, H, T, T]
    t = torch.arange(period + 1, 2 * period + 1, device=pattern.device)
    prev = torch.arange(2, 2 * period + 1, device=pattern.device)
    return HeadScores(
        induction=pattern[:, :, t, t - period + 1].mean(-1).cpu().numpy(),
        previous=pattern[:, :, prev, prev - 1].mean(-1).cpu().numpy(),
        slot0=pattern[:, :, prev, 0].mean(-1).cpu().numpy(),
        gain=float(first - second),
    )
