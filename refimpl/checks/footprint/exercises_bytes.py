"""Checks for the exercises of "Where do the bytes go?": every reference is counted on tensors that exist."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from refimpl.checks import check, require
from refimpl.checks.tiny import random_ids, tiny


def _equal(got: object, right: int, diagnosis: str) -> None:
    require(isinstance(got, int), f"{diagnosis}: expected an int, got {type(got).__name__}")
    require(got == right, f"{diagnosis}: {got:,} bytes instead of {right:,}, {got - right:+,}")


@check
def check_adamw_bytes(adamw_bytes: Callable[[Sequence[tuple[int, ...]], int], int]) -> None:
    """`adamw_bytes(shapes, itemsize)`: what AdamW holds after its first step for parameters of these shapes.

    itemsize : bytes of one element of a parameter, 4 or 2.
    """
    for shapes in ([(8, 4)], [(8, 4), (4,)], [(3, 5), (5,), (2, 2), (1,)]):
        for dtype in (torch.float32, torch.bfloat16):
            weights = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
            optimizer = torch.optim.AdamW(weights)
            sum(w.sum() for w in weights).backward()
            optimizer.step()
            states = [s for held in optimizer.state.values() for s in held.values()]
            moments = sum(s.nbytes for s in states if s.ndim)
            got, what = adamw_bytes(shapes, dtype.itemsize), f"shapes {shapes}, {dtype.itemsize} bytes each"
            require(got != moments // 2, f"{what}: there are two moments, this counts one")
            require(got != moments, f"{what}: both moments are there, the step counts are missing")
            _equal(got, sum(s.nbytes for s in states), what)


@check
def check_storage_bytes(storage_bytes: Callable[[Sequence[Tensor]], int]) -> None:
    """`storage_bytes(tensors)`: the bytes that stay allocated because these tensors exist."""
    base = torch.ones(6, 10)  # 240 bytes
    _equal(storage_bytes([base]), 240, "one tensor [6, 10] in float32")
    _equal(storage_bytes([base, torch.ones(5)]), 260, "two tensors of their own")
    _equal(storage_bytes([base, base]), 240, "the same tensor twice")
    _equal(storage_bytes([base, base.view(60), base.t()]), 240, "views have no bytes of their own")
    _equal(storage_bytes([base[:1]]), 240, "one row of six keeps all six rows alive")
    _equal(storage_bytes([base[0], base[5]]), 240, "two disjoint rows of one storage")
    _equal(storage_bytes([torch.ones(1).expand(1000)]), 4, "an expanded element is stored once")
    _equal(storage_bytes([base.detach(), base.clone()]), 480, "detach() shares the storage, clone() does not")
    _equal(storage_bytes([torch.ones(7, dtype=torch.bfloat16)]), 14, "seven elements of two bytes")
    _equal(storage_bytes([]), 0, "no tensors")


@check
def check_llama_layer_bytes(llama_layer_bytes: Callable[..., int]) -> None:
    """`llama_layer_bytes(B, T, d, F, H, G, D)`: what autograd keeps of one LLaMA layer; float32, sdpa."""
    for batch, length, ffn, kv_heads in ((2, 8, 40, 2), (3, 12, 40, 4), (2, 16, 56, 1), (4, 8, 40, 2)):
        changes = {"intermediate_size": ffn, "num_key_value_heads": kv_heads}
        sizes = [_saved(tiny("llama", attention="sdpa", num_hidden_layers=layers, **changes), batch, length)
                 for layers in (1, 2)]  # fmt: skip
        got = llama_layer_bytes(batch, length, 32, ffn, 4, kv_heads, 8)
        what = f"B={batch}, T={length}, F={ffn}, H=4, G={kv_heads}"
        right = sizes[1] - sizes[0]
        require(got != right // 4, f"{what}: these are elements, an element of float32 has 4 bytes")
        _equal(got, right, what)


@check
def check_mixed_saving(mixed_saving: Callable[[int, int, int, int], tuple[float, float]]) -> None:
    """`mixed_saving(weight, grad, master, moments)`: (saved, promised) in bytes per parameter.

    Against Adam in float32: what a regime with these bytes per parameter saves in total, and what survey
    Eq. 2 promises, which depends on no regime.
    """
    for what, dtypes in {
        "float32": ("float32", "float32", None, "float32"),
        "16-bit weights and gradients, float32 master and moments": ("bfloat16", "bfloat16", "float32",
                                                                     "float32"),
        "float32 gradients beside 16-bit weights and a master": ("bfloat16", "float32", "float32", "float32"),
        "everything in 16 bits": ("bfloat16", "bfloat16", None, "bfloat16"),
        "no master, moments in float32": ("bfloat16", "bfloat16", None, "float32"),
    }.items():  # fmt: skip
        weight, grad, master, moment = (getattr(torch, d).itemsize if d else 0 for d in dtypes)
        got = mixed_saving(weight, grad, master, 2 * moment)
        require(isinstance(got, tuple) and len(got) == 2, f"{what}: return the pair (saved, promised)")
        held = [torch.empty(1, dtype=getattr(torch, d)) for d in (*dtypes, dtypes[3]) if d]
        saved = sum(t.nbytes for t in [torch.empty(1)] * 4) - sum(t.nbytes for t in held)
        require(got[0] == saved, f"{what}: {saved} bytes per parameter are saved in total, not {got[0]}")
        require(got[1] == 4, f"{what}: survey Eq. 2 promises half of 4 + 4 bytes, not {got[1]}")


def _saved(model: nn.Module, batch: int, length: int) -> int:
    """Bytes of the distinct storages that autograd packs, parameters and buffers left out."""
    free = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: list[Tensor] = []
    ids = random_ids(batch, length)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.append(t.detach()) or t.detach(), lambda t: t
    ):
        model(input_ids=ids, labels=ids, use_cache=False)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(size for address, size in storages.items() if address not in free)
