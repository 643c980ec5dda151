"""The same scales, zero points and codes as torchao, and the same GPTQ as llm-compressor.

`data/quantization_golden.py` makes the arrays in environments of the peers and stores the inputs with them.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_scripts import load_script

from refimpl.quantization.gptq import GPTQ
from refimpl.quantization.grids import Grid, dequantize

HERE = Path(__file__).resolve().parent
golden = load_script("quantization_golden")


def arrays(peer):
    """What is stored, W and H as tensors."""
    stored = np.load(HERE / "golden" / f"{peer}.npz")
    digest = hashlib.sha256(stored["W"].tobytes() + stored["H"].tobytes()).hexdigest()
    assert digest in str(stored["about"])
    return stored, torch.from_numpy(stored["W"]), torch.from_numpy(stored["H"])


@pytest.mark.parametrize("group", golden.BLOCKS)
@pytest.mark.parametrize("bits", golden.BITS)
@pytest.mark.parametrize("scheme", golden.MAPPINGS)
def test_scales_zero_points_and_codes_equal_torchao(scheme, bits, group):
    (stored, W, _), name = arrays("torchao"), f"{scheme}_{bits}_{group}"
    q = Grid(bits, scheme, group, scale_dtype=torch.float32).quantize(W)
    assert np.array_equal(q.scale.numpy().ravel(), stored[f"{name}_scale"].ravel())
    zero = q.zero if isinstance(q.zero, int) else q.zero.numpy().ravel()
    assert (stored[f"{name}_zero"].ravel() == zero).all()
    theirs = torch.from_numpy(stored[f"{name}_codes"])
    # torchao multiplies by 1 / s where we divide by s, which differ where W / s is halfway between two codes:
    # in the full scheme, the largest weight of a group by definition.
    steps = W.reshape(*q.scale.shape, -1) / q.scale[..., None]
    halfway = ((steps - steps.floor() - 0.5).abs() < 1e-4).view(W.shape)
    assert torch.equal(q.codes[~halfway], theirs[~halfway])
    assert scheme == "full" or torch.equal(q.codes, theirs)
    reciprocal = (W.reshape(*q.scale.shape, -1) * (1 / q.scale)[..., None]).round()
    zero = q.zero if isinstance(q.zero, int) else q.zero[..., None].float()
    assert torch.equal((reciprocal + zero).clamp(0, 2**bits - 1).to(torch.uint8).view(W.shape), theirs)


@pytest.mark.parametrize("case", golden.GPTQ)
def test_gptq_equals_llm_compressor(case):
    stored, W, H = arrays("llmcompressor")
    bits, symmetric, group, act_order = golden.GPTQ[case]
    grid = ("full" if symmetric else "asymmetric", group or "row")
    q = GPTQ(bits, *grid, scale_dtype=torch.float32, act_order=act_order).solve(W, H)
    assert np.array_equal(q.scale.numpy(), stored[f"{case}_scale"])
    assert (stored[f"{case}_zero"] == (q.zero if symmetric else q.zero.numpy())).all()
    assert np.abs(dequantize(q).numpy() - stored[f"{case}_Q"]).max() < 1e-6
