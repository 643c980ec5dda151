"""Golden arrays of llm-compressor: writes tests/quantization/golden/pruning.npz.

Run it once, `python data/quantization_golden_pruning.py`, in an environment of its own made by
`pip install torch==2.13.0 llmcompressor==0.14.0.1`. Nothing of refimpl is imported; the inputs are stored
with the results: for every case the matrix that its SparseGPT returns, and the mask of its Wanda.

Two conventions differ from ours. Its `n` is how many weights of m go. Its SparseGPT takes every weight up to
and with the threshold, one more than the share of a block; it is given a share that is a little smaller.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "quantization" / "golden"
SEED, ROWS, COLUMNS, TOKENS, BLOCK, DAMP = 0, 16, 160, 600, 128, 0.01
# A little less, so that the weight at the threshold makes it the whole share.
LESS = 1e-4
# name -> share left out, or n kept of m
CASES = {"0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "2:4": (2, 4), "4:8": (4, 8), "1:4": (1, 4)}


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W [16, 160] with a large column, H [160, 160] and sum x_j^2 [160] of correlated x; all float32."""
    rng = np.random.default_rng(SEED)
    W = rng.normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32)
    W[:, 40] *= 5
    X = rng.normal(size=(TOKENS, 24)) @ rng.normal(size=(24, COLUMNS))
    X += 0.5 * rng.normal(size=(TOKENS, COLUMNS))
    X *= np.linspace(0.5, 2, COLUMNS)
    return W, (2 / TOKENS * X.T @ X).astype(np.float32), np.square(X).sum(0).astype(np.float32)


def pruned() -> dict[str, np.ndarray]:
    """Matrices and masks by "method_case"."""
    import torch
    from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
    from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

    W, H, sqnorm = (torch.from_numpy(a) for a in inputs())
    stored = {}
    for name, case in CASES.items():
        share, n, m = (case, 0, 0) if isinstance(case, float) else (0.5, case[1] - case[0], case[1])
        layer = torch.nn.Linear(COLUMNS, ROWS, bias=False)
        layer.weight.data.copy_(W)
        with torch.no_grad():
            _, Q = sgpt_sparsify.sparsify_weight(
                layer, {layer: H.clone()}, share - LESS, n, m, BLOCK, DAMP, preserve_sparsity_mask=False
            )
            stored[f"sparsegpt_{name}"] = Q.numpy()
            found = wanda_sparsify.sparsify_weight(layer, {layer: sqnorm.clone()}, share, n, m)
            stored[f"wanda_{name}"] = (found != 0).numpy()
            if not torch.equal(found, W * (found != 0)):
                raise RuntimeError(f"{name}: Wanda changed a weight that it keeps")
    return stored


def main() -> int:
    """Store the arrays with the versions, the seed and the hash of the inputs."""
    stored = pruned()
    packages = ("llmcompressor", "numpy", "torch")
    versions = "; ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    W, H, sqnorm = inputs()
    digest = hashlib.sha256(W.tobytes() + H.tobytes() + sqnorm.tobytes()).hexdigest()
    about = f"{versions}; seed {SEED}; sha256 of W, H, sqnorm {digest}"
    GOLDEN.mkdir(parents=True, exist_ok=True)
    out = GOLDEN / "pruning.npz"
    np.savez_compressed(out, about=np.array(about), W=W, H=H, sqnorm=sqnorm, **stored)
    print(about, f"{out.stat().st_size} bytes", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
