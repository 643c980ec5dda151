"""The check of the evaluation of strategies: perplexity as a proxy (spec, section 30; arXiv 2402.16775)."""

from collections.abc import Callable

import numpy as np

from refimpl.checks import check, require

IMPLEMENTATION = {
    "quantization_evaluation": "refimpl.quantization.evaluation.strategies:rank_correlation",
}


@check
def check_quantization_evaluation(rank_correlation: Callable) -> None:
    """`rank_correlation(nll [variants, documents], exact [variants, items], rng=)` -> value, lo, hi: Spearman
    of falling perplexity and accuracy, documents and items resampled for all variants alike."""
    draw = np.random.default_rng(0)
    for trial in range(20):
        variants = 3 + trial % 6
        nll = draw.normal(2, 0.5, (variants, 12)) ** 3
        exact = (draw.random((variants, 9)) < 0.5).astype(float)  # few items: accuracies are often equal
        if len(set(exact.mean(1))) == 1:
            continue
        found = rank_correlation(nll, exact, rng=np.random.default_rng(1), n_boot=50)
        expected = _pearson(_mean_ranks(-nll.mean(1)), _mean_ranks(exact.mean(1)))
        require(
            abs(found.value - expected) < 1e-9,
            f"rank correlation of falling perplexity and accuracy is {found.value:.4f}, not {expected:.4f}",
        )
    # Documents differ far more than variants do. Only if all variants get the same ones is the order certain.
    step = np.arange(6.0)[:, None]
    documents, items = draw.normal(0, 20, 30), np.arange(60)
    found = rank_correlation(
        step + documents, (items < 55 - 10 * step).astype(float), rng=np.random.default_rng(0), n_boot=200
    )
    require(found.value == 1, f"a perfect proxy has correlation {found.value}, not 1")
    require(
        found.lo > 0.9, f"the interval of a perfect proxy begins at {found.lo:.3f}: not the same documents"
    )
    # Variants that hardly differ are ranked by chance, and the interval has to say so.
    noise = draw.normal(0, 1, (5, 30))
    found = rank_correlation(
        noise, (draw.random((5, 40)) < 0.5).astype(float), rng=np.random.default_rng(0), n_boot=200
    )
    width = found.hi - found.lo
    require(width > 0.3, f"the interval of mere noise is {width:.3f} wide: nothing was resampled")


def _mean_ranks(x: np.ndarray) -> np.ndarray:
    order = sorted(x)
    return np.array([order.index(v) + (order.count(v) - 1) / 2 for v in x])


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])
