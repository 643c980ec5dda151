"""The check of the byte ledger (footprint spec, Part A and C1): hand-counted bytes of small tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refimpl.checks import check, require, require_error

IMPLEMENTATION = {"ledger": "refimpl.ledger:of_tensors"}


@check
def check_ledger(of_tensors: Callable) -> None:
    """`of_tensors(named, kind)` -> a ledger with `total(view=)`; payload and resident, counted once."""
    full = torch.zeros(100, 8)  # 3200 bytes
    other = torch.zeros(50, dtype=torch.bfloat16)  # 100 bytes
    meta = torch.empty(10, 4, device="meta"), torch.empty(5, 4, device="meta")
    codes = _Codes(torch.zeros(64, 4, dtype=torch.uint8), torch.zeros(4))
    cases = [
        ("two tensors", [full, other], 3300, 3300),
        ("one weight under two names (tied)", [full, other, full], 3300, 3300),
        ("a weight and its transpose", [full, full.t()], 3200, 3200),
        ("a slice: its bytes are payload, the storage it keeps alive is resident", [full[:10]], 320, 3200),
        ("two disjoint slices of one storage", [full[:10], full[50:60]], 640, 3200),
        ("two overlapping slices of one storage", [full[:10], full[5:15]], 480, 3200),
        ("a slice of columns, then the whole", [full[:, :2], full], 3200, 3200),
        ("the whole, then a slice", [full, full[3]], 3200, 3200),
        ("an expanded tensor repeats its elements", [torch.zeros(1, 8).expand(100, 8)], 32, 32),
        ("the same storage seen as another dtype", [other, other.view(torch.int16)], 100, 100),
        ("a parameter and its .data", [p := torch.nn.Parameter(torch.zeros(6)), p.data], 24, 24),
        ("two meta tensors (no addresses)", list(meta), 240, 240),
        ("a quantised subclass: its codes and scales, not the dtype it shows", [codes], 256 + 16, 256 + 16),
        ("a subclass and its inner codes", [codes, codes.codes], 256 + 16, 256 + 16),
        ("an empty tensor", [torch.zeros(0, 4)], 0, 0),
    ]
    for what, tensors, payload, resident in cases:
        ledger = of_tensors([(f"t{i}", t) for i, t in enumerate(tensors)], "weight")
        for view, expected in (("payload", payload), ("resident", resident)):
            got = ledger.total(view=view)
            require(got == expected, f"{what}: {view} is {got} bytes, not {expected}")
    ledger = of_tensors([("w", full)], "kv")
    require(ledger.by_kind() == {"kv": 3200}, f"by_kind() is {ledger.by_kind()}, not {{'kv': 3200}}")
    require_error(ValueError, lambda: of_tensors([("w", full)], "wieght"), "an unknown kind")
    require_error(TypeError, lambda: of_tensors([("w", [1.0])], "weight"), "a list in place of a tensor")


class _Codes(Tensor):
    """A weight that shows itself as float32 [64, 4] and holds one byte per element and a scale per column."""

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> "_Codes":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict, context: None, size: Any, stride: Any) -> "_Codes":
        return cls(inner["codes"], inner["scales"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} is not needed to count bytes")
