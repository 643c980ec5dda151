"""The check of head sensitivity (quantization spec, section 22; arXiv 1905.10650)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from refimpl.checks import check, require_close
from refimpl.checks.tiny import HEADS, LAYERS, random_ids, tiny

IMPLEMENTATION = {"head_sensitivity": "refimpl.quantization.pruning.head_sensitivity:head_importance"}


@check
def check_head_sensitivity(head_importance: Callable) -> None:
    """`head_importance(model, ids [N, T], heads=, normalise=, batch=)` -> [L, H]: the mean over rows of
    |Att_h' dL/dAtt_h|, with each row's mean loss L; `heads` False: closed, importance 0."""
    ids = random_ids(5, 9)
    for family in ("gpt2", "llama"):
        model = tiny(family)
        rows = torch.stack([_gradients(model, row[None]) for row in ids])
        expected = rows.abs().mean(0)
        for batch in (1, 3):
            found = head_importance(model, ids, normalise=False, batch=batch)
            require_close(found, expected, 1e-5, f"{family}, batch {batch}: importance")
        normalised = expected / expected.square().sum(1, keepdim=True).sqrt()
        require_close(
            head_importance(model, ids), normalised, 1e-4, f"{family}: importance over the layer's norm"
        )
    heads = torch.ones(LAYERS, HEADS).bool()
    heads[1, 1:3] = False
    with torch.no_grad():
        size = model.config.hidden_size // HEADS
        model.model.layers[1].self_attn.o_proj.weight[:, size : 3 * size] = 0
    rows = torch.stack([_gradients(model, row[None]) for row in ids])
    found = head_importance(tiny("llama"), ids, heads=heads, normalise=False)
    require_close(found, rows.abs().mean(0), 1e-5, "two heads are pruned already: importance")


def _gradients(model: nn.Module, ids: Tensor) -> Tensor:
    """Att_h' dL/dAtt_h, summed over positions and channels, for one row of ids: [L, H]."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        seen.append(inputs[0])

    gpt2 = hasattr(model, "transformer")
    outputs = (
        [block.attn.c_proj for block in model.transformer.h]
        if gpt2
        else [block.self_attn.o_proj for block in model.model.layers]
    )
    hooks = [module.register_forward_pre_hook(keep) for module in outputs]
    model(ids, labels=ids).loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return torch.stack([(z * z.grad).detach().unflatten(-1, (HEADS, -1)).sum((0, 1, 3)) for z in seen])
