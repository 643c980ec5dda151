"""Golden arrays of three peers: writes tests/quantization/golden/{gptvq,aqlm,kmeans}.npz.

    python data/quantization_golden_codebooks.py gptvq CHECKOUT     # Qualcomm-AI-research/gptvq at fd8a3ce
    python data/quantization_golden_codebooks.py aqlm CHECKOUT      # Vahe1994/AQLM at e79a896
    python data/quantization_golden_codebooks.py kmeans             # scikit-learn

The first two need torch, numpy, tqdm, transformers; nothing of refimpl is imported; the inputs are stored
with the results.

gptvq: the matrix before and after the codebook update, by its `GPTQ.fasterquant`, for the cases of `GPTVQ`,
codebooks in float32. aqlm: what its k-means found, the codes of its beam search from there, and codebooks and
scales after `STEPS` steps of its Adam. kmeans: centroids and inertia from a given start.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import random
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "quantization" / "golden"
SEED, ROWS, COLUMNS, TOKENS = 0, 48, 64, 400
# name -> vector length, rows and columns that share a codebook, k-means and codes weighted by the inputs
GPTVQ = {
    "d1": (1, 12, 32, True),
    "d2": (2, 48, 64, True),
    "d2_groups": (2, 24, 32, True),
    "d2_plain": (2, 48, 64, False),
}
ITERATIONS, BEAMS, STEPS = 10, (1, 3), 20
M, BITS, GROUP, K = 2, 4, 4, 16


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """W [48, 64] float32 and H [64, 64] float64 of correlated inputs of different size."""
    rng = np.random.default_rng(SEED)
    W = rng.normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32)
    X = rng.normal(size=(TOKENS, 12)) @ rng.normal(size=(12, COLUMNS))
    X = (X + 0.5 * rng.normal(size=(TOKENS, COLUMNS))) * rng.uniform(0.3, 2, COLUMNS)
    return W, 2 / TOKENS * X.T @ X


def gptvq() -> dict[str, np.ndarray]:
    """Q of every case, without and with the codebook update, at 2 bits."""
    import torch
    from gptq import GPTQ
    from vq_quant import VQQuantizer

    torch.cuda.synchronize = lambda: None  # it is called without asking for a GPU
    W, H = (torch.from_numpy(a) for a in inputs())
    stored = {}
    for name, (vdim, rows, columns, weighted) in GPTVQ.items():
        for update in (False, True):
            layer = torch.nn.Linear(COLUMNS, ROWS, bias=False)
            layer.weight.data = W.clone()
            solver = GPTQ(layer)
            solver.H = H.float()
            solver.quantizer = VQQuantizer(vq_dim=vdim, columns_per_group=columns, kmeans_iters=ITERATIONS)
            solver.quantizer.configure(2)
            solver.fasterquant(
                blocksize=32, groupsize=rows * columns, use_vq=True, include_m_step=update,
                hessian_weighted_lookups=weighted,
            )  # fmt: skip
            stored[f"{name}_updated" if update else name] = layer.weight.data.numpy()
    return stored


def aqlm() -> dict[str, np.ndarray]:
    """Codes, codebooks and scales of k-means; codes by beam search; codebooks and scales by Adam."""
    import torch
    from aq_engine import AQEngine
    from src.aq import QuantizedWeight
    from src.beam_search_xtx import beam_search_optimal_codes

    W, H = (torch.from_numpy(a) for a in inputs())
    sizes = {
        "out_group_size": 1, "in_group_size": GROUP, "num_codebooks": M, "nbits_per_codebook": BITS,
        "codebook_value_nbits": 16, "codebook_value_num_groups": 1, "scale_nbits": 0,
    }  # fmt: skip
    torch.manual_seed(SEED)
    first = QuantizedWeight(reference_weight=W, max_iter=100, **sizes)
    parts = {
        "codes": first.get_codes(),
        "codebooks": first.codebooks.detach()[:, :, 0],
        "scale": first.scales,
    }
    stored = {f"first_{name}": t.detach().numpy().copy() for name, t in parts.items()}
    stored["first_W"] = first().detach().numpy()
    for beam in BEAMS:
        codes = beam_search_optimal_codes(
            XTX=H.float(), reference_weight=W, codebooks=first.codebooks.detach(), verbose=False,
            prev_codes=first.get_codes(), scales=first.scales.detach(), beam_size=beam,
        )  # fmt: skip
        stored[f"beam_{beam}"] = codes.numpy()
    layer = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight.data = W.clone()
    engine = AQEngine(layer)
    engine.XTX.copy_(H)
    engine.beam_search_update_codes_ = lambda *args, **kwargs: None  # Adam alone
    args = argparse.Namespace(
        devices=[engine.device], init_max_iter=100, init_max_points_per_centroid=None, lr=1e-4, max_epochs=1,
        steps_per_epoch=STEPS, relative_mse_tolerance=None, print_frequency=1000, beam_size=1, **sizes,
    )  # fmt: skip
    torch.manual_seed(SEED)  # the same k-means as before
    trained = engine.quantize(args=args, verbose=False)
    stored["adam_codebooks"] = trained.codebooks.detach()[:, :, 0].numpy()
    stored["adam_scale"] = trained.scales.detach().numpy()
    return stored


def kmeans() -> dict[str, np.ndarray]:
    """Centroids and inertia of Lloyd's iterations until nothing moves, from the first K vectors of W."""
    from sklearn.cluster import KMeans

    points = inputs()[0].reshape(-1, GROUP).astype(np.float64)
    found = KMeans(K, init=points[:K], n_init=1, max_iter=1000, tol=0, algorithm="lloyd").fit(points)
    return {"centroids": found.cluster_centers_, "inertia": np.array(found.inertia_)}


def main() -> int:
    """Store one peer's arrays with its versions, the seed and the hash of the inputs."""
    peers = {"gptvq": gptvq, "aqlm": aqlm, "kmeans": kmeans}
    if len(sys.argv) != (2 if sys.argv[1:2] == ["kmeans"] else 3) or sys.argv[1] not in peers:
        print(f"usage: {sys.argv[0]} gptvq CHECKOUT | aqlm CHECKOUT | kmeans", file=sys.stderr)
        return 2
    sys.path[:0] = sys.argv[2:]
    random.seed(SEED)
    name = sys.argv[1]
    stored = peers[name]()
    packages = {"kmeans": ["scikit-learn", "numpy"]}.get(name, ["torch", "numpy"])
    commit = {"gptvq": "Qualcomm-AI-research/gptvq fd8a3ce; ", "aqlm": "Vahe1994/AQLM e79a896; "}.get(
        name, ""
    )
    W, H = inputs()
    digest = hashlib.sha256(W.tobytes() + H.tobytes()).hexdigest()
    versions = "; ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    about = f"{commit}{versions}; seed {SEED}; sha256 of W, H {digest}"
    GOLDEN.mkdir(parents=True, exist_ok=True)
    out = GOLDEN / f"{name}.npz"
    np.savez_compressed(out, about=np.array(about), W=W, H=H, **stored)
    print(about, f"{out.stat().st_size} bytes", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
