"""Checks for the exercises of chapter 0."""

import math
from collections.abc import Callable

import torch
from torch import LongTensor, Tensor

from refimpl.checks import check, require


def _same(a: object, b: float) -> bool:
    return isinstance(a, float) and math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)


def _equal(actual: object, expected: float, diagnosis: str) -> None:
    require(isinstance(actual, float), f"{diagnosis}: expected a float, got {type(actual).__name__}")
    require(_same(actual, expected), f"{diagnosis}: got {actual:.5g}, expected {expected:.5g}")


@check
def check_bits_per_byte(bits_per_byte: Callable[[float, int], float]) -> None:
    """`bits_per_byte(nll, n_bytes)`: a summed negative log-likelihood in nats as bits per byte of text."""
    uniform = bits_per_byte(7 * math.log(256), 7)
    require(
        not _same(uniform, math.log(256)),
        "the result is still in nats: divide by ln 2 (all 256 bytes equally likely is 8 bits, not 5.545)",
    )
    _equal(uniform, 8.0, "all 256 bytes equally likely")
    _equal(bits_per_byte(math.log(2), 4), 0.25, "one bit spread over four bytes")
    _equal(bits_per_byte(1000.0, 961), 1000.0 / math.log(2) / 961, "1000 nats over 961 bytes")
    _equal(bits_per_byte(0.0, 3), 0.0, "a text that was certain")


@check
def check_perplexity(perplexity: Callable[[Tensor, LongTensor], float]) -> None:
    """`perplexity(logits [T, V], ids [T])`: exp of the mean NLL of ids[1:], each given its predecessors."""
    rng = torch.Generator().manual_seed(0)
    logits, ids = 3 * torch.randn(9, 5, generator=rng), torch.randint(5, (9,), generator=rng)

    def nll(t: int, token: int) -> float:  # by the definition, one prediction at a time
        total = sum(math.exp(x) for x in logits[t].tolist())
        return -math.log(math.exp(logits[t, token].item()) / total)

    right = [nll(t, int(ids[t + 1])) for t in range(8)]
    unshifted = [nll(t, int(ids[t])) for t in range(9)]
    mistakes = {
        math.exp(sum(unshifted) / 9): "the logits at position t predict token t+1, not token t",
        math.exp(sum(unshifted[:8]) / 8): "the logits at position t predict token t+1, not token t",
        math.exp(sum(right) / 9): "9 tokens hold 8 predictions: divide by 8",
        2 ** (sum(right) / 8): "the NLL is in nats: use exp, not 2**",
        math.exp(sum(right)): "take the mean over the predictions, not their sum",
        sum(math.exp(x) for x in right) / 8: "take the mean of the NLLs first, then exp",
    }
    got = perplexity(logits, ids)
    for value, diagnosis in mistakes.items():
        require(not _same(got, value), diagnosis)
    shifted = perplexity(logits + torch.arange(9.0)[:, None], ids)
    _equal(shifted, got, "a constant added to all logits of a position (log_softmax removes it)")
    _equal(got, math.exp(sum(right) / 8), "random logits")
    _equal(perplexity(torch.zeros(6, 11), torch.arange(6)), 11.0, "uniform logits over 11 tokens")


@check
def check_induction_score(induction_score: Callable[[Tensor, int], float]) -> None:
    """`induction_score(pattern [T, T], period)` of one head on BOS, r_1..r_S, r_1..r_S: period S, T = 1 + 2S.

    The score is the mean attention that positions S+1 .. 2S (the second copy; BOS is position 0) give to the
    token after the previous occurrence of their own token.
    """
    for S in (4, 8):
        T = 1 + 2 * S

        def looks_back(n: int, T: int = T) -> Tensor:  # a head that looks exactly n positions back
            pattern = torch.zeros(T, T)
            for i in range(T):
                pattern[i, max(i - n, 0)] = 1.0
            return pattern

        require(
            not _same(induction_score(looks_back(S), S), 1.0),
            f"period {S}: you score attention to the previous occurrence; its successor is at i - S + 1",
        )
        _equal(
            induction_score(looks_back(S - 1), S),
            1.0,
            f"period {S}: a perfect induction head (take the mean over the second copy only)",
        )
        for n, target in (
            (0, "itself"),
            (1, "the token before"),
            (S, "the previous occurrence"),
            (S + 1, "the token before the previous occurrence"),
        ):
            _equal(induction_score(looks_back(n), S), 0.0, f"period {S}: a head that looks at {target}")
        pattern = torch.rand(T, T, generator=torch.Generator().manual_seed(S)).tril()
        pattern = pattern / pattern.sum(-1, keepdim=True)
        expected = sum(pattern[i, i - S + 1].item() for i in range(S + 1, T)) / S
        _equal(induction_score(pattern, S), expected, f"period {S}: a random pattern")
