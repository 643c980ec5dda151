"""Golden values of a group quantiser: writes tests/kvcache/golden/quanto.npz with optimum-quanto.

Run `python data/kvcache_quanto.py` in an environment with `pip install optimum-quanto==0.2.7`; it imports
nothing of refimpl. Random keys of two heads with one large channel are quantised in groups along the tokens
(axis -1 in quanto's terms: per channel) and along the channels (axis 0: per token), and dequantised.
"""

from __future__ import annotations

import importlib.metadata
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from optimum.quanto import MaxOptimizer, qint2, qint4
from optimum.quanto.tensor.grouped import ungroup

OUT = Path(__file__).resolve().parents[1] / "tests" / "kvcache" / "golden" / "quanto.npz"
SEED, SHAPE = 0, (2, 64, 32)


def main() -> int:
    """Quantise, dequantise, store with peer, version, seed and the hash of the input."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))
    x[..., 5] = x[..., 5] * 3 + 4
    stored = {"x": x.numpy()}
    for bits, qtype in ((2, qint2), (4, qint4)):
        for group in (16, 32):
            for name, axis in (("channel", -1), ("token", 0)):
                restored = [one_head(head, qtype, axis, group) for head in x]
                stored[f"{name}_{bits}_{group}"] = torch.stack(restored).numpy()
    about = (
        f"optimum-quanto {importlib.metadata.version('optimum-quanto')}; torch {torch.__version__}; "
        f"seed {SEED}; sha256 of x {sha256(x.numpy().tobytes()).hexdigest()}"
    )
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, about=np.array(about), **stored)
    print(about, f"{OUT.stat().st_size} bytes", sep="\n")
    return 0


def one_head(x: torch.Tensor, qtype: object, axis: int, group: int) -> torch.Tensor:
    """Asymmetric group quantisation of [n, D] and back, with the minimum as a floating-point shift.

    quanto's own way back first unpacks the codes by a C++ kernel that would have to be compiled.
    """
    scale, shift = MaxOptimizer()(x, qtype=qtype, axis=axis, group_size=group, zeropoint=False)
    codes = torch.ops.quanto.quantize_affine(x, qtype.bits, axis, group, scale, shift)
    return ungroup(codes * scale - shift, axis=axis, orig_shape=x.shape)


if __name__ == "__main__":
    sys.exit(main())
