"""The check of LLM-KICK's matched comparison (spec, section 31; arXiv 2310.01382)."""

from collections.abc import Callable

import numpy as np

from refimpl.checks import check, require, require_error

IMPLEMENTATION = {"llm_kick": "refimpl.quantization.evaluation.llm_kick:match"}


@check
def check_llm_kick(match: Callable) -> None:
    """`match(nll [variants, documents], values [variants, items], dense_nll, dense_values, increase)` ->
    `.values` [items], interpolated in the mean loss between the variants around the increase."""
    draw = np.random.default_rng(0)
    for trial in range(10):
        dense, right = draw.normal(2, 0.3, 8), (draw.random(15) < 0.9).astype(float)
        above = np.sort(draw.uniform(0.05, 1.5, 4))[draw.permutation(4)]  # in no order
        nll = dense + above[:, None] + _centred(draw.normal(0, 0.1, (4, 8)))
        values = (draw.random((4, 15)) < 0.6).astype(float)
        wanted = float(draw.uniform(0.02, above.max()))
        points = sorted([(0.0, right), *zip(above, values, strict=True)], key=lambda point: point[0])
        upper = next(i for i, (loss, _) in enumerate(points) if loss >= wanted)
        (a, below), (b, beyond) = points[upper - 1], points[upper]
        expected = below + (beyond - below) * (wanted - a) / (b - a)
        found = np.asarray(match(nll, values, dense, right, wanted).values)
        require(found.shape == (15,), f"values have the shape {found.shape}, not that of the items")
        off = float(abs(found - expected).max())
        require(
            off < 1e-9,
            f"at {wanted:.3f} nats, between {a:.3f} and {b:.3f}, an item is off by {off:.3f} (trial {trial})",
        )
    # A variant that lies exactly there is taken as it is.
    found = np.asarray(match([dense + 0.5], [1 - right], dense, right, 0.5).values)
    require(bool(np.allclose(found, 1 - right)), "a variant at the wanted loss does not give its own values")
    require_error(
        ValueError, lambda: match([dense + 0.5], [1 - right], dense, right, 0.6),
        "an increase that no variant reaches cannot be matched",
    )  # fmt: skip


def _centred(x: np.ndarray) -> np.ndarray:
    return x - x.mean(1, keepdims=True)
