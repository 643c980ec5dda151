"""Checks for the exercises of the notebook on what perplexity hides."""

import math
from collections.abc import Callable

import numpy as np

from refimpl.checks import check, require


@check
def check_divergence_and_flips(
    divergence_and_flips: Callable[[np.ndarray, np.ndarray], tuple[float, float]],
) -> None:
    """`divergence_and_flips(old, new)`: from logits [tokens, V] of the uncompressed and the compressed model,
    the mean KL(old || new) in nats and the share of tokens whose most likely next token differs."""
    for seed, (tokens, V) in enumerate(((5, 3), (8, 6), (1, 4))):
        draw = np.random.default_rng(seed)
        old, new = draw.normal(0, 2, (tokens, V)), draw.normal(0, 2, (tokens, V))
        where = f"{tokens} tokens, {V} words"
        kl, flips = divergence_and_flips(old.copy(), new.copy())
        expected = 0.0
        for a, b in zip(old, new, strict=True):
            p, q = ([math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in (a, b))
            expected += sum(u * math.log(u / v) for u, v in zip(p, q, strict=True)) / tokens
        require(math.isclose(kl, expected, rel_tol=1e-6), f"{where}: KL {kl:.5f} instead of {expected:.5f}")
        changed = sum(list(a).index(max(a)) != list(b).index(max(b)) for a, b in zip(old, new, strict=True))
        require(
            math.isclose(flips, changed / tokens), f"{where}: {flips:.3f} flips of {changed / tokens:.3f}"
        )
        shift = divergence_and_flips(old, old + draw.normal(0, 50, (tokens, 1)))
        require(
            abs(shift[0]) < 1e-6 and shift[1] == 0,
            f"{where}: a constant added to all logits of a token changes no distribution, got {shift}",
        )


@check
def check_rank_agreement(rank_agreement: Callable[[np.ndarray, np.ndarray], float]) -> None:
    """`rank_agreement(a, b)`: Pearson's correlation of the ranks of a [n] and b [n]; equal values share the
    mean of the ranks that they take."""
    cases = [
        ([1.0, 2.0, 3.0, 50.0], [2.0, 4.0, 6.0, 7.0], 1.0, "the same order"),
        ([1.0, 2.0, 3.0], [30.0, 2.0, 1.0], -1.0, "the opposite order"),
        ([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 9.0], 0.7745966692414834, "three values that are equal"),
        ([1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 1.0], 0.0, "no relation"),
    ]
    for a, b, expected, where in cases:
        for x, y in ((a, b), (b, a)):
            got = rank_agreement(np.array(x), np.array(y))
            require(abs(got - expected) < 1e-9, f"{where}: rank correlation {got:.4f}, not {expected:.4f}")


@check
def check_inverted_pairs(
    inverted_pairs: Callable[[np.ndarray, np.ndarray], tuple[int, int]],
) -> None:
    """`inverted_pairs(nll, exact)`, [methods, documents] and [methods, items]: how many pairs of methods
    differ in both means by more than 1.96 standard errors of the paired difference (ddof 1), and in how many
    of these the method with the lower loss has fewer right answers."""
    draw = np.random.default_rng(0)
    documents, items = draw.normal(0, 30, 40), (np.arange(100) % 5 > 0).astype(float)
    loss = documents + np.array([[1.0], [2.0], [3.0], [3.0]]) + draw.normal(0, 0.1, (4, 40))
    answers = np.array([items, items, items, items])
    answers[0, :30] = 0  # the best by loss knows least
    answers[2, 60:70] = 0
    cases = [
        (loss, answers, (4, 3), "documents that differ more than methods do"),
        (loss, answers[::-1].copy(), (4, 1), "the same answers the other way round"),
        (loss, np.array([items] * 4), (0, 0), "methods that answer alike"),
        (documents + draw.normal(0, 1, (4, 40)), answers, (0, 0), "losses that differ by chance"),
    ]
    for nll, exact, expected, where in cases:
        got = tuple(int(x) for x in inverted_pairs(nll.copy(), exact.copy()))
        found = _inverted(nll, exact)
        require(found == expected, f"{where}: the case itself is wrong, {found}")
        require(got == expected, f"{where}: decided and inverted pairs {got} instead of {expected}")


@check
def check_track_score(track_score: Callable[[list[float], float], float]) -> None:
    """`track_score(ratios, power)`: (mean of r^power)^(1/power), for power 0 the geometric mean, for minus
    infinity the smallest ratio; 0 for a power <= 0 if one ratio is 0."""
    for ratios in ([0.5, 1.5], [0.2, 0.9, 1.1], [4.0, 1.0, 1.0], [0.7]):
        where = f"ratios {ratios}"
        expected = {
            2: math.sqrt(sum(r * r for r in ratios) / len(ratios)),
            1: sum(ratios) / len(ratios),
            0: math.exp(sum(math.log(r) for r in ratios) / len(ratios)),
            -math.inf: min(ratios),
        }
        for power, value in expected.items():
            got = track_score(list(ratios), power)
            require(
                math.isclose(got, value, rel_tol=1e-9),
                f"{where}, power {power}: {got:.4f}, expected {value:.4f}",
            )
    for power in (0, -1, -math.inf):
        got = track_score([0.0, 1.0], power)
        require(got == 0, f"a task lost altogether gives 0 at power {power}, not {got}")


def _inverted(nll: np.ndarray, exact: np.ndarray) -> tuple[int, int]:
    def decided(x: np.ndarray, i: int, j: int) -> float:
        d = x[i] - x[j]
        error = d.std(ddof=1) / math.sqrt(len(d))
        return float(d.mean()) if abs(d.mean()) > 1.96 * error else 0.0

    both = [
        (decided(nll, i, j), decided(exact, i, j)) for i in range(len(nll)) for j in range(i + 1, len(nll))
    ]
    both = [(a, b) for a, b in both if a and b]
    return len(both), sum(a * b > 0 for a, b in both)
