"""The checks of EDGE-LLM (quantization spec, section 26; arXiv 2406.15758)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from refimpl.checks import check, require, require_close
from refimpl.checks.tiny import LAYERS, random_ids, tiny

IMPLEMENTATION = {
    "edge_llm_ratios": "refimpl.quantization.edge_llm:pruning_ratios",
    "edge_llm": "refimpl.quantization.edge_llm_tuning:EarlyExits",
    "edge_llm_vote": "refimpl.quantization.edge_llm_tuning:vote",
}
LARGEST = 0.95


@check
def check_edge_llm_ratios(pruning_ratios: Callable) -> None:
    """`pruning_ratios(sensitivity [L], target)`: sparsities with that mean, at most 0.95, in proportion to
    1 - (s - min s) / (max s - min s) where they are not clipped."""
    generator = torch.Generator().manual_seed(0)
    for n in (2, 6, 32):
        for target in (0.0, 0.3, 0.5, 0.8, LARGEST):
            what = f"{n} blocks, target {target}"
            s = torch.rand(n, generator=generator, dtype=torch.float64).square()
            found = torch.tensor(pruning_ratios(s, target), dtype=torch.float64)
            require(found.shape == (n,), f"{what}: ratios of shape {list(found.shape)}")
            mean, most = float(found.mean()), float(found.max())
            require(abs(mean - target) < 1e-6, f"{what}: the mean of the ratios is {mean:.6g}")
            require(0 <= float(found.min()) and most <= LARGEST + 1e-9, f"{what}: a ratio of {most:.6g}")
            require_close(found, _water_level(s, target), 1e-6, f"{what}: the ratios")
        even = torch.tensor(pruning_ratios(torch.full((n,), 2.0), 0.4), dtype=torch.float64)
        require_close(even, torch.full_like(even, 0.4), 1e-9, f"{n} blocks of equal sensitivity")


def _water_level(s: Tensor, target: float) -> Tensor:
    """min(c w, 0.95) with the c that gives the mean, by bisection; the rest on blocks with w = 0."""
    w = 1 - (s - s.min()) / (s.max() - s.min())
    low, high = 0.0, 1e9
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if float((c * w).clamp(max=LARGEST).mean()) < target else (low, c)
    ratio = (high * w).clamp(max=LARGEST)
    none = w == 0
    ratio[none] = max(0.0, target * len(s) - float(ratio.sum())) / int(none.sum())
    return ratio


@check
def check_edge_llm(EarlyExits: Callable) -> None:
    """`EarlyExits(model, stride, rank=, alpha=, generator=)`: `exits(ids)` -> logits of each exit;
    `loss(ids, e)`, `hidden(ids, e)`, `trained(e)` -> parameters, `heads`."""
    ids = random_ids(3, 9)
    for family in ("llama", "gpt2"):
        exits = _disturbed(EarlyExits, family, 1)
        found = exits(ids)
        require(len(found) == LAYERS, f"{family}: {len(found)} exits instead of {LAYERS}")
        before = [one.clone() for one in found]
        for e in range(LAYERS):
            what = f"{family}, exit {e}"
            expected = _exit_logits(exits, family, ids, e)
            require_close(
                found[e], expected, 1e-3, f"{what}: logits of a window with factors on a plain model"
            )
            exits.zero_grad()
            loss = exits.loss(ids, e)
            wanted = nn.functional.cross_entropy(expected[:, :-1].transpose(1, 2), ids[:, 1:])
            require_close(loss, wanted, 1e-3, f"{what}: the loss")
            loss.backward()
            moved = {n for n, p in exits.named_parameters() if p.grad is not None and bool(p.grad.any())}
            mine = {n for n, p in exits.named_parameters() if any(p is q for q in exits.trained(e))}
            require(
                moved == mine, f"{what}: gradients and trained parameters differ: {sorted(moved ^ mine)[:3]}"
            )
            inside = [n for n in mine if ".lora." in n]
            block = f"model.model.layers.{e}." if family == "llama" else f"model.transformer.h.{e}."
            require(all(n.startswith(block) for n in inside) and inside, f"{what}: trains outside its window")
        after = exits(ids)
        require(all(map(torch.equal, before, after)), f"{family}: the exits changed without a step")
        full = _saved(_disturbed(EarlyExits, family, LAYERS), ids, 0)
        for e in range(LAYERS):
            share = _saved(exits, ids, e) / full
            require(share < 1.05 / LAYERS, f"{family}: exit {e} keeps {share:.2f} of the full activations")


@check
def check_edge_llm_vote(vote: Callable) -> None:
    """`vote(logits of each exit)`: for each token the largest probability that any exit gives it, over their
    sum."""
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) + 4 * e for e in range(3)]
    largest = torch.zeros(2, 5, 7, dtype=torch.float64)
    for one in logits:
        largest = torch.maximum(largest, one.exp() / one.exp().sum(-1, keepdim=True))
    expected = largest / largest.sum(-1, keepdim=True)
    require_close(vote(logits), expected, 1e-9, "three exits: the probabilities of the vote")
    require_close(vote(logits[:1]), logits[0].softmax(-1), 1e-9, "one exit: its own probabilities")


def _disturbed(EarlyExits: Callable, family: str, stride: int) -> nn.Module:
    """Exits whose factors B and heads are not those of the start."""
    generator = torch.Generator().manual_seed(0)
    exits = EarlyExits(tiny(family), stride, rank=2, alpha=4, generator=generator)
    with torch.no_grad():
        for name, p in exits.named_parameters():
            if name.endswith("lora.B") or name.startswith("heads."):
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return exits


def _exit_logits(exits: nn.Module, family: str, ids: Tensor, e: int) -> Tensor:
    """A plain model with the factors of block e merged, read behind block e through norm and head."""
    model, caught = tiny(family), []
    llama = family == "llama"
    block = model.model.layers[e] if llama else model.transformer.h[e]
    prefix = f"model.model.layers.{e}." if llama else f"model.transformer.h.{e}."
    factors = dict(exits.named_parameters())
    with torch.no_grad():
        for name, module in block.named_modules():
            if f"{prefix}{name}.lora.A" in factors:
                A, B = (factors[f"{prefix}{name}.lora.{AB}"] for AB in "AB")
                update = 4 / len(A) * B @ A
                module.weight += update if isinstance(module, nn.Linear) else update.T
        keep = lambda _, inputs, output: caught.append(output[0] if isinstance(output, tuple) else output)
        block.register_forward_hook(keep)
        model(ids)
        norm = model.model.norm if llama else model.transformer.ln_f
        return norm(caught[0]) @ exits.heads[e].weight.T


def _saved(exits: nn.Module, ids: Tensor, e: int) -> int:
    """Bytes that autograd keeps for the blocks in front of exit e, parameters not counted."""
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in exits.parameters()}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        exits.hidden(ids, e)
    return sum(storages.values())
