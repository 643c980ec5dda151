"""Golden arrays of the programs of QuIP and QuIP#: writes tests/quantization/golden/quip.npz.

Run it as `python data/quantization_golden_quip.py QUIP_SHARP QUIP`, with clones (bare or not) of the public
repositories Cornell-RelaxML/quip-sharp and Cornell-RelaxML/QuIP, in an environment with torch, numpy, tqdm.
Nothing of refimpl is imported. The commits below are read; the parts used run on a CPU, and what only their
CUDA kernels need is replaced by empty modules.

E8P and its residual codebooks: codes and values of Gaussian vectors, and a hash of all 65 536 points. The
Hadamard transform of the unit vectors. QuIP#: the matrix that the whole procedure returns, and the signs that
it drew. QuIP: the codes of LDLQ.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "quantization" / "golden"
COMMITS = {
    "quip-sharp": "1d8f873e9a2a8b86b12bb1064c312c5689b77d98",
    "QuIP": "ac92cfc7a22f6100009e2caf53bb72257d3f3184",
}
SEED, ROWS, COLUMNS, TOKENS, DAMP = 0, 32, 64, 400, 0.01
BOOKS = {
    2: ("latticee8_padded12", "E8P12_codebook"),
    3: ("latticee8_padded12_rvq3bit", "E8P12RVQ3B_codebook"),
    4: ("latticee8_padded12_rvq4bit", "E8P12RVQ4B_codebook"),
}


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X [300, 8], vectors to round, the last hundred wide; W [32, 64] with a large column; H [64, 64]."""
    rng = np.random.default_rng(SEED)
    X = rng.normal(size=(300, 8))
    X[200:] *= 2
    W = rng.normal(0, 0.1, (ROWS, COLUMNS))
    W[:, 40] *= 5
    acts = rng.normal(size=(TOKENS, 12)) @ rng.normal(size=(12, COLUMNS))
    acts += 0.3 * rng.normal(size=(TOKENS, COLUMNS))
    return X, W, 2 / TOKENS * acts.T @ acts


def unpacked(clone: str, name: str) -> str:
    """The files of a clone at the named commit, in a new folder that Python imports from."""
    archive = ["git", "-C", clone, "archive", COMMITS[name]]
    folder = tempfile.mkdtemp()
    content = subprocess.run(archive, check=True, capture_output=True).stdout
    tarfile.open(fileobj=io.BytesIO(content)).extractall(folder, filter="data")
    sys.path.insert(0, folder)
    return folder


def stand_in(name: str, path: str | None = None, **members: object) -> types.ModuleType:
    """An empty module, or a package whose own start is skipped."""
    module = types.ModuleType(name)
    if path:
        module.__path__ = [path]
    module.__dict__.update(members)
    sys.modules[name] = module
    return module


def quip_sharp(clone: str) -> dict[str, np.ndarray]:
    """Codebooks, transform and the whole procedure of QuIP#."""
    folder = unpacked(clone, "quip-sharp")
    for name in ("quiptools_cuda", "fast_hadamard_transform"):
        stand_in(name)
    stand_in("glog", info=lambda *_: None)
    for name in ("lib", "lib.codebook", "lib.algo"):
        stand_in(name, f"{folder}/{name.replace('.', '/')}")
    utils = stand_in("lib.utils", f"{folder}/lib/utils", clean=lambda: None)
    sys.modules["lib"].utils = utils
    for name in ("math_utils", "matmul_had"):
        utils.__dict__.update(vars(importlib.import_module(f"lib.utils.{name}")))
    algorithm = importlib.import_module("lib.algo.quip")
    X, W, H = (torch.from_numpy(a) for a in inputs())
    H = utils.regularize_H(H.clone(), COLUMNS, DAMP)
    stored = {f"hadamard_{n}": utils.matmul_hadU(torch.eye(n)).numpy() for n in (32, 64)}
    args = types.SimpleNamespace(
        use_fp64=True, rescale_WH=False, incoh_mode="had", lora_rank=0, scale_override=-1,
        resid_scale_override=-1, no_use_buffered=True, lowmem_ldlq=False, quip_tune_iters=0,
    )  # fmt: skip
    for bits, (file, cls) in BOOKS.items():
        book = getattr(importlib.import_module(f"lib.codebook.{file}"), cls)().double()
        values, codes = book.quantize(X * book.opt_scale)
        stored[f"values_{bits}"], stored[f"codes_{bits}"] = values.numpy(), codes.numpy()
        if bits == 2:
            points = (book.grid * 4).round().to(torch.int8).numpy()
            stored["points"] = np.array(hashlib.sha256(points.tobytes()).hexdigest())
        torch.manual_seed(SEED)
        hat, kept = algorithm.quantize(H.clone(), W.clone(), 0, book, args)
        stored[f"hat_{bits}"] = hat.numpy()
        stored["signs"] = torch.cat((kept["SV"], kept["SU"])).sign().to(torch.int8).numpy()
    return stored


def quip(clone: str) -> dict[str, np.ndarray]:
    """The codes of QuIP's LDLQ for weights in units of the grid."""
    unpacked(clone, "QuIP")
    stored = {}
    for bits in (2, 3, 4):
        _, W, H = (torch.from_numpy(a) for a in inputs())
        H += DAMP * H.diagonal().mean() * torch.eye(COLUMNS)
        codes = importlib.import_module("vector_balance").round_ldl(grid_units(W, bits), H, bits, 0)
        stored[f"ldlq_{bits}"] = codes.to(torch.uint8).numpy()
    return stored


def grid_units(W: torch.Tensor, bits: int) -> torch.Tensor:
    """Weights where QuIP's grid is 0 .. 2^b - 1: +-2.4 rms, the rest cut off."""
    return ((W / (2.4 * W.square().mean().sqrt()) + 1) / 2 * (2**bits - 1)).clamp(0, 2**bits - 1)


def main() -> int:
    """Store the arrays with the commits, versions, the seed and the hash of the inputs."""
    if len(sys.argv) != 3:
        print(f"usage: {sys.argv[0]} CLONE_OF_QUIP_SHARP CLONE_OF_QUIP", file=sys.stderr)
        return 2
    stored = quip_sharp(sys.argv[1]) | quip(sys.argv[2])
    X, W, H = inputs()
    digest = hashlib.sha256(X.tobytes() + W.tobytes() + H.tobytes()).hexdigest()
    peers = "; ".join(f"Cornell-RelaxML/{name} {commit}" for name, commit in COMMITS.items())
    about = (
        f"{peers}; torch {torch.__version__}; numpy {np.__version__}; seed {SEED}; sha256 of X, W, H {digest}"
    )
    GOLDEN.mkdir(parents=True, exist_ok=True)
    out = GOLDEN / "quip.npz"
    np.savez_compressed(out, about=np.array(about), X=X, W=W, H=H, **stored)
    print(about, f"{out.stat().st_size} bytes", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
