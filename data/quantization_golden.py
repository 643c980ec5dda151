"""Golden arrays of two peers: writes tests/quantization/golden/torchao.npz and llmcompressor.npz.

Run it once for each peer, `python data/quantization_golden.py torchao`, in an environment of its own made by
`pip install torch==2.13.0` with `torchao==0.18.0` or `llmcompressor==0.14.0.1`. Nothing of refimpl is
imported; the inputs are stored with the results.

torchao: scale, zero point (counted from the lowest code) and codes (likewise) of one matrix, for every
mapping, 2, 3, 4 and 8 bits, and per row, per group of 16, per tensor. llm-compressor: the matrix that its
GPTQ returns for inputs with strongly correlated channels, with the scales and zero points that it was given.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "quantization" / "golden"
SEED, ROWS, COLUMNS, TOKENS, GROUP = 0, 24, 64, 400, 16
MAPPINGS = {"full": "SYMMETRIC", "no-clip": "SYMMETRIC_NO_CLIPPING_ERR", "asymmetric": "ASYMMETRIC"}
BITS = (2, 3, 4, 8)
BLOCKS = {"row": (1, COLUMNS), GROUP: (1, GROUP), "tensor": (ROWS, COLUMNS)}
# name -> bits, symmetric, group or None, act-order
GPTQ = {
    "asymmetric_4_row": (4, False, None, False),
    "asymmetric_3_row": (3, False, None, False),
    "full_3_row": (3, True, None, False),
    "asymmetric_4_row_actorder": (4, False, None, True),
    "asymmetric_3_16_actorder": (3, False, GROUP, True),
    "full_4_16_actorder": (4, True, GROUP, True),
}


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """W [24, 64] float32 with a shifted group, a row of one sign and a large column; H [64, 64] float64."""
    rng = np.random.default_rng(SEED)
    W = rng.normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32)
    W[:, :GROUP] += 0.15
    W[3] = np.abs(W[3])
    W[:, 40] *= 5
    X = rng.normal(size=(TOKENS, 12)) @ rng.normal(size=(12, COLUMNS))
    X += 0.3 * rng.normal(size=(TOKENS, COLUMNS))
    return W, 2 / TOKENS * X.T @ X


def torchao() -> dict[str, np.ndarray]:
    """Scales, zero points and codes by "scheme_bits_group"."""
    import torch
    from torchao.quantization import quant_primitives as peer

    W, stored = torch.from_numpy(inputs()[0]), {}
    for scheme, mapping in MAPPINGS.items():
        for bits in BITS:
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            if scheme == "asymmetric":
                low, high = 0, 2**bits - 1
            dtype = torch.uint8 if low == 0 else torch.int8
            for group, block in BLOCKS.items():
                scale, zero = peer.choose_qparams_affine(
                    W, peer.MappingType[mapping], block, dtype, low, high, zero_point_dtype=torch.int32
                )
                codes = peer.quantize_affine(W, block, scale, zero, dtype, low, high)
                name = f"{scheme}_{bits}_{group}"
                stored[f"{name}_scale"] = scale.numpy()
                stored[f"{name}_zero"] = (zero - low).to(torch.uint8).numpy()
                stored[f"{name}_codes"] = (codes.int() - low).to(torch.uint8).numpy()
    return stored


def llmcompressor() -> dict[str, np.ndarray]:
    """Scale, zero point (counted from the lowest code) and dequantized matrix of every case of `GPTQ`."""
    import torch
    from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    W, H = (torch.from_numpy(a) for a in inputs())
    stored = {}
    for name, (bits, symmetric, group, act_order) in GPTQ.items():
        args = QuantizationArgs(
            num_bits=bits, symmetric=symmetric, strategy="group" if group else "channel", group_size=group,
            actorder=ActivationOrdering.WEIGHT if act_order else None,
        )  # fmt: skip
        groups = W.view(ROWS, -1, group or COLUMNS)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        Q, _, fell_back = quantize_weight(
            W[None].clone(), H[None].float(), scale[None], zero[None], None, args
        )
        if bool(fell_back):
            raise RuntimeError(f"{name}: llm-compressor fell back to rounding")
        stored[f"{name}_scale"], stored[f"{name}_Q"] = scale.numpy(), Q[0].numpy()
        stored[f"{name}_zero"] = (zero.int() + 2 ** (bits - 1)).to(torch.uint8).numpy()
    return stored


def main() -> int:
    """Store one peer's arrays with its versions, the seed and the hash of the inputs."""
    peers = {"torchao": (torchao, "torchao"), "llmcompressor": (llmcompressor, "compressed-tensors")}
    if len(sys.argv) != 2 or sys.argv[1] not in peers:
        print(f"usage: {sys.argv[0]} {' | '.join(peers)}", file=sys.stderr)
        return 2
    name = sys.argv[1]
    make, other = peers[name]
    stored = make()
    versions = {package: importlib.metadata.version(package) for package in {name, other, "torch", "numpy"}}
    W, H = inputs()
    digest = hashlib.sha256(W.tobytes() + H.tobytes()).hexdigest()
    about = "; ".join(f"{package} {version}" for package, version in sorted(versions.items()))
    GOLDEN.mkdir(parents=True, exist_ok=True)
    out = GOLDEN / f"{name}.npz"
    about = f"{about}; seed {SEED}; sha256 of W, H {digest}"
    np.savez_compressed(out, about=np.array(about), W=W, H=H, **stored)
    print(about, f"{out.stat().st_size} bytes", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
