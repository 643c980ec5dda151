"""AdamW with 8-bit states (8-bit optimizers, Dettmers et al. 2110.02861).

Adam keeps two moments of every parameter, 8 bytes in float32: the optimizer term of the survey's Eq. 1. Here
both are stored as codes of one byte with a float32 absmax for each block of 256, 2 · (1 + 4/256) = 2.03125
bytes per parameter. A step decodes them, computes in float32 as ever, and encodes the result again.

Simplified against the paper: blocks of 256 as in today's libraries (the paper has 2048), and of the stable
embedding layer only the rule about states (32 bits), not its initialisation and layer norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from refimpl.footprint.blockwise import MAPS, decode, encode, n_blocks
from refimpl.ledger import Ledger, of_tensors

__all__ = ["MAP_BYTES", "AdamW8bit", "state_bytes"]

MAP_BYTES = 2 * 256 * 4  # the signed map of m and the unsigned one of v, once per optimizer


def state_bytes(numel: int, *, bits: int = 8, block: int | None = 256, min_8bit: int = 4096) -> int:
    """Return the bytes of the two moments of a tensor of `numel` elements, without the maps (`MAP_BYTES`).

    8 bits: 2 · (numel + 4 · ceil(numel / block)); 32 bits, or fewer than `min_8bit` elements: 8 · numel.
    Raises ValueError for a value out of range.

    >>> state_bytes(2**20), state_bytes(2**20) / 2**20, state_bytes(768)
    (2129920, 2.03125, 6144)
    """
    _check_storage(bits, block, min_8bit)
    blocks = n_blocks(numel, block)
    return 2 * (numel + 4 * blocks) if _is_8bit(numel, bits, min_8bit) else 8 * numel


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments m and v rest in 8 bits between steps.

    Implements 2110.02861, section 2: block-wise dynamic quantisation, m signed and v unsigned, around AdamW

        m = β1 m + (1-β1) g;  v = β2 v + (1-β2) g²
        w = w (1 - ηλ) - η · m/(1-β1^t) / (sqrt(v/(1-β2^t)) + ε)

    The step uses m and v as computed; what it stores, and the next one starts from, is rounded to the map.

    Parameters
    ----------
    params : parameters, or groups of them as in every torch optimizer; float32, bfloat16 or float16. All
        settings below may differ by group. **Put embeddings in a group with `"bits": 32`**: a block of
        theirs mixes rows of frequent and rare tokens, and a rare row's v, far below the absmax, is rounded
        to 0 while its m is not, so that m / (sqrt(v) + ε) explodes.
    lr, betas, eps, weight_decay : η, (β1, β2), ε, λ; defaults of `torch.optim.AdamW`.
    bits : 8, or 32 for float32 states, which make the step that of `torch.optim.AdamW`.
    block : elements per absmax, default 256; None for one absmax per tensor (ablation).
    min_8bit : tensors with fewer elements (norms, biases) keep float32 states; default 4096.
    map : "dynamic", or "linear" (ablation).

    Besides the states a step holds 18 bytes per element of one tensor at a time (m, v, quotients and indices
    in 32 bits, codes of both), 4 more where the last block is cut short; 4 with float32 states.

    Raises TypeError for parameters of another dtype, ValueError for a setting out of range, and in `step`
    ValueError for a sparse gradient or one whose square is not finite, before anything has changed.

    Examples
    --------
    >>> layer = torch.nn.Linear(64, 64)
    >>> optimizer = AdamW8bit(layer.parameters(), lr=1e-2)
    >>> layer(torch.ones(1, 64)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.ledger().total() == state_bytes(64 * 64) + state_bytes(64) + MAP_BYTES == 8320 + 512 + 2048
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 8,
        block: int | None = 256,
        min_8bit: int = 4096,
        map: str = "dynamic",
    ) -> None:
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "bits": bits, "block": block, "min_8bit": min_8bit, "map": map,
        })  # fmt: skip
        self._maps: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._maps = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; raises as the constructor does."""
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                self.param_groups.pop()
                raise TypeError(f"params must be float32, bfloat16 or float16, got {p.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        moving = [(p, group) for p, group in pairs if p.grad is not None and p.numel()]
        for p, _ in moving:
            if p.grad.layout is not torch.strided:
                raise ValueError(f"gradients must be dense, got {p.grad.layout}")
            largest = torch.linalg.vector_norm(p.grad, torch.inf, dtype=torch.float32)  # makes no copy
            if not isinstance(largest, FakeTensor) and not largest.square().isfinite():
                raise ValueError("gradients and their squares must be finite in float32: codes hold no NaN")
        for p, group in moving:
            self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[p], p.grad.float()
        if not state:
            for name, (shape, dtype) in _layout(p, group).items():
                state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
            state["step"] = 0
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"]

        m, v = self._decoded(p, group)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))
        del denominator  # its bytes are needed for encoding
        if "m_codes" in state:
            for name, moment, table in zip("mv", (m, v), self._tables(p, group), strict=True):
                codes, absmax = encode(moment, table, group["block"])
                state[f"{name}_codes"].copy_(codes)
                state[f"{name}_absmax"].copy_(absmax)

    def _decoded(self, p: Tensor, group: dict[str, Any]) -> list[Tensor]:
        """m and v in float32: the states themselves where they are kept so, else a copy."""
        state = self.state[p]
        if "m" in state:
            return [state["m"], state["v"]]
        return [
            decode(state[f"{name}_codes"], state[f"{name}_absmax"], table, group["block"])
            for name, table in zip("mv", self._tables(p, group), strict=True)
        ]

    def _tables(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The maps of m and of v on the parameter's device."""
        key = group["map"], p.device
        if key not in self._maps:
            signed, unsigned = (MAPS[group["map"]](sign).to(p.device) for sign in (True, False))
            self._maps[key] = signed, unsigned
        return self._maps[key]

    def ledger(self) -> Ledger:
        """Count the states and maps as they are; none exist before the first step.

        The number of steps is a Python integer of each tensor and counts nothing.
        """
        named = []
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, (p, group) in enumerate(pairs):
            state = self.state.get(p, {})
            named += [(f"{i}.{name}", value) for name, value in state.items() if name != "step"]
            if "m_codes" in state:
                named += zip((f"{i}.m_map", f"{i}.v_map"), self._tables(p, group), strict=True)
        return of_tensors(named, "optim")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the states and settings that `state_dict()` gave, so that training resumes identically.

        Raises ValueError for states that do not fit these parameters, as those of another optimizer.
        """
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        groups = [group for group in state_dict["param_groups"] for _ in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for group in groups:
            _check_group(group)
        for i, p, group in zip(ids, parameters, groups, strict=False):  # torch refuses unequal lengths
            saved = state_dict["state"].get(i)
            if saved is None:
                continue
            expected = _layout(p, group)
            found = {name: (value.shape, value.dtype) for name, value in saved.items() if name != "step"}
            if found != expected:
                raise ValueError(f"state_dict: states of parameter {i} are {found}, expected {expected}")
        super().load_state_dict(state_dict)
        # torch has cast them to the parameter's dtype, which would turn codes into floats.
        for i, p in zip(ids, parameters, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if name != "step":
                    self.state[p][name] = value.to(p.device, copy=True)


def _is_8bit(numel: int, bits: int, min_8bit: int) -> bool:
    return bits == 8 and numel >= min_8bit


def _layout(p: Tensor, group: dict[str, Any]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of a parameter's states."""
    if not _is_8bit(p.numel(), group["bits"], group["min_8bit"]):
        return {"m": (p.shape, torch.float32), "v": (p.shape, torch.float32)}
    codes = p.shape, torch.uint8
    absmax = torch.Size([n_blocks(p.numel(), group["block"])]), torch.float32
    return {"m_codes": codes, "m_absmax": absmax, "v_codes": codes, "v_absmax": absmax}


def _check_storage(bits: int, block: int | None, min_8bit: int) -> None:
    if bits not in (8, 32):
        raise ValueError(f"bits must be 8 or 32, got {bits!r}")
    n_blocks(1, block)
    if isinstance(min_8bit, bool) or not isinstance(min_8bit, int) or min_8bit < 1:
        raise ValueError(f"min_8bit must be an integer >= 1, got {min_8bit!r}")


def _check_group(group: dict[str, Any]) -> None:
    missing = {"lr", "betas", "eps", "weight_decay", "bits", "block", "min_8bit", "map"} - group.keys()
    if missing:
        raise ValueError(f"param_groups lack {sorted(missing)}: not a state of AdamW8bit")
    for name in ("lr", "eps", "weight_decay"):
        if not (isinstance(group[name], int | float) and 0 <= group[name] < float("inf")):
            raise ValueError(f"{name} must be a finite number >= 0, got {group[name]!r}")
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    if group["map"] not in MAPS:
        raise ValueError(f"map must be one of {sorted(MAPS)}, got {group['map']!r}")
    _check_storage(group["bits"], group["block"], group["min_8bit"])
