"""Golden smoothing factors of torchao: writes tests/quantization/golden/smoothquant.npz.

Run it, `python data/quantization_golden_smoothquant.py`, in an environment of its own made by
`pip install torch==2.13.0 torchao==0.18.0`. Nothing of refimpl is imported; the inputs are stored with the
results: the factors of `SmoothQuantObserver` for one weight and one batch of inputs, for five alphas.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "quantization" / "golden"
SEED, TOKENS, ROWS, COLUMNS = 0, 64, 24, 48
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """W [24, 48] and x [4, 16, 48], float32; one column of x in twelve is 50 times larger."""
    rng = np.random.default_rng(SEED)
    W = rng.normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32)
    x = rng.normal(0, 1, (4, TOKENS // 4, COLUMNS)).astype(np.float32)
    x[..., ::12] *= 50
    return W, x


def main() -> int:
    """Store the arrays with versions, the seed and the hash of the inputs."""
    import torch
    from torchao.prototype.smoothquant.core import SmoothQuantObserver

    W, x = inputs()
    stored = {}
    for alpha in ALPHAS:
        observer = SmoothQuantObserver(torch.from_numpy(W), alpha)
        for row in torch.from_numpy(x):
            observer(row)
        stored[f"factor_{alpha}"] = observer.calculate_qparams()[0].numpy()
    digest = hashlib.sha256(W.tobytes() + x.tobytes()).hexdigest()
    packages = ("numpy", "torch", "torchao")
    about = "; ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    about = f"{about}; seed {SEED}; sha256 of W, x {digest}"
    GOLDEN.mkdir(parents=True, exist_ok=True)
    out = GOLDEN / "smoothquant.npz"
    np.savez_compressed(out, about=np.array(about), W=W, x=x, **stored)
    print(about, f"{out.stat().st_size} bytes", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
