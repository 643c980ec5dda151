"""Golden arrays of bitsandbytes' LLM.int8(): writes tests/quantization/golden/bitsandbytes_int8.npz.

Run it, `python data/quantization_golden_bitsandbytes.py`, in an environment of its own made by
`pip install torch==2.13.0 bitsandbytes==0.50.2`. Nothing of refimpl is imported; the inputs are stored with
the results.

Stored: codes and row maxima of a weight; codes, row maxima and outlier columns of inputs, without
decomposition and with threshold 6; the outputs of `Linear8bitLt` for both.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "quantization" / "golden"
SEED, TOKENS, ROWS, COLUMNS, OUTLIERS = 0, 40, 64, 160, (7, 100, 141)
THRESHOLD = 6.0


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """W [64, 160] and x [40, 160], float16; three columns of x are large in most of the tokens."""
    rng = np.random.default_rng(SEED)
    W = rng.normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float16)
    x = rng.normal(0, 1, (TOKENS, COLUMNS))
    x[:, OUTLIERS] = rng.normal(0, 12, (TOKENS, len(OUTLIERS)))
    return W, x.astype(np.float16)


def main() -> int:
    """Store the arrays with versions, the seed and the hash of the inputs."""
    import torch
    from bitsandbytes import functional, nn

    W, x = inputs()
    weight, tokens, stored = torch.from_numpy(W), torch.from_numpy(x), {}
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.clone())
    stored["W_codes"], stored["W_absmax"] = codes.numpy(), absmax.numpy()
    for name, threshold in (("plain", 0.0), ("mixed", THRESHOLD)):
        codes, absmax, columns = functional.int8_vectorwise_quant(tokens.clone(), threshold=threshold)
        stored[f"{name}_codes"], stored[f"{name}_absmax"] = codes.numpy(), absmax.numpy()
        if columns is not None:
            stored[f"{name}_columns"] = columns.numpy()
        layer = nn.Linear8bitLt(COLUMNS, ROWS, bias=False, has_fp16_weights=False, threshold=threshold)
        layer.weight = nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        layer.eval()  # in training mode it rounds the weight only, on a CPU
        with torch.no_grad():
            stored[f"{name}_output"] = layer.to("cpu")(tokens.clone()).numpy()
    digest = hashlib.sha256(W.tobytes() + x.tobytes()).hexdigest()
    packages = ("bitsandbytes", "numpy", "torch")
    about = "; ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    about = f"{about}; seed {SEED}; sha256 of W, x {digest}"
    GOLDEN.mkdir(parents=True, exist_ok=True)
    out = GOLDEN / "bitsandbytes_int8.npz"
    np.savez_compressed(out, about=np.array(about), W=W, x=x, **stored)
    print(about, f"{out.stat().st_size} bytes", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
