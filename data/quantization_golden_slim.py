"""Golden arrays of SLiM's authors: writes tests/quantization/golden/slim.npz.

Run it as `python data/quantization_golden_slim.py FOLDER`, where FOLDER is a checkout of
github.com/Mohammad-Mozaffari/slim (the arrays here: commit ed72646), in an environment with torch 2.13.0,
numpy and tqdm. Nothing of refimpl is imported; the inputs are stored with the results.

Their `slim.quantization.quantization.Quantizer` and `slim.lora.add_lora` run as they are, but for three
things set up from outside: triton, which only the tiled grids use, is an empty module; `Tensor.cuda` does
nothing; and adapters are made in float32 where they ask for bfloat16, so that arrays can be compared closely.
"""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "quantization" / "golden"
COMMIT = "ed72646ca40fe63e32decf82e0028e65d517cc90"
SEED, ROWS, COLUMNS, TOKENS, RANK = 0, 48, 64, 200, 0.25


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """W [48, 64] float32 with heavy tails; X [200, 64] float32, one channel of it never used."""
    rng = np.random.default_rng(SEED)
    W = rng.laplace(0, 0.05, (ROWS, COLUMNS)).astype(np.float32)
    X = (rng.normal(size=(TOKENS, COLUMNS)) * np.linspace(0.3, 3, COLUMNS)).astype(np.float32)
    X[:, 11] = 0
    return W, X


def peer() -> dict[str, np.ndarray]:
    """Clipping points; codes and scales; masks, adapters and final weights of every case."""
    triton = types.ModuleType("triton")
    triton.jit = lambda function: function
    triton.language = types.ModuleType("triton.language")
    triton.language.constexpr = int
    sys.modules |= {"triton": triton, "triton.language": triton.language}
    torch.Tensor.cuda = lambda self, *_: self
    torch.bfloat16 = torch.float32
    from slim.lora import add_lora
    from slim.quantization.quantization import Quantizer
    from slim.utils import prune_nm, shift_zeros

    W, X = (torch.from_numpy(a) for a in inputs())
    stored = {}
    for bits in (2, 3, 4, 8):
        quantizer = Quantizer("weight", num_bits=bits, slim_quant=True)
        stored[f"codes_{bits}"] = quantizer.quantize_weight(W.clone()).numpy()
        stored[f"scale_{bits}"] = (1 / quantizer.scaling_factor).numpy()
    # Their wrapper divides the sums of squares by the number of sequences: here every row is one. (Divided by
    # less, the smallest would exceed 1, and `shift_zeros` adds 1 then, for it looks at the zeros as ones.)
    size = shift_zeros(X.norm(dim=0) ** 2 / TOKENS)
    stored["size"] = size.sqrt().numpy()
    score = W.abs() * size.sqrt()
    dropped = {"2:4": prune_nm(score, 2, 4), "half": torch.zeros_like(score).bool()}
    dropped["half"].scatter_(1, score.sort(dim=-1, stable=True)[1][:, : COLUMNS // 2], True)
    for sparsity, mask in dropped.items():
        stored[f"{sparsity}_keep"] = ~mask.numpy()
        for adapters in ("slim", "naive"):
            module = torch.nn.Linear(COLUMNS, ROWS, bias=False)
            module.weight.data = W.clone()
            add_lora(
                module, W_mask=mask, rank_ratio=RANK, slim_lora=adapters == "slim",
                activations=types.SimpleNamespace(scaler_row=size),
                quantizer=Quantizer("weight", num_bits=4, slim_quant=True), quantize_first=True,
            )  # fmt: skip
            product = module.lora_right.data.T @ module.lora_left.data.T
            stored[f"{sparsity}_{adapters}_weight"] = module.weight.data.numpy()
            stored[f"{sparsity}_{adapters}_product"] = product.numpy()
    return stored


def main() -> int:
    """Store the arrays with the peer's commit, torch's version, the seed and the hash of the inputs."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "slim" / "lora.py").is_file():
        print(f"usage: {sys.argv[0]} FOLDER", file=sys.stderr)
        return 2
    sys.path.insert(0, sys.argv[1])
    stored = peer()
    W, X = inputs()
    digest = hashlib.sha256(W.tobytes() + X.tobytes()).hexdigest()
    about = f"Mohammad-Mozaffari/slim {COMMIT}; torch {torch.__version__}; numpy {np.__version__}"
    about = f"{about}; seed {SEED}; sha256 of W, X {digest}"
    GOLDEN.mkdir(parents=True, exist_ok=True)
    out = GOLDEN / "slim.npz"
    np.savez_compressed(out, about=np.array(about), W=W, X=X, **stored)
    print(about, f"{out.stat().st_size} bytes", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
