"""The checks of EDGE-LLM's bit widths and policy (quantization spec, section 26; arXiv 2406.15758)."""

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import LongTensor, Tensor, nn

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import LAYERS, random_ids, tiny

IMPLEMENTATION = {
    "edge_llm_bits": "refimpl.quantization.edge_llm:bit_widths",
    "edge_llm_policy": "refimpl.quantization.edge_llm:make_policy",
}
LOW, HIGH, TARGET = 3, 6, 0.3
SPARSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@check
def check_edge_llm_bits(bit_widths: Callable) -> None:
    """`bit_widths(sensitivity [L], low, high, n_low)`: `high` bits for blocks of more than average
    sensitivity, `low` for the others; with `n_low` given, `low` for so many least sensitive blocks."""
    generator = torch.Generator().manual_seed(0)
    # 7: the mean of seven 0.1 rounds to below 0.1; 12: block 10 comes before block 2 where names are sorted.
    for n in (1, 3, 7, 12, 32):
        s = torch.rand(n, generator=generator, dtype=torch.float64) ** 4  # few are above the mean
        exact = [Fraction(value) for value in s.tolist()]
        for low, high in ((4, 8), (LOW, HIGH), (4, 4)):
            what = f"{n} blocks, bits {low} and {high}"
            expected = [high if n * value > sum(exact) else low for value in exact]
            _require_bits(bit_widths(s, low, high), expected, f"{what}, by the mean")
            for n_low in {0, 1, n // 2, n}:
                least = sorted(range(n), key=exact.__getitem__)[:n_low]
                expected = [low if block in least else high for block in range(n)]
                _require_bits(bit_widths(s, low, high, n_low), expected, f"{what}, n_low {n_low}")
        even = torch.full((n,), 0.1, dtype=torch.float64)
        _require_bits(bit_widths(even, 4, 8), [4] * n, f"{n} equal blocks: none is above average")
        found = list(bit_widths(even, 4, 8, n // 2)).count(4)
        require(found == n // 2, f"{n} equal blocks, n_low {n // 2}: {found} of them have low bits")


@check
def check_edge_llm_policy(make_policy: Callable) -> None:
    """`make_policy(model, ids, sparsity=, low=, high=, n_low=)` -> object with `sparsity` and `bits` of each
    block: bits by the mean squared output error of rounding to `low`, sparsities by that of pruning."""
    ids = random_ids(8, 16)
    for family in ("gpt2", "llama"):
        model = _planted(family)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rounding, pruning = _errors(model, ids)
        order = rounding.argsort().tolist()
        for n_low in (None, 1, 2):
            policy = make_policy(model, ids, sparsity=TARGET, low=LOW, high=HIGH, n_low=n_low)
            least = order[:n_low] if n_low else (rounding <= rounding.mean()).nonzero().flatten().tolist()
            expected = [LOW if block in least else HIGH for block in range(LAYERS)]
            _require_bits(policy.bits, expected, f"{family}, n_low {n_low}")
        share = 1 - (pruning - pruning.min()) / (pruning.max() - pruning.min())
        ratio = torch.tensor(policy.sparsity, dtype=torch.float64)
        require_close(ratio, share / share.mean() * TARGET, 1e-3, f"{family}: sparsities by pruning errors")
        same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        require(same, f"{family}: measuring changed the model")


def _require_bits(found: object, expected: list[int], what: str) -> None:
    require(list(found) == expected, f"{what}: bits {list(found)} instead of {expected}")


def _planted(family: str) -> nn.Module:
    """A model in whose block 0 one weight of each row is an outlier, which hurts rounding more than pruning;
    block 1 has larger weights, block 2 larger inputs: by its own error the latter's weights look harmless."""
    model = tiny(family)
    with torch.no_grad():
        for layer, block in enumerate(_blocks(model)):
            for module in block.modules():
                if _is_linear(module) and layer == 0:
                    _dense(module)[:, 3] = 4
                elif _is_linear(module) and layer == 1:
                    module.weight *= 2
                elif layer == 2 and "Norm" in type(module).__name__:
                    for parameter in module.parameters():
                        parameter *= 4
    return model


def _errors(model: nn.Module, ids: LongTensor) -> tuple[Tensor, Tensor]:
    """Mean squared output error of each block's linear layers [L]: rounded to LOW bits, and pruned by
    SparseGPT, the mean over SPARSITIES."""
    inputs, hooks = {}, []
    for module in model.modules():
        keep = lambda layer, x: inputs.__setitem__(layer, x[0].flatten(0, -2).double())
        if _is_linear(module):
            hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    rounding, pruning = [], []
    for block in _blocks(model):
        rounded, pruned = [], []
        for module in filter(_is_linear, block.modules()):
            W, X = _dense(module).detach().double(), inputs[module]
            error = lambda Q, W=W, X=X: (X @ (W - Q).T).square().mean()
            step = (W.abs().amax(1, keepdim=True) / (2 ** (LOW - 1) - 1)).half().double()
            rounded.append(error((W / step).round() * step))
            pruned += map(error, _sparsegpt(W, 2 / len(X) * X.T @ X))
        rounding.append(torch.stack(rounded).mean())
        pruning.append(torch.stack(pruned).mean())
    return torch.stack(rounding), torch.stack(pruning)


def _sparsegpt(W: Tensor, H: Tensor) -> list[Tensor]:
    """W pruned to each of SPARSITIES; every column's price is 1 / [inverse of what is left of H]_jj. The
    layers are at most 128 wide, one block of SparseGPT's."""
    n = len(H)
    H = H + 0.01 * H.diagonal().mean() * torch.eye(n)
    inverse = [torch.linalg.inv(H[j:, j:])[0] for j in range(n)]
    order = (W.square() / torch.stack([row[0] for row in inverse])).flatten().argsort()
    pruned = []
    for sparsity in SPARSITIES:
        Q, gone = W.clone(), torch.zeros(W.numel(), dtype=torch.bool)
        gone[order[: int(W.numel() * sparsity)]] = True
        for j, mask in enumerate(gone.view(W.shape).T):
            lost = Q[:, j] * mask
            Q[:, j:] -= lost[:, None] * inverse[j] / inverse[j][0]
        pruned.append(Q.where(~gone.view(W.shape), 0))
    return pruned


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def _dense(module: nn.Module) -> Tensor:
    """The weight [d_out, d_in]; Conv1D stores [d_in, d_out]."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


def _blocks(model: nn.Module) -> nn.ModuleList:
    return model.model.layers if hasattr(model, "model") else model.transformer.h
