"""The checks of packed products (quantization spec, section 3)."""

from collections.abc import Callable

import torch
from torch import Tensor

from refimpl.checks import check, require, require_close

IMPLEMENTATION = {
    "packed_int8": "refimpl.quantization.kernels:PackedInt8",
    "packed_int4": "refimpl.quantization.kernels:PackedInt4",
    "packed_w8a8": "refimpl.quantization.kernels:PackedW8A8",
}
ROWS, COLUMNS, TOKENS = 48, 128, (1, 5, 40)
BFLOAT16 = 1e-2


@check
def check_packed_int8(PackedInt8: Callable) -> None:
    """`PackedInt8((d_out, d_in), {"codes", "scale"}, bias, bits=8)`: zero point 128, a scale a row."""
    for rows, columns in ((ROWS, COLUMNS), (7, 40)):  # 40 is no length for torch's kernel
        generator = torch.Generator().manual_seed(rows)
        codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
        scale = (torch.rand(rows, 1, generator=generator) + 0.1).half()
        bias = torch.randn(rows, generator=generator)
        stored = {"codes": codes.flatten(), "scale": scale}
        layer = PackedInt8((rows, columns), stored, bias, bits=8)
        what = f"int8, {rows} x {columns}"
        W = (codes.float() - 128) * scale.float()
        _compare(layer, W, bias, stored, 1.25, generator, what)


@check
def check_packed_int4(PackedInt4: Callable) -> None:
    """`PackedInt4((d_out, d_in), {"codes", "scale", "zero"}, bias, bits=4)`: the even column's code is the
    high half of a byte; "zero", packed as well, is missing where it is 8."""
    for rows, group in ((ROWS, 32), (ROWS, 64), (ROWS, 128), (ROWS, 16), (10, 32)):  # two that blocks serve
        for asymmetric in (True, False):
            generator = torch.Generator().manual_seed(rows + group)
            n = COLUMNS // group
            codes = torch.randint(0, 16, (rows, COLUMNS), generator=generator, dtype=torch.uint8)
            scale = (torch.rand(rows, n, generator=generator) + 0.1).half()
            zero = torch.randint(0, 16, (rows, n), generator=generator, dtype=torch.uint8)
            stored = {"codes": _bytes(codes), "scale": scale}
            if asymmetric:
                stored["zero"] = _bytes(zero)
            steps = codes.float().view(rows, n, group) - (zero[..., None].float() if asymmetric else 8)
            W = (steps * scale[..., None].float()).view(rows, COLUMNS)
            layer = PackedInt4((rows, COLUMNS), stored, None, bits=4)
            what = f"int4, {rows} rows, groups of {group}, {'with' if asymmetric else 'no'} zero points"
            _compare(layer, W, None, stored, 1.5, generator, what)


@check
def check_packed_w8a8(PackedW8A8: Callable) -> None:
    """`PackedW8A8((d_out, d_in), {"codes", "scale"}, bias, activations="token")`: the product of integers."""
    generator = torch.Generator().manual_seed(0)
    for columns in (96, 1500):
        codes = torch.randint(-127, 128, (ROWS, columns), generator=generator, dtype=torch.int8)
        codes[0] = 127
        scale = torch.rand(ROWS, 1, generator=generator) + 0.1
        bias = torch.randn(ROWS, generator=generator)
        layer = PackedW8A8((ROWS, columns), {"codes": codes, "scale": scale}, bias, activations="token")
        for tokens in TOKENS:
            x = torch.randn(2, tokens, columns, generator=generator)
            x[0, 0] = 3.0  # every partial sum of row 0 is as large as it can be
            x *= torch.logspace(-2, 2, tokens)[:, None]
            s = x.abs().amax(-1, keepdim=True) / 127
            sums = (x / s).round().long() @ codes.long().T
            expected = (sums * s.double() * scale.flatten().double() + bias).float()
            what = f"w8a8, {tokens} tokens, d_in {columns}"
            require_close(layer(x), expected, 1e-6 * float(expected.abs().max()), f"{what}: y")
    kept = sum(t.nbytes for t in layer.buffers())
    require(kept <= codes.nbytes + scale.nbytes, f"w8a8: the buffers are {kept} bytes, more than is stored")


def _compare(
    layer: torch.nn.Module,
    W: Tensor,
    bias: Tensor | None,
    stored: dict[str, Tensor],
    share: float,
    generator: torch.Generator,
    what: str,
) -> None:
    """W^, the file's tensors, the memory, and products with few and many tokens."""
    require(torch.equal(layer.weight, W), f"{what}: W^ is not s (code - z) exactly")
    state = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
    for name, tensor in stored.items():
        same = name in state and torch.equal(state[name], tensor)
        require(same, f"{what}: the tensor {name} of the file is not what the layer was made of")
    require(state.keys() == stored.keys(), f"{what}: the file has {sorted(state)}, wanted {sorted(stored)}")
    kept, given = (sum(t.nbytes for t in ts) for ts in (layer.buffers(), stored.values()))
    require(kept <= share * given, f"{what}: {kept} bytes in memory for {given} stored")
    for tokens in TOKENS:
        x = torch.randn(2, tokens, W.shape[1], generator=generator) + 0.5
        expected = x @ W.T + (0 if bias is None else bias)
        size = float(expected.square().mean().sqrt())
        y = layer(x)
        require(y.dtype == x.dtype, f"{what}: y is {y.dtype} for x in {x.dtype}")
        require_close(y / size, expected / size, 4 * BFLOAT16, f"{what}, {tokens} tokens: y by its mean size")
        error = float((y - expected).square().mean().sqrt()) / size
        require(error < BFLOAT16, f"{what}, {tokens} tokens: y is off by {error:.3g} of its mean size")


def _bytes(codes: Tensor) -> Tensor:
    """Two codes a byte, the first one in the high half; a last half byte is zero."""
    flat = torch.cat((codes.flatten(), codes.new_zeros(codes.numel() % 2)))
    return flat[0::2] * 16 + flat[1::2]
