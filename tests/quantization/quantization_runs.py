"""What the tests of quantization share: token ids, a model of one block, logits, and a way through a file."""

from pathlib import Path

import torch
from torch import Tensor, nn

from refimpl.checks.tiny import random_ids, tiny
from refimpl.quantization import compressed_names, load_compressed, save_compressed

IDS = random_ids(6, 24)


def shallow(family: str, **changes: object) -> nn.Module:
    """`tiny` of one block: for what every block does alike. Block after block: `test_compressed_model`."""
    return tiny(family, **({"num_hidden_layers": 1} | changes))


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Without gradients, [B, T, V]."""
    with torch.no_grad():
        return model(ids).logits


def through_a_file(model: nn.Module, fresh: nn.Module, folder: Path, ids: Tensor = IDS) -> nn.Module:
    """`fresh`, of the same shape and other weights, after it loaded what `model` saved: now they agree."""
    before = logits(model, ids)
    assert not torch.equal(logits(fresh, ids), before)
    save_compressed(model, folder / "model.safetensors")
    assert load_compressed(fresh, folder / "model.safetensors") == compressed_names(model)
    assert torch.equal(logits(fresh, ids), before)
    return fresh
