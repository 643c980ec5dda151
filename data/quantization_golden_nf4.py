"""Golden arrays of bitsandbytes' NF4: writes tests/quantization/golden/nf4.npz.

Run `python data/quantization_golden_nf4.py` in an environment of its own made by `pip install torch==2.13.0
bitsandbytes==0.50.2`. Nothing of refimpl is imported; the inputs are stored with the results.

Stored: the 16 levels, the 256 values of the 8-bit map, and for blocks of 64 and 256, of one matrix, the
packed codes, the absmaxima; with double quantization their codes, second scales and mean, and the
dequantized matrix. Rows are whole blocks long: on a CPU `dequantize_4bit` of this version returns a wrong
matrix where blocks fill the matrix but not its rows (64 x 64 in blocks of 128).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "quantization" / "golden"
SEED, ROWS, COLUMNS = 0, 32, 256
BLOCKS = (64, 256)


def inputs() -> np.ndarray:
    """W [32, 256] float32: normal, rows of different size, one row with an outlier, one of zeros."""
    rng = np.random.default_rng(SEED)
    W = rng.normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32)
    W *= np.linspace(0.5, 2, ROWS, dtype=np.float32)[:, None]
    W[3, 7] = 4
    W[5] = 0
    return W


def bitsandbytes() -> dict[str, np.ndarray]:
    """Levels, 8-bit map, and by block what `quantize_4bit` makes of W, in both forms."""
    import bitsandbytes.functional as peer
    import torch

    W, stored = torch.from_numpy(inputs()), {}
    for block in BLOCKS:
        packed, plain = peer.quantize_4bit(W, blocksize=block, quant_type="nf4", compress_statistics=False)
        again, nested = peer.quantize_4bit(W, blocksize=block, quant_type="nf4", compress_statistics=True)
        if not torch.equal(packed, again):
            raise RuntimeError("double quantization changed the codes")
        stored |= {
            "levels": plain.code.numpy(),
            "map": nested.state2.code.numpy(),
            f"{block}_codes": packed.flatten().numpy(),
            f"{block}_absmax": plain.absmax.numpy(),
            f"{block}_absmax_codes": nested.absmax.numpy(),
            f"{block}_scale": nested.state2.absmax.numpy(),
            f"{block}_mean": nested.offset.numpy(),
            f"{block}_Q": peer.dequantize_4bit(packed, nested).numpy(),
        }
        if nested.state2.blocksize != 256:
            raise RuntimeError(f"the inner blocks have {nested.state2.blocksize} absmaxima, not 256")
    return stored


def main() -> int:
    """Store the arrays with versions, the seed and the hash of the input."""
    stored, W = bitsandbytes(), inputs()
    packages = ("bitsandbytes", "numpy", "torch")
    about = "; ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    about += f"; seed {SEED}; sha256 of W {hashlib.sha256(W.tobytes()).hexdigest()}"
    GOLDEN.mkdir(parents=True, exist_ok=True)
    out = GOLDEN / "nf4.npz"
    np.savez_compressed(out, about=np.array(about), W=W, **stored)
    print(about, f"{out.stat().st_size} bytes", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
