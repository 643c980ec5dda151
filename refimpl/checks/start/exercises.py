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


@check
def check_wilson(wilson: Callable[[int, int], tuple[float, float]]) -> None:
    """`wilson(k, n)`: the 95 % score interval (lo, hi) of a share k/n, as two floats.

    Its ends are the shares p whose own standard error puts k/n exactly z = 1.959964 errors away from p.
    """
    z = 1.959964
    for k, n in ((8, 10), (1, 30), (95, 100), (450, 1000)):
        lo, hi = wilson(k, n)
        share = k / n
        naive = z * math.sqrt(share * (1 - share) / n)
        require(
            not (_same(lo, max(0.0, share - naive)) or _same(hi, min(1.0, share + naive))),
            f"{k} of {n}: this is k/n plus and minus z standard errors taken at k/n; take them at the ends",
        )
        require(lo < share < hi, f"{k} of {n}: the interval [{lo:.4g}, {hi:.4g}] must hold k/n = {share:.4g}")
        for name, p in (("lower", lo), ("upper", hi)):
            require(0 < p < 1, f"{k} of {n}: the {name} end {p:.4g} is not between 0 and 1")
            away = abs(share - p) / math.sqrt(p * (1 - p) / n)
            require(
                abs(away - z) < 1e-3,
                f"{k} of {n}: the {name} end {p:.4f} lies {away:.3f} standard errors from k/n, not {z:.3f}",
            )
    for k, end in ((0, 0), (12, 1)):
        got = wilson(k, 12)[end]
        require(abs(got - end) < 1e-9, f"{k} of 12: the end at {end} is {got:.4g}, it must be {end}")


@check
def check_exact_match(exact_match: Callable[[str, str], bool]) -> None:
    """`exact_match(prediction, gold)`: equality after SQuAD's normalisation.

    Lower case, no ASCII punctuation, the words a, an and the removed, then single spaces.
    """
    for prediction, gold, expected, diagnosis in (
        ("Dover", "Dover", True, "equal strings must match"),
        ("dover", "Dover", True, "capitals do not count"),
        ("Dover.", "Dover", True, "punctuation does not count"),
        ("lake-house", "lakehouse", True, "punctuation inside a word is removed, not replaced by a space"),
        ("the harbour", "harbour", True, "articles do not count"),
        ("  red \n boat", "red boat", True, "runs of white space count as one space"),
        ("The, boat", "boat", True, "remove the punctuation first: 'The,' is an article too"),
        ("in Dover", "Dover", False, "an answer that only contains the gold answer does not match"),
        ("Dov", "Dover", False, "a part of the gold answer does not match"),
        ("theatre", "atre", False, "articles are whole words: 'the' inside 'theatre' stays"),
        ("boat red", "red boat", False, "the order of the words counts"),
        ("", "Dover", False, "an empty answer matches only an empty gold answer"),
    ):
        got = bool(exact_match(prediction, gold))
        require(got == expected, f"{diagnosis}: exact_match({prediction!r}, {gold!r}) is {got}")


@check
def check_both_orders(both_orders: Callable[[list[str], list[str], list[str]], float]) -> None:
    """`both_orders(right, first, swapped)`: the share of items answered right in both orders of A and B.

    Letters "A" or "B": `right`, the right one as printed; `first`, the answer; `swapped`, the answer when the
    two candidates have changed places, so that the right letter is then the other one.
    """
    right = list("AABBABAB")
    other = ["B" if letter == "A" else "A" for letter in right]
    require(
        not _same(both_orders(right, right, right), 1.0),
        "after the swap the right candidate carries the other letter",
    )
    _equal(both_orders(right, right, other), 1.0, "an answerer who is always right")
    _equal(both_orders(right, other, right), 0.0, "an answerer who is always wrong")
    _equal(both_orders(right, ["A"] * 8, ["A"] * 8), 0.0, "an answerer who always says A knows nothing")
    swapped = [*other[:3], *right[3:]]
    _equal(both_orders(right, right, swapped), 0.375, "right at first, and in 3 of 8 after the swap")
    first = [*right[:4], *other[4:]]
    _equal(both_orders(right, first, swapped), 0.375, "items count only if both answers are right")
