"""Checks for the exercises of the notebook on prompt pruning."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close


@check
def check_prompt_budget(prompt_budget: Callable[[float, int, Sequence[int], int], int]) -> None:
    """`prompt_budget(rate, instruction, documents, question)`: tokens that the documents may keep.

    The whole prompt shall shrink to `rate` of its tokens, rounded down; instruction and question stay whole.
    """
    for rate, instruction, documents, question in (
        (0.5, 10, [60, 50], 20), (0.25, 0, [100], 0), (1.0, 7, [30, 3], 5), (0.4, 12, [200, 41, 7], 9),
    ):  # fmt: skip
        whole = instruction + question
        for document in documents:
            whole += document
        expected = math.floor(rate * whole + 1e-9) - instruction - question
        got = prompt_budget(rate, instruction, documents, question)
        where = f"rate {rate}, instruction {instruction}, documents {documents}, question {question}"
        require(
            got == expected or got != int(rate * sum(documents) + 1e-9),
            f"{where}: the rate is of the whole prompt; {got} leaves it longer than asked for",
        )
        require(got == expected, f"{where}: {got} tokens instead of {expected}")


@check
def check_keep_words(keep_words: Callable[[Tensor, Tensor, int], list[int]]) -> None:
    """`keep_words(p, words, budget)`: the tokens that stay, ascending, whole words only.

    p [n], the probability of each token; words [n], the number of each token's word. Words are taken by their
    mean probability, the highest first (of equals the earlier), until one does not fit; it ends the search.
    """
    draw = torch.Generator().manual_seed(0)
    cases = [
        (torch.tensor([0.9, 0.1, 0.6, 0.4]), torch.tensor([0, 0, 1, 2]), 2),
        (torch.tensor([0.5, 0.5, 0.9, 0.9, 0.9, 0.1]), torch.tensor([0, 1, 2, 2, 2, 3]), 4),
        (torch.tensor([0.2, 0.9, 0.8, 0.7, 0.1]), torch.tensor([0, 1, 1, 1, 2]), 2),
    ]
    for n in (12, 30):
        words = (torch.rand(n, generator=draw) < 0.6).long().cumsum(0)
        cases.append((torch.rand(n, generator=draw), words - words[0], n // 2))
    for p, words, budget in cases:
        groups: dict[int, list[int]] = {}
        for token, word in enumerate(words.tolist()):
            groups.setdefault(word, []).append(token)
        means = {w: sum(p[t].item() for t in tokens) / len(tokens) for w, tokens in groups.items()}
        expected: list[int] = []
        for w in sorted(groups, key=lambda w: (-means[w], w)):
            if len(expected) + len(groups[w]) > budget:
                break
            expected += groups[w]
        got = [int(t) for t in keep_words(p.clone(), words.clone(), budget)]
        where = f"p {[round(x, 2) for x in p.tolist()]}, words {words.tolist()}, budget {budget}"
        require(got == sorted(got), f"{where}: the kept tokens {got} are not in their order")
        require(len(got) <= budget, f"{where}: {len(got)} tokens are kept, more than the budget")
        broken = [w for w, tokens in groups.items() if 0 < len(set(tokens) & set(got)) < len(tokens)]
        require(not broken, f"{where}: of the words {broken} only a part is kept")
        require(got == sorted(expected), f"{where}: {got} instead of {sorted(expected)}")


@check
def check_excess_top(excess_top: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """`excess_top(student, reference, k)`: which tokens of a batch are trained on, bool [B, T].

    Losses [B, T]. The share k with the highest excess loss, of the whole batch: round(k B T) tokens.
    """
    draw = torch.Generator().manual_seed(1)
    # 4.2 tokens are 4, 5.6 are 6
    for B, T, k in ((2, 5, 0.6), (3, 8, 0.25), (1, 7, 1.0), (1, 7, 0.6), (1, 7, 0.8)):
        student, reference = torch.rand(B, T, generator=draw), 2 * torch.rand(B, T, generator=draw)
        student[0] += 0.3  # one row has more to learn than the others
        excess = [(float(student[b, t] - reference[b, t]), b, t) for b in range(B) for t in range(T)]
        expected = torch.zeros(B, T, dtype=torch.bool)
        for _, b, t in sorted(excess, reverse=True)[: round(k * B * T)]:
            expected[b, t] = True
        got = excess_top(student.clone(), reference.clone(), k)
        require(tuple(got.shape) == (B, T), f"k {k}: shape {tuple(got.shape)} instead of {(B, T)}")
        require(got.dtype == torch.bool, f"k {k}: a mask is asked for, got {got.dtype}")
        count = int(expected.sum())
        require(int(got.sum()) == count, f"k {k}: {int(got.sum())} tokens are chosen instead of {count}")
        rows = got.sum(1).tolist()
        require(
            B == 1 or len(set(rows)) > 1 or k == 1.0,
            f"k {k}: every row gives {rows[0]} tokens, but the choice is over the batch",
        )
        require(torch.equal(got, expected), f"k {k}: other tokens than those of the highest excess")


@check
def check_bernoulli_gradient(bernoulli_gradient: Callable[[Tensor, Callable], Tensor]) -> None:
    """`bernoulli_gradient(logits, reward_of)`: the exact gradient [k] of the expected reward.

    k independent decisions, kept with probability sigmoid(logit); reward_of(kept), a tuple of k bools.
    """
    for values in ([0.3], [0.4, -0.7], [0.4, -0.7, 0.1], [2.0, -1.0, 0.0, 0.5]):
        logits = torch.tensor(values, dtype=torch.float64, requires_grad=True)

        def reward_of(kept: tuple) -> float:
            used = sum((i + 1.0) * bool(a) for i, a in enumerate(kept))
            return 1.0 + used * used / 3 - 2.0 * bool(kept[0])

        expected = torch.zeros((), dtype=torch.float64)
        for kept in itertools.product([False, True], repeat=len(values)):
            p = torch.ones((), dtype=torch.float64)
            for a, x in zip(kept, logits, strict=True):
                p = p * (torch.sigmoid(x) if a else torch.sigmoid(-x))
            expected = expected + p * reward_of(kept)
        (right,) = torch.autograd.grad(expected, logits)
        got = torch.as_tensor(bernoulli_gradient(logits.detach().clone(), reward_of)).double()
        require(tuple(got.shape) == (len(values),), f"logits {values}: shape {tuple(got.shape)}")
        p = torch.sigmoid(logits.detach())
        if not torch.allclose(got, right, atol=1e-6):
            by_probability = torch.allclose(got, right / (p * (1 - p)), atol=1e-6)
            require(
                not by_probability, f"logits {values}: that is the gradient in the probability, not the logit"
            )
        require_close(got, right, 1e-6, f"gradient at logits {values} against autograd")
