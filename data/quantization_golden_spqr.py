"""Golden arrays of SpQR's own code: writes tests/quantization/golden/spqr.npz.

    python data/quantization_golden_spqr.py CHECKOUT

CHECKOUT is a working copy of github.com/Vahe1994/SpQR (Apache-2.0), commit 543d10e; of it spqr_engine.py,
quant_groups.py and weight_permutation.py are imported, which run on a CPU with torch==2.13.0 and tqdm.
Nothing of refimpl is imported; W and H = 2/N X'X are stored with the results.

For every case: the matrix that `SPQRUtil.quantize` returns, the mask of its outliers, both in the order of
the columns, and the threshold it computed. The code computes in float32.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "quantization" / "golden"
COMMIT = "543d10e56f921e5eeb10d5f0aaaccd30b6662d0e"
SEED, ROWS, COLUMNS, TOKENS, GROUP, META_GROUP = 0, 16, 32, 300, 8, 8
# name -> bits, outlier threshold, bits of scales and zero points, act-order
CASES = {
    "3": (3, np.inf, 3, False),
    "3_outliers": (3, 0.5, 3, False),
    "2_outliers": (2, 1.0, 4, False),
    "3_outliers_actorder": (3, 0.2, 3, True),
}


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """W [16, 32] float32 with a few large weights; X [300, 32] float32, correlated, columns unequal."""
    rng = np.random.default_rng(SEED)
    W = rng.normal(0, 0.1, (ROWS, COLUMNS))
    W[rng.integers(0, ROWS, 8), rng.integers(0, COLUMNS, 8)] *= 6
    X = rng.normal(size=(TOKENS, 8)) @ rng.normal(size=(8, COLUMNS)) + 0.3 * rng.normal(
        size=(TOKENS, COLUMNS)
    )
    return W.astype(np.float32), (X * rng.uniform(0.3, 1.5, COLUMNS)).astype(np.float32)


def spqr(checkout: str) -> dict[str, np.ndarray]:
    """Matrix, outliers and threshold of every case of `CASES`."""
    sys.path.insert(0, checkout)
    import torch
    from spqr_engine import SPQRUtil

    W, X = (torch.from_numpy(a) for a in inputs())
    stored = {}
    for name, (bits, threshold, meta_bits, act_order) in CASES.items():
        layer = torch.nn.Linear(COLUMNS, ROWS, bias=False)
        layer.weight.data = W.clone()
        util = SPQRUtil(layer)
        # One call: its H is then 2 / sequences, of which there is one, and any factor gives the same.
        util.add_batch(X)
        result = util.quantize(
            bits=bits, groupsize=GROUP, outlier_relative_threshold=threshold, qq_scale_bits=meta_bits,
            qq_zero_bits=meta_bits, qq_groupsize=META_GROUP, verbose=False,
            permutation_order="act_order" if act_order else "identity",
        )  # fmt: skip
        back = torch.argsort(result.perm) if act_order else torch.arange(COLUMNS)
        stored[f"{name}_Q"] = result.weight.numpy()
        stored[f"{name}_outliers"] = result.unstructured_outlier_mask[:, back].numpy()
        stored[f"{name}_threshold"] = np.array(result.unstructured_outlier_threshold)
    return stored


def main() -> int:
    """Store the arrays with the commit, versions, the seed and the hash of the inputs."""
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} CHECKOUT", file=sys.stderr)
        return 2
    stored, (W, X) = spqr(sys.argv[1]), inputs()
    H = 2 / TOKENS * X.astype(np.float64).T @ X.astype(np.float64)
    versions = "; ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "numpy"))
    digest = hashlib.sha256(W.tobytes() + X.tobytes()).hexdigest()
    about = f"Vahe1994/SpQR {COMMIT}; {versions}; seed {SEED}; sha256 of W, X {digest}"
    out = GOLDEN / "spqr.npz"
    np.savez_compressed(out, about=np.array(about), W=W, H=H, **stored)
    print(about, f"{out.stat().st_size} bytes", sep="\n")
    for name in CASES:
        print(name, int(stored[f"{name}_outliers"].sum()), float(stored[f"{name}_threshold"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
