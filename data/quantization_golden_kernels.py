"""Golden arrays of onnxruntime's int4 product and of quanto's grids.

Run `python data/quantization_golden_kernels.py`: it writes tests/quantization/golden/matmulnbits.npz and
quanto.npz, in an environment of its own made by `pip install torch==2.13.0 onnx==1.23.2 onnxruntime==1.32.0
optimum-quanto==0.2.7`. Nothing of refimpl is imported; the inputs are stored with the results.

onnxruntime: codes, float16 scales and zero points of one matrix, and x W^' by `com.microsoft::MatMulNBits`
from them, for 12 rows of x at once and for one row alone; eight rows are unit vectors, which read W^ itself.
quanto: scales, zero points and dequantized matrix of the same W, from `MaxOptimizer` for 2 and 4 bits in
groups, with an integer zero point and with the float shift that is its default; scales and codes of 8 bits.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "quantization" / "golden"
SEED, ROWS, COLUMNS = 0, 16, 256
UNITS = (0, 1, 31, 32, 127, 128, 254, 255)  # the ones of the first rows of x
ALONE = 9  # the row of x that is also multiplied alone
# name -> whether there are zero points, block size
PRODUCTS = {
    "asymmetric_32": (True, 32),
    "asymmetric_128": (True, 128),
    "asymmetric_row": (True, COLUMNS),
    "full_32": (False, 32),
    "full_row": (False, COLUMNS),
}
GROUPS = ((2, 32), (4, 32), (4, 128))  # bits, weights that share a scale


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """W [16, 256] with zeros, rows of different size, an outlier and half-rows of one sign; x [12, 256]."""
    rng = np.random.default_rng(SEED)
    W = rng.normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32)
    W *= np.linspace(0.5, 2, ROWS, dtype=np.float32)[:, None]
    W[:, ::17] = 0
    W[3, 7] = 4
    W[5, :128], W[9, 128:] = 0.2 + np.abs(W[5, :128]), -0.2 - np.abs(W[9, 128:])
    x = np.concatenate((np.eye(COLUMNS)[list(UNITS)], rng.normal(size=(4, COLUMNS))))
    return W.astype(np.float16).astype(np.float32), x.astype(np.float32)  # 16 bits are half of the file


def grid(W: np.ndarray, has_zero: bool, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes 0 .. 15 [16, 256], float16 scales and zero points [16, 256 / block], as in refimpl's grid."""
    groups = W.reshape(ROWS, -1, block)
    low, high = groups.min(-1).clip(max=0), groups.max(-1).clip(min=0)
    step = (high - low) / np.float32(15) if has_zero else np.maximum(-low, high) / np.float32(7.5)
    scale = step.astype(np.float16)
    steps = scale.astype(np.float32)
    zero = np.round(-low / steps).clip(0, 15) if has_zero else np.full_like(steps, 8)
    codes = (np.round(groups / steps[..., None]) + zero[..., None]).clip(0, 15)
    return codes.astype(np.uint8).reshape(W.shape), scale, zero.astype(np.uint8)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes per byte, the first in the low half; an odd count is completed by a zero."""
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return codes[..., 0::2] | codes[..., 1::2] << 4


def matmulnbits() -> dict[str, np.ndarray]:
    """Codes, scale, zero point and products by name. `accuracy_level=1`: nothing but float32 multiplies."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    W, x = inputs()
    stored = {}
    for name, (has_zero, block) in PRODUCTS.items():
        codes, scale, zero = grid(W, has_zero, block)
        tensors = {"B": nibbles(codes.reshape(ROWS, -1, block)), "scales": scale.astype(np.float32)}
        if has_zero:
            tensors["zero_points"] = nibbles(zero)
        node = helper.make_node(
            "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft",
            K=COLUMNS, N=ROWS, bits=4, block_size=block, accuracy_level=1,
        )  # fmt: skip
        x_info, y_info = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", size])
            for name, size in (("x", COLUMNS), ("y", ROWS))
        )
        constants = [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
        graph = helper.make_graph([node], "product", [x_info], [y_info], constants)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        stored |= {
            f"{name}_codes": codes,
            f"{name}_scale": scale,
            f"{name}_zero": zero,
            f"{name}_y": session.run(None, {"x": x})[0],
            f"{name}_alone": session.run(None, {"x": x[ALONE : ALONE + 1]})[0],
        }
    return stored


def quanto() -> dict[str, np.ndarray]:
    """Scale, zero point or shift [16, 256 / g], bytes of the packed codes and Q by "kind_bits_group"."""
    import torch
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8, quantize_weight

    W, stored = torch.from_numpy(inputs()[0]), {}
    scale = AbsmaxOptimizer()(W, qint8, axis=0)
    stored |= {"int8_scale": scale.numpy(), "int8_codes": quantize_weight(W, qint8, 0, scale)._data.numpy()}
    for bits, group in GROUPS:
        qtype = {2: qint2, 4: qint4}[bits]
        for kind in ("zero", "shift"):
            scale, shift = MaxOptimizer()(W, qtype, 0, group, zeropoint=kind == "zero")
            q = quantize_weight(W, qtype, 0, scale, shift, group, optimized=False)
            stored |= {
                f"{kind}_{bits}_{group}": shift.view(ROWS, -1).numpy(),
                f"{kind}_{bits}_{group}_scale": scale.view(ROWS, -1).numpy(),
                f"{kind}_{bits}_{group}_bytes": np.array(q._data._data.nbytes),
                f"{kind}_{bits}_{group}_Q": q.dequantize().numpy(),
            }
    return stored


def main() -> int:
    """Store each peer's arrays with versions, the seed and the hash of the inputs."""
    W, x = inputs()
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for make, given, packages in (
        (matmulnbits, {"W": W, "x": x}, ("onnx", "onnxruntime", "numpy")),
        (quanto, {"W": W}, ("optimum-quanto", "torch", "numpy")),
    ):
        versions = "; ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
        digest = hashlib.sha256(b"".join(array.tobytes() for array in given.values())).hexdigest()
        about = f"{versions}; seed {SEED}; sha256 of {', '.join(given)} {digest}"
        out = GOLDEN / f"{make.__name__}.npz"
        np.savez_compressed(out, about=np.array(about), **given, **make())
        print(about, f"{out.stat().st_size} bytes", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
